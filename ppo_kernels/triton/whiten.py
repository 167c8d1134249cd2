"""Moments and whitening: every program that needs the moments merges those of the parts, in one fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels.triton._launch import as_vector, block_for, in_units, launch, mask_bytes, require_computed
from ppo_kernels.triton._math import load_valid

#: Elements per step of a program, four per thread for 16-byte loads.
BLOCK = 2048
#: Steps of a program that applies: enough work to pay for folding the partial moments.
STEPS = 4
#: Most parts: two programs per multiprocessor of a large GPU, and cheap to fold many times over.
PARTS = 256


@triton.jit(do_not_specialize=("total", "blocks"))
def _part_moments(x, mask, counts, means, m2s, total, blocks, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Count, mean and squared deviations of one part. Its second pass finds the part in the cache."""
    part = tl.program_id(0)
    begin = part.to(tl.int64) * blocks * BLOCK
    size = tl.minimum(tl.cast(total, tl.int64) * UNIT - begin, tl.cast(blocks, tl.int64) * BLOCK).to(tl.int32)
    x += begin
    if mask is not None:
        mask += begin
    valids = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float64)
    for at in range(0, size, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = load_valid(mask, t, t < size)
        valids += valid.to(tl.int32)
        sums += tl.where(valid, tl.load(x + t, mask=t < size, other=0.0), 0.0).to(tl.float64)
    count = tl.sum(valids, 0).to(tl.float64)
    mean = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for at in range(0, size, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = load_valid(mask, t, t < size)
        deviation = tl.load(x + t, mask=t < size, other=0.0).to(tl.float64) - mean
        squares += tl.where(valid, deviation * deviation, 0.0)
    tl.store(counts + part, count)
    tl.store(means + part, mean)
    tl.store(m2s + part, tl.sum(squares, 0))


@triton.jit
def _fold(counts, means, m2s, parts, FOLD: tl.constexpr):
    """Moments of the union of disjoint parts (Chan, Golub and LeVeque, 1979)."""
    part = tl.arange(0, FOLD)
    n = tl.load(counts + part, mask=part < parts, other=0.0)
    mu = tl.load(means + part, mask=part < parts, other=0.0)
    m2 = tl.load(m2s + part, mask=part < parts, other=0.0)
    count = tl.sum(n, 0)
    mean = tl.sum(n * mu, 0) / tl.maximum(count, 1.0)
    return count, mean, tl.sum(m2 + n * (mu - mean) * (mu - mean), 0)


@triton.jit(do_not_specialize=("parts",))
def _fold_moments(counts, means, m2s, parts, count, mean, m2, FOLD: tl.constexpr):
    all_count, all_mean, all_m2 = _fold(counts, means, m2s, parts, FOLD)
    tl.store(count, all_count)
    tl.store(mean, all_mean)
    tl.store(m2, all_m2)


@triton.jit(do_not_specialize=("total", "parts"))
def _apply(
    x, mask, counts, means, m2s, y,
    total, parts,
    eps: tl.float64,
    UNIT: tl.constexpr, SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    count, mean, m2 = _fold(counts, means, m2s, parts, FOLD)
    freedom = count - 1.0 if UNBIASED else count
    spread = m2 / tl.maximum(freedom, 1.0) + eps  # m2 is 0 if count <= 1
    scale = 1.0 / tl.sqrt(tl.where(spread == 0.0, float("inf"), spread))
    total = tl.cast(total, tl.int64) * UNIT
    begin = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    for at in range(begin, tl.minimum(begin + STEPS * BLOCK, total), BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = load_valid(mask, t, t < total)
        out = (tl.load(x + t, mask=t < total, other=0.0).to(tl.float64) - mean) * scale
        if not SHIFT_MEAN:
            out += mean
        tl.store(y + t, tl.where(valid, out, 0.0).to(y.dtype.element_ty), mask=t < total)


def _flat(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a contiguous tensor as bytes that lie like it."""
    require_computed("x", x)
    require(x.is_contiguous() and (mask is None or mask.is_contiguous()), "x and mask must be contiguous")
    return mask_bytes(mask, x)


def _scalars(x: Tensor, *shape: int) -> list[Tensor]:
    """Count, mean and sum of squared deviations to write."""
    return [torch.empty(shape, dtype=torch.float64, device=x.device) for _ in range(3)]


def _named(partial: list[Tensor]) -> dict[str, Any]:
    return dict(zip(("counts", "means", "m2s"), partial, strict=True))


def _partial_moments(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Counts, means and sums of squared deviations of parts that the size alone decides."""
    blocks = max(1, triton.cdiv(triton.cdiv(x.numel(), BLOCK), PARTS))
    parts = triton.cdiv(x.numel(), blocks * BLOCK)
    partial = _scalars(x, parts)
    launch(
        _part_moments, parts,
        x=x, mask=mask, **_named(partial), blocks=blocks,
        **in_units(total=x.numel()),
        BLOCK=BLOCK, num_warps=BLOCK // 128,
    )  # fmt: skip
    return partial


def _fold_size(parts: int) -> int:
    return block_for(parts, most=PARTS, least=32)


def moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    partial = _partial_moments(x, _flat(x, mask))
    parts = partial[0].numel()
    count, mean, m2 = _scalars(x)
    launch(
        _fold_moments, 1,
        **_named(partial), parts=parts, count=count, mean=mean, m2=m2,
        FOLD=_fold_size(parts), num_warps=1,
    )  # fmt: skip
    return count, mean, m2


def whiten(
    x: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    mask = _flat(x, mask)
    statistics = {"count": count, "mean": mean, "m2": m2}
    given = [s for name, x in statistics.items() if (s := as_vector(name, x, (), torch.float64)) is not None]
    require(len(given) in (0, 3), "count, mean and m2 come together; pass all or none")
    partial = given or _partial_moments(x, mask)
    parts = partial[0].numel()
    y = torch.empty_like(x)
    launch(
        _apply, triton.cdiv(x.numel(), STEPS * BLOCK),
        x=x, mask=mask, **_named(partial), y=y, parts=parts, eps=eps,
        **in_units(total=x.numel()),
        SHIFT_MEAN=shift_mean, UNBIASED=unbiased, FOLD=_fold_size(parts), BLOCK=BLOCK, STEPS=STEPS,
        num_warps=BLOCK // 128,
    )  # fmt: skip
    return y
