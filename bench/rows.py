"""The rows of the benchmarks: a case at a shape, by one provider. Which there are derives from the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version

import torch
from torch import Tensor

import ppo_kernels
from bench import peers
from bench.cases import DEVICE, MEASURED, Case, Inputs, Shape, benchmarks, flat
from bench.peers import AbsentError
from ppo_kernels import _native, backends

OURS = ("cpu", "cuda", "triton")
PORTABLE, BARE, PRODUCTS = "portable loops", "bare op", "matrix products"
REFERENCE, EAGER, COMPILE = "reference", "eager", "torch.compile"
#: Who is no other library, and what the report says of it.
OWN = {
    "cpu": "ours, C++",
    "cuda": "ours, CUDA C++",
    "triton": "ours, Triton",
    PORTABLE: 'ours, "cpu" as it is without AVX-512',
    BARE: "ours, the registered op without the public function's checks",
    PRODUCTS: "the products by torch that the work consists of, and nothing else: what they would be the least of",
    REFERENCE: 'impl="torch": our eager reference, which computes in float32',
    EAGER: "the few lines that a trainer would write, in the dtype of the inputs",
    COMPILE: "torch.compile of the reference",
}
PROVIDERS = (*OWN, *peers.PEERS)  # in the order of columns
#: What a run may be cut into: our own rows first, as a machine with a GPU may be there for minutes.
PHASES = ("ours", "others", "compile")
#: Of shapes, with what the command line says of them.
SIZES = {
    "small": "small shapes, 3 minutes; the default",
    "quick": "the shapes of the targets without other libraries, 2 minutes",
    "full": "the shapes of the targets, and more points of the scaling lines, 20 minutes",
    "gpu": "the shapes of the GPU table",
    "tiny": "every row of the GPU table once at a tiny shape, on any device: its times mean nothing",
}


def phase(provider: str) -> str:
    if provider in (*OURS, PORTABLE, BARE, PRODUCTS):
        return "ours"
    return "compile" if provider == COMPILE else "others"


@dataclass(frozen=True, eq=False)
class Setup:
    """A case at one shape. Inputs are made when they are first asked for."""

    case: Case
    shape: Shape

    @cached_property
    def inputs(self) -> Inputs:
        inputs = self.case.inputs(torch.Generator(DEVICE).manual_seed(0), self.case.dtype, *self.shape)
        for name in self.leaves:
            inputs[name].requires_grad_()
        return inputs

    @property
    def leaves(self) -> list[str]:
        return [name for name in (self.case.leaf, *self.case.also) if name]

    @cached_property
    def moved(self) -> int:
        """Bytes that have to be read and written at least."""
        return self.case.moved(self.inputs)

    def release(self) -> None:
        self.__dict__.pop("inputs", None)
        self.__dict__.pop("incoming", None)

    @cached_property
    def incoming(self) -> dict[tuple, Tensor]:
        """Gradients of ones by shape and dtype: made once, so that no timed call has to sum up or to fill."""
        return {}

    def finish(self, outputs: object, inputs: Inputs | None = None) -> object:
        """The outputs, and second the gradients of the first one where the case has leaves."""
        if not self.case.leaf:
            return outputs
        first, *others = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        kind = first.shape, first.dtype
        if kind not in self.incoming:
            self.incoming[kind] = torch.ones_like(first)
        leaves = [(inputs or self.inputs)[name] for name in self.leaves]
        return first, torch.autograd.grad(first, leaves, self.incoming[kind]), others

    def exact(self) -> list[Tensor]:
        """The reference in float64; logits that would not fit in it as they are."""
        wide = DEVICE == "cpu" or self.moved < 2**30
        inputs = {
            name: x.detach().to(torch.float64 if wide else x.dtype).requires_grad_(x.requires_grad)
            if x.is_floating_point()
            else x
            for name, x in self.inputs.items()
        }
        return [x.detach() for x in flat(self.finish(self.case.run("torch", **inputs), inputs))]

    def errors(self, got: object, exact: list[Tensor]) -> list[float]:
        """Per output, the largest error over the largest value, at valid tokens. More outputs than ``got`` is fine."""
        mask = self.inputs.get("mask")
        return [_error(g, want, mask) for g, want in zip(flat(got), exact, strict=False)]


def _error(got: Tensor, want: Tensor, mask: Tensor | None) -> float:
    """inf where one is NaN or infinite and the other is not. A scalar below 0.1 counts absolutely: means cancel."""
    assert got.shape == want.shape, f"the output has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach(), want.to(got.device)
    if mask is not None and mask.shape == want.shape:
        got, want = got[mask], want[mask]
    if want.numel() == 0 or torch.equal(got.double(), want.double()):
        return 0.0
    scale = want.abs().max().item()
    if want.numel() == 1:
        scale = max(scale, 0.1)
    parts = zip(got.reshape(-1).split(2**24), want.reshape(-1).split(2**24), strict=True)
    difference = max((g - w).abs().max().item() for g, w in parts)
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Row:
    group: str
    setup: Setup
    provider: str
    threads: int | None = None
    point: tuple[str, int] | None = None  # of a scaling line: the axis and where on it
    file: str = ""  # the benchmark that it belongs to

    @property
    def name(self) -> str:
        where = f"{self.point[0]}={self.point[1]}" if self.point else self.group
        return f"bench_{self.file}[{where}-{self.provider}]"

    @property
    def fullname(self) -> str:
        """Of the benchmark: committed results are found again by it."""
        return f"bench/bench_{self.file}.py::{self.name}"


def of(case: Case, shape: Shape, size: str, *, compiled: bool, file: str, threads: int | None = None) -> list[Row]:
    """A row for everyone who can do this work. The quick size does without libraries beside torch."""
    others = set(peers.for_work(case.work)) & ({"F.cross_entropy"} if size == "quick" else peers.PEERS.keys())
    left_out = {
        *([] if case.bare else [BARE]),
        *([] if case.products else [PRODUCTS]),
        *([] if case.portable_loops and DEVICE == "cpu" else [PORTABLE]),
        *([] if compiled else [COMPILE]),
        *([EAGER] if case.time_loop and DEVICE == "cuda" else []),  # it takes seconds
        *(peers.PEERS.keys() - others),
    }
    setup = Setup(case, shape)
    group = case.group(shape, threads)
    return [Row(group, setup, name, threads, file=file) for name in PROVIDERS if name not in left_out]


def best(setup: Setup) -> str:
    """Our implementation that ``impl="auto"`` takes."""
    return backends.op(setup.case.op).implementations(DEVICE)[0]


def works(size: str) -> list[Row]:
    """Every work at the shapes of a size."""
    return [
        row
        for case in benchmarks()
        for shape in case.shapes.get(size, ())
        for row in of(case, shape, size, compiled=size in case.compiled, file=case.file)
    ]


def small_calls(size: str) -> list[Row]:
    """Next to nothing to compute: what is left is the cost of a call."""
    if size not in MEASURED:
        return []
    cases = [case for case in benchmarks() if case.small_call and (size != "quick" or case.small_call_targets)]
    return [
        row
        for case in cases
        for threads in case.small_call_threads
        for row in of(case, case.small_call, size, compiled=False, file="small_call", threads=threads)
    ]


def scaling(size: str) -> list[Row]:
    """Our own cost against V, T and B with one thread, and against threads; the report fits the exponents.

    With more threads the lines would show from which size on the work is shared out, not how it grows.
    """
    rows = []
    for case in benchmarks() if size in ("small", "full") else ():
        points = [(axis.letter, at, axis.shape(at), 1) for axis in case.axes for at in axis.points(size)]
        if case.threads and DEVICE == "cpu":
            points += [("threads", n, case.threads, n) for n in (1, 2)]
        for axis, at, shape, threads in points:
            setup, group = Setup(case, shape), f"scaling: {case.work} against {axis}"
            rows.append(Row(group, setup, best(setup), threads, (f"{case.work} {axis}", at), "scaling"))
    return rows


def all_of(size: str) -> list[Row]:
    return works(size) + scaling(size) + small_calls(size)


def call_of(setup: Setup, provider: str) -> Callable[[Inputs], Callable[[], object]]:
    """From inputs to the call of a provider up to its outputs; or AbsentError."""
    case = setup.case
    if provider in peers.PEERS:
        return lambda inputs: peers.call(provider, case.work, inputs)
    if provider in (*OURS, PORTABLE, BARE):
        _require(case.op, {PORTABLE: "cpu", BARE: best(setup)}.get(provider, provider))
    if provider == PORTABLE and not _native.avx512_loops():
        raise AbsentError('"cpu" runs the portable loops: they were chosen, or this CPU has no AVX-512')
    if provider == COMPILE and case.time_loop:
        raise AbsentError("the loop over time would be unrolled into one graph of T steps")
    if provider == PRODUCTS:
        return lambda inputs: case.products(**inputs)
    impl = {PORTABLE: "cpu", REFERENCE: "torch", COMPILE: "torch"}.get(provider, provider)
    function = {EAGER: case.eager, BARE: case.bare}.get(provider) or case.call(impl)
    if provider == COMPILE:
        function = torch.compile(function, dynamic=False)
    return lambda inputs: partial(function, **inputs)


def _require(op: str, impl: str) -> None:
    if DEVICE == "cpu" and impl in ("cuda", "triton"):
        raise AbsentError("for GPUs, and this machine has none (Triton's interpreter is not timed)")
    try:
        backends.op(op).choose(impl, DEVICE, torch.float32)
    except ValueError as error:
        raise AbsentError(str(error)) from error


def tolerance(row: Row) -> float:
    case = row.setup.case
    if row.provider == COMPILE:
        return 10 * case.tolerance  # float32 as the reference, but Inductor adds up a whole row in order
    return case.tolerance if row.provider in (*OURS, PORTABLE, REFERENCE, BARE) else case.eager_tolerance


def describe(row: Row) -> dict[str, object]:
    """What names the row in the report, with the versions behind it."""
    facts: dict[str, object] = {
        "provider": row.provider,
        "op": row.setup.case.op,
        "work": row.setup.case.work,
        "device": DEVICE,
        "torch": torch.__version__,
        "ppo_kernels": ppo_kernels.__version__,
    }
    if row.provider == "triton":
        facts["triton"] = version("triton")
    if row.point:
        facts |= {"axis": row.point[0], "at": row.point[1]}
    if row.provider in peers.PEERS:
        facts |= peers.describe(row.provider)
    return facts
