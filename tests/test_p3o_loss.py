"""The pairwise policy loss, its statistics and its gradient."""

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import P3OStats, group_advantages, p3o_loss
from tests.lib.checks import pairs_of_responses as make
from tests.lib.helpers import (
    JUNK,
    MASK_DTYPES,
    NAN,
    assert_close_to_oracle,
    bit_equal,
    cu,
    grad_of,
    holey_mask,
    out_dtype,
    pack,
    strided,
    with_junk,
)

OP = "p3o_loss"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VARIANTS = ("joint", "separate")
FIELDS = (
    "approx_kl_k1 approx_kl_k3 ref_kl ratio_mean ratio_max clamp_frac weight_mean weight_clipfrac clipfrac"
    " reward_gap margin accuracy count"
)


def check(impl, logp, old, ref, scores, mask=None, grad_output=None, **options):
    (loss, stats), grad = grad_of(
        lambda x: p3o_loss(x, old, ref, scores, mask, impl=impl, **options), logp, grad_output
    )
    want, want_stats, want_grad = oracle.p3o_loss(logp, old, ref, scores, mask, **options)
    dtype = out_dtype(*(x.dtype for x in (logp, old, ref, scores)))
    assert isinstance(stats, P3OStats)
    assert " ".join(stats._fields) == FIELDS
    assert loss.dtype == dtype
    assert grad.dtype == logp.dtype
    limit = 1e-6 if dtype == torch.float32 else 1e-11
    assert_close_to_oracle(loss.detach(), want, ceiling=limit, scale=max(abs(want), 1.0), what="loss")
    for name, value in zip(stats._fields, stats, strict=True):
        assert value.shape == ()
        assert value.dtype == dtype
        assert not value.requires_grad
        assert_close_to_oracle(value, want_stats[name], ceiling=limit, scale=max(abs(want_stats[name]), 1.0), what=name)
    scale = 1.0 if grad_output is None else float(grad_output)
    largest = max(np.abs(want_grad * scale).max(initial=0.0, where=np.isfinite(want_grad)), 1e-30)
    rounding = torch.finfo(logp.dtype).eps if logp.dtype.itemsize == 2 else 0.0
    least = torch.finfo(logp.dtype).smallest_normal * torch.finfo(logp.dtype).eps / largest
    assert_close_to_oracle(grad, want_grad * scale, ceiling=limit + rounding + least, scale=largest, what="gradient")
    return loss.detach(), stats, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(2, 1), (4, 2), (6, 33), (8, 300), (4, 1025), (2, 9001)])
def test_matches_the_loop(impl, shape, variant, dtype):
    data = make(*shape, dtype)
    check(impl, *data, variant=variant)
    check(impl, *data, holey_mask(*shape), variant=variant)


@pytest.mark.several_blocks(group_size=3, variant="joint")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 12])
def test_every_pair_of_larger_groups_counts(impl, group_size, variant):
    data = make(12, 20)
    _, stats, _ = check(impl, *data, variant=variant, group_size=group_size)
    assert int(stats.count) == 12 * (group_size - 1) // 2
    check(impl, *data, holey_mask(12, 20), variant=variant, group_size=group_size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("group_size", "groups"), [(40, 1), (130, 2), (300, 1)])
def test_groups_of_many_responses(impl, group_size, groups, variant):
    if impl == "triton" and group_size > 100:
        pytest.skip("Triton's interpreter takes 35 ms for a row")
    data = make(group_size * groups, 3)
    check(impl, *data, holey_mask(group_size * groups, 3), variant=variant, group_size=group_size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0, 60.0])
