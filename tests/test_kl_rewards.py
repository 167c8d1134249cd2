"""KL-shaped token rewards."""

import math

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import kl_rewards
from tests.lib.helpers import (
    ESTIMATORS,
    INF,
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
    unpack,
    with_junk,
)
from tests.lib.memory import far_rows

OP = "kl_rewards"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(batch, length, dtype=torch.float32, seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(batch, length, generator=g) * 8
    ref = logp + torch.randn(batch, length, generator=g) * spread
    return logp.to(dtype), ref.to(dtype), (torch.randn(batch, generator=g) * 6).to(dtype)


def check(impl, logp, ref, scores, mask=None, **options):
    rewards, kl = kl_rewards(logp, ref, scores, mask, impl=impl, **options)
    want, want_kl = oracle.kl_rewards(logp, ref, scores, mask, **options)
    dtype = out_dtype(logp.dtype, ref.dtype, scores.dtype)
    assert rewards.dtype == kl.dtype == dtype
    assert rewards.shape == logp.shape
    assert kl.shape == scores.shape
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    size = max(np.abs(want).max(initial=0.0, where=np.isfinite(want)), 1.0)
    assert_close_to_oracle(rewards, want, ceiling=limit, scale=size, what="rewards")
    absolute = oracle.kl_rewards(
        logp, ref, scores, mask, **(options | {"kl_coef": -1.0, "score_clip": 0.0, "kl_estimator": "abs"})
    )[0]
    total = max(np.abs(absolute).sum(initial=0.0, where=np.isfinite(absolute)), np.abs(want_kl).max(initial=1.0))
    assert_close_to_oracle(kl, want_kl, ceiling=limit, scale=total, what="kl")
    return rewards, kl


@pytest.mark.several_blocks(length=33, dtype=torch.float32, estimator="k3")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 33, 128, 257, 1500, 4100])
def test_matches_the_loop(impl, length, dtype, estimator):
    check(impl, *make(6, length, dtype), holey_mask(6, length), kl_estimator=estimator, kl_coef=0.3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("log_clamp", "value_clamp"), [(20.0, 10.0), (None, 10.0), (0.25, None), (0.5, 0.125), (0.0, 0.0)]
)
def test_clamps_bound_the_log_ratio_before_and_the_estimate_after(impl, estimator, log_clamp, value_clamp):
    logp, ref, scores = make(5, 40, spread=30.0)
    options = {"kl_estimator": estimator, "kl_log_clamp": log_clamp, "kl_clamp": value_clamp}
    _, kl = check(impl, logp, ref, scores, holey_mask(5, 40), **options)
    if value_clamp is not None:
        assert (kl.abs() <= value_clamp * 40 + 1e-4).all()


@pytest.mark.parametrize("coef", [torch.tensor(0.7), torch.tensor([0.7]).double(), torch.tensor(0.0)])
def test_kl_coef_may_be_a_tensor(impl, coef):
    check(impl, *make(4, 30), holey_mask(4, 30), kl_coef=coef)


def test_hand_computed_values(impl):
    logp, ref = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -3.0]])
    want = {"k1": [0.5, -1.0, 0.0], "abs": [0.5, 1.0, 0.0], "k2": [0.125, 0.5, 0.0]}
    want["k3"] = [math.expm1(-0.5) + 0.5, math.expm1(1.0) - 1.0, 0.0]
    for estimator, k in want.items():
        rewards, kl = kl_rewards(logp, ref, torch.tensor([2.0]), kl_coef=0.5, kl_estimator=estimator, impl=impl)
        expected = torch.tensor([[-0.5 * k[0], -0.5 * k[1], 2.0 - 0.5 * k[2]]])
        torch.testing.assert_close(rewards, expected, rtol=0, atol=3e-7)
        torch.testing.assert_close(kl, torch.tensor([sum(k)]), rtol=0, atol=3e-7)


@pytest.mark.parametrize("gap", [1e-4, -1e-4, 1e-3, -1e-3, 1e-2])
def test_k3_keeps_its_digits_for_small_gaps(impl, gap):
    ref = torch.zeros(1, 1)
    logp = torch.full((1, 1), -gap)
    kl = kl_rewards(logp, ref, torch.zeros(1), kl_estimator="k3", impl=impl)[1]
    exact, _ = oracle.kl_token(float(logp), 0.0, "k3")
    assert abs(float(kl) / exact - 1.0) < 2e-3 * (1e-4 / abs(gap)) + 1e-5


