"""Which combinations of parameters `make test` tries.

All of them would take half an hour, most of it in Triton's interpreter. So every implementation meets each pair of a
test's values, and the interpreter each value. ``--tier rest`` runs what that leaves out, ``--tier whole`` everything.
What is marked ``rest``, a test or one of its values, is left out of `make test`, and what is marked ``large`` from that
of the interpreter. On a GPU Triton's kernels are compiled, and are an implementation like the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ppo_kernels.triton import INTERPRETED
from tests.lib import devices

TIERS = ("test", "rest", "whole")
IMPLEMENTATIONS = tuple(map(repr, devices.IMPLEMENTATIONS))
SLOW = repr("triton") if INTERPRETED else ""  # the implementation that runs in an interpreter


def cover(rows: Sequence[dict], strength: int) -> list[int]:
    """Which rows are enough to see every combination of ``strength`` values that any row has: the greedy choice."""

    def combinations(row: dict) -> set:
        return set(itertools.combinations(sorted(row.items()), min(strength, len(row))))

    found = [combinations(row) for row in rows]
    missing: set = set().union(*found)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(found[i] & missing))
        missing -= found[best]
        chosen.append(best)
    return sorted(chosen)


def _parameters(item) -> dict[str, str]:
    params = item.callspec.params if hasattr(item, "callspec") else {"": ""}
    return {name: repr(value) for name, value in params.items()}


def of_make_test(items: Iterable) -> set:
    """Those of the items (of pytest, outside of ``tests/verify``) that `make test` runs."""
    groups: dict[tuple, list] = {}
    for item in items:
        row = _parameters(item)
        impl = next((value for value in row.values() if value in IMPLEMENTATIONS), None)
        if not item.get_closest_marker("rest") and not (impl == SLOW and item.get_closest_marker("large")):
            groups.setdefault((item.nodeid.partition("[")[0], impl), []).append((item, row))
    kept = set()
    for (_, impl), group in groups.items():
        kept.update(group[i][0] for i in cover([row for _, row in group], 1 if impl == SLOW else 2))
    return kept