@pytest.mark.parametrize("cliprange", [0.2, 0.0, 0.9])
@pytest.mark.parametrize(("weight_clip", "clamp"), [(10.0, 20.0), (1.0, 0.8), (1e6, None)])
def test_options(impl, variant, spread, cliprange, weight_clip, clamp):
    logp, old, ref, scores = make(8, 7, torch.float64, spread=spread)
    if variant == "separate" and clamp is None and spread > 3:
        logp = old + (logp - old) / 10  # an infinite ratio has no finite loss
    options = {"cliprange": cliprange, "weight_clip": weight_clip, "log_ratio_clamp": clamp}
    options |= {"variant": variant, "group_size": 4}
    _, stats, _ = check(impl, *(x.float() for x in (logp, old, ref, scores)), kl_coef=torch.tensor(0.7), **options)
    if spread >= 3.0:
        assert 0 < float(stats.clipfrac) < 1
    check(impl, logp, old, ref, scores, kl_coef=0.3, **options)


@pytest.mark.parametrize("normalizer", [None, 3, torch.tensor(11.0), torch.tensor(12), 0, torch.tensor(0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_normalizers(impl, normalizer, variant):
    loss, _, grad = check(impl, *make(6, 9), holey_mask(6, 9), normalizer=normalizer, variant=variant)
    if normalizer is not None and float(normalizer) == 0:
        assert float(loss) == 0.0
        assert not grad.any()


@pytest.mark.parametrize("grad_output", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_incoming_gradients_scale(impl, grad_output, variant):
    check(impl, *make(4, 9), holey_mask(4, 9), grad_output=torch.tensor(grad_output), variant=variant)


# Per row one token; the rollout and the reference say 0. Scores r and 0, kl_coef 0, so that q = r.
JOINT = [
    (0.0, 0.0, 2.0, -1.0),  # no step yet: -q / 2
    (0.125, 0.0, 2.0, -1.0 * np.exp(0.125)),
    (0.25, 0.0, 2.0, -0.5 * np.exp(0.25)),  # at the bound both terms are equal, and the clamp passes half of each
    (0.5, 0.0, 2.0, 0.0),  # beyond it on the good side
    (0.5, 0.0, -2.0, 1.0 * np.exp(0.5)),  # and on the bad side, which is not clipped
    (0.0, 0.5, 2.0, -1.0 * np.exp(0.5)),
    (4.0, 4.0, 2.0, -10.0),  # w is bounded by c = 10
    (-4.0, -4.0, 2.0, -0.1),
]


@pytest.mark.parametrize(("one", "other", "q", "want"), JOINT)
def test_the_joint_gradient_written_out(impl, one, other, q, want):
    logp, zero = torch.tensor([[one], [other]]), torch.zeros(2, 1)
    scores = torch.tensor([q, 0.0])
    _, grad = grad_of(lambda x: p3o_loss(x, zero, zero, scores, kl_coef=0.0, cliprange=0.25, impl=impl)[0], logp)
    if one == 0.25:
        want = 2 * want  # both halves
    torch.testing.assert_close(grad.reshape(-1).double(), torch.tensor([want, -want]).double(), rtol=1e-6, atol=0)


SEPARATE = [
    (0.0, 0.0, 2.0, -1.0, 1.0),
    (0.1, -0.1, 2.0, -1.0, 1.0),  # rho_1 w_2 = rho_2 w_1 = 1
    (0.5, 0.0, 2.0, 0.0, np.exp(0.5)),  # the first ratio is clipped, the second one is not
    (0.5, 0.0, -2.0, np.exp(0.5), -np.exp(0.5)),
    (0.0, -0.5, 2.0, -np.exp(-0.5), 0.0),
    (0.0, 4.0, 2.0, -10.0, np.exp(4.0)),  # w_2 is bounded by c = 10, rho_2 is not
]


@pytest.mark.parametrize(("one", "other", "q", "first", "second"), SEPARATE)
def test_the_separate_gradient_written_out(impl, one, other, q, first, second):
    logp, zero = torch.tensor([[one], [other]]), torch.zeros(2, 1)
    scores, options = torch.tensor([q, 0.0]), {"kl_coef": 0.0, "variant": "separate", "impl": impl}
    _, grad = grad_of(lambda x: p3o_loss(x, zero, zero, scores, **options)[0], logp)
    torch.testing.assert_close(grad.reshape(-1).double(), torch.tensor([first, second]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shift", [64.0, -1024.0])
def test_scores_of_a_prompt_may_be_shifted(impl, variant, shift):
    """The method is named for this. On a grid that the shift does not leave, no bit may change."""
    logp, old, ref, _ = make(8, 12)
    scores = (torch.randn(8) * 256).round() / 256
    moved = scores + torch.tensor([0.0, shift]).repeat_interleave(4)
    call = {"variant": variant, "group_size": 4, "impl": impl}
    results = []
    for s in (scores, moved):
        (loss, stats), grad = grad_of(lambda x, s=s: p3o_loss(x, old, ref, s, **call), logp)
        results.append((loss.detach(), *stats, grad))
    assert bit_equal(*results)
    assert results[0][-1].abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_and_responses_may_change_places(impl, variant):
    logp, old, ref, scores = make(12, 12)
    mask = holey_mask(12, 12)
    order = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])
    within = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4, 8, 11, 9, 10])
    call = {"variant": variant, "group_size": 4, "normalizer": 7.0, "impl": impl}
    (loss, _), grad = grad_of(lambda x: p3o_loss(x, old, ref, scores, mask, **call), logp)
    for at in (order, within):
        moved = [x[at] for x in (old, ref, scores, mask)]
        (again, _), moved_grad = grad_of(lambda x, m=moved: p3o_loss(x, *m, **call), logp[at])
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-7)
        if at is order:
            assert bit_equal(moved_grad, grad[at])
        else:
            torch.testing.assert_close(moved_grad, grad[at], rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [2, 4])
def test_before_the_first_step_it_is_the_policy_gradient_of_rloo(impl, variant, group_size):
    old, _, ref, scores = make(8, 12)
    mask = holey_mask(8, 12)
    mask[1:4] = mask[4]
    (_, stats), grad = grad_of(
        lambda x: p3o_loss(x, old, ref, scores, mask, variant=variant, group_size=group_size, impl=impl), old
    )
    kl = torch.where(mask, old - ref, 0.0).sum(1)
    rloo = group_advantages(scores - 0.05 * kl, group_size=group_size, impl="torch")
    want = torch.where(mask, -rloo[:, None] / 8, 0.0)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)
    assert float(stats.ratio_mean) == float(stats.ratio_max) == float(stats.weight_mean) == 1.0
    assert (
        float(stats.approx_kl_k1)
        == float(stats.approx_kl_k3)
        == float(stats.clipfrac)
        == float(stats.weight_clipfrac)
        == 0.0
    )