@pytest.mark.parametrize("clip", [5.0, 0.5, 0.0, None])
def test_scores_are_clipped_on_both_sides(impl, clip):
    scores = torch.tensor([7.0, -7.0, 0.25, -0.25])
    zero = torch.zeros(4, 3)
    rewards, _ = kl_rewards(zero, zero, scores, score_clip=clip, impl=impl)
    want = scores if clip is None else scores.clamp(-clip, clip)
    assert bit_equal(rewards[:, 2], want)
    assert not rewards[:, :2].any()


def test_infinite_scores_are_clipped_and_nan_stays_in_its_row(impl):
    zero = torch.zeros(3, 2)
    rewards, _ = kl_rewards(zero, zero, torch.tensor([INF, -INF, NAN]), score_clip=5.0, impl=impl)
    assert rewards[:2, 1].tolist() == [5.0, -5.0]
    assert rewards[2, 1].isnan()
    assert not rewards[:, 0].any()


def test_the_score_goes_to_the_last_valid_token(impl):
    zero = torch.zeros(4, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    rewards, kl = kl_rewards(zero, zero, torch.ones(4), mask, impl=impl)
    want = torch.zeros(4, 5)
    want[0, 4] = want[1, 2] = want[2, 0] = 1.0
    assert bit_equal(rewards, want)
    assert not kl.any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_score_index_may_name_a_masked_token_or_none(impl, index_dtype):
    logp, ref, scores = make(5, 6)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0] * 6, [1, 0, 1, 0, 0, 0]])
    index = torch.tensor([2, -1, 0, 3, 2], dtype=index_dtype)
    rewards, _ = check(impl, logp, ref, scores, mask, score_index=index)
    assert float(rewards[0, 2]) == float(scores[0].clamp(-5, 5))
    assert not rewards[3].any(), "a row without valid tokens gets no score"
    assert not rewards[0, 3:].any()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_lies_under_the_mask_does_not_matter(impl, junk, estimator, with_index, mask_dtype):
    logp, ref, scores = make(6, 37)
    mask = holey_mask(6, 37)
    options = {"score_index": torch.tensor([1, 2, 3, 4, 5, -1])} if with_index else {}
    options |= {"kl_estimator": estimator, "impl": impl}
    clean = kl_rewards(logp, ref, scores, mask, **options)
    dirty = [with_junk(logp, mask, junk), with_junk(ref, mask, -junk), torch.where(mask.any(1), scores, junk)]
    assert bit_equal(clean, kl_rewards(*dirty, mask.to(mask_dtype), **options))
    if not with_index:
        assert not clean[0][~mask].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("with_index", [False, True])
def test_packed_equals_padded(impl, estimator, with_index):
    lengths = [5, 0, 31, 1, 17]
    logp, ref, scores = make(5, 31)
    mask = (torch.rand(5, 31) < 0.7) & (torch.arange(31) < torch.tensor(lengths)[:, None])
    options = {"kl_estimator": estimator, "impl": impl}
    if with_index:
        options["score_index"] = torch.tensor([4, -1, 30, 0, 7])
    padded, kl = kl_rewards(logp, ref, scores, mask, **options)
    for kind in (torch.int32, torch.int64):
        packed, packed_kl = kl_rewards(
            *(pack(x, lengths) for x in (logp, ref)),
            scores,
            pack(mask, lengths),
            cu_seqlens=cu(lengths, kind),
            **options,
        )
        assert bit_equal(unpack(packed, lengths, 31), padded)
        torch.testing.assert_close(packed_kl, kl, rtol=0, atol=1e-5)
        if impl == "cpu":
            assert bit_equal(packed_kl, kl)


