"""Importance weights, what a rejection keeps, and their statistics."""

import math

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import ImportanceStats, importance_weights
from tests.lib.helpers import (
    JUNK,
    MASK_DTYPES,
    NAN,
    assert_close_to_oracle,
    assert_raises,
    bit_equal,
    cu,
    holey_mask,
    out_dtype,
    pack,
    strided,
    with_junk,
)

OP = "importance_weights"
LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "mask", "icepop")
REJECTIONS = [("k1", level) for level in ("token", "sum", "mean")]
REJECTIONS += [(k, level) for k in ("k2", "k3") for level in ("token", "sum", "mean", "max")]


def make(batch, length, dtype=torch.float32, seed=0, spread=0.2):
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(batch, length, generator=g) * 6
    return [x.to(dtype) for x in (rollout + torch.randn(batch, length, generator=g) * spread, rollout)]


def check(impl, logp, rollout, mask=None, **options):
    weights, keep, stats = importance_weights(logp, rollout, mask, impl=impl, **options)
    want, want_keep, want_stats = oracle.importance_weights(logp, rollout, mask, **options)
    dtype = out_dtype(logp.dtype, rollout.dtype)
    assert isinstance(stats, ImportanceStats)
    assert (weights.dtype, keep.dtype, keep.shape) == (dtype, torch.bool, logp.shape)
    assert not weights.requires_grad
    limit = 4e-6 if dtype == torch.float32 else 1e-11
    assert_close_to_oracle(weights, want, ceiling=limit, scale=max(np.abs(want).max(initial=0.0), 1.0), what="weights")
    assert np.array_equal(keep.numpy(), want_keep)
    assert list(stats._fields) == list(want_stats)
    for name, value in zip(stats._fields, stats, strict=True):
        assert (value.shape, value.dtype) == ((), dtype)
        scale = max(abs(want_stats[name]), want_stats["ratio_max"] if name == "chi2" else 1.0)
        assert_close_to_oracle(value, want_stats[name], ceiling=limit, scale=scale, what=name)
    return weights, keep, stats


@pytest.mark.several_blocks(shape=(2, 9001), dtype=torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (6, 33), (3, 1025), pytest.param((2, 9001), marks=pytest.mark.rest)])
@pytest.mark.parametrize("level", LEVELS)
def test_matches_the_loop(impl, level, shape, dtype):
    logp, rollout = make(*shape, dtype, spread=0.02 if level == "sequence" else 0.3)
    check(impl, logp, rollout, level=level)
    check(impl, logp, rollout, holey_mask(*shape), level=level)


@pytest.mark.parametrize("bounds", [None, 1.1, (0.9, None), (0.93, 1.15), (0.0, math.inf)])
@pytest.mark.parametrize("clamp", [None, 20.0, 0.25])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_levels_modes_and_bounds(impl, level, mode, bounds, clamp):
    logp, rollout = make(7, 21)
    options = {"level": level, "mode": mode, "bounds": bounds, "log_ratio_clamp": clamp}
    check(impl, logp, rollout, holey_mask(7, 21), **options)


@pytest.mark.parametrize("bounds", [0.03, (0.005, 0.05), (-0.02, 0.02), None])
@pytest.mark.parametrize(("reject", "reject_level"), REJECTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_rejections(impl, level, mode, reject, reject_level, bounds):
    logp, rollout = make(9, 21)
    options = {"reject": reject, "reject_level": reject_level, "reject_bounds": bounds}
    _, _, stats = check(impl, logp, rollout, holey_mask(9, 21), level=level, mode=mode, bounds=(0.8, 1.2), **options)
    assert bounds is None or float(stats.rejectfrac) > 0.0


@pytest.mark.parametrize(("reject_level", "bound"), [("sum", 1.0), ("mean", 3e-3), ("max", 1.0)])
def test_a_late_token_rejects_its_row(impl, reject_level, bound):
    logp = torch.full((3, 300), -3.0)
    rollout = logp.clone()
    rollout[1, 290] -= 2.0
    options = {"reject": "k2", "reject_level": reject_level, "reject_bounds": bound}
    _, keep, _ = check(impl, logp, rollout, bounds=None, **options)
    assert keep.any(1).tolist() == [True, False, True]


def test_equal_policies_have_weights_of_one(impl):
    logp, _ = make(4, 20)
    weights, keep, stats = importance_weights(logp, logp, impl=impl)
    assert (weights == 1.0).all()
    assert keep.all()
    assert [float(stats.ess), float(stats.weight_mean), float(stats.ratio_max)] == [1.0, 1.0, 1.0]
    assert [float(x) for x in (stats.kl_k1, stats.kl_k3, stats.chi2, stats.rejectfrac)] == [0.0] * 4
    assert float(stats.perplexity) == float(stats.rollout_perplexity)


def test_chi2_keeps_its_digits_near_one(impl):
    logp = torch.full((1, 1), 1e-4)
    chi2 = importance_weights(logp, torch.zeros(1, 1), impl=impl)[2].chi2
    assert abs(float(chi2) / math.expm1(2.0 * float(logp)) - 1) < 1e-5


def test_effective_sample_size_of_weights_whose_squares_float32_does_not_hold(impl):
    log_ratio = torch.tensor([[50.0, 49.0], [51.0, -3.0]])
    stats = importance_weights(log_ratio, torch.zeros(2, 2), bounds=None, log_ratio_clamp=None, impl=impl)[2]
    weights = log_ratio.double().exp()
    assert float(stats.ess) == pytest.approx(float(weights.sum() ** 2 / weights.square().sum() / 4), rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_a_nan_is_within_no_bounds(impl, level):
    logp, rollout = make(3, 5)
    rollout[1, 2] = NAN
    hit = torch.zeros(3, 5, dtype=torch.bool)
    hit[1, 2 if level == "token" else slice(None)] = True
    weights, keep, _ = importance_weights(logp, rollout, level=level, impl=impl)
    assert torch.equal(weights.isnan(), hit)
    weights, keep, stats = importance_weights(logp, rollout, level=level, mode="mask", bounds=None, impl=impl)
    assert not weights.isnan().any()
    assert torch.equal(keep, ~hit)
    assert stats.ratio_max.isnan()
    weights, keep, _ = importance_weights(logp, rollout, reject="k3", reject_level="max", impl=impl)
    assert keep.all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("level", LEVELS)
def test_what_lies_under_the_mask_does_not_matter(impl, level, junk, mask_dtype):
    x, mask = make(6, 37), holey_mask(6, 37)
    options = {"level": level, "reject": "k3", "reject_level": "max", "reject_bounds": 0.2, "impl": impl}
    clean = importance_weights(*x, mask, **options)
    dirty = importance_weights(*(with_junk(y, mask, junk) for y in x), mask.to(mask_dtype), **options)
    assert bit_equal((*clean[:2], *clean[2]), (*dirty[:2], *dirty[2]))
    assert not clean[0][~mask].any()
    assert not clean[1][~mask].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 4)])
