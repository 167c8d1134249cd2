"""The rows of ``python -m bench`` as benchmarks of pytest-benchmark: one test for each."""

from bench import rows


def pytest_generate_tests(metafunc):
    metafunc.parametrize("row", rows.all_of(metafunc.config.getoption("bench_size")), ids=lambda row: row.name)


def bench_row(time, row):
    time(row)
