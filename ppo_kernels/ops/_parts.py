"""Rows of logits in parts: the statistics of some columns, and those of all from those of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels import backends
from ppo_kernels._types import wide_dtype
from ppo_kernels.reference import linear_token_logprobs as reference


def part_of(
    impl: str, logits: Tensor, labels: Tensor, first: int, temperature: float, rows: Tensor | None, entropy: bool
) -> Tensor:
    """What these columns, the first of which is the label ``first``, know of each row: ``[3 or 4, rows]``.

    The maximum of the logits, -inf where there are none; the logarithm of the sum of exponentials over it; the logit of
    the label, NaN where that lies elsewhere; and the entropy of these columns, if it is asked for.
    """
    columns = logits.size(-1)
    at = labels - first
    here = (at >= 0) & (at < columns)
    at = at.clamp(0, columns - 1)
    if impl == "torch":
        stats = reference.tile_statistics(logits, temperature if rows is None else rows)[: 3 if entropy else 2]
    else:
        _, stats = backends.op("token_logprobs").run(impl, logits, at, None, rows, temperature, -1, entropy)
    target = torch.where(here, logits.gather(-1, at[:, None])[:, 0].to(stats.dtype), torch.nan)
    if not logits.is_cpu or bool(stats[0].isnan().any()):  # a row of -inf alone is NaN, a part of it is empty
        empty = logits.amax(-1) == -torch.inf
        most, *rest = torch.where(empty, -torch.inf, stats[0]), *torch.where(empty, 0.0, stats[1:])
        return torch.stack([most, rest[0], target, *rest[1:]])
    return torch.stack([stats[0], stats[1], target, *stats[2:]])


def join(parts: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The part that parts ``[P, 3 or 4, rows]`` are together, added up in their order in float64, and so returned.

    ``dtype`` is what logits are computed in.
    """
    top, log_sum, target, *entropies = parts.to(wide_dtype(parts.device)).unbind(1)
    most, first = top.max(0)
    shift = torch.where(top == -torch.inf, top, (top - most) / _usable(temperature, top, dtype))
    # What the sum is beyond the 1 of the maximum: near p = 1 that is all it says.
    is_first = torch.arange(len(parts), device=parts.device)[:, None] == first
    total = torch.log1p(torch.where(is_first, torch.expm1(log_sum), torch.exp(shift + log_sum)).sum(0))
    known = target.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).max(0).values
    found = [most, total, torch.where(target.isnan().all(0), torch.nan, known)]
    if entropies:
        log_share = shift + log_sum - total
        share = log_share.exp()
        found.append(torch.where(share > 0, share * (entropies[0] - log_share), 0.0 * share).sum(0).clamp(min=0.0))
    return torch.stack(found)


def finish(part: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The labels' log-probabilities and the statistics of the rows, as ``token_logprobs`` has them, of a part that is
    all there is. NaN where it has no logit or not the label.
    """
    most, total, label, *entropy = part
    logp = ((label - most) / _usable(temperature, part, dtype) - total).clamp(max=0.0)
    nowhere = label.isnan() | (most == -torch.inf)
    logp, most, *entropy = (torch.where(nowhere, torch.nan, x) for x in (logp, most, *entropy))
    return logp.to(dtype), torch.stack([most, total, *entropy]).to(dtype)


def gathered(part: Tensor, group: str) -> Tensor:
    """The parts of all ranks of a group, which each calls, in their order."""
    ranks = _resolve(group)
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(ranks))]
    torch.distributed.all_gather(parts, part.contiguous(), group=ranks)
    return torch.stack(parts)


def summed(x: Tensor, group: str) -> None:
    """Add up over the ranks of a group, in place."""
    torch.distributed.all_reduce(x, group=_resolve(group))


def _resolve(group: Any) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(group)


def _usable(temperature: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels take it: within what has an inverse in ``dtype``, NaN if not above 0."""
    if isinstance(temperature, Tensor):
        tau = temperature.to(like.dtype)
    else:  # a copy of a number to a GPU would wait for it
        tau = torch.full((), temperature, dtype=like.dtype, device=like.device)
    least = torch.finfo(dtype).tiny
    return torch.where(tau > 0, tau.clamp(least * 2**13, 1 / least), torch.nan)
