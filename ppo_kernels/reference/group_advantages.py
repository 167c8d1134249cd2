"""Advantages over the responses to one prompt, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._rows import Rows, row_sum
from ppo_kernels._types import compute_dtype, wide_dtype


@torch.no_grad()
def group_advantages(
    scores: Tensor, group_ids: Tensor, *, mode: str = "rloo", eps: float = 1e-4, stats: bool = False
) -> tuple[Tensor, Tensor]:
    """Advantages ``[R, B]`` of scores ``[R, B]``, and where groups begin, as the schema of the op has both."""
    ids, order = torch.sort(group_ids, stable=True)
    groups = runs(ids)
    results = [_of_one_reward(x[order], groups, mode, eps) for x in scores.to(wide_dtype(scores.device))]
    advantages, heads = torch.zeros_like(scores), scores.new_zeros(scores.shape, dtype=torch.uint8)
    for r, (advantage, varied) in enumerate(results):
        advantages[r, order] = advantage.to(compute_dtype(scores))
        first = groups.start[groups.row] == torch.arange(ids.numel(), device=ids.device)
        heads[r] = torch.where(first, 1 + varied[groups.row].to(torch.uint8), 0)
    return advantages, heads if stats else heads[:0]


def _of_one_reward(x: Tensor, groups: Rows, mode: str, eps: float) -> tuple[Tensor, Tensor]:
    """The advantages of sorted scores, and for each group whether its scores differ."""
    of_group = lambda per_group: per_group[groups.row]  # noqa: E731
    finite = x.isfinite()
    low, high = _bounds(x, finite, groups)
    # Differences to one score of the group: equal scores, whatever their size, have a deviation of exactly 0.
    origin = of_group(torch.where(low <= high, low, 0.0))
    x = torch.where(finite, x - origin, 0.0)
    count = row_sum(finite.to(x.dtype), groups)
    mean = _mean(row_sum(x, groups), count)
    centred = torch.where(finite, x - of_group(mean), 0.0)
    squares = row_sum(centred.square(), groups)
    over_others = torch.where(count > 1, count / (count - 1), 1.0)
    scale = torch.ones_like(centred)
    if mode == "rloo":
        scale = of_group(over_others)
    elif mode == "grpo":
        scale = of_group(_inverse(_deviation(squares, count) + eps))
    elif mode == "maxrl":
        scale = _inverse(origin + of_group(mean) + eps)
    elif mode == "rloo_scaled":
        spread = _deviation_of_others(finite, centred, squares, count, groups)
        scale = of_group(over_others) / torch.where(spread > 0, spread + eps, 1.0)
    return torch.where(centred == 0, 0.0, centred * scale), low < high


def _deviation_of_others(finite: Tensor, centred: Tensor, squares: Tensor, count: Tensor, groups: Rows) -> Tensor:
    """For each score the standard deviation of its group without it; 0 where there are fewer than two others.

    Their squares are those of all less its own, but for the one that is farthest from the mean: there these cancel.
    """
    low, high = (bound[groups.row] for bound in _bounds(centred, finite, groups))
    above = high >= -low
    far, near = torch.where(above, high, low), torch.where(above, low, high)
    is_far = finite & (centred == far)
    other = finite & ~is_far
    number = row_sum(other.to(count.dtype), groups)
    gap = torch.where(other, centred - near, 0.0)
    gap = torch.where(other, gap - _mean(row_sum(gap, groups), number)[groups.row], 0.0)
    n = count[groups.row]
    apart = is_far & ((n - number[groups.row]) == 1)
    rest = squares[groups.row] - centred.square() * n / (n - 1)
    rest = torch.where(apart, row_sum(gap.square(), groups)[groups.row], rest)
    return torch.where(n > 2, (rest / (n - 2)).clamp(min=0.0).sqrt(), 0.0)


def _bounds(x: Tensor, finite: Tensor, groups: Rows) -> tuple[Tensor, Tensor]:
    """The least and the largest of each group."""
    low, high = (x.new_full((groups.batch,), bound) for bound in (torch.inf, -torch.inf))
    return (
        low.scatter_reduce(0, groups.row, torch.where(finite, x, torch.inf), "amin"),
        high.scatter_reduce(0, groups.row, torch.where(finite, x, -torch.inf), "amax"),
    )


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count, 0.0)


def _deviation(squares: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 1, squares / (count - 1), 0.0).sqrt()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1.0 / x)


def runs(ids: Tensor) -> Rows:
    """The runs of equal neighbours as packed rows: as many as there are elements, the last of them empty."""
    heads = torch.ones_like(ids, dtype=torch.bool)
    heads[1:] = ids[1:] != ids[:-1]
    row = heads.cumsum(0) - 1
    bounds = torch.searchsorted(row, torch.arange(ids.numel() + 1, device=ids.device))
    return Rows(row, torch.ones_like(heads), bounds[:-1], bounds[1:], None)
