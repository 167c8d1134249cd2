"""The clipped value loss with its statistics, forward and backward."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, providers

import ppo_kernels


@pytest.mark.parametrize("provider", providers("value_loss"))
def bench_value_loss(measure, provider):
    values = torch.randn(512, 2048, device=DEVICE, requires_grad=True)
    old, returns = values.detach() + 0.3 * torch.randn_like(values), torch.randn(512, 2048, device=DEVICE)
    mask = torch.rand(512, 2048, device=DEVICE) < 0.9

    def call(impl):
        loss, stats = ppo_kernels.value_loss(values, old, returns, mask, impl=impl)
        return loss, stats, torch.autograd.grad(loss, values)

    measure("value_loss fp32 fwd+bwd [512, 2048]", provider, call, 6 * values.nbytes + mask.nbytes, 1e-4)
