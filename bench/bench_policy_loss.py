"""The clipped policy loss with its statistics, forward and backward."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, providers

import ppo_kernels


@pytest.mark.parametrize("provider", providers("policy_loss"))
def bench_policy_loss(measure, provider):
    logprobs = (-torch.rand(512, 2048, device=DEVICE)).requires_grad_()
    old, advantages = logprobs.detach() + 0.1 * torch.randn_like(logprobs), torch.randn(512, 2048, device=DEVICE)
    mask = torch.rand(512, 2048, device=DEVICE) < 0.9

    def call(impl):
        loss, stats = ppo_kernels.policy_loss(logprobs, old, advantages, mask, impl=impl)
        return loss, stats, torch.autograd.grad(loss, logprobs)

    measure("policy_loss fp32 fwd+bwd [512, 2048]", provider, call, 6 * logprobs.nbytes + mask.nbytes, 1e-4)
