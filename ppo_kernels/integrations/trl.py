"""TRL: its functions of logits, and the fused head that GRPO, RLOO, DPO, KTO and SFT share.

The functions here have TRL's names and arguments and can be called by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels.integrations._adapter import Adapter
from ppo_kernels.integrations._shared import entropy_of, operands
from ppo_kernels.integrations._target import NotCoveredError, Target
from ppo_kernels.ops.linear_token_logprobs import linear_token_logprobs
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


#: Logits that exist at a time for is_top1.
TILE = 1 << 25


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
    outputs: tuple[str, ...] = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1"),  # OPTIONAL_OUTPUTS
) -> tuple[Tensor | None, ...]:
    if "log_sum_sq_probs" in outputs:
        raise NotCoveredError("log_sum_sq_probs")
    if "mean_logits" in outputs and final_logit_softcapping is not None:
        raise NotCoveredError("mean_logits with a soft cap")
    if hasattr(weight, "ds_id"):
        raise NotCoveredError("a weight that ZeRO-3 shards")
    if torch.compiler.is_compiling():
        raise NotCoveredError("a compiled graph")
    hidden, weight, bias = operands(hidden, weight, bias)
    found = linear_token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        entropy="entropy" in outputs,
    )
    logprobs, entropy = found if isinstance(found, tuple) else (found, None)
    mean = top1 = None
    with torch.no_grad():
        if "mean_logits" in outputs:  # the mean of a linear map is the map's mean
            of_bias = 0.0 if bias is None else bias.mean(dtype=torch.float32)
            of_weight = weight.mean(0, dtype=torch.float32)
            mean = (hidden.float() @ of_weight + of_bias) * (logit_scale / temperature)
        if "is_top1" in outputs:
            top1 = _is_top1(hidden, weight, bias, targets)
    return logprobs, entropy, None, mean, top1


def _is_top1(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Whether no token has a higher logit, and none before it as high a one; a product of its own, tile by tile."""
    parts, weight, bias = [], weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    for rows in hidden.split(max(1, TILE // weight.size(0))):
        parts.append(torch.nn.functional.linear(rows, weight, bias).argmax(-1))
    return (torch.cat(parts) if parts else targets.new_empty(0)) == targets


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
