"""Every policy loss of TRL, verl, OpenRLHF and SkyRL is ``policy_loss`` with arguments: values and gradients.

A row of ``ROWS`` is a row of the table in ``docs/losses.md``, where a test looks for it.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ppo_kernels as pk
from tests.verify import parity
from tests.verify.parity import HIGH, LOW, Batch, openrlhf_loss, skyrl_loss, trl_loss, verl_loss

CLIP = {"cliprange": (LOW, HIGH)}
FREE = {"cliprange": None}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def weights_of(batch: Batch) -> torch.Tensor:
    """Truncated importance weights of the rollout."""
    return (batch.old - batch.rollout).exp().clamp(max=1.2)


class Row(NamedTuple):
    trainer: str
    loss: str  # as the trainer calls it
    theirs: Callable[[Batch], torch.Tensor]
    options: dict
    mode: str = "token-mean"  # of aggregation_weights
    more: Callable[[Batch], dict] = lambda batch: {}  # options that are tensors


def bonus_of(batch: Batch) -> dict:
    """The entropy bonus, by the loss's own denominator."""
    return {"entropy": batch.entropy, "entropy_coef": 0.05}


def bonus_by_tokens(batch: Batch) -> dict:
    """Its mean over the tokens, where every row has the weight 1 / T."""
    return bonus_of(batch) | {"entropy_normalizer": batch.mask.sum() / batch.mask.size(1)}


def at_1(batch: Batch) -> dict:
    """The ratio is 1, and its gradient that of logp."""
    return {"old_logprobs": batch.logprobs.detach()}


