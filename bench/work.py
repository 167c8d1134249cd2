"""What a set-up is: its inputs, our call, the eager one, and how errors are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """``work`` says what is computed, whatever the shape; other libraries are known by it (peers.py).

    ``run(impl, **inputs)`` is our call and ``plain(**inputs)`` the eager one, whose outputs are the first of ours.
    Where ``wrt`` names an input, the first output is differentiated with respect to it. The tolerances are for errors
    as ``errors`` counts them, the second for code that computes in the dtype of the inputs.
    """

    op: str
    work: str
    name: str
    make: Callable[[], Inputs]
    run: Callable[..., object]
    count: Callable[[Inputs], int]
    tolerance: float
    plain: Callable[..., object]
    eager_tolerance: float
    steps: bool = False  # the eager code is a Python loop over time
    wrt: str | None = None
    bare: Callable[..., object] | None = None  # the registered op without the public function around it

    @cached_property
    def inputs(self) -> Inputs:
        torch.manual_seed(0)
        return self.make()

    @cached_property
    def moved(self) -> int:
        """Bytes that the passes over memory have to read and write: a loss has two, forward and backward."""
        return self.count(self.inputs)

    def release(self) -> None:
        self.__dict__.pop("inputs", None)

    def forward(self, impl: str) -> object:
        return self.run(impl, **self.inputs)

    def eager(self) -> object:
        return self.plain(**self.inputs)

    @property
    def loop(self) -> Callable[[], object] | None:
        """The time loop that trainers run."""
        return self.eager if self.steps else None

    def finish(self, outputs: object, inputs: Inputs | None = None) -> list[Tensor]:
        """The outputs as a flat list, and the gradient second where the set-up has one."""
        flat = _flat(outputs)
        if self.wrt is not None:
            flat.insert(1, torch.autograd.grad(flat[0].sum(), (inputs or self.inputs)[self.wrt])[0])
        return flat

    def call(self, impl: str) -> list[Tensor]:
        return self.finish(self.forward(impl))

    def exact(self) -> list[Tensor]:
        """The reference on the same inputs in float64."""
        inputs = {
            name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in self.inputs.items()
        }
        return [x.detach() for x in self.finish(self.run("torch", **inputs), inputs)]

    def errors(self, got: list[Tensor], exact: list[Tensor]) -> list[float]:
        """Per output, the largest error over the largest value, at valid tokens. More outputs than ``got`` is fine."""
        mask = self.inputs.get("mask")
        return [_error(g, want, mask) for g, want in zip(got, exact, strict=False)]


def _flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, (tuple, list))
    return [t for part in result for t in _flat(part)]


def _error(got: Tensor, want: Tensor, mask: Tensor | None) -> float:
    """inf where one is NaN or infinite and the other is not. A scalar below 0.1 counts absolutely: means cancel."""
    assert got.shape == want.shape, f"the output has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach(), want.to(got.device)
    if mask is not None and mask.shape == want.shape:
        got, want = got[mask], want[mask]
    if want.numel() == 0 or torch.equal(got.double(), want):
        return 0.0
    scale = want.abs().max().item()
    if want.numel() == 1:
        scale = max(scale, 0.1)
    difference = (
        max((g - w).abs().max().item() for g, w in zip(got.split(64), want.split(64), strict=True))
        if (want.dim())
        else (got - want).abs().item()
    )
    error = difference / scale if scale else difference
    return error if error == error else float("inf")
