"""Masked whitening."""

from __future__ import annotations

import pytest
import setups
from conftest import providers


@pytest.mark.parametrize("provider", providers("whiten"))
def bench_whiten(measure, provider):
    measure(setups.whiten(256, 8192), provider)