ROWS = (
    Row("verl", "vanilla", lambda b: verl_loss(b, "vanilla"), CLIP | {"dual_clip": 3.0}),
    Row("verl", "vanilla, rollout_is_weights", lambda b: verl_loss(b, "vanilla", weights=weights_of(b)),
        CLIP | {"dual_clip": 3.0}, more=lambda b: {"weights": weights_of(b)}),
    Row("verl", "vanilla, entropy_coeff",
        lambda b: parity.verl_loss_with_entropy(b, 0.05, "seq-mean-token-mean"),
        CLIP | {"dual_clip": 3.0}, "seq-mean-token-mean", more=bonus_of),
    Row("verl", "gspo", lambda b: verl_loss(b, "gspo", "seq-mean-token-mean"),
        CLIP | {"importance_sampling_level": "sequence_token"}, "seq-mean-token-mean"),
    Row("verl", "sapo", lambda b: verl_loss(b, "sapo", tau_pos=1.0, tau_neg=1.05),
        {"surrogate": "sapo"}, "seq-mean-token-mean"),
    Row("verl", "cispo", lambda b: verl_loss(b, "cispo"), CLIP | {"surrogate": "cispo"}),
    Row("verl", "dppo_tv", lambda b: verl_loss(b, "dppo_tv"), CLIP | {"surrogate": "dppo_tv", "delta": 20.0}),
    Row("verl", "dppo_kl", lambda b: verl_loss(b, "dppo_kl", clip_ratio_c=1.5),
        CLIP | {"surrogate": "dppo_kl", "delta": 1.5}),
    Row("verl", "geo_mean", lambda b: verl_loss(b, "geo_mean"),
        CLIP | {"importance_sampling_level": "geometric"}, "seq-mean-token-mean"),
    Row("verl", "gpg", lambda b: verl_loss(b, "gpg"), FREE | {"surrogate": "cispo"}, more=at_1),
    Row("verl", "dro", lambda b: verl_loss(b, "dro", policy_loss=parity.Config(dro_beta=0.3)),
        FREE | {"surrogate": "cispo", "kl_coef": 0.3, "kl_estimator": "k2", "kl_log_clamp": None},
        more=lambda b: at_1(b) | {"ref_logprobs": b.old}),
    Row("OpenRLHF", "ppo", lambda b: openrlhf_loss(b, dual_clip=3.0), CLIP | {"dual_clip": 3.0}),
    Row("OpenRLHF", "ppo, entropy_coef", lambda b: parity.openrlhf_loss_with_entropy(b, 0.05), CLIP, more=bonus_of),
    Row("OpenRLHF", "ppo, is_correction clip",
        lambda b: openrlhf_loss(b, is_correction_level="token", is_correction_mode="clip",
                                is_correction_threshold=[0.5, 1.2]),
        CLIP, more=lambda b: {"weights": (b.old - b.rollout).exp().clamp(0.5, 1.2)}),
    Row("OpenRLHF", "gspo", lambda b: openrlhf_loss(b, policy_loss_type="gspo"),
        CLIP | {"importance_sampling_level": "sequence"}, "seq-mean-token-mean"),
    Row("SkyRL", "regular", lambda b: skyrl_loss(b, "ppo_policy_loss", policy_loss_type="regular"), CLIP),
    Row("SkyRL", "regular, use_entropy_loss",
        lambda b: parity.skyrl_loss_with_entropy(b, 0.05, "seq_mean_token_sum_norm"),
        CLIP, "seq-mean-token-sum-norm", more=bonus_by_tokens),
    Row("SkyRL", "dual_clip", lambda b: skyrl_loss(b, "ppo_policy_loss", policy_loss_type="dual_clip"),
        CLIP | {"dual_clip": 3.0}),
    Row("SkyRL", "gspo", lambda b: skyrl_loss(b, "gspo_policy_loss", "sequence_mean"),
        CLIP | {"importance_sampling_level": "sequence_token"}, "seq-mean-token-mean"),
    Row("SkyRL", "sapo", lambda b: skyrl_loss(b, "sapo_policy_loss", "sequence_mean"),
        {"surrogate": "sapo"}, "seq-mean-token-mean"),
    Row("SkyRL", "cispo", lambda b: skyrl_loss(b, "compute_policy_loss_cispo"), CLIP | {"surrogate": "cispo"}),
    Row("SkyRL", "dppo, binary_tv", lambda b: skyrl_loss(b, "dppo_policy_loss", dppo=DPPO("binary_tv")),
        CLIP | {"surrogate": "dppo_tv"}, more=lambda b: {"old_logprobs": b.rollout}),
    Row("SkyRL", "dppo, binary_kl", lambda b: skyrl_loss(b, "dppo_policy_loss", dppo=DPPO("binary_kl")),
        CLIP | {"surrogate": "dppo_kl"}, more=lambda b: {"old_logprobs": b.rollout}),
    Row("SkyRL", "regular, prompt_mean",
        lambda b: skyrl_loss(b, "ppo_policy_loss", "prompt_mean", policy_loss_type="regular"), CLIP, "prompt-mean"),
    Row("SkyRL", "regular, seq_mean_token_sum_norm",
        lambda b: skyrl_loss(b, "ppo_policy_loss", "seq_mean_token_sum_norm", policy_loss_type="regular"),
        CLIP, "seq-mean-token-sum-norm"),
    Row("SkyRL", "importance_sampling", lambda b: skyrl_loss(b, "importance_sampling_loss"),
        FREE | {"log_ratio_clamp": None}),
    Row("TRL", "grpo", lambda b: trl_loss(b, "grpo"), CLIP, "seq-mean-token-mean"),
    Row("TRL", "grpo, delta", lambda b: trl_loss(b, "grpo", delta=1.3), CLIP | {"delta": 1.3}, "seq-mean-token-mean"),
    Row("TRL", "grpo, sequence", lambda b: trl_loss(b, "grpo", "sequence"),
        CLIP | {"importance_sampling_level": "sequence"}, "seq-mean-token-mean"),
    Row("TRL", "bnpo", lambda b: trl_loss(b, "bnpo"), CLIP),
    Row("TRL", "dapo", lambda b: trl_loss(b, "dapo"), CLIP),
    Row("TRL", "dapo, beta", lambda b: trl_loss(b, "dapo", beta=0.3),
        CLIP | {"kl_coef": 0.3, "kl_estimator": "k3", "unbiased_kl": True}, more=lambda b: {"ref_logprobs": b.ref}),
    Row("TRL", "dapo, beta without use_bias_correction_kl",
        lambda b: trl_loss(b, "dapo", beta=0.3, use_bias_correction_kl=False),
        CLIP | {"kl_coef": 0.3, "kl_estimator": "k3"}, more=lambda b: {"ref_logprobs": b.ref}),
    Row("TRL", "dapo, importance_sampling_ratio", lambda b: trl_loss(b, "dapo", weights=weights_of(b)),
        CLIP, more=lambda b: {"weights": weights_of(b)}),
    Row("TRL", "dr_grpo", lambda b: trl_loss(b, "dr_grpo"), CLIP, "seq-mean-token-sum-norm"),
    Row("TRL", "dr_grpo, entropy_coef", lambda b: trl_loss(b, "dr_grpo", entropy_coef=0.05), CLIP,
        "seq-mean-token-sum-norm", more=bonus_by_tokens),
    Row("TRL", "luspo", lambda b: trl_loss(b, "luspo", "sequence"),
        CLIP | {"importance_sampling_level": "sequence"}, "seq-mean-token-sum"),
    Row("TRL", "cispo", lambda b: trl_loss(b, "cispo", epsilon_high=1.25),
        {"surrogate": "cispo", "cliprange": (None, 0.25)}),
    Row("TRL", "sapo", lambda b: trl_loss(b, "sapo"), {"surrogate": "sapo"}, "seq-mean-token-mean"),
    Row("TRL", "gmpo", lambda b: trl_loss(b, "", of="gmpo"),
        CLIP | {"importance_sampling_level": "geometric"}, "seq-mean-token-mean"),
)  # fmt: skip
DPPO = lambda kind: parity.Config(dppo_type=kind, delta_low=LOW, delta_high=HIGH)  # noqa: E731
PACKAGES = {"verl": "verl", "OpenRLHF": "openrlhf", "SkyRL": "skyrl", "TRL": "trl"}


