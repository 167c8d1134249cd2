"""What the launchers share: the call that launches a kernel, and inputs in the form that kernels take.

The public functions have already checked their arguments, with messages that explain; the checks here only keep a
direct call of a registered op from reading out of bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


def launch(
    kernel: triton.JITFunction,
    programs: int,
    *args: object,
    num_warps: int,
    fp_fusion: bool = False,
    **constexprs: object,
) -> None:
    """Run ``programs`` programs along the first grid axis, the only one whose size may exceed 65535.

    ``fp_fusion`` lets the compiler contract ``a * b + c``. Every launch sets it, because Triton's default changes from
    version to version. It is off by default, so that a formula gives the same bits wherever it is inlined.
    """
    if programs > 0:
        kernel[(programs,)](*args, **constexprs, num_warps=num_warps, enable_fp_fusion=fp_fusion)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


class Rows(NamedTuple):
    """The rows of a token tensor: the arguments of ``_math.row_span``, and how many there are."""

    batch: int
    length: int  # of every row if padded, 0 if packed
    starts: Tensor | None  # [B+1] if packed


def token_rows(tokens: Tensor, cu_seqlens: Tensor | None) -> Rows:
    """The rows of padded ``[B, T]`` or packed ``[N]`` tokens.

    cu_seqlens is forced into order and into [0, N], so that no value can make two rows overlap or leave the tensor.
    """
    require(tokens.dtype in (torch.float32, torch.float64), "expected float32 or float64")
    require_unit_stride(tokens)
    if cu_seqlens is None:
        require(tokens.dim() == 2, "expected [B, T]")
        return Rows(tokens.size(0), tokens.size(1), None)
    require(tokens.dim() == 1 and cu_seqlens.dim() == 1, "expected [N] and cu_seqlens [B+1]")
    require(cu_seqlens.numel() >= 1 and cu_seqlens.dtype == torch.int64, "expected int64 cu_seqlens [B+1]")
    return Rows(cu_seqlens.numel() - 1, 0, cu_seqlens.clamp(0, tokens.numel()).cummax(0).values)


def require_unit_stride(x: Tensor) -> None:
    require(x.dim() == 0 or x.size(-1) <= 1 or x.stride(-1) == 1, "the last dimension must be contiguous")


def require_like(x: Tensor, tokens: Tensor) -> None:
    """``x`` is a further token tensor of the op: same shape, dtype and device."""
    require(x.shape == tokens.shape, f"expected the shape {tuple(tokens.shape)}, got {tuple(x.shape)}")
    require(x.dtype == tokens.dtype and x.device == tokens.device, "an input has another dtype or device")
    require_unit_stride(x)


def mask_bytes(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The mask as bytes."""
    if mask is None:
        return None
    require(mask.dtype in (torch.bool, torch.uint8), "masks are bytes")
    require(mask.shape == tokens.shape and mask.device == tokens.device, "the mask has another shape or device")
    require_unit_stride(mask)
    return mask.view(torch.uint8)


def as_vector(x: Tensor | None, count: int, dtype: torch.dtype, tokens: Tensor) -> Tensor | None:
    """A tensor of ``count`` elements, contiguous: kernels read it through a pointer alone."""
    if x is None:
        return None
    require(x.dtype == dtype and x.device == tokens.device, "an input has another dtype or device")
    require(x.numel() == count, f"expected {count} elements, got {x.numel()}")
    return x.contiguous()


def row_stride(x: Tensor | None) -> int:
    """Elements from one row of a token tensor to the next, or from one packed token to the next."""
    return 0 if x is None else x.stride(0)


def new_tokens(tokens: Tensor, rows: Rows) -> Tensor:
    """A token tensor to write. Padded rows cover it; packed ones may leave tokens without a row, which are 0."""
    make = torch.empty if rows.starts is None else torch.zeros
    return make(tokens.shape, dtype=tokens.dtype, device=tokens.device)


def block_for(length: int, most: int, least: int) -> int:
    """The least power of two that covers ``length``, within limits, so that variants and idle lanes are few."""
    return min(most, max(least, triton.next_power_of_2(length)))
