"""TRL: its functions of logits, and the fused head that GRPO, RLOO, DPO, KTO and SFT share.

The functions here have TRL's names and arguments and can be called by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels.integrations._adapter import Adapter
from ppo_kernels.integrations._linear_head import LinearLogprobs
from ppo_kernels.integrations._shared import entropy_of
from ppo_kernels.integrations._target import NotCoveredError, Target
from ppo_kernels.ops.token_logprobs import token_logprobs

__all__ = [
    "ADAPTER",
    "apply",
    "entropy_from_logits",
    "revert",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "status",
]


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of ``index``, ``[...]`` or ``[..., K]`` for K labels a row; float32, also of bfloat16 logits.

    ``row_mask`` is ``[...]`` or of the shape of ``index``.
    """
    return token_logprobs(logits, index, temperature=temperature, mask=row_mask)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy; the entropy carries a gradient only with ``entropy_requires_grad``.

    The third argument is that of ``trl.trainer.utils``; the function of this name in ``trl.kernels`` has the
    temperature there.
    """
    if not isinstance(entropy_requires_grad, bool):
        raise TypeError(
            f"selective_log_softmax_and_entropy: entropy_requires_grad must be a bool, got {entropy_requires_grad!r};"
            " pass a temperature by name"
        )
    if entropy_requires_grad:
        return token_logprobs(logits, index, temperature=temperature, mask=row_mask, entropy=True)
    return token_logprobs(logits, index, temperature=temperature, mask=row_mask, entropy="detached")


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of each row, differentiable. One pass, whatever ``chunk_size`` is."""
    return entropy_of(logits)


def _chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor | None, ...]:
    if final_logit_softcapping is not None:
        raise NotCoveredError("logits with a soft cap")
    if "log_sum_sq_probs" in outputs:
        raise NotCoveredError("log_sum_sq_probs")
    if not logit_scale > 0:
        raise NotCoveredError("a logit_scale that is not above 0")
    if hasattr(weight, "ds_id"):
        raise NotCoveredError("a weight that ZeRO-3 shards")
    if torch.compiler.is_compiling():
        raise NotCoveredError("a compiled graph")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return LinearLogprobs.apply(hidden, weight, bias, targets, temperature / logit_scale, dtype, outputs)


def _targets() -> list[Target]:
    utils = "trl.trainer.utils"
    forward = (
        "(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,"
        " outputs=OPTIONAL_OUTPUTS)"
    )
    return [
        Target(
            "trl.kernels.chunked_logprob",
            "ChunkedLogProbFunction.apply",
            None,
            _chunked_logprobs,
            "the fused head of GRPO, RLOO, DPO, KTO and SFT: log-probabilities, entropy, mean_logits and is_top1",
            reads={"ChunkedLogProbFunction.forward": forward},
        ),
        Target(
            utils,
            "selective_log_softmax",
            "(logits, index, temperature=1.0, row_mask=None)",
            selective_log_softmax,
            "log-probabilities in SDPO, SDFT, A2PO, CPO and ORPO",
        ),
        Target(
            utils,
            "selective_log_softmax_and_entropy",
            "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
            selective_log_softmax_and_entropy,
            "log-probabilities and entropy in TPO",
        ),
        Target(
            utils,
            "entropy_from_logits",
            "(logits, chunk_size=128)",
            entropy_from_logits,
            "the entropy of logits",
        ),
    ]


ADAPTER = Adapter("trl", "trl", ("1.16.0",), _targets())
apply: Any = ADAPTER.apply
revert: Any = ADAPTER.revert
status: Any = ADAPTER.status