def batch_of(interior: bool, dtype: torch.dtype = torch.float64) -> Batch:
    g = torch.Generator().manual_seed(3)
    shape = (6, 23)
    old = -3.0 * torch.rand(shape, generator=g, dtype=dtype) - 0.02
    near = lambda size: (old + size * torch.randn(shape, generator=g, dtype=dtype)).clamp(max=-0.01)  # noqa: E731
    lengths = torch.tensor([23, 5, 17, 1, 9, 23])[:, None]
    mask = torch.arange(23) < lengths
    if interior:  # such as what a tool wrote
        mask &= (torch.rand(shape, generator=g) < 0.7) | (torch.arange(23) == 0)
    advantages = torch.randn(6, generator=g, dtype=dtype)
    batch = near(0.3).requires_grad_(), old, near(0.3), near(0.2), advantages, mask
    return Batch(*batch, 3.0 * torch.rand(shape, generator=g, dtype=dtype).requires_grad_())


def installed(trainer: str) -> None:
    if parity.FOLDER not in sys.path:
        sys.path.append(parity.FOLDER)
    try:
        importlib.metadata.version(PACKAGES[trainer])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{trainer} is not installed in {parity.FOLDER}; make bench fetches it")


@pytest.mark.parametrize("interior", [False, True], ids=["prefix", "interior"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.trainer}-{row.loss}")
def test_the_loss_of_a_trainer_is_policy_loss_with_arguments(row, interior):
    installed(row.trainer)
    batch = batch_of(interior)
    theirs = row.theirs(batch)
    inputs = (batch.logprobs, batch.entropy) if "entropy" in row.more(batch) else (batch.logprobs,)
    want = [grad * batch.mask for grad in torch.autograd.grad(theirs, inputs)]
    groups = {"group_size": 2} if row.mode == "prompt-mean" else {}
    row_weight, normalizer = pk.aggregation_weights(batch.mask, row.mode, **groups)
    given = {"old_logprobs": batch.old, "row_weight": row_weight, "normalizer": normalizer} | row.more(batch)
    for impl in ("torch", "cpu"):
        ours, _ = pk.policy_loss(
            batch.logprobs, advantages=batch.advantages, mask=batch.mask, **given, **row.options, impl=impl
        )
        got = torch.autograd.grad(ours, inputs)
        torch.testing.assert_close([*got], want, rtol=2e-6, atol=1e-9)  # some of theirs compute in float32
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-6, atol=1e-9)


class Correction(NamedTuple):
    trainer: str
    name: str  # as the trainer calls it
    theirs: Callable[[Batch], tuple[torch.Tensor | None, torch.Tensor | None]]  # weights and kept tokens, or either
    options: dict


def verl_weights(batch: Batch, level: str, threshold: float | str) -> tuple:
    weigh = parity.verl_correction().compute_rollout_correction_weights
    return weigh(batch.old - batch.rollout, batch.mask.to(batch.old.dtype), level, threshold)[0], None


def verl_mask(batch: Batch, option: str, threshold: float | str) -> tuple:
    reject = parity.verl_correction().compute_rollout_rejection_mask
    return None, reject(batch.old - batch.rollout, batch.mask.to(batch.old.dtype), option, threshold)[0]


