"""The clipped policy loss, its statistics and its gradient."""

import math

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import PolicyStats, policy_loss
from tests.lib.checks import check_views
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
    grad_of,
    holey_mask,
    out_dtype,
    pack,
    with_junk,
)

OP = "policy_loss"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FIELDS = (
    "approx_kl_k1 approx_kl_k2 approx_kl_k3 ratio_mean ratio_var ratio_max clipfrac_high clipfrac_low dual_clipfrac"
    " ref_kl clamp_frac ess entropy count"
)


def make(batch, length, dtype=torch.float32, seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(batch, length, generator=g) * 6
    logp = old + torch.randn(batch, length, generator=g) * spread
    adv = torch.randn(batch, length, generator=g)
    return [x.to(dtype) for x in (logp, old, adv)]


def extras(batch, length, dtype=torch.float32, seed=7):
    g = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.rand(batch, length, generator=g).to(dtype) * 2,
        "ref_logprobs": (-torch.rand(batch, length, generator=g) * 6).to(dtype),
        "row_weight": torch.rand(batch, generator=g).to(dtype),
    }


def check(impl, logp, old, adv, mask=None, grad_output=None, **options):
    (loss, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, mask, impl=impl, **options), logp, grad_output)
    want, want_stats, want_grad = oracle.policy_loss(logp, old, adv, mask, **options)
    tensors = (logp, old, adv, *(options.get(name) for name in ("weights", "ref_logprobs", "entropy")))
    dtype = out_dtype(*(x.dtype for x in tensors if x is not None))
    assert isinstance(stats, PolicyStats)
    assert " ".join(stats._fields) == FIELDS
    assert loss.dtype == dtype
    assert grad.dtype == logp.dtype
    limit = 2e-6 if dtype == torch.float32 else 1e-11
    share = np.abs(want_grad).sum(initial=0.0, where=np.isfinite(want_grad))
    assert_close_to_oracle(loss.detach(), want, ceiling=limit, scale=max(abs(want), share, 1e-6), what="loss")
    for name, value in zip(stats._fields, stats, strict=True):
        assert value.shape == ()
        assert value.dtype == dtype
        assert not value.requires_grad
        size = max(abs(want_stats[name]), want_stats["ratio_max"] ** 2 if name == "ratio_var" else 1.0)
        assert_close_to_oracle(value, want_stats[name], ceiling=limit, scale=size, what=name)
    scale = 1.0 if grad_output is None else float(grad_output)
    largest = max(np.abs(want_grad * scale).max(initial=0.0, where=np.isfinite(want_grad)), 1e-30)
    if options.get("importance_sampling_level") in ("sequence", "geometric"):
        # A mean over the row of what cancels: as exact as its terms, which the advantages bound.
        largest = max(largest, float(adv.double().abs().mean()) / logp.numel() * abs(scale))
    rounding = torch.finfo(logp.dtype).eps if logp.dtype.itemsize == 2 else 0.0
    least = torch.finfo(logp.dtype).smallest_normal * torch.finfo(logp.dtype).eps / largest
    assert_close_to_oracle(grad, want_grad * scale, ceiling=limit + rounding + least, scale=largest, what="gradient")
    return loss.detach(), stats, grad


@pytest.mark.several_blocks(shape=(2, 9001), dtype=torch.float32)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (6, 33), (5, 128), (3, 1025), (2, 9001)])
def test_matches_the_loop(impl, shape, dtype):
    logp, old, adv = make(*shape, dtype)
    check(impl, logp, old, adv)
    check(impl, logp, old, adv, holey_mask(*shape))