def test_statistics_written_out(impl):
    zero = torch.zeros(4, 1)
    logp, ref = torch.tensor([[0.5], [0.0], [-0.5], [3.0]]), torch.tensor([[0.0], [1.0], [-0.5], [0.0]])
    scores = torch.tensor([1.0, 0.0, 2.0, 0.0])
    _, stats = p3o_loss(logp, zero, ref, scores, kl_coef=0.5, log_ratio_clamp=2.0, impl=impl)
    want = {
        "approx_kl_k1": -(0.5 - 0.5 + 2.0) / 4,
        "approx_kl_k3": (np.expm1(0.5) - 0.5 + np.expm1(-0.5) + 0.5 + np.expm1(2.0) - 2.0) / 4,
        "ref_kl": (0.5 - 1.0 + 0.0 + 3.0) / 4,
        "ratio_mean": (np.exp(0.5) + 1.0 + np.exp(-0.5) + np.exp(2.0)) / 4,
        "ratio_max": np.exp(2.0),
        "clamp_frac": 0.25,
        "weight_mean": (np.exp(0.5) + 10.0) / 2,
        "weight_clipfrac": 0.5,
        "clipfrac": 0.5,  # the first pair has moved by 0.5 where q = 0.25; the second one against its q = 3.5
        "reward_gap": (0.25 + 3.5) / 2,
        "margin": (1.5 - 3.0) / 2,
        "accuracy": 0.5,
        "count": 2.0,
    }
    assert {k: float(x) for k, x in stats._asdict().items()} == pytest.approx(want, rel=1e-6)