@pytest.mark.several_blocks
def test_packed_rows_of_several_blocks_equal_padded_ones(impl):
    lengths = [2100, 0, 4100, 1, 700]
    logp, ref, scores = make(5, 4100)
    mask = (torch.rand(5, 4100) < 0.7) & (torch.arange(4100) < torch.tensor(lengths)[:, None])
    padded, kl = kl_rewards(logp, ref, scores, mask, impl=impl)
    want, _ = kl_rewards(logp.double(), ref.double(), scores.double(), mask, impl="torch")
    torch.testing.assert_close(padded, want.float(), rtol=1e-6, atol=1e-6)
    tokens = [pack(x, lengths) for x in (logp, ref, mask)]
    packed, packed_kl = kl_rewards(*tokens[:2], scores, tokens[2], cu_seqlens=cu(lengths), impl=impl)
    assert bit_equal(unpack(packed, lengths, 4100), padded)
    size = ((logp - ref).abs() * mask).sum(1)  # the terms of a sum cancel, its rounding does not; a lost token is 1
    assert ((packed_kl - kl).abs() <= 5e-7 * size).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 4)])
def test_empty_and_all_masked_batches(impl, shape):
    x = torch.full(shape, NAN)
    rewards, kl = kl_rewards(x, x, torch.full(shape[:1], NAN), torch.zeros(shape), impl=impl)
    assert rewards.shape == shape
    assert kl.shape == shape[:1]
    assert not rewards.any()
    assert not kl.any()


@pytest.mark.parametrize("rows", [0, 3])
def test_packed_without_tokens(impl, rows):
    none = torch.empty(0)
    rewards, kl = kl_rewards(
        none, none, torch.ones(rows), cu_seqlens=torch.zeros(rows + 1, dtype=torch.int64), impl=impl
    )
    assert rewards.shape == (0,)
    assert kl.tolist() == [0.0] * rows


@pytest.mark.parametrize("pad", [1, 5])
def test_padded_rows_and_transposed_inputs(impl, pad):
    logp, ref, scores = make(5, 19)
    mask = holey_mask(5, 19)
    plain = kl_rewards(logp, ref, scores, mask, impl=impl)
    wide_mask = torch.ones(5, 19 + pad, dtype=torch.bool)
    wide_mask[:, :19] = mask
    every_other = torch.stack([scores, torch.full_like(scores, NAN)], 1)[:, 0]
    assert bit_equal(
        plain, kl_rewards(strided(logp, pad), strided(ref, pad, 2), every_other, wide_mask[:, :19], impl=impl)
    )
    assert bit_equal(plain, kl_rewards(logp.t().contiguous().t(), ref, scores, mask.t().contiguous().t(), impl=impl))


def test_rows_beyond_the_reach_of_32_bits(impl):
    logp, ref, scores = make(9, 5)
    mask = holey_mask(9, 5)
    far = kl_rewards(*(far_rows(x, 2**28) for x in (logp, ref)), scores, far_rows(mask, 2**28), impl=impl)
    assert bit_equal(far, kl_rewards(logp, ref, scores, mask, impl=impl))


def test_nan_in_a_valid_token_stays_in_its_row(impl):
    logp, ref, scores = make(3, 40)
    clean = kl_rewards(logp, ref, scores, impl=impl)
    logp[1, 7] = NAN
    rewards, kl = kl_rewards(logp, ref, scores, kl_log_clamp=20.0, kl_clamp=10.0, impl=impl)
    assert rewards[1, 7].isnan()
    assert rewards.isnan().sum() == 1
    assert kl.isnan().tolist() == [False, True, False]
    assert bit_equal(rewards[[0, 2]], clean[0][[0, 2]])


@pytest.mark.parametrize(
    "bounds", [[-5, 3, 12], [0, 100, 7], [0, 9, 4, 12], [2**40, -(2**40), 12], [3, 3, 3], [12, 0], [5]]
)
@pytest.mark.parametrize("index", [None, 2**62, -(2**62), 11, 3])
def test_wrong_cu_seqlens_and_score_index_never_read_outside(impl, bounds, index):
    rows = len(bounds) - 1
    at = None if index is None else torch.full((rows,), index)
    x = torch.randn(12)
    call = {"cu_seqlens": torch.tensor(bounds), "score_index": at, "impl": impl}
    rewards, kl = kl_rewards(x, x + 1, torch.ones(rows), **call)
    assert rewards.shape == (12,)
    assert kl.shape == (rows,)
    assert rewards.isfinite().all()
    assert_raises(
        ValueError,
        lambda: kl_rewards(x, x, torch.ones(rows), validate=True, **call),
        "cu_seqlens",
        "12",
        str(bounds[0]),
    )


