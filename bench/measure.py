"""Times, errors and memory of rows. Those of a group take turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own starts and stops otherwise

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import DEVICE, flat
from bench.peers import AbsentError
from bench.rows import PORTABLE, PRODUCTS, Row, Setup, call_of, describe, tolerance
from ppo_kernels import _native

Call = Callable[[], object]

SECONDS = {"quick": 1.5, "small": 0.6, "full": 2.5, "gpu": 0.5, "tiny": 0.0}  # of timing per group
SHORT = 1e-3  # seconds; a shorter call is repeated within one sample
SLOW = 0.1  # seconds; a call that takes longer gets fewer samples
LEAST, LEAST_SLOW, MOST = 15, 3, 200  # samples
SLEEP_CYCLES = 1.9e9  # per second, of torch.cuda._sleep: no less than any clock of today's GPUs needs


@dataclass
class Timed:
    """Calls that do the same work on different memory (one of them on a CPU), and the samples in seconds per work.

    What a GPU returns is kept for a round, so that outputs too come from memory that has left the L2 cache.
    """

    calls: list[Call]
    threads: int | None = None
    works: int = 1  # that one call does: a graph has many
    repeats: int = 1
    samples: list[float] = field(default_factory=list)
    pause: float = 1e-3  # seconds that the device waits while the host enqueues
    kept: dict[int, object] = field(default_factory=dict)

    def sample(self) -> float:
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return (self._device_seconds() if DEVICE == "cuda" else self._host_seconds()) / (self.repeats * self.works)

    def _host_seconds(self) -> float:
        if self.repeats > len(self.calls):
            self.calls[0]()  # a short call finds its code in the caches, and not what the others have left there
        start = time.perf_counter()
        for i in range(self.repeats):
            self.calls[i % len(self.calls)]()
        return time.perf_counter() - start

    def _enqueue(self) -> float:
        """The host's seconds."""
        start = time.perf_counter()
        for i in range(self.repeats):
            at = i % len(self.calls)
            self.kept[at] = self.calls[at]()
        return time.perf_counter() - start

    def _device_seconds(self) -> float:
        """By events, behind a pause that grows until the host has enqueued the calls before it ends."""
        for _ in range(20):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(self.pause * SLEEP_CYCLES))
            begin.record()
            host = self._enqueue()
            end.record()
            end.synchronize()
            if host <= 0.8 * self.pause:
                return begin.elapsed_time(end) / 1e3
            self.pause = 2 * host
        raise RuntimeError(f"the host never enqueued the calls within {self.pause:.3f} s")


