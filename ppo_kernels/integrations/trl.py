"""The functions of ``trl.trainer.utils`` (TRL 1.16), with its names and arguments.

import trl.trainer.grpo_trainer as grpo_trainer
from ppo_kernels.integrations import trl as fused

grpo_trainer.selective_log_softmax = fused.selective_log_softmax
"""

from __future__ import annotations

from torch import Tensor

from ppo_kernels.ops.token_logprobs import selective_log_softmax, token_logprobs

__all__ = ["selective_log_softmax", "selective_log_softmax_and_entropy"]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy; the entropy carries a gradient only with ``entropy_requires_grad``."""
    if entropy_requires_grad:
        return token_logprobs(logits, index, temperature=temperature, mask=row_mask, entropy=True)
    return token_logprobs(logits, index, temperature=temperature, mask=row_mask, entropy="detached")
