"""A row of the benchmarks: one set-up by one provider. The rows of a group are checked, then timed in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

import ppo_kernels
from bench import peers
from bench.measure import Timed, in_turns, median, peak_extra
from bench.peers import AbsentError
from bench.setups import DEVICE, Setup
from ppo_kernels import backends

OURS = ("cpu", "cuda", "triton")
REFERENCE, EAGER, COMPILE, BARE = "reference", "eager", "torch.compile", "bare op"


@dataclass(frozen=True)
class Row:
    group: str
    setup: Setup
    provider: str
    threads: int | None = None
    point: tuple[str, int] | None = None  # of a scaling line: the axis and where on it

    def __str__(self) -> str:
        where = f"{self.point[0]}={self.point[1]}" if self.point else self.setup.name
        return f"{where}-{self.provider}"


@dataclass
class Outcome:
    """``absent`` or ``wrong`` say why a row was not timed."""

    samples: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, object] = dataclasses.field(default_factory=dict)
    absent: str = ""
    wrong: str = ""


def of(setup: Setup, *, compiled: bool = True) -> list[Row]:
    """A row for everyone who can do this work."""
    providers = [*OURS, REFERENCE, EAGER, *([COMPILE] if compiled else []), *peers.for_work(setup.work)]
    if setup.bare is not None:
        providers.insert(len(OURS), BARE)
    return [Row(setup.name, setup, provider) for provider in providers]


def best(setup: Setup) -> str:
    """Our implementation that ``impl="auto"`` takes."""
    return backends.implementations(setup.op, DEVICE)[0]


def calls(setup: Setup, provider: str) -> Callable[[], list[torch.Tensor]]:
    """What is timed, or AbsentError."""
    inputs, run = setup.inputs, setup.run
    if provider in OURS:
        _require(setup.op, provider)
        return lambda: setup.finish(run(provider, **inputs), inputs)
    if provider == BARE:
        _require(setup.op, best(setup))
        return lambda: setup.finish(setup.bare(**inputs), inputs)
    if provider == REFERENCE:
        return lambda: setup.finish(run("torch", **inputs), inputs)
    if provider == EAGER:
        return lambda: setup.finish(setup.plain(**inputs), inputs)
    if provider == COMPILE:
        if setup.steps:
            raise AbsentError("the loop over time would be unrolled into one graph of T steps")
        compiled = torch.compile(lambda **tensors: run("torch", **tensors), dynamic=False)
        return lambda: setup.finish(compiled(**inputs), inputs)
    call = peers.call(provider, setup)
    return lambda: setup.finish(call(), inputs)


def _require(op: str, impl: str) -> None:
    if DEVICE == "cpu" and impl in ("cuda", "triton"):
        raise AbsentError("for GPUs, and this machine has none (Triton's interpreter is not timed)")
    if impl not in backends.implementations(op, DEVICE):
        try:
            backends.choose(op, impl, DEVICE, torch.float32)
        except ValueError as error:
            raise AbsentError(str(error)) from error


def measure(rows: list[Row], seconds: float) -> dict[Row, Outcome]:
    """Check every row of a group against float64, then time those that are right."""
    outcomes = {row: Outcome() for row in rows}
    timed: dict[Row, Timed] = {}
    exact: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        if id(row.setup) not in exact:
            exact[id(row.setup)] = row.setup.exact()
        outcome = outcomes[row]
        try:
            ready = [calls(copy, row.provider) for copy in _copies(row.setup)]
            _check(row, ready, exact[id(row.setup)], outcome)
            timed[row] = Timed(ready, row.threads)
        except AbsentError as reason:
            outcome.absent = str(reason)
        except Exception as error:  # of any library: its row is red, the others go on
            outcome.wrong = f"{type(error).__name__}: {error}"
    exact.clear()
    if timed:
        in_turns(timed, seconds)
    for row, one in timed.items():
        outcomes[row].samples = one.samples
        outcomes[row].facts |= _speed(row, one)
    for row in rows:
        row.setup.release()
    torch.compiler.reset()
    return outcomes


def _copies(setup: Setup) -> list[Setup]:
    """On a GPU as many as it takes to be beyond the L2 cache when one comes round again."""
    if DEVICE == "cpu":
        return [setup]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [setup, *(dataclasses.replace(setup) for _ in range(min(32, 2 * cache // setup.moved + 1)))]


def _check(row: Row, ready: list[Callable], exact: list[torch.Tensor], outcome: Outcome) -> None:
    setup = row.setup
    tolerance = setup.tolerance if row.provider in (*OURS, REFERENCE, BARE) else setup.eager_tolerance
    if row.provider == COMPILE:
        tolerance = 10 * setup.tolerance  # float32 as the reference, but Inductor adds up a whole row in order
    for call in ready:
        errors = setup.errors(call(), exact)
        outcome.facts |= {"error": max(errors), "tolerance": tolerance, "outputs": len(errors)}
        if not max(errors) <= tolerance:
            raise AssertionError(f"error {max(errors):.2g} against float64, allowed {tolerance:.2g}")
    outcome.facts["extra_bytes"] = peak_extra(ready[0])


def _speed(row: Row, one: Timed) -> dict[str, object]:
    setup, seconds = row.setup, median(one.samples)
    facts: dict[str, object] = {
        "bytes": setup.moved,
        "GB/s": round(setup.moved / seconds / 1e9, 3),
        "repeats": one.repeats,
        "threads": row.threads or torch.get_num_threads(),
    }
    if one.warm:
        facts["l2_warm_seconds"] = median(one.warm)
    return facts


def describe(row: Row) -> dict[str, object]:
    """What names the row in the report, with the versions behind it."""
    facts: dict[str, object] = {
        "provider": row.provider,
        "op": row.setup.op,
        "work": row.setup.work,
        "device": DEVICE,
        "torch": torch.__version__,
        "ppo_kernels": ppo_kernels.__version__,
    }
    if row.provider == "triton":
        facts["triton"] = version("triton")
    if row.point:
        facts |= {"axis": row.point[0], "at": row.point[1]}
    if row.provider in peers.PEERS:
        try:
            facts |= peers.describe(row.provider)
        except PackageNotFoundError:
            facts["version"] = "not installed"
    return facts
