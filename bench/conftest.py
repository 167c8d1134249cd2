"""What every benchmark shares: one row is (op, shape, provider), checked against the reference before it is timed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ppo_kernels
from ppo_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    """``measure(group, provider, call, moved_bytes, tolerance)``: check ``call(impl)``, then time it."""

    def run(group: str, provider: str, call: Callable[[str], object], moved_bytes: int, tolerance: float) -> None:
        if provider == "torch.compile":
            compiled = torch.compile(lambda: call("torch"), dynamic=False)
            target = compiled
        else:

            def target():
                return call(provider)

        got, want = _flat(target()), _flat(call("torch"))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance, equal_nan=True)

        def timed():
            result = target()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        benchmark.group = group
        benchmark.extra_info.update(
            provider=provider,
            device=torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            bytes=moved_bytes,
            torch=torch.__version__,
            ppo_kernels=ppo_kernels.__version__,
            commit=commit,
        )
        benchmark.pedantic(timed, rounds=7, warmup_rounds=2)
        if benchmark.stats:
            benchmark.extra_info["GB/s"] = round(moved_bytes / benchmark.stats.stats.median / 1e9, 2)

    return run


def _flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    assert isinstance(result, (tuple, list))
    return [t for part in result for t in _flat(part)]
