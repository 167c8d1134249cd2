"""What the launchers share: the call that launches a kernel, and inputs in the form that kernels take.

The public functions have already checked their arguments, but compiled graphs and C++ callers come without them: the
device is checked where the op is registered, dtype and shape here, and kernels clamp what they take for an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ppo_kernels._registered import require


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


class Rows(NamedTuple):
    """The rows of a token tensor: the arguments of ``_math.row_span``, and how many there are."""

    batch: int
    length: int  # of every row if padded, 0 if packed
    starts: Tensor | None  # [B+1] if packed


def token_rows(tokens: Tensor, cu_seqlens: Tensor | None) -> Rows:
    """The rows of padded ``[B, T]`` or packed ``[N]`` tokens.

    cu_seqlens is forced into order and into [0, N], so that no value can make two rows overlap or leave the tensor.
    """
    require_computed("the tokens", tokens)
    require_unit_stride("the tokens", tokens)
    shape = list(tokens.shape)
    if cu_seqlens is None:
        require(tokens.dim() == 2, f"the tokens must be [B, T], or [N] with cu_seqlens; got the shape {shape}")
        return Rows(tokens.size(0), tokens.size(1), None)
    require(
        tokens.dim() == 1 and cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1,
        f"with cu_seqlens [B+1] the tokens must be [N]; got the shapes {list(cu_seqlens.shape)} and {shape}",
    )
    require_dtype("cu_seqlens", cu_seqlens, torch.int64)
    return Rows(cu_seqlens.numel() - 1, 0, cu_seqlens.clamp(0, tokens.numel()).cummax(0).values)


def require_computed(name: str, x: Tensor) -> None:
    require(x.dtype in (torch.float32, torch.float64), f"{name} must be float32 or float64, got {x.dtype}")


def require_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    require(x.dtype in allowed, f"{name} must be {' or '.join(map(str, allowed))}, got {x.dtype}")


def require_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    require(tuple(x.shape) == tuple(shape), f"{name} must have the shape {list(shape)}, got {list(x.shape)}")


def require_unit_stride(name: str, x: Tensor) -> None:
    require(
        x.dim() == 0 or x.size(-1) <= 1 or x.stride(-1) == 1, f"{name} must have a last stride of 1, got {x.stride()}"
    )


def require_code(name: str, code: int, count: int) -> None:
    require(0 <= code < count, f"{name} must be from 0 to {count - 1}, got {code}")


def require_like(name: str, x: Tensor, tokens: Tensor) -> None:
    """``x`` is a further token tensor of the op: same shape and dtype."""
    require_dtype(name, x, tokens.dtype)
    require_shape(name, x, tokens.shape)
    require_unit_stride(name, x)


def mask_bytes(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The mask as bytes."""
    if mask is None:
        return None
    require_dtype("mask", mask, torch.bool, torch.uint8)
    require_shape("mask", mask, tokens.shape)
    require_unit_stride("mask", mask)
    return mask.view(torch.uint8)


def as_vector(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A tensor of this shape, contiguous: kernels read it through a pointer alone."""
    if x is None:
        return None
    require_dtype(name, x, dtype)
    require_shape(name, x, shape)
    return x.contiguous()


def row_stride(x: Tensor | None) -> int:
    """Elements from one row of a token tensor to the next, or from one packed token to the next."""
    return 0 if x is None else x.stride(0)


def in_units(**sizes: int) -> dict[str, Any]:
    """Sizes as kernels take them: in units of 4 elements where all are multiples of it, else of 1, with that UNIT.

    What is a multiple of 4 is loaded by 16 bytes, and one binary serves all sizes of a unit.
    """
    unit = 1 if any(size % 4 for size in sizes.values()) else 4
    return {"UNIT": unit} | {name: size // unit for name, size in sizes.items()}


def row_sizes(rows: Rows, **tensors: Tensor | None) -> dict[str, Any]:
    """Strides (``x_stride`` of a tensor x) and length as ``row_span`` takes them. Packed rows begin anywhere."""
    strides = {f"{name}_stride": row_stride(x) for name, x in tensors.items()}
    if rows.starts is not None:
        return strides | {"length": 0, "UNIT": 1}
    return in_units(**strides, length=rows.length)


def new_tokens(tokens: Tensor, rows: Rows) -> Tensor:
    """A token tensor to write. Padded rows cover it; packed ones may leave tokens without a row, which are 0."""
    make = torch.empty if rows.starts is None else torch.zeros
    return make(tokens.shape, dtype=tokens.dtype, device=tokens.device)


def block_for(length: int, most: int, least: int) -> int:
    """The least power of two that covers ``length``, within limits, so that variants and idle lanes are few."""
    return min(most, max(least, triton.next_power_of_2(length)))
