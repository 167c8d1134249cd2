"""Every op on the CPU in under two minutes: ``python -m bench.quick``; ``--check`` fails when a target is missed.

One table. The providers of a row are timed in turns within one run, on the same tensors, and the medians are compared.
All of them are checked against the reference in float64 before any is timed. GB/s counts what our passes over memory
read and write. Extra memory is the peak of what torch's allocator holds beyond the inputs during one call, outputs
included, as its profiler reports it.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own starts and stops otherwise

import torch
from torch.profiler import ProfilerActivity, profile

import ppo_kernels
from bench import setups
from bench.setups import Setup
from ppo_kernels import _native

SECONDS_PER_ROW = 1.5  # of timing
MIB = 2**20
BARE = "bare op"  # the registered op without the public function around it
COLUMNS = ("reference", "eager", "compile", "loop", BARE)

Call = Callable[[], object]


@dataclass
class Row:
    """``targets``: a provider and how many times faster than it we have to be."""

    setup: Setup
    targets: dict[str, float] = field(default_factory=dict)
    compiled: bool = True
    reference: bool = True
    max_extra: int | None = None  # bytes


def rows() -> list[Row]:
    bf16, fp32 = torch.bfloat16, torch.float32
    n, vocab = 256, 151936
    per_row = 64 * n  # bytes; the logits have vocab times as many
    backward = {"eager": 6.0, "compile": 4.0}

    def logits(dtype, **options):
        return setups.token_logprobs(dtype, n, vocab, **options)

    forward = {"reference": 12.0, "eager": 4.5, "compile": 2.0}
    return [
        Row(logits(bf16), forward, max_extra=per_row),
        Row(logits(fp32), compiled=False, max_extra=per_row),
        Row(logits(bf16, entropy=True), {"eager": 15.0}, compiled=False, max_extra=per_row),
        Row(logits(bf16, backward=True), backward, reference=False, max_extra=2 * n * vocab + per_row),
        Row(logits(fp32, backward=True), backward, reference=False, max_extra=4 * n * vocab + per_row),
        Row(setups.gae(256, 8192), {"loop": 60.0}, compiled=False),
        Row(setups.kl_rewards("k1", 256, 8192), compiled=False),
        Row(setups.kl_rewards("k3", 256, 8192)),
        Row(setups.whiten(256, 8192), compiled=False),
        Row(setups.experience(256, 8192), {"loop": 60.0}, compiled=False, reference=False),
        Row(setups.policy_loss(512, 2048), {"eager": 10.0, "compile": 1.5}),
        Row(setups.policy_loss(512, 2048, ref=True)),
        Row(setups.value_loss(512, 2048)),
    ]


def providers(row: Row) -> dict[str, Call]:
    setup = row.setup
    calls: dict[str, Call] = {"ours": lambda: setup.call("cpu")}
    if row.reference:
        calls["reference"] = lambda: setup.call("torch")
    if setup.loop is None:
        calls["eager"] = lambda: setup.finish(setup.eager())
    else:
        calls["loop"] = lambda: setup.finish(setup.loop())
    if row.compiled:
        forward = torch.compile(lambda: setup.forward("torch"), dynamic=False)
        calls["compile"] = lambda: setup.finish(forward())
    return calls


def check(setup: Setup, calls: dict[str, Call]) -> None:
    """Every provider against the reference in float64; this also compiles and warms up."""
    want = setup.exact()
    for name, call in calls.items():
        tolerance = setup.eager_tolerance if name in ("eager", "loop") else setup.tolerance
        if name == "compile":
            tolerance *= 10  # Inductor adds up a whole row in order
        error = max(setup.errors(call(), want))
        if not error <= tolerance:
            raise AssertionError(f"{setup.name}, {name}: error {error:.2g} against float64, allowed {tolerance:.2g}")


def medians(calls: dict[str, Call], seconds: float, least: int = 11) -> dict[str, float]:
    """Seconds per call. The providers take turns; a slow one (a Python loop) sits out the rounds that it would fill."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    slow = {name for name, call in calls.items() if _time(call) > seconds / 8}
    done = 0
    while done < least or (time.perf_counter() < end and done < 1001):
        for name, call in calls.items():
            if done < 3 or name not in slow:
                spent[name].append(_time(call))
        done += 1
    return {name: statistics.median(times) for name, times in spent.items()}


