"""The ops on a GPU beside eager code, torch.compile and a plain copy: ``python -m bench.gpu_timing OUT [--dry-run]``.

Device times are medians of events around calls that the host has enqueued before, on rotating inputs larger than the
L2 cache; "call" is the wall-clock time of one synchronized call. OUT gets timings.json and timings.md. A dry run builds
every row with tiny shapes and runs it once, on whatever device there is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import ppo_kernels
from bench import setups
from bench.setups import DEVICE, Inputs, Setup
from ppo_kernels import backends

BF16 = torch.bfloat16
SLEEP_CYCLES = 1.9e9  # per second, of torch.cuda._sleep: no less than any clock of today's GPUs needs
ROTATE = 2**28  # bytes, several times an L2 cache
COMPILE, EAGER = "torch.compile", "eager"


def rows(tiny: bool) -> Iterator[Setup]:
    """The shapes of the GPU table."""
    count = 8 if tiny else 8192
    for vocab in (96, 97) if tiny else (128256, 151936, 151935):
        yield setups.token_logprobs(BF16, count, vocab)
        yield setups.token_logprobs(BF16, count, vocab, entropy=True)
    yield setups.token_logprobs(BF16, count, 96 if tiny else 128256, backward=True)
    for shape in ((4, 40),) if tiny else ((512, 2048), (64, 32768)):
        yield setups.gae(*shape)
        yield setups.kl_rewards("k3", *shape)
        yield setups.whiten(*shape)
        yield setups.experience(*shape)
        yield setups.policy_loss(*shape)
        yield setups.policy_loss(*shape, ref=True)
        yield setups.value_loss(*shape)
    yield setups.p3o_loss(*((8, 40, 2) if tiny else (512, 2048, 2)))
    yield setups.group_advantages(*((4, 3) if tiny else (1024, 8)))


def providers(setup: Setup) -> dict[str, Callable[[Inputs], object]]:
    """Everyone's forward. The eager time loop takes seconds, and compiling it minutes: they are left out."""
    ours = [impl for impl in backends.implementations(setup.op, DEVICE) if impl != "torch"]
    found = {impl: (lambda inputs, impl=impl: setup.run(impl, **inputs)) for impl in ours}
    if not setup.steps:
        compiled = torch.compile(setup.plain, dynamic=False)
        found[EAGER] = lambda inputs: setup.plain(**inputs)
        found[COMPILE] = lambda inputs: compiled(**inputs)
    return found


def _first(outputs: object) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else _first(outputs[0])  # type: ignore[index]


def device_seconds(calls: list[Callable[[], object]], samples: int) -> float:
    """Per call. Without a GPU the wall-clock time, of a dry run that means nothing."""
    times: list[float] = []
    pause = 1e-3  # seconds that the device waits while the host enqueues; grows until the host is the faster one
    for attempt in range(samples + 20):
        if DEVICE == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(pause * SLEEP_CYCLES))
            begin.record()
        start = time.perf_counter()
        for call in calls:
            call()
        seconds = host = time.perf_counter() - start
        if DEVICE == "cuda":
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        if attempt < 2:
            continue  # warm-up
        if DEVICE == "cuda" and host > 0.8 * pause:
            pause = 2 * host
            continue
        times.append(seconds / len(calls))
        if len(times) == samples:
            break
    assert times, f"the host never enqueued within {pause:.3f} s"
    return statistics.median(times)