@pytest.mark.parametrize("dual_clip", [None, 1.01, 3.0])
@pytest.mark.parametrize("cliprange", [0.2, 0.0, (0.1, 0.4), (0.9, 0.0)])
@pytest.mark.parametrize("clamp", [None, 20.0, 0.5])
@pytest.mark.parametrize(
    "extra", [(), ("weights",), ("ref_logprobs",), ("row_weight",), ("weights", "ref_logprobs", "row_weight")]
)
def test_every_option_and_all_together(impl, cliprange, dual_clip, clamp, extra):
    logp, old, adv = make(5, 41, spread=1.0)
    options = {k: v for k, v in extras(5, 41).items() if k in extra}
    if "ref_logprobs" in extra:
        options |= {"kl_coef": 0.3, "kl_estimator": "k3", "kl_log_clamp": 3.0}
    mask = holey_mask(5, 41)
    check(impl, logp, old, adv, mask, cliprange=cliprange, dual_clip=dual_clip, log_ratio_clamp=clamp, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("log_clamp", "value_clamp"), [(20.0, None), (None, None), (1.0, None), (None, 0.5), (1.0, 0.5)]
)
def test_the_kl_term_and_its_clamps(impl, estimator, log_clamp, value_clamp):
    logp, old, adv = make(4, 30)
    ref = logp + torch.randn(4, 30)
    options = {"kl_estimator": estimator, "kl_log_clamp": log_clamp, "kl_clamp": value_clamp, "ref_logprobs": ref}
    check(impl, logp, old, adv, holey_mask(4, 30), kl_coef=0.7, **options)
    stats = policy_loss(logp, old, adv, impl=impl, **options)[1]
    assert float(stats.ref_kl) != 0.0, "a metric with kl_coef = 0"


@pytest.mark.parametrize("coef", [torch.tensor(0.7), torch.tensor([0.7]).double(), torch.tensor(0.0)])
def test_kl_coef_may_be_a_tensor(impl, coef):
    logp, old, adv = make(4, 30)
    check(impl, logp, old, adv, holey_mask(4, 30), kl_coef=coef, ref_logprobs=logp + torch.randn(4, 30))


def test_the_kl_term_is_not_weighted(impl):
    logp, old, adv = make(3, 10)
    options = {"ref_logprobs": old, "kl_coef": 1.0, "kl_estimator": "k2", "impl": impl}
    loss, _ = policy_loss(logp, old, adv, weights=torch.zeros(3, 10), **options)
    torch.testing.assert_close(loss, 0.5 * (logp - old).square().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["advantages", "weights"])
def test_one_value_per_row_equals_its_repetition(impl, name):
    logp, old, adv = make(5, 12)
    rows = torch.randn(5)
    lengths = [3, 0, 12, 1, 7]
    call = {"advantages": adv, "impl": impl}
    plain = policy_loss(logp, old, mask=holey_mask(5, 12), **(call | {name: rows[:, None].repeat(1, 12)}))
    for form in (rows, rows[:, None], rows[:, None].expand(5, 12)):
        assert bit_equal(plain[0], policy_loss(logp, old, mask=holey_mask(5, 12), **(call | {name: form}))[0])
    packed = [pack(x, lengths) for x in (logp, old, adv)]
    spread = torch.cat([r.repeat(n) for r, n in zip(rows, lengths, strict=True)])
    for form in (rows, rows[:, None]):
        call = {"advantages": packed[2], "cu_seqlens": cu(lengths), "impl": impl}
        one = policy_loss(packed[0], packed[1], **(call | {name: form}))
        assert bit_equal(one[0], policy_loss(packed[0], packed[1], **(call | {name: spread}))[0])


NORMALIZERS = [None, 3, 7.5, torch.tensor(11.0), torch.tensor(12), torch.tensor([5.0]).double(), 0, torch.tensor(0.0)]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers(impl, normalizer):
    logp, old, adv = make(4, 9)
    loss, _, grad = check(impl, logp, old, adv, holey_mask(4, 9), normalizer=normalizer)
    if normalizer is not None and float(normalizer) == 0:
        assert float(loss) == 0.0
        assert not grad.any()


@pytest.mark.parametrize("grad_output", [1.0, -2.5, 0.0, 1e-20])
def test_incoming_gradients_scale(impl, grad_output):
    check(impl, *make(4, 9), holey_mask(4, 9), grad_output=torch.tensor(grad_output))