def in_turns(timed: dict[Hashable, Timed], seconds: float) -> None:
    """Fill in the samples. Each gets its share of ``seconds``; a slow one takes part in fewer rounds, evenly spread."""
    threads = torch.get_num_threads()
    rounds = {}
    for key, one in timed.items():
        cost = min(one.sample(), one.sample()) * one.works
        one.repeats = math.ceil(SHORT / cost) if cost < SHORT else len(one.calls)
        share = seconds / len(timed) / (cost * one.repeats)
        least = LEAST if cost < SLOW else LEAST_SLOW
        rounds[key] = min(MOST, max(least, int(share))) if seconds else 1
    total = max(rounds.values(), default=0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(total):
            for key, one in timed.items():
                if turn * rounds[key] // total != (turn - 1) * rounds[key] // total:
                    one.samples.append(one.sample())
    finally:
        gc.enable()
        torch.set_num_threads(threads)


@dataclass
class Outcome:
    """``absent`` or ``wrong`` say why a row was not timed."""

    samples: list[float] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    absent: str = ""
    wrong: str = ""


def measure(rows: list[Row], seconds: float) -> dict[Row, Outcome]:
    """Check every row of a group against float64, then time those that are right."""
    outcomes = {row: Outcome() for row in rows}
    copies: dict[Setup, list[Setup]] = {}
    exact: dict[Setup, list[torch.Tensor]] = {}
    ready: dict[Row, tuple[Timed, list[Call], list[Call]]] = {}
    begin = time.time()
    for row, outcome in outcomes.items():
        setup = row.setup
        try:
            if setup not in exact:
                copies[setup], exact[setup] = _copies(setup), setup.exact()
            call = call_of(setup, row.provider)
            halves = [call(copy.inputs) for copy in copies[setup]]  # up to the outputs, without the gradient
            whole = [_whole(row, copy, half) for copy, half in zip(copies[setup], halves, strict=True)]
            _check(row, whole, exact[setup], outcome)
            ready[row] = _timed(row, whole, outcome), whole, halves
        except AbsentError as reason:
            outcome.absent = str(reason)
        except Exception as error:  # of any library: its row is red, the others go on
            outcome.wrong = f"{type(error).__name__}: {error}"
    exact.clear()
    in_turns({row: timed for row, (timed, *_) in ready.items()}, seconds)
    for row, (timed, whole, halves) in ready.items():
        outcome, moved = outcomes[row], row.setup.moved
        outcome.samples = timed.samples
        rate = round(moved / statistics.median(timed.samples) / 1e9, 3)
        outcome.facts |= {"bytes": moved, "GB/s": rate, "repeats": timed.repeats}
        outcome.facts["threads"] = row.threads or torch.get_num_threads()
        if DEVICE == "cuda":
            outcome.facts["between"] = [round(begin, 2), round(time.time(), 2)]  # to find its clocks by
            outcome.facts |= _parts(row, len(timed.samples), whole, halves, copies[row.setup])
    for many in copies.values():
        for setup in many:
            setup.release()
    torch.compiler.reset()
    return outcomes


def _copies(setup: Setup) -> list[Setup]:
    """On a GPU as many as it takes to be beyond the L2 cache when one comes round again."""
    if DEVICE == "cpu":
        return [setup]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [setup, *(Setup(setup.case, setup.shape) for _ in range(min(32, 2 * cache // setup.moved + 1)))]


def _timed(row: Row, ready: list[Call], outcome: Outcome) -> Timed:
    """On a GPU as a graph of all copies, where the calls can be captured."""
    if DEVICE == "cpu":
        return Timed(ready, row.threads)
    graph, why = captured(ready)
    outcome.facts |= {"by": "events", "no_graph": why} if graph is None else {"by": "graph"}
    outcome.facts["ring_bytes"] = len(ready) * row.setup.moved
    return Timed(ready, row.threads) if graph is None else Timed([graph], row.threads, works=len(ready))


def captured(calls: list[Call]) -> tuple[Call | None, str]:
    """A CUDA graph of all calls in turn, without what the host does between two launches; or None, and why.

    What they return is kept while it lasts, so each has outputs of its own and a whole round passes before memory comes
    round again. A library that waits for the device, or takes memory by other means than torch, cannot be captured.
    """
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:1] * 3 + calls:
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            kept = [call() for call in calls]
    except Exception as error:  # of any library: its row is timed by events
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def replay() -> object:
        graph.replay()
        return kept

    return replay, ""


def _whole(row: Row, setup: Setup, call: Call) -> Call:
    if row.provider == PRODUCTS:
        return call
    inputs = setup.inputs

    def whole() -> object:
        return setup.finish(call(), inputs)

    return _native.portable_loops()(whole) if row.provider == PORTABLE else whole


def _check(row: Row, ready: list[Call], exact: list[torch.Tensor], outcome: Outcome) -> None:
    allowed = tolerance(row)
    for call in ready if row.provider != PRODUCTS else ():
        errors = row.setup.errors(call(), exact)
        outcome.facts |= {"error": max(errors), "tolerance": allowed, "outputs": len(errors)}
        if not max(errors) <= allowed:
            raise AssertionError(f"error {max(errors):.2g} against float64, allowed {allowed:.2g}")
    outcome.facts["extra_bytes"] = peak_extra(ready[0])


def _parts(row: Row, rounds: int, whole: list[Call], halves: list[Call], copies: list[Setup]) -> dict[str, object]:
    """On a GPU also: the call as the host sees it, on one memory within the L2 cache, and a gradient's two halves."""

    def median(calls: list[Call], repeats: int) -> float:
        alone = Timed(calls, repeats=repeats)
        return statistics.median(alone.sample() for _ in range(2 + rounds))

    def synchronized() -> float:
        start = time.perf_counter()
        whole[0]()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    facts: dict[str, object] = {
        "call_seconds": statistics.median(synchronized() for _ in range(rounds)),
        "l2_warm_seconds": median(whole[:1], len(whole)),
    }
    if row.setup.leaves and row.provider != PRODUCTS:
        few = zip(halves[:2], copies, strict=False)
        losses = [(flat(half())[0], [copy.inputs[name] for name in copy.leaves]) for half, copy in few]
        ones = torch.ones_like(losses[0][0])
        backward = [lambda y=y, x=x: torch.autograd.grad(y, x, ones, retain_graph=True) for y, x in losses]
        try:
            facts |= {
                "forward_seconds": median(halves, len(halves)),
                "backward_seconds": median(backward, len(backward)),
            }
        except RuntimeError as error:  # of a library whose backward runs once, as a compiled one that reuses buffers
            facts["no_halves"] = str(error)
    return facts


def peak_extra(call: Call) -> int:
    """The most that torch's allocator held at once in this call, in bytes, beyond what it held before."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bandwidth() -> dict[str, float]:
    """GB/s of reading and of copying memory beyond the caches, by torch: the best of ten."""
    source = torch.ones((1 << 30 if DEVICE == "cuda" else 1 << 28) // 4, device=DEVICE)
    target = torch.empty_like(source)

    def rate(call: Call, size: int) -> float:
        return round(size / min(Timed([call]).sample() for _ in range(10)) / 1e9, 1)

    return {
        "read": rate(lambda: source.sum(), source.nbytes),
        "copy": rate(lambda: target.copy_(source), 2 * source.nbytes),
    }


def machine() -> dict[str, object]:
    """What two runs that can be compared have in common, beside what else pytest-benchmark tells of a machine."""
    facts = {
        "cpu": {"brand_raw": _cpu()},
        "isa": _native.cpu_capability() if _native.CPU_ERROR is None else "C++ ops not built",
        "cores": os.cpu_count(),
        "cache MiB": _last_cache(),
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {})


def _cpu() -> str:
    """The model, where Linux tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(found, platform.processor())


def _last_cache() -> float | None:
    """MiB of the last cache before memory."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size / 2**20
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) / 1024 for size in sizes if size.endswith("K")), default=None)


def commit() -> str:
    """Of the sources; a copy without git says it in PPO_KERNELS_COMMIT."""
    if named := os.environ.get("PPO_KERNELS_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


class Session:
    """The groups of one run as they are measured, and the facts that their rows share."""

    def __init__(self, rows: list[Row], size: str, seconds: float | None) -> None:
        self.size, self.commit = size, commit()
        self.seconds = SECONDS[size] if seconds is None else seconds
        self.rates: dict[str, float] = {}
        self.outcomes: dict[Row, Outcome] = {}
        self.untimed: list[dict[str, object]] = []
        self.groups: dict[str, list[Row]] = {}
        for row in rows:
            self.groups.setdefault(row.group, []).append(row)

    def outcome(self, row: Row) -> Outcome:
        """Of the row; its group is measured when the first of its rows is asked for."""
        if not self.rates:  # pytest-benchmark asks for rows alone
            self.measure_bandwidth()
        if row not in self.outcomes:
            self.outcomes = measure(self.groups[row.group], self.seconds)
        outcome = self.outcomes[row]
        outcome.facts = describe(row) | outcome.facts | {"commit": self.commit}
        if why := outcome.absent or outcome.wrong:
            state = "absent" if outcome.absent else "wrong"
            self.untimed.append({"group": row.group, "why": why, **outcome.facts, "state": state})
        return outcome

    def measure_bandwidth(self) -> None:
        """Before and after the rows; the better of the two."""
        self.rates = {name: max(rate, self.rates.get(name, 0.0)) for name, rate in bandwidth().items()}

    def facts(self) -> dict[str, object]:
        load = [round(load, 2) for load in os.getloadavg()]
        return {"untimed": self.untimed, "run": {"size": self.size, "load": load, "GB/s": self.rates}}
