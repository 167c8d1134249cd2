"""Every op in eager PyTorch: the specification, and what runs where no kernel does.

Each function is the public one of the same name without its argument checks, differentiable by autograd.
Padded ``[B, T]`` and packed ``[N]`` share one path: tokens are flattened, and ``Rows`` holds the row of each.
A masked token is replaced before any arithmetic, so that what lies under a mask reaches neither a value nor a
gradient.
"""

from ppo_kernels.reference.aggregation_weights import aggregation_weights
from ppo_kernels.reference.gae import gae
from ppo_kernels.reference.group_advantages import group_advantages
from ppo_kernels.reference.kl_rewards import kl_rewards
from ppo_kernels.reference.p3o_loss import p3o_loss
from ppo_kernels.reference.policy_loss import policy_loss
from ppo_kernels.reference.token_logprobs import token_logprobs
from ppo_kernels.reference.value_loss import value_loss
from ppo_kernels.reference.whiten import merge_moments, moments, whiten

__all__ = [
    "aggregation_weights",
    "gae",
    "group_advantages",
    "kl_rewards",
    "merge_moments",
    "moments",
    "p3o_loss",
    "policy_loss",
    "token_logprobs",
    "value_loss",
    "whiten",
]