@pytest.mark.parametrize("grad_output", [INF, -INF, NAN])
def test_an_overflow_from_above_shows_in_every_entry(impl, grad_output):
    """As documented: the kernels' masked entries are NaN then, the reference's 0."""
    logp, old, adv = make(4, 9)
    mask = holey_mask(4, 9)
    fn = lambda x: policy_loss(x, old, adv, mask, cliprange=10.0, impl=impl)  # noqa: E731
    grad = grad_of(fn, logp, torch.tensor(grad_output))[1]
    assert not grad[mask].isfinite().any()
    assert not grad[~mask].any() if impl == "torch" else grad[~mask].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_at_the_exact_clip_bounds(impl, dtype, sign):
    """clamp passes the gradient at its bounds, and neither bound counts as clipped."""
    gap = torch.tensor([[0.25 * sign]], dtype=dtype)
    old, adv = torch.full_like(gap, -1.0), torch.full_like(gap, 2.0 * sign)
    logp = old + gap
    ratio = float(policy_loss(logp, old, adv, impl=impl)[1].ratio_max)
    edge = abs(ratio - 1.0)
    (_, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, cliprange=edge, impl=impl), logp)
    assert float(grad) == pytest.approx(-2.0 * sign * ratio, rel=1e-6)
    assert float(stats.clipfrac_high) == float(stats.clipfrac_low) == 0.0
    (_, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, cliprange=edge * 0.999, impl=impl), logp)
    assert float(grad) == 0.0
    assert float(stats.clipfrac_high if sign > 0 else stats.clipfrac_low) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_a_tie_with_the_dual_clip_is_halved(impl, dtype):
    old, adv = torch.full((1, 1), -3.0, dtype=dtype), torch.full((1, 1), -2.0, dtype=dtype)
    logp = old + 0.5
    ratio = float(policy_loss(logp, old, adv, impl=impl)[1].ratio_max)
    (_, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, dual_clip=ratio, impl=impl), logp)
    assert float(grad) == pytest.approx(0.5 * 2.0 * ratio, rel=1e-6)
    assert float(stats.dual_clipfrac) == 0.0
    for c, frac, want in ((ratio * 0.99, 1.0, 0.0), (ratio * 1.01, 0.0, 2.0 * ratio)):
        (_, stats), grad = grad_of(lambda x, c=c: policy_loss(x, old, adv, dual_clip=c, impl=impl), logp)
        assert float(grad) == pytest.approx(want, rel=1e-6)
        assert float(stats.dual_clipfrac) == frac


def test_gradient_at_ties_of_the_clamps(impl):
    """Gaps of exactly a clamp's bound pass, larger ones do not; |x| has slope 0 at 0; cliprange 0 at ratio 1 passes."""
    gaps = torch.tensor([[0.5, -0.5, 0.75, -0.75, 0.0]])
    old = torch.full((1, 5), -2.0)
    adv = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 1.0]])
    _, _, grad = check(impl, old + gaps, old, adv, log_ratio_clamp=0.5)
    assert grad[0, 2:4].tolist() == [0.0, 0.0]
    assert grad[0, :2].all()
    _, stats, grad = check(impl, old + gaps, old, adv, cliprange=0.0, log_ratio_clamp=0.0)
    assert grad[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, -0.2])
    assert float(stats.clamp_frac) == pytest.approx(0.8)
    zero = torch.zeros(1, 5)
    for estimator in ESTIMATORS:
        options = {"ref_logprobs": old + 2 * gaps, "kl_coef": 1.0, "kl_estimator": estimator}
        check(impl, old + gaps, old, zero, kl_log_clamp=0.5, **options)
        check(impl, old + 2 * gaps, old + gaps, zero, kl_clamp=0.5, **(options | {"ref_logprobs": old + gaps}))


def test_the_first_update_has_ratio_one(impl):
    logp, _, adv = make(5, 20)
    (loss, stats), grad = grad_of(lambda x: policy_loss(x, logp, adv, impl=impl), logp)
    torch.testing.assert_close(loss.detach(), -adv.mean(), rtol=0, atol=1e-7)
    torch.testing.assert_close(grad, -adv / 100, rtol=1e-6, atol=0)
    for name in (
        "approx_kl_k1",
        "approx_kl_k2",
        "approx_kl_k3",
        "ratio_var",
        "clipfrac_high",
        "clipfrac_low",
        "clamp_frac",
    ):
        assert float(getattr(stats, name)) == 0.0, name
    assert float(stats.ratio_mean) == float(stats.ratio_max) == float(stats.ess) == 1.0


def test_kl_k3_keeps_its_digits_near_zero(impl):
    logp = torch.full((1, 1), 1e-4)
    k3 = policy_loss(logp, torch.zeros(1, 1), torch.ones(1, 1), impl=impl)[1].approx_kl_k3
    assert abs(float(k3) / (math.expm1(float(logp)) - float(logp)) - 1) < 2e-3


