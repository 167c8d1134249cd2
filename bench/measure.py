"""Times and memory of calls. The calls of a group take turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

SHORT = 1e-3  # seconds; a shorter call is repeated within one sample
SLOW = 0.1  # seconds; a call that takes longer gets fewer samples
LEAST, LEAST_SLOW, MOST = 15, 3, 200  # samples


@dataclass
class Timed:
    """Calls that do the same work on different memory (one of them on a CPU), and the samples in seconds per call."""

    calls: list[Call]
    threads: int | None = None
    repeats: int = 1
    samples: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)  # on one memory again and again, within the GPU's L2 cache

    def sample(self) -> float:
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        clock = _device_seconds if torch.cuda.is_available() else _wall_seconds
        return clock(self.calls, self.repeats) / self.repeats


def _wall_seconds(calls: list[Call], repeats: int) -> float:
    call = calls[0]
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _device_seconds(calls: list[Call], repeats: int) -> float:
    """By events, behind a pause on the device in which the host enqueues the calls."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)
    first.record()
    for i in range(repeats):
        calls[i % len(calls)]()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def in_turns(timed: dict[Hashable, Timed], seconds: float) -> None:
    """Fill in the samples. Each gets its share of ``seconds``; a slow one takes part in fewer rounds, evenly spread."""
    threads = torch.get_num_threads()
    rounds = {}
    for key, one in timed.items():
        cost = min(one.sample(), one.sample())
        one.repeats = math.ceil(SHORT / cost) if cost < SHORT else len(one.calls)
        share = seconds / len(timed) / (cost * one.repeats)
        least = LEAST if cost < SLOW else LEAST_SLOW
        rounds[key] = min(MOST, max(least, int(share))) if seconds else 1
    total = max(rounds.values())
    gc.collect()
    gc.disable()
    try:
        for turn in range(total):
            for key, one in timed.items():
                if turn * rounds[key] // total != (turn - 1) * rounds[key] // total:
                    one.samples.append(one.sample())
        for one in timed.values():
            if len(one.calls) > 1:
                alone = Timed(one.calls[:1], repeats=len(one.calls))
                one.warm = [alone.sample() for _ in range(len(one.samples))]
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def peak_extra(call: Call) -> int:
    """The most that torch's allocator held at once in this call, in bytes, beyond what it held before."""
    if torch.cuda.is_available():
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)

    def rate(call: Call, size: int) -> float:
        return round(size / min(Timed([call]).sample() for _ in range(10)) / 1e9, 1)

    return {
        "read": rate(lambda: source.sum(), source.nbytes),
        "copy": rate(lambda: target.copy_(source), 2 * source.nbytes),
    }


def median(samples: list[float]) -> float:
    return statistics.median(samples)
