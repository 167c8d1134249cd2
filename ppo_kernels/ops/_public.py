"""What surrounds every public function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable)


def public(function: Function) -> Function:
    """A public function, which reads a DTensor that every rank holds whole as this rank's tensor.

    It returns plain tensors; the gradient of such a DTensor is one too, with the same placements.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        for x in (*arguments, *options.values()):
            if type(x) is not Tensor and isinstance(x, Tensor) and _is_replica(x):
                return function(*map(_local, arguments), **{name: _local(x) for name, x in options.items()})
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return _within_a_transform(function, arguments, options)
        return function(*arguments, **options)

    return cast(Function, call)


def _is_replica(x: object) -> bool:
    placements = getattr(x, "placements", None) if isinstance(x, Tensor) else None
    return placements is not None and all(p.is_replicate() for p in placements)


def _local(x: Any) -> Any:
    return x.to_local() if _is_replica(x) else x


def not_a_graph(function: Function) -> Function:
    """A function that Dynamo leaves alone, and all that it calls.

    Where torch.compile has broken its graph inside a transform, Dynamo makes graphs of the eager code's single frames.
    Those know nothing of the transform: in some the refusal of a second derivative is lost, on others PyTorch fails.
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


@not_a_graph
def _within_a_transform(function: Callable, arguments: tuple, options: dict[str, Any]) -> Any:
    return function(*arguments, **options)