def wall_seconds(call: Callable[[], object], samples: int) -> float:
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_rate(nbytes: int, samples: int) -> float:
    """Bytes per second of a copy within the device, reads and writes counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * nbytes / device_seconds([lambda: target.copy_(source)] * 4, samples)


def check(setup: Setup, forward: Callable[[Inputs], object], own: bool, want: list[Tensor]) -> float:
    """The largest error against the reference; float64 where that fits, and it does for all but logits."""
    got = [x.detach() for x in setup.finish(forward(setup.inputs))]
    error = max(setup.errors(got, want[: len(got)]))
    limit = setup.tolerance if own else setup.eager_tolerance
    assert error <= limit, f"{setup.name}: error {error:.2e} > {limit:.0e}"
    return error


def reference(setup: Setup) -> list[Tensor]:
    if setup.op != "token_logprobs":
        return setup.exact()
    return [x.detach() for x in setup.call("torch")]


def timed(setup: Setup, forward: Callable[[Inputs], object], many: list[Inputs], samples: int) -> dict[str, float]:
    """Microseconds of the parts of a call, and of the whole."""
    full = [lambda x=x: setup.finish(forward(x), x) for x in many]
    row = {"forward_us": device_seconds([lambda x=x: forward(x) for x in many], samples)}
    if setup.wrt is not None:
        graphs = [(_first(forward(x)).sum(), x[setup.wrt]) for x in many[:2]]
        backward = [lambda y=y, x=x: torch.autograd.grad(y, x, retain_graph=True) for y, x in graphs]
        row["backward_us"] = device_seconds(backward, samples)
    row |= {"device_us": device_seconds(full, samples), "call_us": wall_seconds(full[0], samples)}
    return {name: 1e6 * seconds for name, seconds in row.items()}


def measure(setup: Setup, copy: float, samples: int) -> list[dict]:
    """A row per provider. A failure is a row with its reason: the rows after it still count."""
    found: list[dict] = []
    try:
        copies = max(1, min(16, math.ceil(ROTATE / setup.moved))) if DEVICE == "cuda" else 1
        many = [setup.inputs, *(setup.make() for _ in range(copies - 1))]
        want = reference(setup)
        for name, forward in providers(setup).items():
            row: dict[str, object] = {"work": setup.name, "provider": name, "bytes": setup.moved}
            found.append(row)
            try:
                row["error"] = check(setup, forward, name not in (EAGER, COMPILE), want)
                times = timed(setup, forward, many, samples)
                rate = setup.moved / times["device_us"] / 1e3
                row |= times | {"GB/s": rate, "of_copy": rate * 1e9 / copy}
            except Exception as problem:  # a compiler's own, or out of memory
                row["problem"] = _text(problem)
    except Exception as problem:
        found.append({"work": setup.name, "provider": "inputs and reference", "problem": _text(problem)})
    setup.release()
    return found


def _text(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".replace("\n", " ")[:300]


def commit() -> str:
    """Of the sources; a copy without git says it in PPO_KERNELS_COMMIT."""
    if named := os.environ.get("PPO_KERNELS_COMMIT"):
        return named
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def table(results: dict) -> str:
    facts = results["facts"]
    lines = [f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}: copy {facts['copy_GB/s']:.0f} GB/s"]
    columns = ("forward_us", "backward_us", "device_us", "call_us", "GB/s", "of_copy", "error")
    lines += ["", "| work | provider | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in results["rows"]:
        if "problem" in row:
            lines.append(f"| {row['work']} | {row['provider']} | {row['problem']} |" + " |" * (len(columns) - 1))
            continue
        cells = [f"{row[c]:.3g}" if c in row else "" for c in columns]
        lines.append(f"| {row['work']} | {row['provider']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if DEVICE != "cuda" and not options.dry_run:
        parser.error("no GPU is visible to torch; --dry-run builds every row without one")
    samples = 1 if options.dry_run else 15
    copy = copy_rate(2**16 if options.dry_run else 2**31, samples)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU: a dry run, whose times mean nothing"
    facts = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "copy_GB/s": copy / 1e9}
    facts |= {"ppo_kernels": ppo_kernels.__version__, "commit": commit(), "date": time.strftime("%F")}
    results = {"facts": facts, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for setup in rows(options.dry_run):
        results["rows"] += measure(setup, copy, samples)
        (options.out / "timings.json").write_text(json.dumps(results, indent=1) + "\n")  # as far as it came
        (options.out / "timings.md").write_text(table(results))
    print(table(results))
    return 1 if any("problem" in row for row in results["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