def test_equal_scores_prefer_nothing(impl):
    logp, old, ref, _ = make(6, 5)
    stats = p3o_loss(logp, old, ref, torch.ones(6), group_size=3, impl=impl)[1]
    assert float(stats.margin) == float(stats.accuracy) == 0.0
    assert float(stats.reward_gap) > 0


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("junk", JUNK)
def test_what_lies_under_the_mask_does_not_matter(impl, junk, variant, mask_dtype):
    logp, old, ref, scores = make(8, 37)
    mask, call = holey_mask(8, 37), {"variant": variant, "group_size": 4, "impl": impl}
    (loss, stats), grad = grad_of(lambda x: p3o_loss(x, old, ref, scores, mask, **call), logp)
    dirty = [with_junk(x, mask, j) for x, j in ((logp, junk), (old, -junk), (ref, junk))]
    scores = torch.where(mask.any(1), scores, junk)
    again, dirty_grad = grad_of(lambda x: p3o_loss(x, *dirty[1:], scores, mask.to(mask_dtype), **call), dirty[0])
    assert bit_equal((loss, *stats), (again[0], *again[1]))
    assert bit_equal(grad, dirty_grad)
    assert not grad[~mask].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (6, 0), (4, 3)])
def test_empty_and_all_masked_batches_give_zeros(impl, shape, variant):
    x, scores = torch.full(shape, NAN), torch.full(shape[:1], NAN)
    (loss, stats), grad = grad_of(
        lambda leaf: p3o_loss(leaf, x, x, scores, torch.zeros(shape), variant=variant, impl=impl), x
    )
    assert float(loss.detach()) == 0.0
    assert [float(s) for s in stats] == [0.0] * 13
    assert grad.shape == shape
    assert not grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_that_is_masked_out_takes_its_pairs_along(impl, variant):
    logp, old, ref, scores = make(6, 9, spread=0.02)
    mask = torch.ones(6, 9)
    mask[1] = mask[5] = 0
    scores[1] = NAN
    _, stats, grad = check(impl, logp, old, ref, scores, mask, variant=variant, group_size=3)
    assert float(stats.count) == 2
    assert not grad[[1, 5]].any()
    assert grad[[0, 2, 3, 4]].any(1).all()
    pairs = check(impl, *(x[[0, 2, 3, 4]] for x in (logp, old, ref, scores)), variant=variant)
    torch.testing.assert_close(grad[[0, 2, 3, 4]], pairs[2], rtol=1e-6, atol=0)


@pytest.mark.several_blocks(kind=torch.int64, variant="separate")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_equals_padded(impl, kind, variant):
    lengths = [5, 0, 31, 1, 17, 300]
    logp, old, ref, scores = make(6, 300)
    mask = (torch.rand(6, 300) < 0.7) & (torch.arange(300) < torch.tensor(lengths)[:, None])
    call = {"variant": variant, "group_size": 3}
    padded = check(impl, logp, old, ref, scores, mask, **call)
    packed = check(
        impl,
        *(pack(x, lengths) for x in (logp, old, ref)),
        scores,
        pack(mask, lengths),
        cu_seqlens=cu(lengths, kind),
        **call,
    )
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(packed[2], pack(padded[2], lengths), rtol=1e-6, atol=1e-9)
    assert bit_equal(packed[2], pack(padded[2], lengths)) or impl == "torch"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("without", ["", "mask", "normalizer"])