def test_huge_gaps_are_clamped_and_counted(impl):
    logp, old = torch.tensor([[0.0, -1000.0, -1.0, -1.0]]), torch.tensor([[-1000.0, 0.0, -1.0, -1.0]])
    adv = torch.tensor([[-1.0, 1.0, 1.0, -1.0]])
    _, stats, grad = check(impl, logp, old, adv)
    assert float(stats.clamp_frac) == 0.5
    assert float(stats.ratio_max) == pytest.approx(math.exp(20.0), rel=1e-6)
    assert grad[0, :2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("clamp", [20.0, None])
@pytest.mark.parametrize("junk", JUNK)
def test_what_lies_under_the_mask_does_not_matter(impl, junk, clamp, mask_dtype):
    logp, old, adv = make(6, 37)
    mask = holey_mask(6, 37)
    more = extras(6, 37) | {"kl_coef": 0.2, "dual_clip": 3.0, "impl": impl}
    more |= {"log_ratio_clamp": clamp, "kl_log_clamp": clamp}
    (loss, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, mask, **more), logp)
    dirty = [with_junk(x, mask, j) for x, j in ((logp, junk), (old, -junk), (adv, junk))]
    more |= {name: with_junk(more[name], mask, junk) for name in ("weights", "ref_logprobs")}
    more["row_weight"] = torch.where(mask.any(1), more["row_weight"], junk)
    again, dirty_grad = grad_of(lambda x: policy_loss(x, *dirty[1:], mask.to(mask_dtype), **more), dirty[0])
    assert bit_equal((loss, *stats), (again[0], *again[1]))
    assert bit_equal(grad, dirty_grad)
    assert not grad[~mask].any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 4)])
def test_empty_and_all_masked_batches_give_zeros(impl, shape):
    x = torch.full(shape, NAN)
    (loss, stats), grad = grad_of(lambda leaf: policy_loss(leaf, x, x, torch.zeros(shape), impl=impl), x)
    assert loss.item() == 0.0
    assert [float(s) for s in stats] == [0.0] * 14
    assert grad.shape == shape
    assert not grad.any()


def test_packed_equals_padded(impl):
    lengths = [5, 0, 31, 1, 17]
    data, more = make(5, 31), extras(5, 31)
    mask = (torch.rand(5, 31) < 0.7) & (torch.arange(31) < torch.tensor(lengths)[:, None])
    options = {"kl_coef": 0.1, "dual_clip": 2.0, "cliprange": 0.1}
    padded = check(impl, *data, mask, **more, **options)
    packed_more = {k: v if v.dim() == 1 else pack(v, lengths) for k, v in more.items()}
    packed = check(impl, *(pack(x, lengths) for x in (*data, mask)), **packed_more, **options, cu_seqlens=cu(lengths))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-7)
    assert bit_equal(packed[2], pack(padded[2], lengths))


@pytest.mark.parametrize("pad", [1, 5])
def test_views(impl, pad):
    check_views(policy_loss, make(5, 19), holey_mask(5, 19), impl, pad)


def test_only_the_current_logprobs_get_a_gradient(impl):
    leaves = [x.requires_grad_() for x in (*make(3, 4), *extras(3, 4).values())]
    logp, old, adv, weights, ref, row_weight = leaves
    loss, _ = policy_loss(
        logp, old, adv, weights=weights, ref_logprobs=ref, row_weight=row_weight, kl_coef=1.0, impl=impl
    )
    loss.backward()
    assert logp.grad is not None
    assert [x.grad for x in leaves[1:]] == [None] * 5
    assert not policy_loss(logp.detach(), old, adv, weights=weights, impl=impl)[0].requires_grad


def test_nan_in_a_valid_token_is_seen_and_reaches_no_other_gradient(impl):
    logp, old, adv = make(3, 4)
    clean = grad_of(lambda x: policy_loss(x, old, adv, impl=impl), logp)[1]
    logp[1, 2] = NAN
    (loss, stats), grad = grad_of(lambda x: policy_loss(x, old, adv, impl=impl), logp)
    assert loss.isnan()
    assert stats.approx_kl_k1.isnan()
    assert stats.ratio_mean.isnan()
    assert stats.ratio_max.isnan()
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert bit_equal(grad[others], clean[others])
    of_reference = grad_of(lambda x: policy_loss(x, old, adv, impl="torch"), logp)[1]
    assert bool(grad[1, 2].isnan()) == bool(of_reference[1, 2].isnan())


