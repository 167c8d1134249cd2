"""What needs no oracle: changes of a batch that must not change its results, or that change them in a known way."""

import inspect

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import REGISTERED, ROWWISE, run
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import INF, MASKED_STEPS, NAN, bit_equal, cu, grad_of, holey_mask, pack, unpack

#: The ops whose rows do not know of each other, and the losses, whose gradients do not once the normalizer is given.
BY_ROW = [name for name in ROWWISE if "packed" not in name]
#: The ops that take padded tokens and packed ones.
PADDED = [
    name
    for name, case in REGISTERED.items()
    if not case.packed and "cu_seqlens" in inspect.signature(getattr(pk, case.op)).parameters
]


def batch_of(name: str) -> cases.Call:
    """Fewer tokens where each of them is a row of logits, because an interpreter has to walk it."""
    return cases.make(name, batch=6, length=7 if name.startswith("token_logprobs") else 40)


def rowwise(case, impl, tensors) -> tuple[torch.Tensor, ...]:
    """The outputs that have one row per sequence."""
    tensors = dict(tensors)
    if case.op == "value_loss":
        tensors["normalizer"] = torch.tensor(17.0)
    return tuple(x for x in run(case, impl, tensors) if x.dim())


def of_rows(tensors, index) -> dict[str, torch.Tensor]:
    return {k: x[index] if x.dim() else x for k, x in tensors.items()}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", BY_ROW)
def test_batches_may_be_concatenated(require_impl, impl, name):
    case = batch_of(name)
    impl = require_impl(case.op, impl)
    whole = rowwise(case, impl, case.tensors)
    parts = [rowwise(case, impl, of_rows(case.tensors, slice(*s))) for s in ((0, 1), (1, 4), (4, 4), (4, 6))]
    assert bit_equal(tuple(torch.cat(x) for x in zip(*parts, strict=True)), whole)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("extra", [1, 90, 1100])
def test_time_may_be_padded(require_impl, impl, name, extra):
    case = cases.make(name, batch=6, length=37)
    impl, lead = require_impl(case.op, impl), case.tensors["mask"].shape
    junk = torch.tensor([NAN, INF, -INF, 1e30])

    def wider(x):
        if tuple(x.shape) != tuple(lead):
            return x
        tail = torch.zeros(6, extra, dtype=x.dtype) if x.dtype == torch.bool else junk.repeat(6, extra)[:, :extra]
        return torch.cat([x, tail], 1)

    narrow = rowwise(case, impl, case.tensors)
    wide = rowwise(case, impl, {k: wider(x) for k, x in case.tensors.items()})
    for a, b in zip(narrow, wide, strict=True):
        if b.dim() == 2:
            assert not b[:, 37:].any()
            b = b[:, :37]
        assert bit_equal(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PADDED)
def test_packed_is_padded(require_impl, impl, name):
    """Token by token the same bits; sums over the batch may be grouped in another way."""
    lengths = [37, 0, 1, 20, 32, 5]
    case = cases.make(name, batch=6, length=37)
    impl, inside = require_impl(case.op, impl), torch.arange(37) < torch.tensor(lengths)[:, None]
    padded = dict(case.tensors)
    padded["mask"] = padded["mask"] & inside
    if "score_index" in padded:
        padded["score_index"] = torch.tensor([36, -1, 0, 19, 5, 4])
    packed = {k: pack(x, lengths) if x.shape == inside.shape else x for k, x in padded.items()}
    packed["cu_seqlens"] = cu(lengths)
    one, other = rowwise(case, impl, padded), rowwise(case, impl, packed)
    for a, b in zip(one, other, strict=True):
        assert bit_equal(unpack(b, lengths, 37), a) if a.dim() == 2 else bit_equal(a, b) or impl == "torch"
        if a.dim() == 1:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shift", [-64.0, 16.0, 1024.0])
