"""What every benchmark shares: one row is (op, shape, provider), checked against the reference before it is timed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from setups import DEVICE, Setup

import ppo_kernels
from ppo_kernels import backends


def providers(op: str) -> list[str]:
    """Ours per implementation, and the reference eager and compiled."""
    return [*backends.implementations(op, DEVICE), "torch.compile"]


@pytest.fixture(scope="session")
def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


@pytest.fixture
def measure(benchmark, commit):
    """``measure(setup, provider)``: check the provider against the reference, then time it."""

    def run(setup: Setup, provider: str) -> None:
        if provider == "torch.compile":
            forward = torch.compile(lambda: setup.forward("torch"), dynamic=False)

            def target():
                return setup.finish(forward())
        else:

            def target():
                return setup.call(provider)

        for got, want in zip(target(), setup.call("torch"), strict=True):
            torch.testing.assert_close(got, want, rtol=setup.tolerance, atol=setup.tolerance, equal_nan=True)

        def timed():
            result = target()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        benchmark.group = setup.name
        benchmark.extra_info.update(
            provider=provider,
            device=torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            bytes=setup.moved,
            torch=torch.__version__,
            ppo_kernels=ppo_kernels.__version__,
            commit=commit,
        )
        benchmark.pedantic(timed, rounds=7, warmup_rounds=2)
        if benchmark.stats:
            benchmark.extra_info["GB/s"] = round(setup.moved / benchmark.stats.stats.median / 1e9, 2)

    return run
