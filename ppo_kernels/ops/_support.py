"""Support sets: the tokens that sampling allowed in each row, over which probabilities add up to 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels.ops._inputs import check_device, check_integer

_LOST = -2  # of a label that is not in its support: no column, and not what stands for a label that does not count
_IGNORED = -100


def narrowed(
    op: str, logits: Tensor, labels: Tensor, ignore_index: int, support: Any, vocab_start: int, validate: bool
) -> tuple[Tensor, Tensor, int]:
    """The logits ``[..., S]`` of the support, -inf where there is no token or one of another shard, the labels' places
    there, and the label that does not count. Where a label's logit is another shard's, its place is none.
    """
    many = labels.dim() == logits.dim()
    ids, at = supported(op, labels if many else labels[..., None], ignore_index, support, logits, validate)
    local = ids - vocab_start
    here = (ids >= 0) & (local >= 0) & (local < logits.size(-1))
    chosen = torch.where(here, logits.gather(-1, torch.where(here, local, 0)), -torch.inf)
    at = torch.where((at < 0) | here.gather(-1, at.clamp(min=0)), at, _LOST)  # one of another shard, or of none
    place = at if many else at[..., 0]
    return chosen, place, _IGNORED


def supported(
    op: str, y: Tensor, ignore_index: int, support: Any, rows_of: Tensor, validate: bool
) -> tuple[Tensor, Tensor]:
    """The ids ``[..., S]``, each once and otherwise -1, of the rows of ``rows_of [..., anything]``; and the places
    there of labels ``[..., K]``, negative for those that are not there or do not count."""
    ids = _padded(op, support, rows_of, validate).sort(-1).values
    before = torch.cat([ids.new_full((*ids.shape[:-1], 1), -1), ids[..., :-1]], -1)
    ids = torch.where(ids != before, ids.clamp(min=-1), -1)  # one that stands there twice counts once
    at = (ids[..., None, :] == y[..., None]) & (ids >= 0)[..., None, :]
    counts = y != ignore_index
    if validate:
        lost = counts & ~at.any(-1)
        if bool(lost.any()):
            raise ValueError(
                f"{op}: every label must be in the support of its row; {int(lost.sum())} are not, the first is"
                f" {int(y[lost][0])}"
            )
    place = torch.where(at.any(-1), at.to(torch.uint8).argmax(-1), _LOST)
    return ids, torch.where(counts, place, _IGNORED)


def with_support(
    op: str, labels: Tensor, ignore_index: int, support: Any, rows_of: Tensor, validate: bool
) -> tuple[Tensor, Tensor, int]:
    """The ids, the labels with those that are not there as labels of no vocabulary, and the one that does not count."""
    ids, place = supported(op, labels[..., None], ignore_index, support, rows_of, validate)
    return ids, torch.where(place[..., 0] < 0, place[..., 0], labels), _IGNORED


def clear_outside_(tile: Tensor, ids: Tensor, first: int) -> None:
    """Make -inf the columns of a tile ``[rows, columns]``, of which the first is the label ``first``, that are not
    among the ids of their row."""
    columns = tile.size(1)
    local = ids - first
    local = torch.where((ids >= 0) & (local >= 0) & (local < columns), local, columns)
    outside = torch.ones(len(tile), columns + 1, dtype=torch.bool, device=tile.device).scatter_(1, local, False)
    tile.masked_fill_(outside[:, :columns], -torch.inf)


def _padded(op: str, support: Any, logits: Tensor, validate: bool) -> Tensor:
    """Ids ``[..., S]`` with S >= 1, -1 where there are fewer."""
    rows = logits.shape[:-1]
    if isinstance(support, (tuple, list)) and len(support) == 2:
        ids = _from_offsets(op, support[0], support[1], logits, validate)
    else:
        ids = check_integer(op, "support", support).long()
        if ids.dim() != logits.dim() or ids.shape[:-1] != rows:
            raise ValueError(
                f"{op}: support must be ids [..., S], padded with -1, for the rows {tuple(rows)}, or a pair (ids,"
                f" offsets); got {tuple(ids.shape)}"
            )
        check_device(op, "support", ids, logits.device)
    return ids if ids.size(-1) else ids.new_full((*rows, 1), -1)


def _from_offsets(op: str, ids: Any, offsets: Any, logits: Tensor, validate: bool) -> Tensor:
    ids, offsets = check_integer(op, "ids of support", ids).long(), check_integer(op, "offsets of support", offsets)
    rows = logits.shape[:-1]
    for name, x in (("ids of support", ids), ("offsets of support", offsets)):
        check_device(op, name, x, logits.device)
    if ids.dim() != 1 or offsets.dim() != 1 or len(offsets) != rows.numel() + 1:
        raise ValueError(
            f"{op}: support as (ids [M], offsets [R + 1]) needs R = {rows.numel()} rows; got {tuple(ids.shape)} and"
            f" {tuple(offsets.shape)}"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: support as (ids, offsets) has a length that a compiled graph cannot know; pass ids [..., S] padded"
            " with -1"
        )
    if validate and not (offsets[0] == 0 and offsets[-1] == len(ids) and bool((offsets[:-1] <= offsets[1:]).all())):
        raise ValueError(f"{op}: offsets of support must rise from 0 to {len(ids)}, the number of ids")
    first, last = (x.long().clamp(0, len(ids)) for x in (offsets[:-1], offsets[1:]))
    most = int((last - first).max()) if len(first) else 0  # waits for the device
    at = first[:, None] + torch.arange(max(most, 1), device=ids.device)
    if len(ids) == 0:
        return ids.new_full((*rows, 1), -1)
    found = torch.where(at < last[:, None], ids[at.clamp(max=len(ids) - 1)], -1)
    return found.view(*rows, -1)
