"""What the losses share: chunks of tokens, the rows that own them, and partial sums.

The first launch has one program per chunk, which writes the gradient and a line of partial sums in float64. The
second launch, of one program, adds the lines in a fixed order and writes the loss and its statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton._launch import Rows, as_vector, launch, require_dtype, require_shape, row_stride

#: Lines that the second launch reads at a time: with 8 warps, 16 or 32 numbers a lane.
FOLD = 512


def chunk_for(tokens: int) -> tuple[int, int]:
    """Tokens per program, and its warps. One warp needs no barrier for its sums; more keep the number of lines small.

    8 tokens a lane are two 16-byte loads of each input; 16 would take up to 255 registers.
    """
    return (256, 1) if tokens <= 2**18 else (2048, 8)


def columns(*names: str) -> list[tl.constexpr]:
    """Where a line of partial sums has each of these, and as the last its length: Triton's blocks are powers of two."""
    return [*map(tl.constexpr, range(len(names))), tl.constexpr(triton.next_power_of_2(len(names)))]


def row_arguments(rows: Rows, like: Tensor, row_weight: Tensor | None) -> dict[str, Any]:
    """The arguments by which a kernel finds rows."""
    weights = as_vector("row_weight", row_weight, (rows.batch,), like.dtype)
    sizes = {"N": like.numel(), "T": rows.length, "B": rows.batch}
    return {"row_weight_ptr": weights, "bounds_ptr": rows.starts} | sizes


def token_arguments(**tensors: Tensor | None) -> dict[str, Any]:
    """``x_ptr`` and ``x_stride`` of each tensor x that ``load_tokens`` reads."""
    pointers = {f"{name}_ptr": x for name, x in tensors.items()}
    return pointers | {f"{name}_stride": row_stride(x) for name, x in tensors.items()}


def is_flat(*tensors: Tensor | None) -> bool:
    """Whether an index into the tokens is an offset in each of the tensors."""
    return all(x is None or x.is_contiguous() for x in tensors)


def is_per_row(name: str, x: Tensor | None, tokens: Tensor, rows: Rows) -> bool:
    """Whether ``x`` holds one value per row, ``[B, 1]``, and not one per token."""
    if x is None or x.dim() != 2 or x.size(1) != 1 or x.shape == tokens.shape:
        return False
    require_dtype(name, x, tokens.dtype)
    require_shape(name, x, (rows.batch, 1))
    return True


class Outputs(NamedTuple):
    loss: Tensor
    stats: Tensor
    grad: Tensor
    inv_normalizer: Tensor


def new_outputs(like: Tensor, stats: int, grad: bool) -> Outputs:
    shapes = ((), (stats,), like.shape if grad else (0,), ())
    return Outputs(*(torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes))


def new_parts(like: Tensor, chunk: int, columns: int) -> Tensor:
    """One line of partial sums per chunk."""
    return torch.empty(triton.cdiv(like.numel(), chunk), columns, dtype=torch.float64, device=like.device)


def launch_fold(
    kernel: triton.JITFunction, parts: Tensor, normalizer: Tensor | None, out: Outputs, **constants: Any
) -> None:
    normalizer = as_vector("normalizer", normalizer, (), torch.float64)
    launch(
        kernel, 1,
        parts_ptr=parts, normalizer_ptr=normalizer, loss_ptr=out.loss, stats_ptr=out.stats,
        inverse_ptr=out.inv_normalizer, P=parts.size(0),
        FOLD=FOLD, num_warps=8, **constants,
    )  # fmt: skip


