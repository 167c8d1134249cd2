"""A moving average of the policy's weights (InstructGPT, DeepSpeed-Chat: 0.992)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import state


class MovingAverage:
    """In float32, of what this rank holds of each trained parameter; the others do not move."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: held.detach().float().clone() for name, held in _held(module)}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        for name, held in _held(module):
            self.average[name].lerp_(held.float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of(self, module: torch.nn.Module) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        own = {name: held.detach().clone() for name, held in _held(module)}
        try:
            self._write(module, self.average)
            yield
        finally:
            self._write(module, own)

    @torch.no_grad()
    def _write(self, module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        for name, held in _held(module):
            held.copy_(weights[name])

    def slices(self, module: torch.nn.Module) -> list[state.Slice]:
        """To be saved, or filled."""
        return [state.laid_out(name, weight, self.average[name]) for name, weight in _trained(module)]


def _trained(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def _held(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, state.held(weight)) for name, weight in _trained(module)]