def test_logits_may_be_shifted(require_impl, impl, shift):
    """On a grid that the shift does not leave, nothing is rounded and so no bit may change."""
    impl = require_impl("token_logprobs", impl)
    logits, labels = (torch.randn(4, 515) * 64).round() / 64, torch.randint(0, 515, (4,))
    results = []
    for x in (logits, logits + shift):
        leaf = x.clone().requires_grad_()
        logp, h = pk.token_logprobs(leaf, labels, entropy=True, impl=impl)
        (logp.sum() + h.sum()).backward()
        results.append((logp.detach(), h.detach(), leaf.grad))
    if impl == "cuda":  # it multiplies before it subtracts the maximum, and that product is rounded
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    else:
        assert bit_equal(*results)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_vocabulary_may_be_permuted_and_padded_with_minus_infinity(require_impl, impl):
    impl = require_impl("token_logprobs", impl)
    logits, labels, order = torch.randn(4, 515) * 3, torch.randint(0, 515, (4,)), torch.randperm(600)
    wide = torch.cat([logits, torch.full((4, 85), -INF)], 1)
    call = {"entropy": True, "impl": impl}
    total = lambda out: (2 * out[0] + out[1],)  # noqa: E731
    plain, grad = grad_of(lambda x: total(pk.token_logprobs(x, labels, **call)), logits, torch.ones(4))
    moved, moved_grad = grad_of(
        lambda x: total(pk.token_logprobs(x, order.argsort()[labels], **call)), wide[:, order], torch.ones(4)
    )
    torch.testing.assert_close(moved[0], plain[0], rtol=0, atol=1e-5)
    back = moved_grad[:, order.argsort()]
    torch.testing.assert_close(back[:, :515], grad, rtol=0, atol=2e-6)
    assert not back[:, 515:].any()
    assert grad.double().sum(1).abs().max() < 3e-6, "the gradients of a row add up to zero"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
def test_gae_is_linear_in_rewards_values_and_bootstrap_values(require_impl, impl, masked_steps):
    impl, mask = require_impl("gae", impl), holey_mask(6, 70)
    call = {"gamma": 0.9, "lam": 0.8, "masked_steps": masked_steps, "impl": impl}
    one, two = [(torch.randn(6, 70), torch.randn(6, 70), torch.randn(6)) for _ in range(2)]
    mixed = [2 * a - 3 * b for a, b in zip(one, two, strict=True)]
    results = [pk.gae(r, v, mask, bootstrap_value=boot, **call) for r, v, boot in (one, two, mixed)]
    for a, b, both in zip(*results, strict=True):
        torch.testing.assert_close(both, 2 * a - 3 * b, rtol=0, atol=3e-5)
        assert both.abs().max() > 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_skip_is_gae_without_the_masked_tokens_and_zero_is_gae_of_zeros(require_impl, impl):
    impl, mask = require_impl("gae", impl), holey_mask(6, 70)
    rewards, values, boot = torch.randn(6, 70), torch.randn(6, 70), torch.randn(6)
    call = {"gamma": 0.9, "lam": 0.8, "bootstrap_value": boot, "impl": impl}
    lengths = mask.sum(1).tolist()
    skipped = pk.gae(rewards, values, mask, masked_steps="skip", **call)
    dense = pk.gae(rewards[mask], values[mask], cu_seqlens=cu(lengths), **call)
    zeros = pk.gae(rewards, values, mask, masked_steps="zero", **call)
    of_zeros = pk.gae(rewards * mask, values * mask, mask, masked_steps="keep", **call)
    for i in range(2):
        torch.testing.assert_close(skipped[i][mask], dense[i], rtol=0, atol=2e-6)
        assert bit_equal(zeros[i], of_zeros[i])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lambda_zero_is_delta_and_lambda_one_the_discounted_return(require_impl, impl):
    impl, gamma = require_impl("gae", impl), 0.9
    rewards, values, boot = torch.randn(4, 60), torch.randn(4, 60), torch.randn(4)
    call = {"gamma": gamma, "bootstrap_value": boot, "impl": impl}
    ahead = torch.cat([values[:, 1:], boot[:, None]], 1).double()
    delta = rewards.double() + gamma * ahead - values.double()
    for lam in (0.0, torch.zeros(4)):
        torch.testing.assert_close(pk.gae(rewards, values, lam=lam, **call)[0].double(), delta, rtol=0, atol=1e-6)
    power = gamma ** (torch.arange(60.0)[None] - torch.arange(60.0)[:, None]).double()
    power = torch.where(torch.ones(60, 60).triu().bool(), power, 0.0)
    total = rewards.double() @ power.t() + boot.double()[:, None] * gamma ** (60.0 - torch.arange(60.0)).double()
    for lam in (1.0, torch.ones(4)):
        adv, ret = pk.gae(rewards, values, lam=lam, **call)
        torch.testing.assert_close(ret.double(), total, rtol=0, atol=5e-6)
        torch.testing.assert_close(adv.double(), total - values, rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("scale", "offset"), [(4.0, 0.0), (0.25, 1024.0), (-2.0, -64.0)])
