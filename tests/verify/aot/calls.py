"""Calls of the registered ops that together reach the Triton kernels users meet, recorded from the public functions.

The cases of the contracts (bench/cases), at shapes with long and short rows, padded and packed, with every optional
input and with none. Only the arguments count: nothing is computed by Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench.cases import CASES, Case, Inputs
from tests.lib import recorded


@functools.cache
def all_of() -> dict[str, list[tuple]]:
    """By op, the arguments of its calls."""
    found: dict[str, list[tuple]] = {}
    for case in (case for case in CASES if case.contract and not case.composed):
        for op, args in _of(case):
            found.setdefault(op, []).append(args)
    return found


def _of(case: Case) -> Iterator[tuple[str, tuple]]:
    g = torch.Generator().manual_seed(0)
    for i, (dtype, shape, options) in enumerate(case.reach):
        inputs = case.inputs(g, dtype, *shape)
        if i % 2:
            inputs = _off_a_vector(inputs, case.leaf)
        for turn, kind in enumerate((recorded.full, recorded.bare)):
            # The values of an option take turns, so that each meets short and long rows, with all inputs and with few.
            n = i + turn + case.packed
            chosen = {name: values[n % len(values)] for name, values in case.choices.items()}
            yield from kind(case, inputs, "cpu", **chosen | options)


def _off_a_vector(inputs: Inputs, leaf: str | None) -> Inputs:
    """The same tokens, one element off a 16-byte boundary."""
    like = inputs[leaf] if leaf else next(iter(inputs.values()))
    return {name: _moved(x) if x.shape == like.shape else x for name, x in inputs.items()}


def _moved(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def far(op: str, args: tuple) -> tuple | None:
    """The call with the rows of its first tensor further apart than 32 bits count; None for ops of dense tensors."""
    if any(case.dense for case in CASES if case.op == op):
        return None
    x, *rest = (a.to("meta") if torch.is_tensor(a) else a for a in args)
    return (torch.empty_strided(x.shape, (*[2**33] * (x.dim() - 1), 1), dtype=x.dtype, device="meta"), *rest)
