"""The clipped value loss with its statistics, forward and backward."""

from __future__ import annotations

import pytest
import setups
from conftest import providers


@pytest.mark.parametrize("provider", providers("value_loss"))
def bench_value_loss(measure, provider):
    measure(setups.value_loss(512, 2048), provider)