@triton.jit
def locate(first, N, T, bounds_ptr, B, NEEDS_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens of the chunk at ``first``: flat index, row, column, and whether a row owns them."""
    lane = tl.arange(0, CHUNK)
    n = first + lane
    owned = n < N
    row = tl.zeros([CHUNK], tl.int64)
    column = row
    if bounds_ptr is None:
        if NEEDS_ROWS:
            # One division in 64 bits per chunk; those per token are in T's own width, nearly always 32 bits.
            above = first // T
            local = (first - above * T + lane).to(tl.uint32 if T.dtype == tl.int32 else tl.int64)
            row = above + (local // T.to(local.dtype)).to(tl.int64)
            column = (local % T.to(local.dtype)).to(tl.int64)
    else:
        owned = owned & (n >= tl.load(bounds_ptr)) & (n < tl.load(bounds_ptr + B))
        if NEEDS_ROWS:
            low, high = row, row + B
            left = B
            while left > 0:
                middle = (low + high) // 2
                right = (low < high) & (tl.load(bounds_ptr + 1 + middle, mask=owned & (low < high), other=0) <= n)
                low = tl.where(right, middle + 1, low)
                high = tl.where(right, high, middle)
                left = left // 2
            row = low
    return n, row, column, owned


@triton.jit
def load_tokens(ptr, n, row, column, stride, inside, whole, PER_ROW: tl.constexpr, FLAT: tl.constexpr):
    """Values of a token or a row tensor. A mask would prevent 16-byte loads, so a whole chunk has none."""
    if PER_ROW:
        x = tl.load(ptr + row * stride, mask=inside, other=0)
    elif FLAT:
        if whole:
            x = tl.load(ptr + n)
        else:
            x = tl.load(ptr + n, mask=inside, other=0)
    else:
        x = tl.load(ptr + row * stride + column, mask=inside, other=0)
    return x


@triton.jit
def store_tokens(ptr, n, x, inside, whole):
    if whole:
        tl.store(ptr + n, x)
    else:
        tl.store(ptr + n, x, mask=inside)


@triton.jit
def store_weights(line, weight, WEIGHT: tl.constexpr, SQUARES: tl.constexpr):
    """The sums of weights and of their squares, which may be beyond what float32 holds."""
    peak = tl.max(tl.abs(weight), 0)
    unit = weight / tl.where(peak == 0.0, 1.0, peak)
    peak = peak.to(tl.float64)
    tl.store(line + WEIGHT, tl.sum(unit, 0).to(tl.float64) * peak)
    tl.store(line + SQUARES, tl.sum(unit * unit, 0).to(tl.float64) * peak * peak)


@triton.jit
def fold_sums(parts_ptr, P, q, USED: tl.constexpr, FOLD: tl.constexpr, Q: tl.constexpr):
    """Sum and maximum of each column of the lines ``[P, Q]``, as ``[Q]``. Columns from USED on were not written."""
    sums = tl.zeros([FOLD, Q], tl.float64)
    peak = tl.zeros([FOLD, Q], tl.float64)
    for begin in range(0, P, FOLD):
        line = begin + tl.arange(0, FOLD)[:, None]
        x = tl.load(parts_ptr + line * Q + q[None, :], mask=(line < P) & (q < USED)[None, :], other=0.0)
        sums += x
        peak = tl.where(x > peak, x, peak)
    return tl.sum(sums, 0), tl.max(peak, 0)


@triton.jit
def fold_m2(
    parts_ptr, P, mean, COUNT: tl.constexpr, SUM: tl.constexpr, M2: tl.constexpr, FOLD: tl.constexpr, Q: tl.constexpr
):
    """Squared deviations from ``mean``, from each line's count, sum and squared deviations from its own mean."""
    total = tl.zeros([FOLD], tl.float64)
    for begin in range(0, P, FOLD):
        line = begin + tl.arange(0, FOLD)
        here = parts_ptr + line * Q
        n = tl.load(here + COUNT, mask=line < P, other=0.0)
        step = tl.load(here + SUM, mask=line < P, other=0.0) / tl.where(n == 0.0, 1.0, n) - mean
        total += tl.load(here + M2, mask=line < P, other=0.0) + tl.where(n == 0.0, 0.0, n * step * step)
    return tl.sum(total, 0)


@triton.jit
def finish(total, count, normalizer_ptr, loss_ptr, inverse_ptr):
    """loss = total / normalizer, 0 where the normalizer is 0."""
    scale = count
    if normalizer_ptr is not None:
        scale = tl.load(normalizer_ptr)
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
    tl.store(loss_ptr, tl.where(scale == 0.0, 0.0, total * inverse))
    tl.store(inverse_ptr, inverse)


@triton.jit
def fold_loss(
    parts_ptr, normalizer_ptr, loss_ptr, inverse_ptr, P, q,
    COUNT: tl.constexpr, LOSS: tl.constexpr, USED: tl.constexpr, FOLD: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Write the loss; return the sums and maxima of the columns before USED, and the number of tokens."""
    sums, peak = fold_sums(parts_ptr, P, q, USED, FOLD, Q)
    count = pick(sums, q, COUNT)
    finish(pick(sums, q, LOSS), count, normalizer_ptr, loss_ptr, inverse_ptr)
    return sums, peak, count


@triton.jit
def pick(x, q, i: tl.constexpr):
    """Element i of a vector."""
    return tl.sum(tl.where(q == i, x, 0.0), 0)
