"""Advantages over the responses to one prompt: one program per reward and place in the sorted order.

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
def _scores_at(scores, order, begin, end, total, BLOCK: tl.constexpr):
    """Scores of a block of places, which of them are members of the group, and where they are.

    What is beyond the group or not finite is no member, and 0.
    """
    t = begin + tl.arange(0, BLOCK)
    inside = t < end
    at = t
    if order is not None:  # a raw call's order may hold anything; the public function sorted it
        at = tl.load(order + t, mask=inside, other=0)
        at = tl.where(at < 0, 0, tl.where(at >= total, total - 1, at))
    x = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
    member = inside & (tl.abs(x) < float("inf"))
    return tl.where(member, x, 0.0), member, at, inside


@triton.jit
def _range(scores, order, begin, end, total, BLOCK: tl.constexpr):
    """How many scores a group has, the least and the largest."""
    number = tl.zeros([BLOCK], tl.int64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = -low
    for place in range(begin, end, BLOCK):
        x, member, _, _ = _scores_at(scores, order, place, end, total, BLOCK)
        number += member.to(tl.int64)
        low = tl.minimum(low, tl.where(member, x, float("inf")))
        high = tl.maximum(high, tl.where(member, x, -float("inf")))
    return tl.sum(number, 0).to(tl.float64), tl.min(low, 0), tl.max(high, 0)


@triton.jit
def _moments(scores, order, begin, end, total, count, origin, left_out, BLOCK: tl.constexpr):
    """Mean and squares of the differences to ``origin`` of ``count`` scores, those that are not ``left_out``."""
    sums = tl.zeros([BLOCK], tl.float64)
    for place in range(begin, end, BLOCK):
        x, member, _, _ = _scores_at(scores, order, place, end, total, BLOCK)
        sums += tl.where(member & (x != left_out), x - origin, 0.0)
    mean = tl.where(count > 0.0, tl.sum(sums, 0) / tl.where(count > 0.0, count, 1.0), 0.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for place in range(begin, end, BLOCK):
        x, member, _, _ = _scores_at(scores, order, place, end, total, BLOCK)
        deviation = tl.where(member & (x != left_out), x - origin - mean, 0.0)
        squares += deviation * deviation
    return mean, tl.sum(squares, 0)


@triton.jit
def _far_count(scores, order, begin, end, total, far, BLOCK: tl.constexpr):
    number = tl.zeros([BLOCK], tl.int64)
    for place in range(begin, end, BLOCK):
        x, member, _, _ = _scores_at(scores, order, place, end, total, BLOCK)
        number += (member & (x == far)).to(tl.int64)
    return tl.sum(number, 0).to(tl.float64)


@triton.jit
def _inverse(x):
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit(do_not_specialize=("total", "group_size"))
def _group_advantages(
    scores, ids, order, advantages, heads, total, group_size, eps, MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = place // total * total
    begin = place - row
    scores += row
    if ids is None:
        head = begin % group_size == 0
    else:
        before = tl.load(ids + begin - 1, mask=begin > 0, other=0)
        head = (begin == 0) | (before != tl.load(ids + begin))
    if heads is not None:
        tl.store(heads + place, tl.zeros([], tl.uint8))
    if head:
        end = _end_of(ids, begin, total, group_size, BLOCK)
        count, low, high = _range(scores, order, begin, end, total, BLOCK)
        if heads is not None:
            tl.store(heads + place, tl.where(low < high, 2, 1).to(tl.uint8))
        # Differences to one of the scores: equal ones, whatever their size, have a deviation of exactly 0.
        origin = tl.where(count > 0.0, low, 0.0)
        mean, squares = _moments(scores, order, begin, end, total, count, origin, float("inf"), BLOCK)
        more = count > 1.0
        over_others = tl.where(more, count / tl.where(more, count - 1.0, 1.0), 1.0)
        scale = tl.zeros([], tl.float64) + 1.0
        if MODE == 0:
            scale = over_others
        if MODE == 1:
            scale = _inverse(tl.sqrt(tl.where(more, squares / tl.where(more, count - 1.0, 1.0), 0.0)) + eps)
        if MODE == 3:
            scale = _inverse(origin + mean + eps)
        far = low
        squares_of_others = squares
        of_others = tl.where(count > 2.0, 1.0 / tl.where(count > 2.0, count - 2.0, 1.0), 0.0)  # one has no deviation
        if MODE == 4:  # the squares of all less its own cancel for one score at most, the farthest from the mean
            above = high - origin - mean >= -(low - origin - mean)
            far = tl.where(above, high, low)
            far_count = _far_count(scores, order, begin, end, total, far, BLOCK)
            near = tl.where(count > 0.0, tl.where(above, low, high), 0.0)
            _, squares_of_others = _moments(scores, order, begin, end, total, count - far_count, near, far, BLOCK)
            far = tl.where(far_count == 1.0, far, float("inf"))  # no score
        for block in range(begin, end, BLOCK):
            x, member, at, inside = _scores_at(scores, order, block, end, total, BLOCK)
            own = tl.where(member, x - origin - mean, 0.0)
            result = own * scale
            if MODE == 4:
                rest = tl.where(x == far, squares_of_others, squares - own * own * over_others)
                rest *= of_others
                result = own * over_others / tl.where(rest > 0.0, tl.sqrt(tl.maximum(rest, 0.0)) + eps, 1.0)
            tl.store(advantages + row + at, tl.where(own == 0.0, 0.0, result), mask=inside)


def group_advantages(
    scores: Tensor,
    sorted_ids: Tensor | None,
    order: Tensor | None,
    group_size: int,
    mode: int,
    eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    require_computed("scores", scores)
    require((sorted_ids is None) == (order is None), "sorted_ids and order come together; pass both or neither")
    require(order is not None or group_size >= 1, f"group_size must be >= 1, got {group_size}")
    require(scores.dim() == 2, f"scores must be [R, B], got the shape {list(scores.shape)}")
    require_code("mode", mode, 5)
    rewards, total = scores.shape
    make = torch.empty if order is None else torch.zeros  # what no place names stays 0
    advantages = make(scores.shape, dtype=scores.dtype, device=scores.device)
    heads = torch.empty(rewards if stats else 0, total, dtype=torch.uint8, device=scores.device)
    launch(
        _group_advantages, rewards * total,
        scores=as_vector("scores", scores, (rewards, total), scores.dtype),
        ids=as_vector("sorted_ids", sorted_ids, (total,), torch.int64),
        order=as_vector("order", order, (total,), torch.int64),
        advantages=advantages, heads=heads if stats else None, total=total,
        group_size=min(group_size, total), eps=eps, MODE=mode, BLOCK=64,
        num_warps=2 if mode == 4 else 1,  # the deviation of the others would spill in one
    )  # fmt: skip
    return advantages, heads
