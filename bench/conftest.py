"""``pytest bench --benchmark-only``: the rows of ``python -m bench``, with pytest-benchmark's JSON and comparisons."""

from __future__ import annotations

import pytest

from bench import measure, report
from bench.rows import SIZES, Row


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-size", choices=SIZES, default="small", help="the class of shapes")
    group.addoption("--bench-seconds", type=float, help="of timing per group; 0 times one round (default: by size)")


SESSION = pytest.StashKey[measure.Session]()


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not getattr(option, "benchmark_compare", False):
        option.benchmark_quiet = True  # one table, ours, in the place of one per group
    elif not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    rows = [item.callspec.params["row"] for item in session.items if _has_row(item)]
    seconds = config.getoption("bench_seconds")
    seconds = measure.SECONDS[config.getoption("bench_size")] if seconds is None else seconds
    config.stash[SESSION] = measure.Session(rows, seconds)


def _has_row(item: pytest.Item) -> bool:
    return isinstance(getattr(item, "callspec", None) and item.callspec.params.get("row"), Row)


@pytest.fixture(name="report")
def fixture_report(request, benchmark):
    """``report(row)``: check the row, time it in turns with its group, and hand the times to pytest-benchmark."""

    def run(row: Row) -> None:
        outcome = request.config.stash[SESSION].outcome(row)
        if outcome.absent or outcome.wrong:
            (pytest.skip if outcome.absent else pytest.fail)(outcome.absent or outcome.wrong)
        benchmark.group, benchmark.extra_info = row.group, outcome.facts
        # Committed results are found again by these names, whichever file a benchmark is in now.
        benchmark.name, benchmark.fullname = row.name, f"bench/bench_{row.file}.py::{row.name}"
        # pytest-benchmark times one test after another, so it cannot let the rows of a group take turns. It records an
        # empty call here, and what was measured takes the place of that in the statistics that it keeps for the test.
        benchmark.pedantic(lambda: None)
        benchmark.stats.stats.data[:] = outcome.samples

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What two runs that can be compared have in common."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {"brand_raw": machine_info["cpu"].get("brand_raw")}
    machine_info |= measure.machine()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    session = config.stash[SESSION]
    session.measure_bandwidth()
    output_json |= session.facts(config.getoption("bench_size"))
    for row in output_json["benchmarks"]:
        row["params"] = row["param"] = None  # its name says it
        row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in getattr(session, "benchmarks", []) if bench]
    if timed:
        results = [bench.as_dict(include_data=False) for bench in timed]
        data = {"benchmarks": results} | config.stash[SESSION].facts(config.getoption("bench_size"))
        terminalreporter.write_line("")
        terminalreporter.write_line(report.overview(data))
