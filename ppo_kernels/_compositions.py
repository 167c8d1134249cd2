"""Ops made of other ops and of torch's own, in Python: where they run, and what torch knows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppo_kernels import backends
from ppo_kernels._registered import arguments, checked, guard
from ppo_kernels.backends import Op

_library = torch.library.Library("ppo_kernels_composed", "DEF")


@dataclass(eq=False)
class Composition(Op):
    """An op that runs where all of its parts do; ``status`` counts them in its place."""

    parts: tuple[str, ...] = ()

    def implementations(self, device_type: str) -> tuple[str, ...]:
        first, *others = (backends.op(name).implementations(device_type) for name in self.parts)
        return tuple(impl for impl in first if all(impl in available for available in others))


def compose(name: str, parts: Sequence[str]) -> Composition:
    """An op that is nothing but calls of public ones, which are differentiated and traced by themselves."""
    return _keep(Composition(name, {}, {}, None, _not_traced, (), {}, parts=tuple(parts)))


def _not_traced(*_arguments: Any) -> None:
    raise NotImplementedError("torch traces the parts of this composition")


def register_composition(
    schema: str, parts: Sequence[str], *, fake: Callable, kernel: Callable, reference: Callable | None = None
) -> Composition:
    """Make what Python computes one op for torch, which does not look into it: the number of rows that count, and with
    it the shapes of the products, depend on values.

    Args:
        schema: of the op; its last argument, ``str impl``, says which implementation of the parts to call.
        parts: the ops that it calls.
        fake, reference: as in ``backends.register``.
        kernel: what computes it. Autocast has no say in it: the dtype of each product is chosen.
    """

    def call(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False), torch.no_grad():
            return kernel(*args)

    name, fake = schema.partition("(")[0], checked(schema, fake)
    _library.define(schema)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, checked(schema, call), key)
    guard(_library, schema)
    torch.library.register_fake(f"ppo_kernels_composed::{name}", fake, lib=_library)
    op = getattr(torch.ops.ppo_kernels_composed, name).default
    torch.library.register_vmap(op, backends.vmap_by_calls(op), lib=_library)
    floats = tuple(i for i, argument in enumerate(arguments(schema)) if argument.startswith("float "))
    impls = [impl for impl in backends.NAMES if impl != "auto"]
    kernels = dict.fromkeys(impls, op)
    graphs = dict.fromkeys(impls, backends.register_traced(name, schema, floats, fake, op)) if floats else {}
    return _keep(Composition(name, kernels, {}, reference, fake, floats, graphs, parts=tuple(parts)))


def _keep(op: Composition) -> Composition:
    backends._ops[op.name] = op
    return op


def compositions() -> tuple[str, ...]:
    """The public ops that are made of others."""
    return tuple(
        name for name, op in backends._ops.items() if isinstance(op, Composition) and name in backends._public_names
    )
