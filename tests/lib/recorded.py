"""What the public functions hand to the registered ops: recorded from the calls of the registry (bench/cases)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_kernels
from bench.cases import CASES, Case, Inputs, flat

Calls = list[tuple[str, tuple]]


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace.startswith("ppo_kernels"):
            at = tuple(_kept(x, argument) for x, argument in zip(args, op._schema.arguments, strict=True))
            self.calls.append((op._schema.name.partition("::")[2], at))
        return op(*args, **(kwargs or {}))


def _kept(x, argument):
    """The argument as it is now: a copy of what the op will overwrite."""
    if not torch.is_tensor(x):
        return x
    written = argument.alias_info is not None and argument.alias_info.is_write
    return x.detach().clone() if written else x.detach()


def bare_inputs(case: Case, inputs: Inputs) -> Inputs:
    """The inputs without those that may be left out."""
    parameters = inspect.signature(getattr(ppo_kernels, case.op)).parameters
    needed = {name for name, p in parameters.items() if p.default is p.empty} | {"cu_seqlens"}
    return {name: x for name, x in inputs.items() if name in needed}


def calls(case: Case, inputs: Inputs, impl: str, first: int = 0, **options: object) -> Calls:
    """The registered ops that one call, and the backward of its outputs from ``first`` on, arrive at."""
    inputs = {name: x.detach() for name, x in inputs.items()}
    if case.leaf:
        leaf = inputs[case.leaf].requires_grad_()
        if options.get("inplace_backward"):  # which a leaf does not allow
            inputs[case.leaf] = leaf.clone()
    with _Record() as record:
        outputs = flat(case.run(impl, **inputs, **options))
        if case.leaf:
            torch.autograd.backward([x.sum() for x in outputs[first:] if x.requires_grad])
    if case.in_a_group:
        record.calls.append((case.op, case.in_a_group(**inputs)))
    return record.calls


def full(case: Case, inputs: Inputs, impl: str, **options: object) -> Iterator[tuple[str, tuple]]:
    """The calls with every optional input."""
    for given in _per_token_and_per_row(case, inputs):
        yield from calls(case, given, impl, **options)


def bare(case: Case, inputs: Inputs, impl: str, **options: object) -> Iterator[tuple[str, tuple]]:
    """The calls without any. What has its gradient from the forward is not differentiated, and the others also in
    their last output alone."""
    options |= case.bare_options
    if not hasattr(torch.ops.ppo_kernels, f"{case.op}_backward"):
        case = replace(case, leaf=None)
    for given in _per_token_and_per_row(case, bare_inputs(case, inputs)):
        yield from calls(case, given, impl, **options)
        if case.differentiable > 1:
            yield from calls(case, given, impl, first=1, **options)


def _per_token_and_per_row(case: Case, inputs: Inputs) -> Iterator[Inputs]:
    yield inputs
    if case.per_row:
        yield {name: _rows(x, inputs) if name in case.per_row else x for name, x in inputs.items()}


def _rows(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The first token of each row in place of all."""
    return x.view(len(inputs["cu_seqlens"]) - 1, -1)[:, 0] if "cu_seqlens" in inputs else x[:, 0]


def samples(dtype: torch.dtype, impl: str) -> Mapping[str, list[tuple]]:
    """Arguments of each registered op: with every optional tensor and with none, padded and packed."""
    found: dict[str, dict[str, tuple]] = {}
    for case in (case for case in CASES if case.contract and not case.composed):
        inputs = case.inputs(torch.Generator().manual_seed(0), dtype, 2, 3 if case.vocabulary else 7)
        for options in ({}, *({name: values[-1]} for name, values in case.choices.items())):
            for op, args in (*full(case, inputs, impl, **options), *bare(case, inputs, impl, **options)):
                found.setdefault(op, {})[_kind(args)] = args
    return {op: list(kinds.values()) for op, kinds in found.items()}


def _kind(args: tuple) -> str:
    """Calls that differ in the values of tensors alone, or in numbers, are of one kind."""
    return str([(x.dtype, x.shape) if torch.is_tensor(x) else x is True or type(x) for x in args])
