"""Advantages over the responses to one prompt: one program per place in the sorted order.

The program at the start of a group computes the whole group and the others end at once, so that the host need not know
how many groups there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels.triton._launch import as_vector, launch, require_code, require_computed


@triton.jit
def _end_of(ids, begin, total, group_size, BLOCK: tl.constexpr):
    """One past the last place of the group that begins at ``begin``."""
    if ids is None:
        return tl.minimum(begin + group_size, total)
    else:
        name = tl.load(ids + begin)
        end = begin
        more = BLOCK
        while more == BLOCK:
            t = end + tl.arange(0, BLOCK)
            inside = t < total
            same = inside & (tl.load(ids + t, mask=inside, other=0) == name)
            more = tl.sum(same.to(tl.int32), 0)
            end += more
        return end


@triton.jit
def _deviations(scores, order, begin, end, total, first, mean, BLOCK: tl.constexpr):
    """Scores of a block of places over the group's mean, 0 beyond the group, and where they are."""
    t = begin + tl.arange(0, BLOCK)
    inside = t < end
    at = t
    if order is not None:  # a raw call's order may hold anything; the public function sorted it
        at = tl.load(order + t, mask=inside, other=0)
        at = tl.where(at < 0, 0, tl.where(at >= total, total - 1, at))
    x = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64) - first - mean
    return tl.where(inside, x, 0.0), at, inside


@triton.jit(do_not_specialize=("total", "group_size"))
def _group_advantages(scores, ids, order, advantages, total, group_size, eps, MODE: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64)
    if ids is None:
        head = begin % group_size == 0
    else:
        before = tl.load(ids + begin - 1, mask=begin > 0, other=0)
        head = (begin == 0) | (before != tl.load(ids + begin))
    if head:
        end = _end_of(ids, begin, total, group_size, BLOCK)
        # Differences to the first score: equal ones, whatever their size, have a deviation of exactly 0.
        nothing = tl.zeros([], tl.float64)
        first = begin
        if order is not None:
            first = tl.load(order + begin)
            first = tl.where(first < 0, 0, tl.where(first >= total, total - 1, first))
        origin = tl.load(scores + first).to(tl.float64)
        sums = tl.zeros([BLOCK], tl.float64)
        for place in range(begin, end, BLOCK):
            x, _, _ = _deviations(scores, order, place, end, total, origin, nothing, BLOCK)
            sums += x
        count = (end - begin).to(tl.float64)
        mean = tl.sum(sums, 0) / count
        scale = nothing + 1.0
        if MODE == 0:
            scale = tl.where(count > 1.0, count / tl.where(count > 1.0, count - 1.0, 1.0), 1.0)
        if MODE == 1:
            squares = tl.zeros([BLOCK], tl.float64)
            for place in range(begin, end, BLOCK):
                x, _, _ = _deviations(scores, order, place, end, total, origin, mean, BLOCK)
                squares += x * x
            spread = tl.sqrt(tl.sum(squares, 0) / tl.where(count > 1.0, count - 1.0, 1.0)) + eps
            scale = tl.where(spread == 0.0, 0.0, 1.0 / tl.where(spread == 0.0, 1.0, spread))
        for place in range(begin, end, BLOCK):
            x, at, inside = _deviations(scores, order, place, end, total, origin, mean, BLOCK)
            tl.store(advantages + at, x * scale, mask=inside)


def group_advantages(
    scores: Tensor, sorted_ids: Tensor | None, order: Tensor | None, group_size: int, mode: int, eps: float
) -> Tensor:
    require_computed("scores", scores)
    require((sorted_ids is None) == (order is None), "sorted_ids and order come together; pass both or neither")
    require(order is not None or group_size >= 1, f"group_size must be >= 1, got {group_size}")
    require_code("mode", mode, 3)
    total = scores.numel()
    make = torch.empty if order is None else torch.zeros  # what no place names stays 0
    advantages = make(total, dtype=scores.dtype, device=scores.device)
    launch(
        _group_advantages, total,
        scores=as_vector("scores", scores, (total,), scores.dtype),
        ids=as_vector("sorted_ids", sorted_ids, (total,), torch.int64),
        order=as_vector("order", order, (total,), torch.int64),
        advantages=advantages, total=total, group_size=min(group_size, total), eps=eps,
        MODE=mode, BLOCK=64, num_warps=1,
    )  # fmt: skip
    return advantages
