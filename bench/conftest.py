"""``pytest bench --benchmark-only``: the rows of ``python -m bench``, with pytest-benchmark's JSON and comparisons."""

from __future__ import annotations

import pytest

from bench import measure, report
from bench.results import Results
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
    rows = [item.callspec.params["row"] for item in session.items if getattr(item, "originalname", "") == "bench_row"]
    config.stash[SESSION] = measure.Session(rows, config.getoption("bench_size"), config.getoption("bench_seconds"))


@pytest.fixture
def time(request, benchmark):
    """``time(row)``: check the row, time it in turns with its group, and hand the times to pytest-benchmark."""

    def time(row: Row) -> None:
        outcome = request.config.stash[SESSION].outcome(row)
        if outcome.absent or outcome.wrong:
            (pytest.skip if outcome.absent else pytest.fail)(outcome.absent or outcome.wrong)
        benchmark.group, benchmark.extra_info = row.group, outcome.facts
        # Committed results are found again by these names, whichever file a benchmark is in now.
        benchmark.name, benchmark.fullname = row.name, row.fullname
        # pytest-benchmark times one test after another, so it cannot let the rows of a group take turns. It records an
        # empty call here, and what was measured takes the place of that in the statistics that it keeps for the test.
        benchmark.pedantic(lambda: None)
        benchmark.stats.stats.data[:] = outcome.samples

    return time


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)
    machine_info |= measure.machine()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    session = config.stash[SESSION]
    session.measure_bandwidth()
    output_json |= session.facts()
    for row in output_json["benchmarks"]:
        row["params"] = row["param"] = None  # its name says it
        row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if timed := [bench.as_dict(include_data=False) for bench in getattr(session, "benchmarks", []) if bench]:
        data = {"benchmarks": timed} | config.stash[SESSION].facts()
        terminalreporter.write_line("\n" + report.overview(Results(data)))
