"""Soft clipping: a block of elements per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton._launch import launch, mask_bytes, require
from ppo_kernels.triton._math import load_valid

BLOCK = 1024


@triton.jit
def _soft_clip(x, mask, y, total, cap: tl.float64, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = load_valid(mask, t, t < total)
    value = tl.load(x + t, mask=t < total, other=0.0)
    clipped = value / (1.0 + tl.abs(value) / tl.cast(cap, value.dtype))
    tl.store(y + t, tl.where(valid, clipped, 0.0), mask=t < total)


def soft_clip(x: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    require(x.is_contiguous() and (mask is None or mask.is_contiguous()), "expected contiguous tensors")
    y = torch.empty_like(x)
    programs = triton.cdiv(x.numel(), BLOCK)
    launch(_soft_clip, programs, x, mask_bytes(mask, x), y, x.numel(), cap, BLOCK=BLOCK, num_warps=8)
    return y
