"""The checks that the ops on logits, or on what makes logits, share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels._registered import forward_mode_message
from ppo_kernels._types import element
from ppo_kernels.ops._autograd import has_tangent
from ppo_kernels.ops._inputs import (
    check_device,
    check_floating,
    check_group,
    check_integer,
    check_integer_option,
    check_number,
    check_tensor,
    temperature_rows,
    to_mask,
)

#: Of labels, where the size of the vocabulary is not known: these logits are a shard of it.
ANY_LABEL = 2**63 - 1


def check_entropy(op: str, entropy: object) -> None:
    if not (entropy is False or entropy is True or (isinstance(entropy, str) and entropy == "detached")):
        given = f"a tensor {tuple(entropy.shape)}" if isinstance(entropy, Tensor) else repr(entropy)
        raise ValueError(f'{op}: entropy must be False, True or "detached", got {given}')


def check_ignore_index(op: str, ignore_index: object) -> int:
    if type(ignore_index) is not int:
        ignore_index = check_integer_option(op, "ignore_index", ignore_index, least=-(2**63))
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must fit an int64, got {ignore_index}")
    return ignore_index


def check_temperature(op: str, temperature: object, logits: Tensor) -> tuple[Tensor | None, float]:
    """That of each row of logits ``[..., V]``, or None and one for all."""
    rows = temperature if isinstance(temperature, Tensor) else None
    tau = check_number(op, "temperature", temperature, above=0.0) if rows is None else 1.0
    if rows is None and torch.compiler.is_compiling():  # a float would become a constant of the graph
        rows, tau = element(tau), 1.0
    return None if rows is None else temperature_rows(op, rows, logits), tau


def check_shard(op: str, group: object, vocab_start: object, x: Tensor) -> int:
    """The place of a shard; ``x`` is what is differentiated."""
    vocab_start = check_integer_option(op, "vocab_start", vocab_start, least=0)
    if group is None:
        if vocab_start != 0:
            raise ValueError(f"{op}: vocab_start={vocab_start} is the place of a shard in a group; pass group= too")
        return vocab_start
    check_group(op, "group", group)
    refuse_forward_mode(f"{op} with group=", x)
    return vocab_start


def refuse_forward_mode(call: str, x: Tensor) -> None:
    if has_tangent(x):
        raise RuntimeError(forward_mode_message(call))


def check_logits(
    op: str, logits: Any, labels: Any, temperature: object, mask: object, ignore_index: object, entropy: object
) -> tuple[Tensor, Tensor | None, Tensor | None, float, int]:
    """Labels, mask, the temperature of each row or None and one for all, and ignore_index, as kernels take them."""
    check_entropy(op, entropy)
    ignore_index = check_ignore_index(op, ignore_index)
    check_floating(op, "logits", logits)
    check_integer(op, "labels", labels)
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ValueError(f"{op}: logits must be [..., V] with V >= 1, got shape {tuple(logits.shape)}")
    rows = logits.shape[:-1]
    many = labels.dim() == logits.dim() and labels.size(-1) > 0
    if tuple(labels.shape[:-1] if many else labels.shape) != tuple(rows):
        raise ValueError(
            f"{op}: labels must have the shape of the logits without V {tuple(rows)}, or that and K >= 1"
            f" labels for each row; got {tuple(labels.shape)}"
        )
    check_device(op, "labels", labels, logits.device)
    if mask is not None:
        of_rows = labels.dim() == logits.dim() > check_tensor(op, "mask", mask).dim()
        mask = to_mask(op, mask, logits[..., 0] if of_rows else labels)
        if mask is not None and mask.dim() == logits.dim():
            labels, mask = torch.where(mask != 0, labels.long(), ignore_index), None
    labels = (labels if labels.dtype == torch.int64 else labels.long()).contiguous()
    of_rows, tau = check_temperature(op, temperature, logits)
    return labels, None if mask is None else mask.contiguous(), of_rows, tau, ignore_index


def check_values(
    op: str, labels: Tensor, mask: Tensor | None, rows: Tensor | None, ignore_index: int, vocab: int
) -> None:
    """Labels and temperatures, which waits for the device."""
    live = labels != ignore_index
    if mask is not None:
        live = live & ((mask if mask.dim() == labels.dim() else mask[..., None]) != 0)
    bad = labels[live & ((labels < 0) | (labels >= vocab))]
    if bad.numel():
        raise ValueError(
            f"{op}: labels must be in [0, {vocab}) or ignore_index={ignore_index};"
            f" {bad.numel()} are not, the first is {int(bad[0])}"
        )
    if rows is not None and not bool((rows > 0).all()):
        raise ValueError(f"{op}: every temperature must be > 0, the least is {float(rows.min())}")