def test_gradcheck(impl, variant, without):
    """q and w are constants for the gradient but not for the loss: only here, where nothing can move them, do the two
    agree."""
    logp, *data = make(6, 5, torch.float64, spread=1.0)
    optional = {"mask": holey_mask(6, 5), "normalizer": torch.tensor(3.0)}
    optional.pop(without, None)
    constant = {"kl_coef": 0.0, "weight_clip": 1.0, "variant": variant, "group_size": 3, "impl": impl}
    fn = lambda x: p3o_loss(x, *data, **optional, **constant)[0]  # noqa: E731
    assert torch.autograd.gradcheck(fn, logp.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("extra", [1, 90, 1100])
def test_time_may_be_padded(impl, extra, variant):
    logp, old, ref, scores = make(6, 137)
    mask, junk = holey_mask(6, 137), torch.tensor([NAN, 1e30, -1e30]).repeat(6, extra)[:, :extra]
    call = {"variant": variant, "group_size": 3, "impl": impl}
    _, narrow = grad_of(lambda x: p3o_loss(x, old, ref, scores, mask, **call)[0], logp)
    wide = [torch.cat([x, junk], 1) for x in (logp, old, ref)]
    mask = torch.cat([mask, torch.zeros(6, extra, dtype=torch.bool)], 1)
    _, grad = grad_of(lambda x: p3o_loss(x, *wide[1:], scores, mask, **call)[0], wide[0])
    assert not grad[:, 137:].any()
    torch.testing.assert_close(grad[:, :137], narrow, rtol=1e-6, atol=1e-9)
    assert bit_equal(grad[:, :137], narrow) or impl == "torch"


@pytest.mark.parametrize("pad", [1, 5])
def test_views(impl, pad):
    logp, old, ref, scores = make(6, 19)
    mask = holey_mask(6, 19)
    wide = torch.ones(6, 19 + pad, dtype=torch.bool)
    wide[:, :19] = mask
    (loss, _), grad = grad_of(lambda x: p3o_loss(x, old, ref, scores, mask, impl=impl), logp)
    spaced = torch.stack([scores, scores], 1)[:, 0]
    for view in (lambda x: strided(x, pad), lambda x: x.t().contiguous().t()):
        leaf = view(logp).requires_grad_()
        again, _ = p3o_loss(leaf, view(old), view(ref), spaced, wide[:, :19], impl=impl)
        again.backward()
        assert bit_equal(again, loss)
        assert bit_equal(leaf.grad, grad)


def test_only_the_current_logprobs_get_a_gradient(impl):
    logp, old, ref, scores = (x.requires_grad_() for x in make(4, 4))
    p3o_loss(logp, old, ref, scores, impl=impl)[0].backward()
    assert logp.grad is not None
    assert [x.grad for x in (old, ref, scores)] == [None] * 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "scores"])
def test_nan_in_a_valid_response_is_seen_in_its_group_alone(impl, name, variant):
    data = dict(zip(("logprobs", "old_logprobs", "ref_logprobs", "scores"), make(6, 4), strict=True))
    call = {"variant": variant, "group_size": 3, "impl": impl}
    logp = data.pop("logprobs")
    clean = grad_of(lambda x: p3o_loss(x, **data, **call), logp)[1]
    (data | {"logprobs": logp})[name][1] = NAN
    (loss, stats), grad = grad_of(lambda x: p3o_loss(x, **data, **call), logp)
    assert loss.isnan()
    assert bool(stats.approx_kl_k1.isnan()) == (name in ("logprobs", "old_logprobs"))
    assert bool(stats.ref_kl.isnan()) == (name in ("logprobs", "ref_logprobs"))
    assert bool(stats.reward_gap.isnan()) == (name != "old_logprobs")
    assert bool(stats.margin.isnan()) == (name != "old_logprobs")
    # The clamp of a row's own log-ratio passes no gradient for a NaN, as torch.clamp does not.
    stopped = variant == "separate" and name in ("logprobs", "old_logprobs")
    assert grad[[0, 2] if stopped else [0, 1, 2]].isnan().all()
    assert bit_equal(grad[3:], clean[3:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_ratios_that_overflow_are_clamped_and_counted(impl, variant):
    logp, old, ref, scores = make(4, 50)
    logp = logp + torch.tensor([4.0, 0.0, -4.0, 0.0])[:, None]  # 200 nats
    (loss, stats), grad = grad_of(lambda x: p3o_loss(x, old, ref, scores, variant=variant, impl=impl), logp)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert float(stats.clamp_frac) == 0.5
    assert float(stats.ratio_max) == pytest.approx(np.exp(20.0), rel=1e-5)
