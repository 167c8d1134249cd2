"""Surrogates, levels of the ratio and the unbiased KL term of policy_loss, against the float64 loops."""

import math

import numpy as np
import pytest
import torch

from ppo_kernels import policy_loss
from tests.lib.helpers import JUNK, assert_raises, bit_equal, cu, grad_of, holey_mask, pack, with_junk
from tests.test_policy_loss import check, extras, make

OP = "policy_loss"
SURROGATES = ("clip", "cispo", "sapo", "dppo_tv", "dppo_kl")
ROW_LEVELS = ("sequence", "sequence_token", "geometric")
FORMS = [(surrogate, "token") for surrogate in SURROGATES]
FORMS += [(surrogate, level) for surrogate in SURROGATES[:3] for level in ROW_LEVELS[:2]] + [("clip", "geometric")]


def probabilities(batch, length, dtype=torch.float32, **options):
    """As make, below 1: the divergence of two outcomes needs probabilities."""
    logp, old, adv = make(batch, length, dtype, **options)
    return logp.clamp(max=-0.01), old.clamp(max=-0.01), adv


def form_of(form):
    return dict(zip(("surrogate", "importance_sampling_level"), form, strict=True))


@pytest.mark.several_blocks(shape=(2, 9001), dtype=torch.float32, form=("clip", "sequence"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (6, 33), (2, 1025), pytest.param((2, 9001), marks=pytest.mark.rest)])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_every_form_matches_the_loop(impl, form, shape, dtype):
    logp, old, adv = probabilities(*shape, dtype)
    check(impl, logp, old, adv, holey_mask(*shape), **form_of(form))


@pytest.mark.parametrize("cliprange", [(0.02, 0.3), (None, 0.1), (0.1, None), None])
@pytest.mark.parametrize("clamp", [None, 20.0, 0.25])
@pytest.mark.parametrize("extra", [("ref_logprobs",), ("weights", "row_weight")])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_every_form_with_the_other_options(impl, form, cliprange, clamp, extra):
    logp, old, adv = probabilities(5, 41, spread=0.7)
    options = {k: v for k, v in extras(5, 41).items() if k in extra}
    if "ref_logprobs" in extra:
        options |= {"kl_coef": 0.3, "kl_estimator": "k3", "kl_log_clamp": 3.0}
    off = tuple(math.inf if bound is None else bound for bound in (cliprange or (None, None)))
    bounds = {"cliprange": off, "log_ratio_clamp": clamp}
    check(impl, logp, old, adv, holey_mask(5, 41), **form_of(form), **bounds, **options)


@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("delta", [1.1, 1.5, 2.5])
@pytest.mark.parametrize(
    "form", [f for f in FORMS if f[0] in ("clip", "dppo_tv", "dppo_kl") and f[1] != "geometric"], ids="-".join
)
def test_delta_bounds_the_ratio(impl, form, delta, dual_clip):
    logp, old, adv = probabilities(5, 41, spread=0.7)
    bounds = {"delta": delta, "dual_clip": dual_clip if form[0] == "clip" else None}
    _, stats, _ = check(impl, logp, old, adv, holey_mask(5, 41), cliprange=(0.2, 0.3), **form_of(form), **bounds)
    assert form[1] != "token" or float(stats.dual_clipfrac) > 0.0


@pytest.mark.parametrize("taus", [(1.0, 1.05), (5.0, 0.3)])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_temperatures_of_sapo(impl, taus, spread):
    logp, old, adv = probabilities(4, 30, spread=spread)
    options = dict(zip(("sapo_temperature_pos", "sapo_temperature_neg"), taus, strict=True))
    check(impl, logp, old, adv, holey_mask(4, 30), surrogate="sapo", **options)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize(
    ("log_clamp", "value_clamp", "clamp"), [(20.0, None, 20.0), (None, 0.5, None), (1.0, None, 0.3)]
)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_unbiased_kl_term(impl, surrogate, estimator, log_clamp, value_clamp, clamp):
    logp, old, adv = probabilities(4, 30)
    options = {"kl_estimator": estimator, "kl_log_clamp": log_clamp, "kl_clamp": value_clamp, "log_ratio_clamp": clamp}
    options |= {"ref_logprobs": logp + 0.5 * torch.randn(4, 30), "kl_coef": 0.7, "unbiased_kl": True}
    check(impl, logp, old, adv, holey_mask(4, 30), surrogate=surrogate, **options)


