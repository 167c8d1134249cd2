"""The JSON of a run as tables."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bench import cases, clocks
from bench.cases import benchmarks
from bench.rows import COMPILE, OURS, OWN, PRODUCTS, PROVIDERS

#: The order of rows: what comes first in a training step.
WORKS = tuple(dict.fromkeys(case.work for case in benchmarks()))
ON_A_GPU = {case.group(shape): (case, shape) for case in benchmarks() for shape in case.shapes.get("gpu", ())}
MIB = 2**20
NOISY = 0.25  # spread

Bench = dict[str, Any]


@dataclass
class Table:
    title: str
    note: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.lines, strict=True)]

        def text(line: list[str]) -> str:
            cells = [f"{c:>{w}}" if i else f"{c:<{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            return "| " + " | ".join(cells) + " |"

        rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
        return "\n".join([text(self.header), f"|{rule}|", *map(text, self.lines)])


@dataclass
class Line:
    """One scaling line: the least seconds at each point of an axis, as noise must not look like growth."""

    work: str
    axis: str
    points: list[tuple[int, float]]
    bytes: list[int]

    @classmethod
    def of(cls, work: str, axis: str, benches: list[Bench]) -> Line:
        benches = sorted(benches, key=lambda bench: bench["extra_info"]["at"])
        points = [(bench["extra_info"]["at"], bench["stats"]["min"]) for bench in benches]
        return cls(work, axis, points, [bench["extra_info"]["bytes"] for bench in benches])

    def rates(self) -> list[float]:
        """GB/s at each point."""
        return [size / time / 1e9 for size, (_, time) in zip(self.bytes, self.points, strict=True)]


class Results:
    def __init__(self, data: dict[str, Any]) -> None:
        self.machine = data.get("machine_info", {})
        self.device = self.machine.get("gpu") or self.machine.get("cpu", {}).get("brand_raw") or "unknown CPU"
        self.run = data.get("run", {})
        self.rate = self.run.get("GB/s", {})  # at which torch reads and copies memory
        self.when = str(data.get("datetime", ""))[:16].replace("T", " ")
        self.untimed: list[Bench] = data.get("untimed", [])
        self.clocks = [clocks.Sample(*sample) for sample in data.get("clocks", [])]
        self.groups: dict[str, dict[str, Bench]] = {}
        scaling: dict[tuple[str, str], list[Bench]] = {}
        for bench in data["benchmarks"]:
            info = bench["extra_info"]
            if "axis" in info:
                scaling.setdefault((info["work"], info["axis"].rpartition(" ")[2]), []).append(bench)
            elif "provider" in info:
                self.groups.setdefault(bench["group"], {})[info["provider"]] = bench
        self.groups = dict(sorted(self.groups.items(), key=_place))
        lines = [Line.of(work, axis, benches) for (work, axis), benches in scaling.items()]
        self.lines = [line for line in lines if line.axis != "threads"]
        self.threads = [line for line in lines if line.axis == "threads"]
        first = data["benchmarks"][0]["extra_info"] if data["benchmarks"] else {}
        self.versions = {name: first.get(name, "") for name in ("torch", "ppo_kernels", "threads")}
        commits = dict.fromkeys(bench["extra_info"].get("commit", "") for bench in data["benchmarks"])
        self.versions["commit"] = ", ".join(commits)  # rows that were measured again are of a later one

    @property
    def wrong(self) -> list[Bench]:
        return [row for row in self.untimed if row["state"] == "wrong"]

    def providers(self) -> list[str]:
        found = {provider for group in self.groups.values() for provider in group}
        return [name for name in PROVIDERS if name in found] + sorted(found - set(PROVIDERS))

    def ours(self, group: str) -> str | None:
        """Our fastest implementation in this group."""
        rows = self.groups.get(group, {})
        return min([name for name in OURS if name in rows], key=lambda name: seconds(rows[name]), default=None)

    def ratio(self, group: str, provider: str) -> float | None:
        """How many times longer the provider takes than we do."""
        rows, mine = self.groups.get(group, {}), self.ours(group)
        return seconds(rows[provider]) / seconds(rows[mine]) if mine and provider in rows else None

    def best_rate(self, work: str) -> float | None:
        """GB/s of one thread at the best size of the scaling lines: in cache, where instructions are the limit."""
        return max((rate for line in self.lines if line.work == work for rate in line.rates()), default=None)


def seconds(bench: Bench) -> float:
    return bench["stats"]["median"]


def small_call(group: str) -> bool:
    """Next to nothing to compute: 8 rows, and not 8 sequences of hidden states."""
    return re.search(r"\[8, \d+\](, 1 thread)?$", group) is not None


def spread(bench: Bench) -> float:
    """The interquartile range over the median."""
    return bench["stats"]["iqr"] / bench["stats"]["median"]


def _place(item: tuple[str, dict[str, Bench]]) -> tuple[bool, int]:
    """Small calls last; the others in the order of a training step."""
    group, rows = item
    work = next(iter(rows.values()))["extra_info"]["work"]
    return small_call(group), WORKS.index(work) if work in WORKS else len(WORKS)


def duration(s: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if s >= scale * 0.9995:
            return f"{s / scale:.3g} {unit}"
    return f"{s * 1e9:.3g} ns"


def times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.0f}×" if ratio >= 99.5 else f"{ratio:.3g}×"


def mib(size: float) -> str:
    return f"{size / MIB:.2f}" if size < 10 * MIB else f"{size / MIB:.0f}"


def speed_table(results: Results) -> Table:
    others = [name for name in results.providers() if name not in OURS]
    read = results.rate.get("read")
    table = Table(
        "Speed",
        "× is how many times longer the other takes (medians of calls in turns). GB/s counts the bytes that our passes "
        "over memory read and write, over our time; % is the share of what torch reads from memory on this machine "
        "(more than 100 %: the data was in the caches). In cache is our best rate at any size with one thread: where "
        "it is below what memory delivers, the instructions are the limit. ~ marks what a busy machine blurred.",
        ["work", "ours", "GB/s", "% of read", "in cache, 1 thread", *others],
    )
    for group, rows in results.groups.items():
        mine = results.ours(group)
        if mine is None:
            continue
        rate, best = rows[mine]["extra_info"]["GB/s"], results.best_rate(rows[mine]["extra_info"]["work"])
        ours = duration(seconds(rows[mine])) + (f" ({mine})" if mine != "cpu" else "")
        blurred = {name: "~" for name in rows if max(spread(rows[name]), spread(rows[mine])) > NOISY}
        ratios = [times(results.ratio(group, name)) + blurred.get(name, "") for name in others]
        in_cache = f"{best:.3g}" if best else ""
        table.lines.append([group, ours, f"{rate:.3g}", _percent(rate, read), in_cache, *ratios])
    return table


def _percent(rate: float, whole: float | None) -> str:
    return f"{100 * rate / whole:.0f} %" if whole else ""


def per_provider(results: Results, title: str, note: str, show: Callable[[Bench], str]) -> Table:
    table = Table(title, note, ["work", *results.providers()])
    for group, rows in results.groups.items():
        table.lines.append([group, *(show(rows[name]) if name in rows else "" for name in results.providers())])
    return table


def error(row: Bench) -> str:
    return f"{row['extra_info']['error']:.0e}" if "error" in row["extra_info"] else ""


def device_table(results: Results) -> Table:
    note = (
        "Device times of a whole work: by replays of a CUDA graph of as many copies as leave the L2 cache, inputs and "
        "outputs, and (events) where a library cannot be captured, by events around calls that the host has enqueued "
        "before. IQR is the interquartile range over the median; call is the wall-clock time of one synchronized call; "
        "forward and backward are timed alone, by events; % is the share of the rate at which torch copies memory; the "
        "floor is what copying the bytes that the work has to read and write would take; MHz is the least clock of the "
        "SMs while the group was timed, ! if it was held down."
    )
    columns = ("min", "median", "IQR", "forward", "backward", "call", "in L2", "floor", "% of copy", "target", "MHz")
    table = Table("Device times, µs", note, ["work", "provider", *columns])
    copy = results.rate.get("copy")
    for group, rows in results.groups.items():
        for name in results.providers():
            info = rows[name]["extra_info"] if name in rows else {}
            if "call_seconds" not in info:
                continue
            stats, floor = rows[name]["stats"], _floor(results, info)
            times = [info.get(f"{part}_seconds") for part in ("forward", "backward", "call", "l2_warm")]
            cells = [micros(stats["min"]), micros(stats["median"]), f"{spread(rows[name]):.0%}"]
            cells += [*map(micros, [*times, floor]), _percent(info["GB/s"], copy)]
            cells += [" ".join(device_target(results, group, name)), _clock(results, info)]
            provider = f"{name} (events)" if info.get("by") == "events" else name
            table.lines.append([group, provider, *cells])
    return table


def micros(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.3g}"


def _floor(results: Results, info: Bench) -> float | None:
    copy = results.rate.get("copy")
    return info["bytes"] / copy / 1e9 if copy else None


def device_target(results: Results, group: str, provider: str | None) -> list[str]:
    """What the device may take, and what came of it: of our implementations alone."""
    case, shape = ON_A_GPU.get(group, (None, ()))
    if case is None or case.device_target is None or provider not in OURS:
        return []
    row = results.groups[group][provider]
    floor = _floor(results, row["extra_info"])
    if floor is None:
        return []
    verdict = case.device_target.verdict(shape, floor, seconds(row), row["extra_info"]["call_seconds"])
    return [f"≤ {micros(case.device_target.most(shape, floor))}", verdict]


def _clock(results: Results, info: Bench) -> str:
    samples = clocks.between(results.clocks, *info.get("between", (0.0, 0.0)))
    slowed = "!" if any(clocks.held(sample.reasons) for sample in samples) else ""
    return f"{min(sample.mhz for sample in samples)}{slowed}" if samples else ""


def untimed_table(results: Results) -> Table:
    """Who is missing, and why."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in results.untimed:
        reasons.setdefault((row["provider"], row["state"], row["why"]), []).append(row["group"])
    note = "Rows that were not timed. Wrong means that the result was off: such a row is never timed."
    table = Table("Not timed", note, ["provider", "state", "why", "rows"])
    for (provider, state, why), groups in sorted(reasons.items()):
        table.lines.append([provider, state, why, str(len(groups)) if state == "absent" else "; ".join(groups)])
    return table


