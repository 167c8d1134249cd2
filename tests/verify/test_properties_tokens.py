"""kl_rewards, gae, moments and whiten on random batches of every kind, against the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import oracle
from ppo_kernels import gae, kl_rewards, moments, whiten
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import ESTIMATORS, MASKED_STEPS, assert_close_to_oracle, magnitude
from tests.lib.strategies import SCALES, batches, poisoned, poisons

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def kl_calls(draw):
    batch = draw(batches())
    gap = draw(st.sampled_from([1.0, 0.0, 2.0**-10, 8.0]))
    logp = batch.normal(4.0)
    ref = (logp.double() + batch.normal(gap).double()).to(batch.dtype)
    tensors = {"logprobs": logp, "ref_logprobs": ref}
    poisoned(batch, tensors, draw(poisons(tuple(tensors))))
    tensors = {name: batch.view(x) for name, x in tensors.items()}
    tensors["scores"] = batch.normal(draw(SCALES), rows=True)
    options = batch.options | {
        "kl_coef": draw(st.sampled_from([0.1, 0.0, -2.0])),
        "kl_estimator": draw(st.sampled_from(ESTIMATORS)),
        "score_clip": draw(st.sampled_from([5.0, None, 0.0])),
        "kl_log_clamp": draw(st.sampled_from([None, 20.0, 0.5])),
        "kl_clamp": draw(st.sampled_from([None, 10.0, 0.125])),
    }
    if draw(st.booleans()):
        odd = st.sampled_from([-1, 0, 2**40, -(2**40)])
        index = [draw(st.one_of(odd, st.integers(-1, n))) for n in batch.lengths]
        options["score_index"] = torch.tensor(index, dtype=torch.int64)
    return batch, tensors, options


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=kl_calls())
def test_any_rewards_match_the_oracle(require_impl, impl, call):
    batch, tensors, options = call
    rewards, kl = kl_rewards(**tensors, mask=batch.mask, impl=require_impl("kl_rewards", impl), **options)
    want, want_kl = oracle.kl_rewards(*tensors.values(), batch.mask, **options)
    assert rewards.dtype == kl.dtype == batch.compute_dtype()

    # Each token by its own size: the estimate, the gap that it comes from, and the score.
    u, coef = batch.unit(), abs(options["kl_coef"])
    gaps = options | {"kl_coef": -1.0, "kl_estimator": "abs", "score_clip": 0.0, "kl_clamp": None}
    gap, gap_sums = (magnitude(x) for x in oracle.kl_rewards(*tensors.values(), batch.mask, **gaps))
    score = magnitude(oracle.kl_rewards(*tensors.values(), batch.mask, **(options | {"kl_coef": 0.0}))[0])
    limit = 16 * u * magnitude(want) + 2 * u * (coef * gap + score) + 1e-36
    assert_close_to_oracle(rewards, want, ceiling=1.0, scale=limit, what="rewards")
    assert not rewards.double().numpy()[(want == 0) & ~batch.valid.numpy()].any()
    size = np.maximum(magnitude(want_kl), gap_sums)
    assert_close_to_oracle(kl, want_kl, ceiling=48 * u, scale=size + 1e-30, what="kl")


@st.composite
def gae_calls(draw):
    batch, scale = draw(batches()), draw(SCALES)
    masked_steps = draw(st.sampled_from(MASKED_STEPS))
    tensors = {"rewards": batch.normal(scale), "values": batch.normal(scale)}
    poisoned(batch, tensors, draw(poisons(tuple(tensors))))
    readable = batch.until_last() if masked_steps == "keep" else batch.valid
    tensors = {name: batch.view(x, readable) for name, x in tensors.items()}
    factor = st.sampled_from([1.0, 0.95, 0.0])
    options = batch.options | {"masked_steps": masked_steps, "gamma": draw(factor), "lam": draw(factor)}
    if draw(st.booleans()):
        options["lam"] = torch.rand(batch.rows, generator=batch.g).to(batch.dtype)
    if draw(st.booleans()):
        options["bootstrap_value"] = batch.normal(scale, rows=True)
    return batch, tensors, options


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=gae_calls())
def test_any_advantages_match_the_oracle(require_impl, impl, call):
    batch, tensors, options = call
    got = gae(**tensors, mask=batch.mask, impl=require_impl("gae", impl), **options)
    want = oracle.gae(*tensors.values(), batch.mask, **options)
    limit = np.zeros(batch.valid.shape)
    for row in oracle.rows_of(batch.valid, options.get("cu_seqlens")):
        at = slice(row.start, row.stop)
        largest = max(magnitude(w).reshape(-1)[at].max(initial=0.0) for w in want)
        limit.reshape(-1)[at] = 8 * batch.unit() * largest + 1e-36
    for name, g, w in zip(("advantages", "returns"), got, want, strict=True):
        assert g.dtype == batch.compute_dtype()
        assert_close_to_oracle(g, w, ceiling=1.0, scale=limit, what=name)
        assert not g[~batch.valid].any(), name


@st.composite
def whiten_calls(draw):
    batch, scale = draw(batches()), draw(SCALES)
    x = (batch.normal(scale).double() + draw(st.sampled_from([0.0, 1.0, 100.0])) * scale).to(batch.dtype)
    tensors = {"x": x}
    poisoned(batch, tensors, draw(poisons(("x",))))
    options = {"shift_mean": draw(st.booleans()), "unbiased": draw(st.booleans())}
    # Compared with the variance, unless there is none: then what is left of rounding decides.
    options["eps"] = draw(st.sampled_from([1e-8, 1e-2])) * (scale * scale or 1.0)
    return batch, batch.view(tensors["x"]), options


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=whiten_calls())
def test_any_whitening_matches_the_oracle(require_impl, impl, call):
    batch, x, options = call
    got = whiten(x, batch.mask, impl=require_impl("whiten", impl), **options)
    want = oracle.whiten(x, batch.mask, **options)
    assert got.dtype == batch.compute_dtype()
    count, mean, m2 = oracle.moments(x, batch.mask)
    largest = magnitude(np.where(batch.valid, x.double(), 0.0)).max(initial=0.0)
    deviation = np.sqrt(np.nan_to_num(m2) / max(count, 1) + options["eps"])
    limit = 4 * batch.unit() * max(magnitude(want).max(initial=0.0), 1.0) + 1e-14 * largest / deviation
    assert_close_to_oracle(got, want, ceiling=limit, what="whiten")
    assert not got[~batch.valid].any()

    found = moments(x, batch.mask, impl=require_impl("moments", impl))
    for name, g, w, size in zip(
        ("count", "mean", "m2"), found, (count, mean, m2), (count, largest, count * largest * largest), strict=True
    ):
        assert g.dtype == torch.float64
        assert_close_to_oracle(g, w, ceiling=1e-11, scale=size + 1e-300, what=name)
