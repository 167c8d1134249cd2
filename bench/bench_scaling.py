"""Our own cost against V, T and B with one thread, and against threads.

The points of a line take turns; the report fits the exponents. With more threads the lines would show from which size
on the work is shared out, not how it grows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench import rows, setups
from bench.rows import Row
from bench.setups import Setup

BF16 = torch.bfloat16
LAST = {"small": {"V": 18, "T": 14, "B": 8}, "full": {"V": 18, "T": 17, "B": 12}}  # powers of two


def _logprobs(**options: bool) -> Callable[[int, int], Setup]:
    return lambda count, vocab: setups.token_logprobs(BF16, count, vocab, **options)


LOGITS = {
    "token_logprobs": _logprobs(),
    "token_logprobs + entropy": _logprobs(entropy=True),
    "token_logprobs fwd+bwd": _logprobs(backward=True),
}
TOKENS: dict[str, Callable[[int, int], Setup]] = {
    "gae": setups.gae,
    "kl_rewards k3": partial(setups.kl_rewards, "k3"),
    "whiten": setups.whiten,
    "policy_loss fwd+bwd": setups.policy_loss,
    "value_loss fwd+bwd": setups.value_loss,
}


def _line(work: str, axis: str, points: list[int], make: Callable[[int], Setup]) -> list[Row]:
    return [
        Row(f"scaling: {work} against {axis}", setup, rows.best(setup), threads=1, point=(f"{work} {axis}", at))
        for at, setup in ((at, make(at)) for at in points)
    ]


def _threads(work: str, setup: Setup) -> list[Row]:
    return [
        Row(f"scaling: {work} against threads", setup, rows.best(setup), threads=n, point=(f"{work} threads", n))
        for n in (1, 2)
    ]


def rows_of(size: str) -> list[Row]:
    last = LAST[size]
    lines = []
    for work, make in LOGITS.items():
        lines += _line(work, "V", [2**k for k in range(10, last["V"] + 1)], partial(make, 16))
        lines += _line(work, "B", [2**k for k in range(last["B"] - 2)], lambda at, make=make: make(at, 8192))
        if setups.DEVICE == "cpu":
            lines += _threads(work, make(64, 32000))
    for work, make in TOKENS.items():
        lines += _line(work, "T", [2**k for k in range(4, last["T"] + 1)], partial(make, 16))
        lines += _line(work, "B", [2**k for k in range(last["B"])], lambda at, make=make: make(at, 1024))
        if setups.DEVICE == "cpu":
            lines += _threads(work, make(64, 8192))
    return lines


def bench_scaling(measure, row):
    measure(row)
