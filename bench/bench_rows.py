"""The rows of ``python -m bench`` as benchmarks of pytest-benchmark: one test for each."""

from __future__ import annotations

from bench import rows

ROWS = {"bench_work": rows.works, "bench_small_call": rows.small_calls, "bench_scaling": rows.scaling}


def pytest_generate_tests(metafunc):
    found = ROWS[metafunc.function.__name__](metafunc.config.getoption("bench_size"))
    metafunc.parametrize("row", found, ids=str)


def bench_work(report, row):
    """Every work at the shapes of the size, by everyone who can do it."""
    report(row)


def bench_small_call(report, row):
    """What a call costs when there is next to nothing to compute."""
    report(row)


def bench_scaling(report, row):
    """Our own cost against V, T, B and threads."""
    report(row)