@pytest.mark.parametrize("bounds", [[0], [5]])
def test_packed_tokens_of_no_row(impl, bounds):
    x = torch.randn(5000)  # more than a block's
    rewards, kl = kl_rewards(x, x + 1, torch.ones(0), cu_seqlens=torch.tensor(bounds), impl=impl)
    assert kl.shape == (0,)
    assert rewards.shape == (5000,)
    assert not rewards.any()


MANY = [0, 12, *[0] * 1100, 12]  # more than a block looks at in one round


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 9, 4, 12],
        [0, 12, 0, 12],
        [6, 3, 9, -1, 12],
        [0, 2**40, 0, 12],
        pytest.param(MANY, id="many", marks=pytest.mark.large),
    ],
)
def test_with_wrong_cu_seqlens_no_kernel_counts_a_token_twice(impl, bounds):
    x, rows = torch.randn(12), len(bounds) - 1
    options = {
        "kl_estimator": "abs",
        "kl_coef": 1.0,
        "score_clip": 0.0,
        "cu_seqlens": torch.tensor(bounds),
        "impl": impl,
    }
    rewards, kl = kl_rewards(x, torch.zeros(12), torch.ones(rows), **options)
    torch.testing.assert_close(kl.sum(), -rewards.sum())


@pytest.mark.parametrize("index", [4, -2, 2**40, -(2**40)])
def test_score_index_outside_the_row_places_no_score_and_validate_says_so(impl, index):
    zero = torch.zeros(2, 4)
    at = torch.tensor([1, index])
    rewards, _ = kl_rewards(zero, zero, torch.ones(2), score_index=at, impl=impl)
    assert rewards[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert not rewards[1].any()
    call = {"score_index": at, "validate": True, "impl": impl}
    assert_raises(ValueError, lambda: kl_rewards(zero, zero, torch.ones(2), **call), "score_index", str(index), "4")


@pytest.mark.parametrize(
    ("change", "error", "mentions"),
    [
        ({"logprobs": torch.randn(3, 4, 1)}, ValueError, ("logprobs", "[B, T]", "(3, 4, 1)")),
        ({"ref_logprobs": torch.randn(3, 5)}, ValueError, ("ref_logprobs", "(3, 4)", "(3, 5)")),
        ({"scores": torch.randn(4)}, ValueError, ("scores", "(3,)", "(4,)")),
        ({"scores": torch.ones(3, dtype=torch.bool)}, TypeError, ("scores", "floating", "bool")),
        ({"scores": 1.0}, TypeError, ("scores", "Tensor", "float")),
        ({"mask": torch.ones(3, 1)}, ValueError, ("mask", "(3, 4)", "(3, 1)")),
        ({"kl_estimator": "k4"}, ValueError, ("kl_estimator", "k3", "k4")),
        ({"kl_coef": "big"}, TypeError, ("kl_coef", "number", "str")),
        ({"score_clip": -1.0}, ValueError, ("score_clip", "0", "-1.0")),
        ({"kl_log_clamp": -1.0}, ValueError, ("kl_log_clamp", "0", "-1.0")),
        ({"kl_clamp": NAN}, ValueError, ("kl_clamp", "nan")),
        ({"score_index": torch.ones(3)}, TypeError, ("score_index", "int64", "float32")),
        ({"score_index": torch.ones(3, 1, dtype=torch.int64)}, ValueError, ("score_index", "(3,)", "(3, 1)")),
        ({"cu_seqlens": torch.tensor([0.0, 12.0])}, TypeError, ("cu_seqlens", "int32", "float32")),
        ({"cu_seqlens": torch.tensor([0, 12])}, ValueError, ("cu_seqlens", "(3, 4)")),
        ({"ref_logprobs": torch.randn(3, 4, device="meta")}, ValueError, ("ref_logprobs", "meta", "cpu")),
        ({"impl": "CUDA"}, ValueError, ("CUDA", "cpu", "auto")),
        ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
    ],
)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = {
        "logprobs": torch.randn(3, 4),
        "ref_logprobs": torch.randn(3, 4),
        "scores": torch.randn(3),
        "mask": None,
        "impl": impl,
    }
    assert_raises(error, lambda: kl_rewards(**(arguments | change)), *mentions)
