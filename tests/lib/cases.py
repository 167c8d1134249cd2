"""The calls of the contracts that all ops share: the cases of the registry (bench/cases) that are for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from bench.cases import CASES, Case, Shape, flat, pack


class Call(NamedTuple):
    op: str
    tensors: dict[str, torch.Tensor]
    call: Callable  # call(tensors, impl) -> tuple of outputs
    leaf: str | None  # the tensor that the op is differentiable in


REGISTERED = {case.name: case for case in CASES if case.contract}
NAMES = tuple(REGISTERED)
#: The others have one output per batch, or rows that know of each other.
ROWWISE = tuple(name for name, case in REGISTERED.items() if case.rowwise)
MASKED = tuple(name for name, case in REGISTERED.items() if case.per_token)
DIFFERENTIABLE = tuple(name for name, case in REGISTERED.items() if case.leaf)


def outputs(x) -> tuple[torch.Tensor, ...]:
    """Everything an op returns, flat: (loss, *stats) for the losses."""
    return tuple(flat(x))


def pick_rows(case: Call, rows: list[int]) -> dict[str, torch.Tensor]:
    """The case's tensors with only these rows, in this order."""
    if "cu_seqlens" not in case.tensors:
        return {k: x[rows] if x.dim() else x for k, x in case.tensors.items()}
    batch, tokens = case.tensors["cu_seqlens"].numel() - 1, case.tensors["mask"].numel()
    padded = {k: x.view(batch, -1) if x.numel() == tokens else x for k, x in case.tensors.items() if k != "cu_seqlens"}
    return pack({k: x[rows] if x.dim() else x for k, x in padded.items()})


def fit(name: str, impl: str, length: int) -> int:
    """A length that the implementation can afford: a row of logits takes Triton's interpreter 25 ms."""
    return min(length, 4) if impl == "triton" and REGISTERED[name].vocabulary else length


def make(name: str, dtype=torch.float32, batch=4, length=None, seed=0) -> Call:
    case, g = REGISTERED[name], torch.Generator().manual_seed(seed)
    if length is None:
        length = 9 if case.vocabulary else 33
    run = case.run
    tensors = case.inputs(g, dtype, batch, length)
    return Call(case.op, tensors, lambda t, impl: outputs(run(impl, **t)), case.leaf)


class Meeting(NamedTuple):
    """A call in which many blocks hand one another their parts (``Case.meetings``)."""

    case: Case
    dtype: torch.dtype
    shape: Shape
    options: Mapping[str, object]

    def __str__(self) -> str:
        return "-".join([self.case.name, "x".join(map(str, self.shape)), *map(str, self.options.values())])

    def make(self, seed: int = 0, device: str = "cpu") -> Call:
        tensors = self.case.inputs(torch.Generator().manual_seed(seed), self.dtype, *self.shape)
        tensors = {name: x.to(device) for name, x in tensors.items()}
        run, options = self.case.run, self.options
        return Call(self.case.op, tensors, lambda t, impl: outputs(run(impl, **t, **options)), self.case.leaf)


def meetings(where: str) -> list[Meeting]:
    """Of all contracts: "gpu" or "host"."""
    return [Meeting(case, *call) for case in REGISTERED.values() for call in case.meetings.get(where, ())]


def run(case: Call, impl: str, tensors=None) -> tuple[torch.Tensor, ...]:
    """Outputs detached, and the gradient last if there is one; the incoming gradients are of different sizes."""
    tensors = dict(case.tensors if tensors is None else tensors)
    if case.leaf is None:
        return case.call(tensors, impl)
    leaf = tensors[case.leaf] = tensors[case.leaf].detach().clone().requires_grad_()
    out = case.call(tensors, impl)
    torch.autograd.backward([x.sum() * (1 + i) for i, x in enumerate(out) if x.requires_grad])
    return (*(x.detach() for x in out), leaf.grad)
