"""What autograd asks of a loss: its gradient, scaled by what the launch reads on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton._launch import as_vector, launch, require_computed

BLOCK = 1024


@triton.jit(do_not_specialize=("total",))
def _scale(grad, grad_loss, inv_normalizer, out, total, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    n = begin + tl.arange(0, BLOCK)
    scale = tl.load(grad_loss) * tl.load(inv_normalizer)
    if begin + BLOCK <= total:  # a mask would prevent 16-byte loads
        tl.store(out + n, tl.load(grad + n) * scale)
    else:
        tl.store(out + n, tl.load(grad + n, mask=n < total) * scale, mask=n < total)


def loss_backward(grad: Tensor, grad_loss: Tensor, inv_normalizer: Tensor) -> Tensor:
    """``grad * grad_loss * inv_normalizer``."""
    require_computed("grad", grad)
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    scale = as_vector("grad_loss", grad_loss, (), grad.dtype)
    inverse = as_vector("inv_normalizer", inv_normalizer, (), grad.dtype)
    launch(
        _scale, triton.cdiv(grad.numel(), BLOCK),
        grad=grad.contiguous(), grad_loss=scale, inv_normalizer=inverse, out=out, total=grad.numel(),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out
