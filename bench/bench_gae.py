"""Generalised advantage estimation."""

from __future__ import annotations

import pytest
import setups
from conftest import providers


@pytest.mark.parametrize("shape", [(8, 128), (256, 8192)], ids=str)
@pytest.mark.parametrize("provider", providers("gae"))
def bench_gae(measure, provider, shape):
    measure(setups.gae(*shape), provider)
