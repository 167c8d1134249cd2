"""moments: the first half of whiten, which is timed there."""

from __future__ import annotations

from bench.cases import Case, tokens

CASES = (
    Case(
        op="moments",
        contract=True,
        rowwise=False,
        per_token=False,
        inputs=lambda *args: tokens(*args, "x"),
    ),
)
