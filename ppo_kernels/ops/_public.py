"""What surrounds every public function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from ppo_kernels._registered import forward_mode_message, not_a_graph
from ppo_kernels._types import Function, constant_of_a_graph

_MAY_HOLD_REPLICAS = (Tensor, tuple, list)


def public(function: Function, *, op: str = "", differentiable: bool = False, also: str = "") -> Function:
    """A public function, which reads a DTensor that every rank holds whole as this rank's tensor.

    It returns plain tensors; the gradient of such a DTensor is one too, with the same placements. A tangent of forward
    mode is refused, but for the first argument of a ``differentiable`` op.
    """
    name, first = op or function.__name__, function.__code__.co_varnames[0]

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if forward_ad._current_level >= 0:
            constants = options | {first: None, also: None} if differentiable else options
            refuse_tangents(name, *arguments[differentiable:], *constants.values(), differentiable=differentiable)
            if not torch.compiler.is_compiling():
                return _without_graphs(on_this_rank, arguments, options)
        for x in arguments:
            if type(x) is not Tensor and isinstance(x, _MAY_HOLD_REPLICAS) and _holds_replica(x):
                return on_this_rank(arguments, options)
        for x in options.values():
            if type(x) is not Tensor and isinstance(x, _MAY_HOLD_REPLICAS) and _holds_replica(x):
                return on_this_rank(arguments, options)
        return function(*arguments, **options)

    def on_this_rank(arguments: Iterable, options: dict[str, Any]) -> Any:
        return function(*map(_local, arguments), **{name: _local(x) for name, x in options.items()})

    return cast(Function, call)


def refuse_tangents(op: str, *given: object, differentiable: bool = False) -> None:
    """Raise if forward-mode differentiation goes on and one of these takes part: the results would have no tangent.

    A graph does not know which of its inputs do, and reads the level for Dynamo to guard it: one made without would
    drop tangents. It does know what it differentiates itself.
    """
    if forward_ad._current_level < 0:
        return
    message = forward_mode_message(op)
    if differentiable:
        message = (
            f"{op}: forward-mode differentiation is not supported in this argument, and a graph takes no dual tensors;"
            " detach it, or call torch.func.jvp within the graph"
        )
    if torch.compiler.is_compiling():
        _allow_in_graph()
        if torch.compiler.is_exporting() or not (differentiable and differentiates_forward()):
            _refuse_tangent(message, None)
        for x in _tensors(given):
            _refuse_tangent(message, x)
    elif any_tangent(given):
        raise RuntimeError(message)


@constant_of_a_graph
def differentiates_forward() -> bool:
    """Whether a graph differentiates in forward mode where this is traced."""
    stack = functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == functorch.TransformType.Jvp for interpreter in stack)


@constant_of_a_graph
def _allow_in_graph() -> None:
    """Make ``_refuse_tangent`` opaque to Dynamo, which runs this before it looks at that."""
    torch.compiler.allow_in_graph(_refuse_tangent)


def _refuse_tangent(message: str, x: Tensor | None) -> Tensor:
    """Raise if ``x`` has a tangent or is None, and with it end the compilation: behind a break of the graph eager code
    would no longer see the tangents that the graph has made."""
    if x is None or any_tangent((x,)):
        raise RuntimeError(message)
    return x.new_empty(0)


def _holds_replica(x: object) -> bool:
    """Whether it is a DTensor that every rank holds whole, or a pair or list with one."""
    if isinstance(x, (tuple, list)):
        return any(_holds_replica(part) for part in x)
    placements = getattr(x, "placements", None) if isinstance(x, Tensor) else None
    return placements is not None and all(p.is_replicate() for p in placements)


def _local(x: Any) -> Any:
    if not _holds_replica(x):
        return x
    return tuple(_local(part) for part in x) if isinstance(x, (tuple, list)) else x.to_local()


def _tensors(given: Iterable[object]) -> list[Tensor]:
    """The tensors among arguments, also of a pair."""
    pairs = [x if isinstance(x, (tuple, list)) else (x,) for x in given]
    return [x for pair in pairs for x in pair if isinstance(x, Tensor)]


@not_a_graph
def _without_graphs(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


@not_a_graph
def any_tangent(given: Iterable[object]) -> bool:
    """Whether one of the tensors, also in a pair, has a tangent: at the innermost transform, or at one around it."""
    tensors = _tensors(given)
    transform = functorch.peek_interpreter_stack()
    sees_tangents = transform is None or transform.key() == functorch.TransformType.Jvp
    if sees_tangents and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return True
    if transform is None:
        return False
    level = transform.level()
    outer = [functorch.get_unwrapped(x) if functorch.maybe_get_level(x) == level else x for x in tensors]
    with temporarily_pop_interpreter_stack():
        return any_tangent(outer)
