"""The clipped policy loss with its statistics, forward and backward."""

from __future__ import annotations

import pytest
import setups
from conftest import providers


@pytest.mark.parametrize("ref", [False, True], ids=["plain", "ref"])
@pytest.mark.parametrize("provider", providers("policy_loss"))
def bench_policy_loss(measure, provider, ref):
    measure(setups.policy_loss(512, 2048, ref=ref), provider)