def skyrl_correction(batch: Batch, function: str, *names: str, **options: object) -> tuple:
    compute = getattr(parity.skyrl_correction(), function)
    mask = batch.mask.to(batch.old.dtype)
    found = compute(batch.old, batch.rollout, mask, *names, parity.Config(**options))[0] * mask
    return (found, None) if function == "compute_tis_ratio" else (None, found)


LN = math.log
K1 = {"bounds": None, "reject": "k1"}  # verl's bounds of k1 are those of exp(k1)
CORRECTIONS = (
    Correction("verl", "rollout_is token", lambda b: verl_weights(b, "token", 1.1), {"bounds": 1.1}),
    Correction("verl", "rollout_is sequence", lambda b: verl_weights(b, "sequence", 1.5),
               {"level": "sequence", "bounds": 1.5}),
    Correction("verl", "rollout_is token, lower_upper", lambda b: verl_weights(b, "token", "0.9_1.2"),
               {"mode": "icepop", "bounds": (0.9, 1.2)}),
    Correction("verl", "rollout_rs token_k1", lambda b: verl_mask(b, "token_k1", "0.9_1.2"),
               K1 | {"reject_bounds": (LN(0.9), LN(1.2))}),
    Correction("verl", "rollout_rs seq_sum_k1", lambda b: verl_mask(b, "seq_sum_k1", "0.5_1.5"),
               K1 | {"reject_level": "sum", "reject_bounds": (LN(0.5), LN(1.5))}),
    Correction("verl", "rollout_rs seq_mean_k3", lambda b: verl_mask(b, "seq_mean_k3", 0.02),
               {"reject": "k3", "reject_level": "mean", "reject_bounds": 0.02}),
    Correction("verl", "rollout_rs seq_max_k2", lambda b: verl_mask(b, "seq_max_k2", 0.06),
               {"reject": "k2", "reject_level": "max", "reject_bounds": 0.06}),
    Correction("SkyRL", "tis_ratio_type token",
               lambda b: skyrl_correction(b, "compute_tis_ratio", "token", token_tis_ratio_clip_high=1.1),
               {"bounds": 1.1}),
    Correction("SkyRL", "tis_ratio_type sequence",
               lambda b: skyrl_correction(b, "compute_tis_ratio", "sequence", sequence_tis_ratio_clip_high=1.5),
               {"level": "sequence", "bounds": 1.5}),
    Correction("SkyRL", "token_mask",
               lambda b: skyrl_correction(b, "compute_token_mask", token_mask_is_threshold_low=0.9,
                                          token_mask_is_threshold_high=1.2),
               {"mode": "mask", "bounds": (0.9, 1.2)}),
    Correction("SkyRL", "sequence_mask_metric geometric",
               lambda b: skyrl_correction(b, "compute_sequence_mask", "geometric", geo_mask_low=0.95,
                                          geo_mask_high=1.03),
               {"level": "geometric", "mode": "mask", "bounds": (0.95, 1.03)}),
    Correction("SkyRL", "sequence_mask_metric product",
               lambda b: skyrl_correction(b, "compute_sequence_mask", "product", product_mask_low=0.5,
                                          product_mask_high=1.5),
               {"level": "sequence", "mode": "mask", "bounds": (0.5, 1.5)}),
)  # fmt: skip


@pytest.mark.parametrize("interior", [False, True], ids=["prefix", "interior"])
@pytest.mark.parametrize("row", CORRECTIONS, ids=lambda row: f"{row.trainer}-{row.name}")
def test_the_correction_of_a_trainer_is_importance_weights_with_arguments(row, interior):
    installed(row.trainer)
    batch = batch_of(interior)
    weights, kept = row.theirs(batch)
    for impl in ("torch", "cpu"):
        ours, keep, stats = pk.importance_weights(batch.old, batch.rollout, batch.mask, **row.options, impl=impl)
        if weights is not None:
            torch.testing.assert_close(ours, weights.to(ours.dtype), rtol=2e-6, atol=1e-9)
            assert torch.equal(keep, batch.mask)
        if kept is not None:
            assert torch.equal(keep, kept != 0)
            assert 0.0 < float(stats.rejectfrac) < 1.0


def test_the_page_has_every_row():
    text = PAGE.read_text()
    missing = [f"{row.trainer} {row.name}" for row in CORRECTIONS if f"| {row.trainer} | `{row.name}`" not in text]
    missing += [f"{row.trainer} {row.loss}" for row in ROWS if f"| {row.trainer} | `{row.loss}`" not in text]
    assert not missing
