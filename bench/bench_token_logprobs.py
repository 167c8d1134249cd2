"""Log-probabilities of the labels: the one op that reads the logits."""

from __future__ import annotations

import pytest
import setups
import torch
from conftest import providers

N, V = (8192, 128256) if setups.DEVICE == "cuda" else (128, 151936)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", providers("token_logprobs"))
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp+entropy"])
def bench_forward(measure, provider, dtype, entropy):
    measure(setups.token_logprobs(dtype, N, V, entropy=entropy), provider)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("provider", providers("token_logprobs"))
def bench_forward_backward(measure, provider, dtype):
    measure(setups.token_logprobs(dtype, N, V, backward=True), provider)
