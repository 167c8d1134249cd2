"""The rollout's chain in one call is the three ops one after the other."""

import pytest
import torch

from bench import oracle
from ppo_kernels import Experience, gae, kl_rewards, prepare_experience, whiten
from tests.lib.helpers import NAN, assert_close_to_oracle, assert_raises, bit_equal, cu, holey_mask

OP = "prepare_experience"
B, T = 5, 23


def make(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = -torch.rand(2, B, T, generator=g).to(dtype)
    values, scores = torch.randn(B, T, generator=g).to(dtype), torch.randn(B, generator=g).to(dtype)
    return {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores}


OPTIONS = (
    {},
    {"kl_coef": 0.3, "kl_estimator": "k3", "score_clip": 0.5, "kl_clamp": 0.4, "gamma": 0.9, "lam": 0.5},
    {"masked_steps": "zero", "lam": torch.rand(B), "bootstrap_value": torch.rand(B), "shift_mean": False},
    {"masked_steps": "keep", "score_index": torch.arange(B), "unbiased": False, "eps": 0.1, "kl_log_clamp": 0.2},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_oracle(impl, options, dtype):
    inputs, mask = make(dtype), holey_mask(B, T)
    got = prepare_experience(**inputs, mask=mask, impl=impl, **options)
    want = oracle.prepare_experience(**inputs, mask=mask, **options)
    for x, y, name in zip(got, want, Experience._fields, strict=True):
        assert x.dtype == dtype
        ceiling = 1e-9 if dtype == torch.float64 and impl != "triton" else 2e-5
        assert_close_to_oracle(x, y, ceiling=ceiling, what=name)


@pytest.mark.parametrize("packed", [False, True])
def test_is_the_three_ops_to_the_bit(impl, packed):
    inputs, mask = make(), holey_mask(B, T)
    inputs["values"][~mask] = NAN
    more = {"cu_seqlens": cu([T] * B)} if packed else {}
    if packed:
        inputs = {name: x.reshape(-1) if x.dim() == 2 else x for name, x in inputs.items()}
        mask = mask.reshape(-1)
    values = inputs["values"]
    rollout = {name: x for name, x in inputs.items() if name != "values"}
    rewards, kl = kl_rewards(**rollout, mask=mask, kl_coef=0.2, impl=impl, **more)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, impl=impl, **more)
    for whitened in (True, False):
        options = {"kl_coef": 0.2, "gamma": 0.9, "whiten_advantages": whitened}
        got = prepare_experience(**inputs, mask=mask, impl=impl, **more, **options)
        scaled = whiten(advantages, mask, impl=impl) if whitened else advantages
        assert bit_equal(tuple(got), (rewards, scaled, returns, kl))
        assert not any(x.requires_grad for x in got)


@pytest.mark.parametrize("name", ["lam", "bootstrap_value", "scores"])
def test_one_float64_input_makes_every_result_float64(impl, name):
    inputs, mask = make(), holey_mask(B, T)
    inputs |= {"lam": torch.rand(B), "bootstrap_value": torch.rand(B)}
    inputs[name] = inputs[name].double()
    got = prepare_experience(**inputs, mask=mask, impl=impl)
    want = prepare_experience(**{key: x.double() for key, x in inputs.items()}, mask=mask, impl=impl)
    assert bit_equal(tuple(got), tuple(want))


def test_errors_name_the_op_that_refuses():
    inputs = make()
    assert_raises(TypeError, lambda: prepare_experience(**inputs | {"values": 1.0}), "prepare_experience: values")
    assert_raises(ValueError, lambda: prepare_experience(**inputs, impl="tpu"), "prepare_experience: impl", "tpu")
    assert_raises(ValueError, lambda: prepare_experience(**inputs, gamma=2.0), "gae: gamma")
    assert_raises(ValueError, lambda: prepare_experience(**inputs, eps=-1.0), "whiten: eps")
    assert_raises(ValueError, lambda: prepare_experience(**inputs | {"values": torch.zeros(2, 2)}), "gae: values")
