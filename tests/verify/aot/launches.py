"""How often a call of a CUDA op launches something, by the launchers themselves, on every path of the data."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case, Inputs, flat
from tests.lib.cases import REGISTERED
from tests.lib.host_cuda import launches

ALLOCATE = ("empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided")


class _Own(TorchDispatchMode):
    """Torch's own operations: each that is no view and no allocation would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.partition("::")[2]
        views = all(r.alias_info is not None for r in op._schema.returns)
        if op.namespace == "aten" and name not in ALLOCATE and not views:
            self.names.append(f"torch {name}")
        return op(*args, **(kwargs or {}))


def of(case: Case, inputs: Inputs, **options: object) -> list[str]:
    """The kernels, memsets and operations of torch in one call; the incoming gradients are there already."""
    inputs = dict(inputs)
    if case.leaf:
        inputs[case.leaf] = inputs[case.leaf].detach().requires_grad_()
    with launches.skipped():
        some = [x for x in flat(case.run("cuda", **inputs, **options)) if x.requires_grad]
    incoming = [torch.ones_like(x) for x in some]

    def call() -> None:
        outputs = [x for x in flat(case.run("cuda", **inputs, **options)) if x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, inputs[case.leaf], incoming)

    with _Own() as own:
        found = launches.recorded(call)
    return [launch.kernel for launch in found] + own.names


def all_of() -> dict[str, list[str]]:
    """By case and shape; of the shapes of a case that launch the same only the first."""
    found: dict[str, list[str]] = {}
    for case in (case for case in REGISTERED.values() if not case.composed):
        known = []
        for dtype, shape, options in (*case.meetings.get("gpu", ()), *case.reach):
            names = of(case, case.inputs(torch.Generator().manual_seed(0), dtype, *shape), **options)
            if names not in known:
                known.append(names)
                found[" ".join([case.name, str(list(shape)), *map(str, options.values())])] = names
    return found