def _time(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_extra(call: Call) -> int:
    """The most that torch's CPU allocator held at once in this call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(row: Row) -> list[str]:
    calls = providers(row)
    check(row.setup, calls)
    times = medians(calls, SECONDS_PER_ROW)
    extra = {name: peak_extra(call) for name, call in calls.items() if name in ("ours", "eager")}
    targets = [(f"≥ {target:g}× {name}", times[name] / times["ours"] >= target) for name, target in row.targets.items()]
    if row.max_extra is not None:
        targets.append((f"≤ {_mib(row.max_extra)} MiB", extra["ours"] <= row.max_extra))
    return _cells(row.setup.name, times, row.setup.moved, extra, targets)


def small_call() -> list[str]:
    """What the public function adds to the registered op, where the work itself is next to nothing."""
    setup = setups.gae(8, 128)
    rewards, values = torch.randn(2, 8, 128)
    mask = torch.rand(8, 128) < 0.9
    op = torch.ops.ppo_kernels.gae.default
    batch = 100
    single: dict[str, Call] = {
        "ours": lambda: ppo_kernels.gae(rewards, values, mask),
        BARE: lambda: op(rewards, values, mask, None, None, None, 1.0, 0.95, 0),
        "loop": setup.loop,
    }
    check(setup, {"ours": lambda: setup.call("cpu"), "loop": lambda: setup.finish(setup.loop())})

    def repeated(call: Call, n: int) -> Call:
        return lambda: [call() for _ in range(n)]

    counts = {"ours": batch, BARE: batch, "loop": 1}
    times = medians({name: repeated(call, counts[name]) for name, call in single.items()}, SECONDS_PER_ROW)
    times = {name: seconds / counts[name] for name, seconds in times.items()}
    overhead = (times["ours"] - times[BARE]) * 1e6
    name = f"{setup.name}, call + {overhead:.1f} µs of checks"
    met = times["ours"] <= 3 * times[BARE]
    return _cells(name, times, setup.moved, {"ours": peak_extra(single["ours"])}, [("≤ 3× bare op", met)])


def _mib(size: int) -> str:
    return f"{size / MIB:.2f}" if size < 10 * MIB else f"{size / MIB:.0f}"


def _cells(
    name: str, times: dict[str, float], moved: int, extra: dict[str, int], targets: list[tuple[str, bool]]
) -> list[str]:
    ratios = [f"{times[other] / times['ours']:.3g}" if other in times else "" for other in COLUMNS]
    verdicts = "; ".join(f"{text} {'ok' if met else 'MISSED'}" for text, met in targets)
    return [
        name,
        f"{times['ours'] * 1e3:.3f}",
        f"{moved / times['ours'] / 1e9:.1f}",
        *ratios,
        _mib(extra["ours"]),
        _mib(extra["eager"]) if "eager" in extra else "",
        verdicts,
    ]


HEADER = ["op", "ours, ms", "GB/s", *(f"× {name}" for name in COLUMNS), "extra MiB", "eager's", "target"]


def print_table(table: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in (HEADER, *table)) for i in range(len(HEADER))]

    def text(line):
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:-1], strict=True))]
        return "| " + " | ".join([*cells, line[-1].ljust(widths[-1])]) + " |"

    print(text(HEADER))
    print(
        "|" + "|".join("-" * (w + 1) + ("-" if i in (0, len(widths) - 1) else ":") for i, w in enumerate(widths)) + "|"
    )
    for line in table:
        print(text(line))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quick", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    options = parser.parse_args()
    if _native.CPU_ERROR is not None:
        print(f"the C++ ops are not there: {_native.CPU_ERROR}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    start = time.perf_counter()
    table = []
    for row in [*rows(), None] if not options.only else [r for r in rows() if options.only in r.setup.name]:
        table.append(small_call() if row is None else measure(row))
        row = None
        torch.compiler.reset()
        gc.collect()
    print_table(table)
    print(
        f"\n× p: how many times longer p takes (medians, in turns). {torch.get_num_threads()} threads of"
        f" {os.cpu_count()}, {_native.cpu_capability()}, torch {torch.__version__},"
        f" ppo_kernels {ppo_kernels.__version__}, {time.perf_counter() - start:.0f} s"
    )
    missed = [line[0] for line in table if "MISSED" in line[-1]]
    print("targets: " + (f"missed by {', '.join(missed)}" if missed else "all met"))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
