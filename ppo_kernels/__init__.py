"""Fused kernels for the arithmetic of RLHF: log-probabilities, KL rewards, GAE, whitening and the clipped PPO losses.

Every function takes ``impl="auto"``: a compiled kernel where one serves the tensors, the eager reference elsewhere.
``status()`` counts which one ran, and ``python -m ppo_kernels.env`` reports what is installed.
"""

from __future__ import annotations

import os as _os

from ppo_kernels._process import refuse_another_interpreter as _refuse_another_interpreter

__version__ = "0.2.0"

__all__: list[str] = [
    "Experience",
    "GroupStats",
    "ImportanceStats",
    "LogprobExtras",
    "P3OStats",
    "PolicyStats",
    "ValueStats",
    "aggregation_weights",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_rewards",
    "linear_policy_loss",
    "linear_token_logprobs",
    "merge",
    "moments",
    "p3o_loss",
    "partial",
    "policy_loss",
    "prepare_experience",
    "status",
    "token_logprobs",
    "value_loss",
    "whiten",
]

_refuse_another_interpreter()
try:
    import torch as _torch

    _torch.Tensor  # noqa: B018  # a folder named torch has none
except (Exception, SystemExit) as _error:  # `python -m ppo_kernels.env` must still be able to say so
    _torch_error = _error

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"ppo_kernels.{name} needs PyTorch >= 2.11, which cannot be imported: {_torch_error}")
        raise AttributeError(f"module 'ppo_kernels' has no attribute {name!r}")

else:
    from ppo_kernels._types import (
        Experience,
        GroupStats,
        ImportanceStats,
        LogprobExtras,
        P3OStats,
        PolicyStats,
        ValueStats,
    )
    from ppo_kernels.backends import log_choice as _log_choice
    from ppo_kernels.backends import status
    from ppo_kernels.ops.aggregation_weights import aggregation_weights
    from ppo_kernels.ops.gae import gae
    from ppo_kernels.ops.group_advantages import group_advantages
    from ppo_kernels.ops.importance_weights import importance_weights
    from ppo_kernels.ops.kl_rewards import kl_rewards
    from ppo_kernels.ops.linear_policy_loss import linear_policy_loss
    from ppo_kernels.ops.linear_token_logprobs import linear_token_logprobs
    from ppo_kernels.ops.p3o_loss import p3o_loss
    from ppo_kernels.ops.partial import merge, partial
    from ppo_kernels.ops.policy_loss import policy_loss
    from ppo_kernels.ops.prepare_experience import prepare_experience
    from ppo_kernels.ops.token_logprobs import token_logprobs
    from ppo_kernels.ops.value_loss import value_loss
    from ppo_kernels.ops.whiten import moments, whiten

    _log_choice()
    if "PPO_KERNELS_PATCH" in _os.environ:
        from ppo_kernels.integrations import from_environment as _patch_trainers

        _patch_trainers()
