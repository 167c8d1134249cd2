"""The rows of `make verify PART=faults` give up on what hangs, and not on what a busy machine slows down."""

import time

import pytest

from .faults.processes import run, succeeded


def circles() -> None:
    while True:
        pass


def work() -> str:
    ends = time.process_time() + 2
    while time.process_time() < ends:
        pass
    return "done"


@pytest.mark.parametrize(
    ("function", "message"), [(lambda: time.sleep(100), "s of work, [2-9] s without"), (circles, "[2-9] s of work")]
)
def test_what_hangs_is_given_up(tmp_path, function, message):
    with pytest.raises(AssertionError, match=message):
        run(tmp_path, function, limit=2, still=2)


def test_who_works_may_take_longer_than_who_waits(tmp_path):
    assert succeeded(run(tmp_path, work, still=1.5)) == "done"