def test_empty_and_all_masked_batches_give_zeros(impl, level, shape):
    x = torch.full(shape, NAN)
    weights, keep, stats = importance_weights(x, x, torch.zeros(shape), level=level, impl=impl)
    assert not weights.any()
    assert not keep.any()
    assert [float(s) for s in stats] == [0.0] * 12


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("reject", "reject_level"), [(None, "token"), ("k2", "mean"), ("k3", "max")])
def test_packed_equals_padded(impl, level, reject, reject_level):
    lengths = [5, 0, 31, 1, 17]
    data = make(5, 31)
    mask = (torch.rand(5, 31) < 0.7) & (torch.arange(31) < torch.tensor(lengths)[:, None])
    options = {"level": level, "reject": reject, "reject_level": reject_level}
    options |= {} if reject is None else {"reject_bounds": 0.03}
    padded = check(impl, *data, mask, **options)
    packed = check(impl, *(pack(x, lengths) for x in (*data, mask)), **options, cu_seqlens=cu(lengths))
    torch.testing.assert_close(packed[0], pack(padded[0], lengths), rtol=1e-6, atol=0)
    assert torch.equal(packed[1], pack(padded[1], lengths))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pad", [1, 5])
def test_views_have_the_same_bits(impl, level, pad):
    x, mask = make(5, 19), holey_mask(5, 19)
    want = importance_weights(*x, mask, level=level, impl=impl)
    wide = torch.nn.functional.pad(mask, (0, pad), value=True)[:, :19]
    for view in (lambda y: strided(y, pad), lambda y: y.t().contiguous().t()):
        got = importance_weights(*map(view, x), wide, level=level, impl=impl)
        assert bit_equal((*want[:2], *want[2]), (*got[:2], *got[2]))


WRONG = [
    ({"level": "row"}, ValueError, ("level", "sequence", "row")),
    ({"mode": "clip"}, ValueError, ("mode", "truncate", "clip")),
    ({"bounds": (2.0, 1.0)}, ValueError, ("bounds", "low <= high", "2.0")),
    ({"bounds": (0.1, 1.0, 2.0)}, ValueError, ("bounds", "(low, high)")),
    ({"bounds": -1.0}, ValueError, ("bounds (high)", "0", "-1.0")),
    ({"bounds": "wide"}, TypeError, ("bounds", "number")),
    ({"reject": "k9"}, ValueError, ("reject", "k3", "k9")),
    ({"reject": "k1", "reject_level": "max"}, ValueError, ("max", "k2")),
    ({"reject": "k2", "reject_level": "row"}, ValueError, ("reject_level", "mean", "row")),
    ({"log_ratio_clamp": -1.0}, ValueError, ("log_ratio_clamp", "-1.0")),
    ({"rollout_logprobs": torch.randn(4, 3)}, ValueError, ("rollout_logprobs", "(3, 4)", "(4, 3)")),
    ({"logprobs": torch.ones(3, 4, dtype=torch.int64)}, TypeError, ("logprobs", "int64")),
    ({"mask": torch.ones(4, 3)}, ValueError, ("mask", "(3, 4)", "(4, 3)")),
    ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
]


@pytest.mark.parametrize(("change", "error", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = dict(zip(("logprobs", "rollout_logprobs"), make(3, 4), strict=True)) | {"impl": impl}
    assert_raises(error, lambda: importance_weights(**(arguments | change)), *mentions)


@pytest.mark.parametrize("given", [{"reject_bounds": (0.0, 0.1)}, {"reject_level": "mean"}, {"reject_level": "bogus"}])
def test_bounds_of_a_rejection_that_is_not_asked_for_are_refused(given):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="reject_level and reject_bounds are read with reject alone"):
        importance_weights(x, x, **given)
