"""More of a row of logits than a label's probability: metrics that cost nothing where nobody asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppo_kernels._compositions import register_composition
from ppo_kernels._types import LogprobExtras, ProcessGroup, compute_dtype
from ppo_kernels.ops._parts import gathered, join, part_of

EXTRAS = LogprobExtras._fields


def check_extras(op: str, extras: object) -> tuple[str, ...]:
    if not isinstance(extras, (tuple, list)) or any(name not in EXTRAS for name in extras):
        raise ValueError(f"{op}: extras must be a tuple of names out of {EXTRAS}, got {extras!r}")
    return tuple(extras)


def _fake(logits, labels, *_others):
    dtype = compute_dtype(logits)
    return logits.new_empty(logits.shape[:-1], dtype=dtype), labels.new_empty(labels.shape, dtype=torch.bool)


def _extras(logits, labels, mask, rows, temperature, ignore_index, squares, vocab_start, group, impl):
    """Both. The sum of the squares of p is that of exponentials at half the temperature, over the square of theirs."""
    dtype, many = compute_dtype(logits), labels.dim() == logits.dim()
    live = labels != ignore_index
    if mask is not None:
        live = live & ((mask[..., None] if many else mask) != 0)
    of_row = live.any(-1) if many else live
    parts = []
    for share in (1.0, 0.5)[: 1 + squares]:
        tau, of_rows = temperature * share, None if rows is None else rows * share
        parts.append(part_of(impl, logits, labels, vocab_start, tau, of_rows, False, of_row))
    together = torch.stack(parts)
    every = gathered(together, group) if group else together[None]
    halves = [1.0, 0.5][: 1 + squares]
    whole = [
        join(every[:, i], temperature * x if rows is None else rows * x, dtype, False) for i, x in enumerate(halves)
    ]
    y_live = live.movedim(-1, 0) if many else live[None]
    found, top = extras_of_rows(whole[0], False, whole[1] if squares else None, y_live)
    found = torch.where(of_row, found, 0.0)
    return found.to(dtype), top.movedim(0, -1).contiguous() if many else top[0].clone()


def extras_of_rows(
    part: Tensor, entropy: bool, half: Tensor | None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of a part that is all there is, the sum of squares by the ``half`` at half the temperature, zeros without; and
    which labels ``[K, ...]``, of those that are ``live``, are the top ones.
    """
    most, log_sum, targets = part[0], part[1], part[2 + entropy :]
    top = (targets == most) & (most != -torch.inf)  # NaN, of a label of no column, compares unequal
    top = top if live is None else top & live
    if half is None:
        return torch.zeros_like(most), top
    bad = targets.isnan() if live is None else targets.isnan() & live
    nowhere = bad.any(0) | (most == -torch.inf)
    return torch.where(nowhere, torch.nan, torch.exp(half[1] - 2 * log_sum).clamp(max=1.0)), top


_EXTRAS = register_composition(
    "token_logprobs_extras(Tensor logits, Tensor labels, Tensor? mask, Tensor? temperature_rows, float temperature,"
    " int ignore_index, bool squares, int vocab_start, str group, str impl) -> (Tensor sum_sq_probs, Tensor top1)",
    ("token_logprobs",),
    fake=_fake,
    kernel=_extras,
)


def extras_of(
    impl: str, logits: Tensor, constants: tuple, names: Sequence[str], group: ProcessGroup | None, vocab_start: int
) -> LogprobExtras:
    """``constants``: labels, mask, temperatures, temperature and ignore_index, as kernels take them."""
    shard = (vocab_start, "" if group is None else group.group_name)
    found = _EXTRAS.call(impl, logits.detach(), *constants, "sum_sq_probs" in names, *shard, impl)
    return LogprobExtras(*(x if name in names else None for name, x in zip(EXTRAS, found, strict=True)))