def test_the_unbiased_gradient_of_k3_is_that_of_the_divergence(impl):
    """rho (logp - ref), which OpenRLHF and verl write down directly."""
    logp, old, _ = probabilities(4, 30)
    ref = logp + 0.3 * torch.randn(4, 30)
    options = {"ref_logprobs": ref, "kl_coef": 1.0, "kl_estimator": "k3", "unbiased_kl": True, "normalizer": 1.0}
    _, grad = grad_of(lambda x: policy_loss(x, old, torch.zeros(4, 30), impl=impl, **options), logp)
    torch.testing.assert_close(grad, (logp - old).exp() * (logp - ref), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["advantages", "weights"])
@pytest.mark.parametrize("level", ROW_LEVELS)
def test_one_value_per_row_equals_its_repetition(impl, level, name):
    logp, old, adv = probabilities(5, 12)
    rows, lengths = torch.rand(5) + 0.1, [3, 0, 12, 1, 7]
    mask = holey_mask(5, 12)
    call = {"advantages": adv, "importance_sampling_level": level, "impl": impl}
    plain = grad_of(lambda x: policy_loss(x, old, mask=mask, **(call | {name: rows[:, None].repeat(1, 12)})), logp)
    for form in (rows, rows[:, None], rows[:, None].expand(5, 12)):
        got = grad_of(lambda x, form=form: policy_loss(x, old, mask=mask, **(call | {name: form})), logp)
        assert bit_equal(plain[0][0], got[0][0])
        assert bit_equal(plain[1], got[1])
    packed = [pack(x, lengths) for x in (logp, old, adv)]
    call |= {"advantages": packed[2], "cu_seqlens": cu(lengths)}
    spread = torch.cat([r.repeat(n) for r, n in zip(rows, lengths, strict=True)])
    want = grad_of(lambda x: policy_loss(x, packed[1], **(call | {name: spread})), packed[0])
    got = grad_of(lambda x: policy_loss(x, packed[1], **(call | {name: rows})), packed[0])
    assert bit_equal(want[0][0], got[0][0])
    assert bit_equal(want[1], got[1])


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_packed_equals_padded(impl, form):
    lengths = [5, 0, 31, 1, 17]
    data, more = probabilities(5, 31), extras(5, 31)
    mask = (torch.rand(5, 31) < 0.7) & (torch.arange(31) < torch.tensor(lengths)[:, None])
    options = {"kl_coef": 0.1, "cliprange": 0.1} | form_of(form)
    padded = check(impl, *data, mask, **more, **options)
    packed_more = {k: v if v.dim() == 1 else pack(v, lengths) for k, v in more.items()}
    packed = check(impl, *(pack(x, lengths) for x in (*data, mask)), **packed_more, **options, cu_seqlens=cu(lengths))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(packed[2], pack(padded[2], lengths), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_what_lies_under_the_mask_does_not_matter(impl, form, junk):
    logp, old, adv = probabilities(6, 37)
    mask = holey_mask(6, 37)
    more = extras(6, 37) | {"kl_coef": 0.2, "unbiased_kl": form[1] == "token", "impl": impl} | form_of(form)
    (loss, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, mask, **more), logp)
    dirty = [with_junk(x, mask, j) for x, j in ((logp, junk), (old, -junk), (adv, junk))]
    more |= {name: with_junk(more[name], mask, junk) for name in ("weights", "ref_logprobs")}
    again, dirty_grad = grad_of(lambda x: policy_loss(x, *dirty[1:], mask, **more), dirty[0])
    assert bit_equal((loss, *stats), (again[0], *again[1]))
    assert bit_equal(grad, dirty_grad)
    assert not grad[~mask].any()


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_the_first_update_has_the_gradient_of_reinforce(impl, form):
    """At a ratio of 1 every surrogate has the slope -A; through the mean of a row it is that of the row's tokens."""
    logp, _, adv = probabilities(5, 20)
    adv = adv[:, :1].expand(5, 20).contiguous()
    (_, stats), grad = grad_of(lambda x: policy_loss(x, logp, adv, impl=impl, **form_of(form)), logp)
    torch.testing.assert_close(grad, -adv / 100, rtol=1e-6, atol=0)
    assert [float(stats.clipfrac_high), float(stats.clipfrac_low), float(stats.ratio_var)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 4)])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_empty_and_all_masked_batches_give_zeros(impl, form, shape):
    x = torch.full(shape, math.nan)
    call = form_of(form) | {"impl": impl}
    (loss, stats), grad = grad_of(lambda leaf: policy_loss(leaf, x, x, torch.zeros(shape), **call), x)
    assert loss.item() == 0.0
    assert [float(s) for s in stats] == [0.0] * 14
    assert grad.shape == shape
    assert not grad.any()


