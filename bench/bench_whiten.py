"""Masked whitening."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, providers

import ppo_kernels


@pytest.mark.parametrize("provider", providers("whiten"))
def bench_whiten(measure, provider):
    x = torch.randn(256, 8192, device=DEVICE)
    mask = torch.rand(256, 8192, device=DEVICE) < 0.9

    def call(impl):
        return ppo_kernels.whiten(x, mask, impl=impl)

    measure("whiten fp32 [256, 8192]", provider, call, 3 * x.nbytes + 2 * mask.nbytes, 1e-4)
