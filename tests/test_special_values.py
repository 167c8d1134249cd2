"""NaN and infinite inputs have the values and the gradients of the formulas, the same in every implementation."""

import itertools
import math

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels.reference.p3o_loss import p3o_loss
from ppo_kernels.reference.policy_loss import policy_loss
from ppo_kernels.reference.value_loss import value_loss
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import ESTIMATORS

NAN, INF = math.nan, math.inf
FEW = (1.0, NAN, INF, -INF)


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, require_impl):
    return require_impl("policy_loss", request.param)


def every(count, values=(0.0, 1.0, -1.0, NAN, INF, -INF)):
    """[1, N] tensors, of whose tokens each is another combination of special values."""
    return [torch.tensor([x]) for x in zip(*itertools.product(values, repeat=count), strict=True)]


def gradient(op, first, *rest, **options):
    leaf = first.clone().requires_grad_()
    op(leaf, *rest, normalizer=1.0, **options)[0].backward()
    return leaf.grad


def check_gradient(impl, op, reference, *tensors, **options):
    """The gradient is autograd's of the reference in float64, and None is infinity."""
    wide = [x.double() for x in tensors]
    want = gradient(reference, *wide, **options).float()
    for off in (None, INF):
        given = {name: off if x is None else x for name, x in options.items()}
        got = gradient(op, *tensors, impl=impl, **given)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5, 0.0])
def test_gradient_of_value_loss(impl, clip):
    check_gradient(impl, pk.value_loss, value_loss, *every(3), cliprange_value=clip)


def weighted(op):
    return lambda logp, old, adv, weights, **options: op(logp, old, adv, weights=weights, **options)


@pytest.mark.parametrize("clamp", [None, 20.0])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_gradient_of_policy_loss(impl, clamp, dual_clip):
    options = {"log_ratio_clamp": clamp, "dual_clip": dual_clip}
    check_gradient(impl, weighted(pk.policy_loss), weighted(policy_loss), *every(4), **options)


def penalised(op, estimator):
    def call(logp, ref, **options):
        zero = torch.zeros_like(ref)
        return op(logp, zero, zero, ref_logprobs=ref, kl_coef=0.5, kl_estimator=estimator, **options)

    return call


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("log_clamp", [None, 0.5])
@pytest.mark.parametrize("clamp", [None, 0.25])
def test_gradient_of_the_penalty(impl, estimator, log_clamp, clamp):
    logp, ref = every(2)
    calls = penalised(pk.policy_loss, estimator), penalised(policy_loss, estimator)
    check_gradient(impl, *calls, logp, ref, kl_log_clamp=log_clamp, kl_clamp=clamp)


def paired(op, variant):
    def call(first, old, ref, score, **options):
        logp, old, ref, score = (
            torch.cat([x, torch.zeros_like(x)]).mT.reshape(-1, 1) for x in (first, old, ref, score)
        )
        return op(logp, old, ref, score[:, 0], variant=variant, **options)

    return call


@pytest.mark.parametrize("variant", ["joint", "separate"])
@pytest.mark.parametrize("clamp", [None, 20.0])
def test_gradient_of_p3o_loss(impl, variant, clamp):
    calls = paired(pk.p3o_loss, variant), paired(p3o_loss, variant)
    check_gradient(impl, *calls, *every(4, (0.25, NAN)), log_ratio_clamp=clamp)


@pytest.mark.parametrize(
    ("estimator", "ref", "clamp", "slope"),
    [
        ("k1", -INF, None, 1.0),
        ("k3", -INF, None, 1.0),  # 1 - e^x
        ("k3", -INF, 10.0, 0.0),  # an infinite estimate is clamped to a constant
        ("k2", INF, 10.0, 0.0),
        ("abs", -INF, None, 1.0),
    ],
)
def test_a_token_that_the_reference_rules_out(impl, estimator, ref, clamp, slope):
    call, zero = penalised(pk.policy_loss, estimator), torch.zeros(1, 1)
    got = gradient(call, zero, torch.full((1, 1), ref), kl_log_clamp=None, kl_clamp=clamp, impl=impl)
    assert float(got) == 0.5 * slope


def test_a_nan_square_is_the_larger(impl):
    values = torch.tensor([[INF]])
    assert pk.value_loss(values, torch.zeros(1, 1), values, impl=impl)[0].isnan()  # (inf - inf)^2 against inf


def test_a_weight_of_a_clipped_token_does_not_matter(impl):
    zero, weights = torch.zeros(1, 1), torch.full((1, 1), NAN)
    call = weighted(pk.policy_loss)
    assert float(gradient(call, zero + 1.0, zero, zero + 1.0, weights, impl=impl)) == 0.0


@pytest.mark.parametrize("at", [0, 700, 1999])
def test_one_infinity_makes_an_infinite_mean(impl, at):
    x = torch.zeros(2000)
    x[at] = INF
    count, mean, m2 = pk.moments(x, impl=impl)
    assert (float(count), float(mean)) == (2000, INF)
    assert m2.isnan()


def check_values(impl, op, *tensors, **options):
    """The results are those of the reference in float64."""

    def results(impl, *tensors):
        found = op(*tensors, impl=impl, **options)
        return [x.float() for x in (found if isinstance(found, tuple) else (found,))]

    want = results("torch", *(x.double() if x.is_floating_point() else x for x in tensors))
    torch.testing.assert_close(results(impl, *tensors), want, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked_steps", ["skip", "zero", "keep"])
def test_advantages_and_returns(impl, masked_steps):
    steps = torch.cat(every(3, FEW)).mT
    zero, hole = torch.zeros_like(steps), torch.tensor([True, False, True]).expand_as(steps)
    for rewards, values in ((steps, zero), (zero, steps)):
        for mask in (torch.ones_like(hole), hole):
            check_values(impl, pk.gae, rewards, values, mask, gamma=0.9, lam=0.5, masked_steps=masked_steps)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards(impl, estimator):
    logp, ref, score = (x.mT for x in every(3, FEW))
    for options in ({"kl_coef": 0.0}, {"kl_coef": 0.5}, {"kl_coef": 0.5, "kl_log_clamp": None, "kl_clamp": None}):
        check_values(impl, pk.kl_rewards, logp, ref, score[:, 0], kl_estimator=estimator, **options)


def test_advantages_of_a_group(impl):
    scores = torch.cat(every(3, FEW)).mT.reshape(-1)
    for options in ({}, {"mode": "grpo"}, {"mode": "dr_grpo"}, {"mode": "maxrl"}, {"scale_rewards": "group"}):
        check_values(impl, pk.group_advantages, scores, group_size=3, **options)


def test_whitened_values(impl):
    for combination in itertools.combinations_with_replacement(FEW, 3):
        check_values(impl, pk.whiten, torch.tensor([combination]), torch.tensor([[True, True, False]]))
