"""KL-shaped rewards."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, providers

import ppo_kernels


@pytest.mark.parametrize("provider", providers("kl_rewards"))
def bench_kl_rewards(measure, provider):
    logprobs, ref_logprobs = -torch.rand(2, 256, 8192, device=DEVICE)
    scores = torch.randn(256, device=DEVICE)
    mask = torch.rand(256, 8192, device=DEVICE) < 0.9

    def call(impl):
        return ppo_kernels.kl_rewards(logprobs, ref_logprobs, scores, mask, kl_estimator="k3", impl=impl)

    measure("kl_rewards fp32 k3 [256, 8192]", provider, call, 3 * logprobs.nbytes + mask.nbytes, 1e-3)
