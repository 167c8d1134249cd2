"""A coefficient of 0 switches its term off: a reference that is not finite then changes nothing."""

import pytest
import torch

import ppo_kernels as pk
from tests.lib.devices import IMPLEMENTATIONS

torch.manual_seed(0)
LOGP, OLD, ADV = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
SCORES = torch.randn(4)
ZEROS = pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
REFERENCES = pytest.mark.parametrize("reference", [float("nan"), float("-inf"), 1e30])


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, require_impl):
    return require_impl("policy_loss", request.param)


def spoiled(reference):
    ref = LOGP.clone()
    ref[0, 0] = ref[2, 1] = reference
    return ref


@ZEROS
@REFERENCES
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_rewards_are_the_scores(impl, zero, reference, estimator):
    got, _ = pk.kl_rewards(LOGP, spoiled(reference), SCORES, kl_coef=zero, kl_estimator=estimator, impl=impl)
    want = torch.zeros_like(LOGP)
    want[:, -1] = SCORES
    assert torch.equal(got, want)


def loss_and_gradient(op, *rest, **options):
    leaf = LOGP.clone().requires_grad_()
    loss, _ = op(leaf, *rest, **options)
    loss.backward()
    return loss.detach(), leaf.grad


@ZEROS
@REFERENCES
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("clamp", [None, 20.0])
def test_policy_loss_is_that_without_a_reference(impl, zero, reference, estimator, clamp):
    options = {"kl_coef": zero, "kl_estimator": estimator, "kl_log_clamp": clamp}
    got = loss_and_gradient(pk.policy_loss, OLD, ADV, ref_logprobs=spoiled(reference), **options, impl=impl)
    torch.testing.assert_close(got, loss_and_gradient(pk.policy_loss, OLD, ADV, impl=impl), rtol=0, atol=0)


@ZEROS
@pytest.mark.parametrize("reference", [float("nan"), float("-inf")])
@pytest.mark.parametrize("variant", ["separate", "joint"])
def test_p3o_has_the_gradient_of_any_reference(impl, zero, reference, variant):
    def call(ref):
        options = {"kl_coef": zero, "variant": variant}
        return loss_and_gradient(pk.p3o_loss, OLD, ref, SCORES, **options, impl=impl)

    loss, grad = call(spoiled(reference))
    assert loss.isfinite()
    want, want_grad = call(LOGP)
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=0)
    if variant == "separate":
        assert torch.equal(loss, want)
