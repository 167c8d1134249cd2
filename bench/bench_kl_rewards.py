"""KL-shaped rewards."""

from __future__ import annotations

import pytest
import setups
from conftest import providers


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("provider", providers("kl_rewards"))
def bench_kl_rewards(measure, provider, estimator):
    measure(setups.kl_rewards(estimator, 256, 8192), provider)
