"""``pytest bench --benchmark-only``: every row is (set-up, provider), checked against float64 before it is timed.

pytest-benchmark times one test after another. Here the rows of a group are timed in turns when the first of them comes
up (bench/measure.py), and its clock then shows each test the times that were measured; statistics, JSON and comparisons
are its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench import report, rows
from bench.measure import bandwidth
from bench.rows import Outcome, Row
from ppo_kernels import _native

SECONDS = {"small": 0.6, "full": 2.5}  # of timing, per group


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-size", choices=["small", "full"], default="small", help="the class of shapes")
    group.addoption("--bench-seconds", type=float, help="of timing per group; 0 times one round (default: by size)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        cases = metafunc.module.rows_of(metafunc.config.getoption("bench_size"))
        metafunc.parametrize("row", cases, ids=str)


class Bench:
    """The outcomes of the group at hand, and what has to be told about rows that were not timed."""

    def __init__(self, config: pytest.Config) -> None:
        seconds = config.getoption("bench_seconds")
        self.seconds = SECONDS[config.getoption("bench_size")] if seconds is None else seconds
        self.groups: dict[str, list[Row]] = {}
        self.outcomes: dict[Row, Outcome] = {}
        self.untimed: list[dict[str, object]] = []
        self.bandwidth: dict[str, float] = {}
        self.now = 0.0
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        self.commit = run.stdout.strip() or "unknown"

    def clock(self) -> float:
        return self.now

    def measure_bandwidth(self) -> None:
        """Before and after the rows; the better of the two."""
        for name, rate in bandwidth().items():
            self.bandwidth[name] = max(rate, self.bandwidth.get(name, 0.0))

    def outcome(self, row: Row) -> Outcome:
        if not self.bandwidth:
            self.measure_bandwidth()
        if row not in self.outcomes:
            self.outcomes = rows.measure(self.groups[row.group], self.seconds)
        return self.outcomes[row]


KEY = pytest.StashKey[Bench]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Bench(config)
    option = config.option
    if not getattr(option, "benchmark_compare", False):
        option.benchmark_quiet = True  # one table, ours, in the place of one per group
    elif not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    bench = config.stash[KEY]
    for item in items:
        if (row := _row(item)) is not None:
            item.add_marker(pytest.mark.benchmark(timer=bench.clock, group=row.group))


def pytest_collection_finish(session: pytest.Session) -> None:
    groups = session.config.stash[KEY].groups
    for item in session.items:
        if (row := _row(item)) is not None:
            groups.setdefault(row.group, []).append(row)


def _row(item: pytest.Item) -> Row | None:
    return item.callspec.params.get("row") if hasattr(item, "callspec") else None


@pytest.fixture
def measure(request, benchmark):
    """``measure(row)``: check the row, time it with its group, and hand the times to pytest-benchmark."""
    bench = request.config.stash[KEY]

    def run(row: Row) -> None:
        outcome = bench.outcome(row)
        facts = rows.describe(row) | outcome.facts | {"commit": bench.commit}
        if outcome.absent or outcome.wrong:
            bench.untimed.append({"group": row.group, "why": outcome.absent or outcome.wrong, **facts})
            bench.untimed[-1]["state"] = "absent" if outcome.absent else "wrong"
            (pytest.skip if outcome.absent else pytest.fail)(outcome.absent or outcome.wrong)
        benchmark.extra_info.update(facts)
        samples = iter(outcome.samples)

        def replay() -> None:
            bench.now += next(samples)

        benchmark.pedantic(replay, rounds=len(outcome.samples))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What two runs that can be compared have in common."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {"brand_raw": machine_info["cpu"].get("brand_raw")}
    machine_info |= {
        "isa": _native.cpu_capability() if _native.CPU_ERROR is None else "C++ ops not built",
        "cores": os.cpu_count(),
        "cache MiB": _last_cache(),
    }
    if rows.DEVICE == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


def _last_cache() -> float | None:
    """MiB of the last cache before memory."""
    if rows.DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size / 2**20
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) / 1024 for size in sizes if size.endswith("K")), default=None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    bench = config.stash[KEY]
    bench.measure_bandwidth()
    output_json["untimed"] = bench.untimed
    output_json["run"] = {
        "size": config.getoption("bench_size"),
        "load": [round(load, 2) for load in os.getloadavg()],
        "GB/s": bench.bandwidth,
    }
    for row in output_json["benchmarks"]:
        row["params"] = row["param"] = None  # its name says it
        row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in getattr(session, "benchmarks", []) if bench]
    if timed:
        results = [b.as_dict(include_data=False) for b in timed]
        terminalreporter.write_line("")
        terminalreporter.write_line(report.overview({"benchmarks": results, "untimed": config.stash[KEY].untimed}))