def test_a_rows_ratio_follows_its_own_tokens_alone(impl):
    logp, old, adv = probabilities(4, 700)
    call = {"importance_sampling_level": "sequence", "impl": impl, "normalizer": 1.0}
    whole = grad_of(lambda x: policy_loss(x, old, adv, **call), logp)[1]
    for b in range(4):
        alone = grad_of(lambda x, b=b: policy_loss(x, old[b : b + 1], adv[b : b + 1], **call), logp[b : b + 1])[1]
        assert bit_equal(whole[b : b + 1], alone)


WRONG = [
    ({"surrogate": "ppo"}, ("surrogate", "cispo", "ppo")),
    ({"importance_sampling_level": "row"}, ("importance_sampling_level", "sequence", "row")),
    ({"surrogate": "dppo_tv", "importance_sampling_level": "sequence"}, ("dppo_tv", "token", "sequence")),
    ({"surrogate": "sapo", "importance_sampling_level": "geometric"}, ("geometric", "clip", "sapo")),
    ({"importance_sampling_level": "sequence", "unbiased_kl": True}, ("unbiased_kl", "token", "sequence")),
    ({"surrogate": "cispo", "dual_clip": 3.0}, ("dual_clip", "cispo", "3.0")),
    ({"surrogate": "sapo", "delta": 3.0}, ("delta", "sapo", "3.0")),
    ({"importance_sampling_level": "geometric", "delta": 3.0}, ("delta", "geometric", "3.0")),
    ({"delta": 1.0}, ("delta", "> 1", "1.0")),
    ({"sapo_temperature_pos": 0.0}, ("sapo_temperature_pos", "> 0", "0.0")),
]


@pytest.mark.parametrize(("change", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, mentions):
    logp, old, adv = make(3, 4)
    assert_raises(ValueError, lambda: policy_loss(logp, old, adv, impl=impl, **change), *mentions)


def test_an_infinite_log_probability_has_no_ratio_of_its_own(impl):
    logp = torch.tensor([[-1.0, -float("inf"), -2.0]])
    options = {"importance_sampling_level": "sequence_token", "impl": impl}
    loss, stats = policy_loss(logp, torch.full((1, 3), -1.5), torch.ones(1, 3), **options)
    assert loss.isfinite()
    assert stats.ratio_mean.isfinite()


@pytest.mark.parametrize("off", [np.float32("inf"), torch.tensor(float("inf")), None])
def test_a_bound_that_is_off_is_off_in_any_kind_of_number(off):
    x = torch.zeros(1, 2)
    assert policy_loss(x, x, x, surrogate="sapo", delta=off, dual_clip=off)[0] == 0
