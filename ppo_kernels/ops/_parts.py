"""Rows of logits in parts: the statistics of some columns, and those of all from those of each.

A part is ``[2 + E + K, ...]`` for the rows ``...``: the maximum of the columns' logits, -inf where there are none; the
logarithm of the sum of exponentials over it; the entropy of these columns, if it is asked for (E = 1); and the logits
of the row's K labels, NaN for one that lies elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels import backends
from ppo_kernels._types import wide_dtype
from ppo_kernels.reference import parts as reference


def part_of(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    first: int,
    temperature: float,
    rows: Tensor | None,
    entropy: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """The part that these columns are, the first of which is the label ``first``; rows under a mask have no logit.

    ``labels`` are ``[...]``, or ``[..., K]`` as the logits are ``[..., V]``.
    """
    columns = logits.size(-1)
    at = (labels if labels.dim() == logits.dim() else labels[..., None]) - first
    here = (at >= 0) & (at < columns)
    at = at.clamp(0, columns - 1)
    if impl == "torch":
        stats = reference.statistics(logits, temperature if rows is None else rows)[: 3 if entropy else 2]
    else:
        one = at[..., 0].contiguous()
        _, stats = backends.op("token_logprobs").run(impl, logits, one, mask, rows, temperature, -1, entropy)
    targets = torch.where(here, logits.gather(-1, at).to(stats.dtype), torch.nan).movedim(-1, 0)
    nothing = None if mask is None else mask == 0
    if not logits.is_cpu or bool(stats[0].isnan().any()):  # a row of -inf alone is NaN, a part of it is empty
        empty = logits.amax(-1) == -torch.inf
        nothing = empty if nothing is None else nothing | empty
    if nothing is not None:
        stats = torch.cat([torch.where(nothing, -torch.inf, stats[:1]), torch.where(nothing, 0.0, stats[1:])])
    return torch.cat([stats, targets])


def join(parts: Tensor, temperature: float | Tensor, dtype: torch.dtype, entropy: bool) -> Tensor:
    """The part that parts ``[P, ...]`` are together, added up in their order in float64, and so returned.

    ``dtype`` is what logits are computed in.
    """
    wide = parts.to(wide_dtype(parts.device))
    top, log_sum, targets = wide[:, 0], wide[:, 1], wide[:, 2 + entropy :]
    most, first = top.max(0)
    shift = torch.where(top == -torch.inf, top, (top - most) / _usable(temperature, top, dtype))
    # What the sum is beyond the 1 of the maximum: near p = 1 that is all it says.
    is_first = torch.arange(len(parts), device=parts.device).view(-1, *[1] * first.dim()) == first
    total = torch.log1p(torch.where(is_first, torch.expm1(log_sum), torch.exp(shift + log_sum)).sum(0))
    found = [most, total]
    if entropy:
        log_share = shift + log_sum - total
        share = log_share.exp()
        found.append(torch.where(share > 0, share * (wide[:, 2] - log_share), 0.0 * share).sum(0).clamp(min=0.0))
    known = targets.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(0)
    return torch.cat([torch.stack(found), torch.where(targets.isnan().all(0), torch.nan, known)])


def finish(
    part: Tensor, temperature: float | Tensor, dtype: torch.dtype, entropy: bool, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The labels' log-probabilities ``[K, ...]`` and the statistics of the rows, as ``token_logprobs`` has them, of a
    part that is all there is. NaN where it has no logit or not the label. ``live [K, ...]`` are the labels that count.
    """
    stats, targets = part[: 2 + entropy], part[2 + entropy :]
    most, total = stats[:2]
    logp = ((targets - most) / _usable(temperature, most, dtype) - total).clamp(max=0.0)
    nowhere = targets.isnan() | (most == -torch.inf)
    logp = torch.where(nowhere, torch.nan, logp)
    if live is None:
        bad = nowhere.any(0)
    else:
        bad, logp = (nowhere & live).any(0), torch.where(live, logp, 0.0)
    known = stats.clone()
    known[0] = torch.where(bad, torch.nan, most)
    if entropy:
        known[2] = torch.where(bad, torch.nan, stats[2])
    if live is not None:
        idle = ~live.any(0)
        known = torch.where(idle, 0.0, known)
        known[1] = torch.where(idle, -1.0, known[1])  # not read
    return logp.to(dtype), known.to(dtype)


def gradient_of_part(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    first: int,
    temperature: float,
    rows: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    logprobs: Tensor,
    stats: Tensor,
    ignore_index: int,
    *,
    over: bool = False,
) -> Tensor:
    """Of such columns, from what all columns together have given; with ``over`` written over them, by a kernel.

    A kernel takes the first column for that of every label that lies elsewhere, and this alone is then made again.
    """
    every = temperature if rows is None else rows
    many = labels.dim() == logits.dim()
    one = lambda x: x if many or x is None else x[..., None]  # noqa: E731
    y, of_labels = one(labels), one(logprobs)
    ignored, at = y == ignore_index, y - first
    here = ~ignored & (at >= 0) & (at < logits.size(-1))
    g = None if grads[0] is None else torch.where(ignored, 0.0, one(grads[0]))
    local = torch.where(here, at, -1)
    if impl == "torch":
        out = logits.clone(memory_format=torch.contiguous_format)
        every = torch.where(stats[1] < 0, 1.0, _usable(every, stats, stats.dtype))
        reference.gradient_(out, local, every, (g, grads[1]), of_labels, stats)
        return torch.where((stats[1] < 0)[..., None], 0.0, out)
    name, given = f"token_logprobs_backward{'_' * over}", torch.where(ignored, -1, local.clamp(min=0))
    given = given if many else given[..., 0]
    column = logits[..., :1].clone()
    if many:  # a label's own column is made of its log-probability, which knows nothing of a label that is nowhere
        logprobs = torch.where(stats[0].isnan()[..., None], torch.nan, logprobs)
    found = backends.op(name).run(impl, logits, given, rows, *grads, logprobs, stats, temperature, -1)
    out = logits.data if over else found  # whose version the kernel has raised
    zero = torch.zeros_like(y[..., :1])
    again = reference.gradient_at(
        column, zero, local, _usable(every, stats, stats.dtype), (g, grads[1]), of_labels, stats
    )
    elsewhere = (~here & ~ignored).any(-1) & (stats[1] >= 0)
    out[..., 0] = torch.where(elsewhere, again[..., 0].to(out.dtype), out[..., 0])
    return out


def gathered(part: Tensor, group: str) -> Tensor:
    """The parts of all ranks of a group, which each calls, in their order."""
    parts = [torch.empty_like(part) for _ in range(world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=_resolve(group))
    return torch.stack(parts)


def world_size(group: str) -> int:
    return torch.distributed.get_world_size(_resolve(group))


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
