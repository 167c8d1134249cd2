"""Rows of logits in parts: the statistics of some columns, and those of all from those of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels import backends
from ppo_kernels._types import wide_dtype


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
    _, stats = backends.op("token_logprobs").run(impl, logits, at, None, rows, temperature, -1, entropy)
    target = torch.where(here, logits.gather(-1, at[:, None])[:, 0].to(stats.dtype), torch.nan)
    if not logits.is_cpu or bool(stats[0].isnan().any()):  # a row of -inf alone is NaN, a part of it is empty
        nothing = stats.new_tensor([-torch.inf, 0.0, 0.0])[: len(stats), None]
        stats = torch.where(logits.amax(-1) == -torch.inf, nothing, stats)
    return torch.stack([stats[0], stats[1], target, *stats[2:]])


def merge(parts: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """The labels' log-probabilities and the statistics of the rows, as ``token_logprobs`` has them, of all parts
    ``[P, 3 or 4, rows]``. Added up in float64 and in the order of the parts; NaN where no part has the label.
    """
    most, total, label, share, log_share = _merged(parts, temperature)
    tau = _usable(temperature, parts)
    logp = ((label - most) / tau - total).clamp(max=0.0)
    most = torch.where(label.isnan(), torch.nan, most)
    stats = [most, total]
    if parts.size(1) == 4:
        entropies = parts[:, 3].to(share.dtype)
        entropy = torch.where(share > 0, share * (entropies - log_share), 0.0 * share).sum(0).clamp(min=0.0)
        stats.append(torch.where(label.isnan(), torch.nan, entropy))
    return logp.to(parts.dtype), torch.stack(stats).to(parts.dtype)


def _merged(parts: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
    """The maximum, the logarithm of the sum, the label's logit, and what share of the sum is each part's."""
    top, log_sum, target = parts[:, :3].to(wide_dtype(parts.device)).unbind(1)
    most, first = top.max(0)
    most = torch.where(most == -torch.inf, torch.nan, most)
    shift = (top - most) / _usable(temperature, parts)
    # What the sum is beyond the 1 of the maximum: near p = 1 that is all it says.
    is_first = torch.arange(len(parts), device=parts.device)[:, None] == first
    total = torch.log1p(torch.where(is_first, torch.expm1(log_sum), torch.exp(shift + log_sum)).sum(0))
    known = target.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).max(0).values
    label = torch.where(target.isnan().all(0), torch.nan, known)
    log_share = shift + log_sum - total
    return most, total, label, log_share.exp(), log_share


def _usable(temperature: float | Tensor, parts: Tensor) -> Tensor:
    """As the kernels take it: within what has an inverse in the dtype that is computed in, NaN if not above 0."""
    tau = torch.as_tensor(temperature, dtype=wide_dtype(parts.device), device=parts.device)
    least = torch.finfo(parts.dtype).tiny
    return torch.where(tau > 0, tau.clamp(least * 2**13, 1 / least), torch.nan)