def works_table() -> Table:
    note = "The steps of a PPO update of a language model that the rows stand for."
    small = ["[8, ...]", "small calls: next to nothing to compute, so what is left is the cost of a call"]
    return Table("What is computed", note, ["work", "is"], [*map(list, cases.described().items()), small])


def sources_table(results: Results) -> Table:
    table = Table("Who is who", "", ["provider", "version", "what is called"])
    for name in results.providers():
        info = next(rows[name]["extra_info"] for rows in results.groups.values() if name in rows)
        by = "torch" if name in (COMPILE, PRODUCTS) else "ppo_kernels"
        table.lines.append([name, info.get("version", f"{by} {info[by]}"), OWN.get(name) or info.get("loaded", "")])
    return table


def exponents(line: Line) -> tuple[float, float]:
    """The growth exponent of the upper half of a line (least squares), and the steepest doubling of the whole."""
    logs = [(math.log2(at), math.log2(time)) for at, time in line.points]
    steepest = max(((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(logs)), default=math.nan)
    half = logs[len(logs) // 2 :]
    return statistics.linear_regression(*zip(*half, strict=True)).slope if len(half) > 1 else math.nan, steepest


CLIFF = math.log2(3)  # a doubling that costs more than three times as much


def scaling_table(results: Results) -> Table:
    table = Table(
        "Growth",
        "Exponent of the least time over the upper half of each line (1 is linear; below 1 a fixed cost still shows), "
        f"and the steepest doubling; beyond {CLIFF:.2f} (three times the time) it would be a cliff. One thread.",
        ["work", "axis", "from", "to", "exponent", "steepest doubling", "time at the end", "verdict"],
    )
    for line in results.lines:
        slope, steepest = exponents(line)
        (start, _), (end, last) = line.points[0], line.points[-1]
        verdict = "linear" if slope <= 1.15 and steepest <= CLIFF else "LOOK"
        figures = [str(start), str(end), f"{slope:.2f}", f"{steepest:.2f}", duration(last)]
        table.lines.append([line.work, line.axis, *figures, verdict])
    return table


def threads_table(results: Results) -> Table:
    note = "Least time with one thread over that with two; 2 is ideal."
    table = Table("Threads", note, ["work", "1 thread", "2 threads", "gain"])
    for line in results.threads:
        if len(line.points) == 2:
            (_, one), (_, two) = line.points
            table.lines.append([line.work, duration(one), duration(two), times(one / two)])
    return table
