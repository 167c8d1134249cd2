"""Log-probabilities of the labels: the one op that reads the logits."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, providers

import ppo_kernels

N, V = (8192, 128256) if DEVICE == "cuda" else (128, 151936)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", providers("token_logprobs"))
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp+entropy"])
def bench_forward(measure, provider, dtype, entropy):
    logits = torch.randn(N, V, device=DEVICE).to(dtype)
    labels = torch.randint(V, (N,), device=DEVICE)

    def call(impl):
        return ppo_kernels.token_logprobs(logits, labels, entropy=entropy, impl=impl)

    name = f"token_logprobs{' + entropy' if entropy else ''} {dtype} [{N}, {V}]"
    measure(name, provider, call, logits.nbytes, 2e-4)


@pytest.mark.parametrize("provider", providers("token_logprobs"))
def bench_forward_backward(measure, provider):
    logits = torch.randn(N, V, device=DEVICE).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(V, (N,), device=DEVICE)

    def call(impl):
        logp = ppo_kernels.token_logprobs(logits, labels, impl=impl)
        return torch.autograd.grad(logp.sum(), logits)

    measure(f"token_logprobs fwd+bwd {logits.dtype} [{N}, {V}]", provider, call, 3 * logits.nbytes, 1e-2)