def test_whitening_forgets_scale_and_offset_and_repeats_nothing(require_impl, impl, scale, offset):
    impl, mask = require_impl("whiten", impl), holey_mask(5, 300)
    x = (torch.randn(5, 300) * 256).round() / 256  # so that the images are exact
    plain = pk.whiten(x, mask, eps=0.0, impl=impl)
    moved = pk.whiten(x * scale + offset, mask, eps=0.0, impl=impl)
    torch.testing.assert_close(moved, plain if scale > 0 else -plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(pk.whiten(plain, mask, eps=0.0, impl=impl), plain, rtol=0, atol=1e-6)
    order = torch.randperm(x.numel())
    shuffled = pk.whiten(x.flatten()[order], mask.flatten()[order], eps=0.0, impl=impl)
    torch.testing.assert_close(shuffled, plain.flatten()[order], rtol=0, atol=1e-6)
    kept = pk.whiten(x, mask, eps=0.0, shift_mean=False, impl=impl)
    torch.testing.assert_close(kept, (plain + x[mask].mean()) * mask, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_inactive_clip_leaves_the_importance_weighted_mean(require_impl, impl):
    impl, mask = require_impl("policy_loss", impl), holey_mask(5, 60)
    old, adv = -torch.rand(5, 60) * 5, torch.randn(5, 60)
    logp = old + torch.rand(5, 60) * 0.3 - 0.15
    want = -(adv.double() * (logp.double() - old.double()).exp())[mask]
    calls = ({"cliprange": 0.2, "dual_clip": 3.0}, {"cliprange": 0.2}, {"cliprange": (0.9, 9.0), "dual_clip": 50.0})
    for options in calls:
        (loss, stats), grad = grad_of(lambda x, o=options: pk.policy_loss(x, old, adv, mask, impl=impl, **o), logp)
        torch.testing.assert_close(loss.detach().double(), want.mean(), rtol=0, atol=1e-6)
        torch.testing.assert_close(grad[mask].double(), want / len(want), rtol=2e-6, atol=0)
        assert float(stats.clipfrac_high) == float(stats.clipfrac_low) == float(stats.dual_clipfrac) == 0.0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rewards_are_the_penalty_plus_the_score(require_impl, impl):
    """Linear in kl_coef, and the sum of the penalties is the kl that is reported."""
    impl, mask = require_impl("kl_rewards", impl), holey_mask(5, 60)
    logp, ref, scores = torch.randn(5, 60), torch.randn(5, 60), torch.randn(5)
    for estimator in ("k1", "abs", "k2", "k3"):
        call = {"kl_estimator": estimator, "impl": impl}
        whole, kl = pk.kl_rewards(logp, ref, scores, mask, kl_coef=0.25, **call)
        penalty, same = pk.kl_rewards(logp, ref, scores * 0, mask, kl_coef=1.0, **call)
        score, _ = pk.kl_rewards(logp, ref, scores, mask, kl_coef=0.0, **call)
        torch.testing.assert_close(whole, 0.25 * penalty + score, rtol=0, atol=1e-6)
        torch.testing.assert_close(kl, -penalty.sum(1), rtol=2e-6, atol=2e-5)
        assert bit_equal(kl, same)
        torch.testing.assert_close(score.sum(1), scores * mask.any(1), rtol=0, atol=0)
