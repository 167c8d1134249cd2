"""Generalised advantage estimation."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, providers

import ppo_kernels


@pytest.mark.parametrize("shape", [(8, 128), (256, 8192)], ids=str)
@pytest.mark.parametrize("provider", providers("gae"))
def bench_gae(measure, provider, shape):
    rewards, values = torch.randn(2, *shape, device=DEVICE)
    mask = torch.rand(shape, device=DEVICE) < 0.9

    def call(impl):
        return ppo_kernels.gae(rewards, values, mask, impl=impl)

    measure(f"gae fp32 {list(shape)}", provider, call, 4 * rewards.nbytes + mask.nbytes, 1e-4)