def test_an_infinite_ratio_without_an_advantage_is_seen(impl):
    """0 times infinity: the loss is NaN, as its gradient is, and not the clipped side's 0."""
    logp, old = torch.zeros(1, 2), torch.tensor([[-200.0, 0.0]])
    (loss, _), _ = grad_of(lambda x: policy_loss(x, old, torch.zeros(1, 2), log_ratio_clamp=None, impl=impl), logp)
    assert loss.isnan()


@pytest.mark.parametrize("bounds", [[-5, 3, 12], [0, 100, 7], [2**40, -(2**40), 12], [3, 3, 3], [12, 0], [5]])
def test_wrong_cu_seqlens_never_read_outside(impl, bounds):
    rows = len(bounds) - 1
    x, call = torch.randn(12), {"cu_seqlens": torch.tensor(bounds), "impl": impl}
    loss, _ = policy_loss(x, x, torch.ones(rows), row_weight=torch.ones(rows), **call)
    assert loss.isfinite()
    assert_raises(ValueError, lambda: policy_loss(x, x, torch.ones(rows), validate=True, **call), "cu_seqlens", "12")


WRONG = [
    ({"dual_clip": 1.0}, ValueError, ("dual_clip", "> 1", "1.0")),
    ({"cliprange": -0.1}, ValueError, ("cliprange", "0", "-0.1")),
    ({"cliprange": (0.1, -0.2)}, ValueError, ("cliprange", "-0.2")),
    ({"cliprange": (0.1, 0.2, 0.3)}, (ValueError, TypeError), ("cliprange", "low, high")),
    ({"cliprange": "wide"}, TypeError, ("cliprange", "number")),
    ({"log_ratio_clamp": -1.0}, ValueError, ("log_ratio_clamp", "-1.0")),
    ({"kl_estimator": "k9"}, ValueError, ("kl_estimator", "k3", "k9")),
    ({"kl_coef": 0.1}, ValueError, ("kl_coef", "ref_logprobs")),
    ({"entropy_coef": 0.1}, ValueError, ("entropy_coef=0.1", "needs entropy", "set entropy_coef=0")),
    ({"entropy": torch.ones(4, 3)}, ValueError, ("entropy", "(3, 4)", "(4, 3)")),
    ({"entropy": torch.ones(3, 4), "entropy_coef": "much"}, TypeError, ("entropy_coef", "number", "str")),
    ({"entropy": torch.ones(3, 4), "entropy_normalizer": -1.0}, ValueError, ("entropy_normalizer", "0", "-1.0")),
    ({"advantages": torch.randn(4)}, ValueError, ("advantages", "[3]", "(4,)")),
    ({"advantages": torch.randn(1, 4)}, ValueError, ("advantages", "(3, 4)", "(1, 4)")),
    ({"advantages": 1.0}, TypeError, ("advantages", "Tensor", "float")),
    ({"weights": torch.ones(3, 4, dtype=torch.int32)}, TypeError, ("weights", "int32")),
    ({"old_logprobs": torch.randn(4, 3)}, ValueError, ("old_logprobs", "(3, 4)", "(4, 3)")),
    ({"ref_logprobs": torch.randn(4, 3)}, ValueError, ("ref_logprobs", "(3, 4)", "(4, 3)")),
    ({"mask": torch.ones(4, 3)}, ValueError, ("mask", "(3, 4)", "(4, 3)")),
    ({"row_weight": torch.ones(4)}, ValueError, ("row_weight", "(3,)", "(4,)")),
    ({"normalizer": torch.ones(2)}, ValueError, ("normalizer", "(2,)")),
    ({"normalizer": -1.0}, ValueError, ("normalizer", "0", "-1.0")),
    ({"normalizer": "n"}, TypeError, ("normalizer", "number", "str")),
    ({"cu_seqlens": torch.tensor([0, 12])}, ValueError, ("cu_seqlens", "(3, 4)")),
    ({"logprobs": torch.ones(3, 4, dtype=torch.int64)}, TypeError, ("logprobs", "int64")),
    ({"old_logprobs": torch.randn(3, 4, device="meta")}, ValueError, ("old_logprobs", "meta", "cpu")),
    ({"impl": "CUDA"}, ValueError, ("CUDA", "cpu", "auto")),
    ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
]


@pytest.mark.parametrize(("change", "error", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = dict(zip(("logprobs", "old_logprobs", "advantages"), make(3, 4), strict=True)) | {"impl": impl}
    assert_raises(error, lambda: policy_loss(**(arguments | change)), *mentions)
