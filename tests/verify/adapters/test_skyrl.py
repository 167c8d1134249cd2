"""SkyRL's own functions, found by name and in its registries, with our functions in place and without."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ppo_kernels import integrations
from tests.verify.adapters.lib import MASKS, B, T, both, close, draw, grad, load, make_mask

ppo, tensors = load(
    "skyrl",
    "skyrl.backends.skyrl_train.utils.ppo_utils",
    "skyrl.backends.skyrl_train.utils.torch_utils",
)
V = 97
UIDS = np.array(["b", "a", "b", "c", "a", "b"])  # c stands alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_entropy_of_the_same_logits(dtype):
    """As the model wrapper calls them, which asks for an in-place gradient of logits that it also uses for entropy."""
    labels = torch.randint(0, V, (4, 10), generator=torch.Generator().manual_seed(0))
    logits, weights = draw(4, 10, V, scale=3.0).to(dtype), draw(2, 4, 10, seed=1)
    mask = (torch.arange(10) < torch.tensor([[3], [10], [7], [1]])).float()
    widen = iter((True, False))

    def call():
        leaf = logits.clone().requires_grad_()
        given = (leaf.float() if next(widen) else leaf) * 1
        logprobs = tensors.logprobs_from_logits(given, labels, inplace_backward=True)
        entropy = tensors.chunked_entropy_from_logits(given, requires_grad=True, attention_mask=mask)
        metric = tensors.chunked_entropy_from_logits(given)
        assert not metric.requires_grad
        return logprobs, entropy, metric, grad((logprobs * weights[0]).sum() + (entropy * weights[1]).sum(), leaf)

    ours, theirs = both("skyrl", call, {"logprobs_from_logits": 1, "chunked_entropy_from_logits": 2})
    close(ours[:3], theirs[:3], rtol=1e-5, atol=5e-6)
    rounding = {"rtol": 1e-5, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-3}
    close(ours[3], theirs[3], **rounding)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_kl(estimator, masked, far):
    mask = make_mask("interior").float() if masked else None
    call = lambda: ppo.compute_approx_kl(draw(B, T), draw(B, T, seed=1) * far, mask, estimator)  # noqa: E731
    close(*both("skyrl", call, {"compute_approx_kl": 1}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(kind, shift_mean):
    mask = make_mask(kind).float()
    call = lambda: ppo.masked_whiten(draw(B, T) * 4 + 3, mask, shift_mean) * mask  # noqa: E731
    close(*both("skyrl", call, {"masked_whiten": 1}), atol=5e-6)


NAMES = {"gae": "gae_advantage_return", "rloo": "rloo_outcome_advantage", "grpo": "grpo_outcome_advantage"}
NAMES["maxrl"] = "maxrl_advantage"


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("estimator", NAMES)
@pytest.mark.parametrize("by_std", [True, False])
def test_advantages(estimator, kind, by_std):
    mask = make_mask(kind).float()

    def call():
        advantages, returns = ppo.compute_advantages_and_returns(
            token_level_rewards=draw(B, T),
            response_mask=mask,
            index=UIDS,
            adv_estimator=estimator,
            config=None,
            values=draw(B, T, seed=1),
            grpo_norm_by_std=by_std,
            gamma=0.98,
            lambd=0.9,
        )
        return advantages * mask, returns  # returns at masked tokens too

    close(*both("skyrl", call, {f"compute_{NAMES[estimator]}": 1}), atol=5e-6)


LOSSES = {
    "regular": "ppo_policy_loss",
    "dual_clip": "ppo_policy_loss",
    "gspo": "gspo_policy_loss",
    "cispo": "compute_policy_loss_cispo",
    "sapo": "sapo_policy_loss",
    "dppo": "dppo_policy_loss",
    "importance_sampling": "importance_sampling_loss",
}


#: Settings of the off-policy correction.
CORRECTIONS = {
    "without": {},
    "token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
    "sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.5},
    "token mask": {"token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 2.0},
    "row mask": {"sequence_mask_metric": "geometric", "geo_mask_low": 0.8, "geo_mask_high": 1.3},
    "outliers": {"outlier_token_is_threshold_high": 4.0, "tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
}
OFF = ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low", "outlier_token_is_threshold_high")
OFF += ("token_mask_is_threshold_low", "token_mask_is_threshold_high")


@pytest.mark.parametrize("kind", [*MASKS, None])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
def test_policy_loss(kind, loss_type, correction):
    if kind is None and correction is not None:
        pytest.skip("theirs needs a mask there")
    mask = None if kind is None else make_mask(kind).float()
    old = -draw(B, T).abs() - 0.02  # dppo takes them to probabilities
    rollout = None if correction is None else (old + draw(B, T, seed=3, scale=0.5)).clamp(max=-0.01)
    config = SimpleNamespace(
        policy_loss_type=loss_type,
        eps_clip_low=0.1,
        eps_clip_high=0.3,
        clip_ratio_c=1.5,
        off_policy_correction=SimpleNamespace(**dict.fromkeys(OFF) | CORRECTIONS.get(correction, {})),
        cispo=SimpleNamespace(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.4),
        sapo=SimpleNamespace(tau_pos=1.1, tau_neg=1.3),
        dppo=SimpleNamespace(
            dppo_type="binary_kl" if kind == "interior" else "binary_tv", delta_low=0.1, delta_high=0.2
        ),
        loss_reduction="sequence_mean",
    )

    def call():
        leaf = (old + draw(B, T, seed=1, scale=0.7)).clamp(max=-0.01).requires_grad_()
        advantages = draw(B, T, seed=2) / 40
        loss, metrics = ppo.PolicyLossRegistry.get(loss_type)(leaf, old, advantages, config, mask, rollout)
        return loss.detach(), metrics, grad(loss, leaf)

    ours, theirs = both("skyrl", call, {LOSSES[loss_type]: 1})
    corrected = correction not in (None, "without") and loss_type != "importance_sampling"
    assert (len(theirs[1]) > 1) == corrected, "it says what it has done"
    assert loss_type in ("sapo", "importance_sampling") or theirs[1]["clip_ratio"] > 0
    close(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", [*MASKS, "empty row", None])
@pytest.mark.parametrize("clip", [0.3, None])
def test_critic_loss(kind, clip):
    mask = None if kind is None else make_mask("prefix" if kind == "empty row" else kind).float()
    if kind == "empty row":
        mask[2] = 0

    def call():
        leaf = draw(B, T).requires_grad_()
        config = SimpleNamespace(value_clip=clip)
        loss, clipfrac = ppo.ppo_critic_loss(leaf, draw(B, T, seed=1), draw(B, T, seed=2), config, mask)
        return loss.detach(), clipfrac, grad(loss, leaf)

    close(*both("skyrl", call, {"ppo_critic_loss": 1}), rtol=1e-5, atol=5e-6)


def test_what_is_not_covered_is_left_to_skyrl():
    from skyrl.train.config import AlgorithmConfig

    adapter = integrations.adapter("skyrl")
    leaf = draw(B, T).requires_grad_()
    mask, config = make_mask("prefix").float(), AlgorithmConfig()
    adapter.apply()
    adapter.reset_status()
    kl = ppo.compute_approx_kl(leaf, draw(B, T), mask)
    ppo.ppo_policy_loss(leaf, draw(B, T), draw(B, T), config, mask * 0.5)
    status = adapter.status()
    adapter.revert()
    assert kl.requires_grad
    assert {name: list(counts["not covered"]) for name, counts in status.items()} == {
        "compute_approx_kl": ["the call is differentiated"],
        "ppo_policy_loss": ["a mask of weights"],
    }


def test_the_registries_hold_ours():
    functions = ppo.PolicyLossRegistry._functions
    theirs = {name: functions[name] for name in ("regular", "dual_clip", "clip_cov")}
    adapter = integrations.adapter("skyrl")
    adapter.apply()
    assert functions["regular"] is functions["dual_clip"] is ppo.ppo_policy_loss
    assert functions["regular"].__wrapped__ is theirs["regular"]
    assert functions["clip_cov"] is theirs["clip_cov"]
    ppo.PolicyLossRegistry.unregister("regular")
    ppo.PolicyLossRegistry.repopulate_registry()
    assert functions["regular"] is ppo.ppo_policy_loss
    adapter.revert()
    functions["regular"] = ppo.ppo_policy_loss
    assert all(functions[name] is theirs[name] for name in theirs)
