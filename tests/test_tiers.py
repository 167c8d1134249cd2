"""What `make test` leaves out of a test's combinations leaves no value and no pair of values out."""

import itertools
from types import SimpleNamespace

from tests.lib.tiers import cover, of_make_test

ROWS = [dict(zip("abcd", row, strict=True)) for row in itertools.product("0123", "012", "01234", "01")]


def seen(rows, names):
    return {tuple(row[name] for name in names) for row in rows}


def test_every_value_and_every_pair_is_covered():
    for strength, at_most in ((1, 5), (2, 24), (4, 120)):
        chosen = [ROWS[i] for i in cover(ROWS, strength)]
        assert len(chosen) <= at_most
        for names in itertools.combinations("abcd", strength):
            assert seen(chosen, names) == seen(ROWS, names)


def test_values_that_come_together_and_tests_without_parameters():
    assert cover([{"low": 0, "high": 1}, {"low": 2, "high": 3}], 2) == [0, 1]
    assert cover([{"": ""}], 2) == [0]
    assert cover([], 2) == []


class Item:
    def __init__(self, impl, row, marker=None):
        self.nodeid, self.row, self.marker = f"test[{impl}]", row, marker
        self.callspec = SimpleNamespace(params=row | {"impl": impl})

    def get_closest_marker(self, name):
        return name == self.marker


def test_pairs_for_compiled_kernels_and_values_for_the_interpreter():
    items = {impl: {Item(impl, row) for row in ROWS} for impl in ("cpu", "triton")}
    marked = {Item("triton", row, "large") for row in ROWS} | {Item("cpu", row, "rest") for row in ROWS}
    items["marked"] = marked | {Item("cpu", row, "large") for row in ROWS[:1]}
    kept = of_make_test([one for group in items.values() for one in group])
    for impl, strength in (("cpu", 2), ("triton", 1)):
        rows = [one.row for one in kept & items[impl]]
        assert len(rows) < 30
        for names in itertools.combinations("abcd", strength):
            assert seen(rows, names) == seen(ROWS, names)
    assert not kept & marked
