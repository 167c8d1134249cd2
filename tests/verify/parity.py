"""The losses of other trainers, called as they call them: their own functions, from the packages in ``build/peers``.

Each ``<trainer>_<loss>`` takes a batch and returns the loss, differentiable in ``batch.logprobs``. ``make bench`` or
``make build/peers/.installed`` fetches the packages; ``PEERS`` names another folder with them.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.source import functions

FOLDER = os.environ.get("PEERS", str(Path(__file__).resolve().parents[2] / "build" / "peers"))
LOW, HIGH = 0.1, 0.25


class Batch(NamedTuple):
    logprobs: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantages: Tensor  # [B]
    mask: Tensor  # bool
    entropy: Tensor

    @property
    def spread(self) -> Tensor:
        """The advantages, one for each token."""
        return self.advantages[:, None].expand_as(self.logprobs)


def _load(package: str, file: str, *names: str, **given: object) -> SimpleNamespace:
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
    return SimpleNamespace(**functions(package, file, *names, **given))


def _registered(_name: object) -> object:
    """In place of a decorator that enters a function in a registry."""
    return lambda function: function


class Config(SimpleNamespace):
    """An actor config: attributes and ``get``."""

    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


VERL_LOSSES = ("vanilla", "gspo", "sapo", "dppo_tv", "dppo_kl", "cispo", "geo_mean", "gpg", "dro")


@cache
def verl() -> SimpleNamespace:
    tensors = _load("verl", "verl/utils/torch_functional.py", "masked_mean", "masked_sum")
    names = [f"compute_policy_loss_{name}" for name in VERL_LOSSES]
    return _load(
        "verl", "verl/trainer/ppo/core_algos.py", *names, "agg_loss", "kl_penalty",
        verl_F=tensors, AlgoConfig=type("AlgoConfig", (), {}), ActorConfig=Config, register_policy_loss=_registered,
    )  # fmt: skip


def verl_loss(batch: Batch, loss: str, mode: str = "token-mean", weights: Tensor | None = None, **options: object):
    config = Config(clip_ratio=0.2, clip_ratio_low=LOW, clip_ratio_high=HIGH, global_batch_info={}, **options)
    compute = getattr(verl(), f"compute_policy_loss_{loss}")
    given = {"config": config, "rollout_is_weights": weights}
    return compute(batch.old, batch.logprobs, batch.spread, batch.mask.float(), mode, **given)[0]


def verl_loss_with_entropy(batch: Batch, coef: float, mode: str) -> Tensor:
    """As ``ppo_loss`` of its workers ends."""
    bonus = verl().agg_loss(loss_mat=batch.entropy, loss_mask=batch.mask, loss_agg_mode=mode)
    return verl_loss(batch, "vanilla", mode) - coef * bonus


@cache
def verl_correction() -> SimpleNamespace:
    tensors = _load("verl", "verl/utils/torch_functional.py", "masked_mean", "masked_sum")
    names = ("compute_rollout_correction_weights", "compute_rollout_rejection_mask")
    return _load("verl", "verl/trainer/ppo/rollout_corr_helper.py", *names, verl_F=tensors)


@cache
def skyrl_correction() -> SimpleNamespace:
    folder = "skyrl/backends/skyrl_train/utils"
    tensors = _load("skyrl", f"{folder}/torch_utils.py", "masked_mean", "safe_exp_delta")
    names = ("compute_tis_ratio", "compute_outlier_token_mask", "compute_token_mask", "compute_sequence_mask")
    return _load("skyrl", f"{folder}/off_policy_correction_utils.py", *names, **vars(tensors))


@cache
def openrlhf() -> SimpleNamespace:
    utils = _load("openrlhf", "openrlhf/models/utils.py", "masked_mean", "compute_approx_kl")
    given = {"masked_mean": utils.masked_mean}
    losses = _load("openrlhf", "openrlhf/models/loss.py", "PolicyLoss", "aggregate_loss", **given)
    return SimpleNamespace(compute_approx_kl=utils.compute_approx_kl, **vars(losses))


def openrlhf_loss(batch: Batch, **options: object) -> Tensor:
    loss = openrlhf().PolicyLoss(clip_eps_low=LOW, clip_eps_high=HIGH, **options)
    return loss(batch.logprobs, batch.old, batch.spread, batch.mask.float(), rollout_log_probs=batch.rollout)[0]


def openrlhf_loss_with_entropy(batch: Batch, coef: float) -> Tensor:
    """As ``training_step`` of its actor ends."""
    return openrlhf_loss(batch) - openrlhf().aggregate_loss(batch.entropy, batch.mask.float()) * coef


@cache
def skyrl() -> SimpleNamespace:
    folder = "skyrl/backends/skyrl_train/utils"
    tensors = _load("skyrl", f"{folder}/torch_utils.py", "masked_mean", "safe_exp_delta")
    names = ("ppo_policy_loss", "sapo_policy_loss", "gspo_policy_loss", "compute_policy_loss_cispo")
    names += ("rollout_is_policy_loss", "dppo_policy_loss", "importance_sampling_loss", "reduce_loss")
    types = SimpleNamespace(
        **{name: name for name in ("REGULAR", "DUAL_CLIP", "SAPO", "GSPO", "CISPO", "ROLLOUT_IS", "DPPO")},
        IMPORTANCE_SAMPLING="",
    )
    losses = _load(
        "skyrl", f"{folder}/ppo_utils.py", *names, "apply_loss_reduction_to_advantages_minibatch",
        **vars(tensors), register_policy_loss=_registered, PolicyLossType=types,
        apply_off_policy_correction=lambda loss, old, rollout, mask, config: (loss, mask, {}),
    )  # fmt: skip
    return SimpleNamespace(masked_mean=tensors.masked_mean, **vars(losses))


def skyrl_loss(batch: Batch, loss: str, reduction: str = "token_mean", **options: object) -> Tensor:
    config = Config(
        eps_clip_low=LOW, eps_clip_high=HIGH, clip_ratio_c=3.0, loss_reduction=reduction,
        off_policy_correction=None,
        sapo=Config(tau_pos=1.0, tau_neg=1.05),
        cispo=Config(cispo_eps_clip_low=LOW, cispo_eps_clip_high=HIGH),
        **options,
    )  # fmt: skip
    mask, length = batch.mask.float(), batch.mask.size(1)
    # It divides the advantages and adds up the losses.
    scale = skyrl().apply_loss_reduction_to_advantages_minibatch
    bounds = [(i, i + 2) for i in range(0, len(mask), 2)]
    advantages = scale(batch.spread, mask, reduction, len(mask), length, bounds)
    return getattr(skyrl(), loss)(batch.logprobs, batch.old, advantages, config, mask, batch.rollout)[0]


def skyrl_loss_with_entropy(batch: Batch, coef: float, reduction: str) -> Tensor:
    """As its worker's step ends, of one micro-batch and one process."""
    loss = skyrl_loss(batch, "ppo_policy_loss", reduction, policy_loss_type="regular")
    return loss - coef * skyrl().masked_mean(batch.entropy, batch.mask.float())


@cache
def trl() -> SimpleNamespace:
    extreme = {"nanmin": torch.min, "nanmax": torch.max}
    plain = _load("trl", "trl/trainer/grpo_trainer.py", "GRPOTrainer._compute_loss", **extreme)
    return SimpleNamespace(
        grpo=plain._compute_loss,
        gmpo=_load(
            "trl", "trl/experimental/gmpo/gmpo_trainer.py", "GMPOTrainer._compute_loss", **extreme
        )._compute_loss,
    )


def trl_loss(batch: Batch, loss_type: str, level: str = "token", of: str = "grpo", **options: object) -> Tensor:
    """``self`` is what the method reads of a trainer."""
    arguments = {"delta": None, "use_bias_correction_kl": True, "sapo_temperature_pos": 1.0}
    arguments |= {"sapo_temperature_neg": 1.05, "steps_per_generation": 1}
    weights = options.pop("weights", None)
    high = options.pop("epsilon_high", HIGH)
    beta, entropy_coef = options.pop("beta", 0.0), options.pop("entropy_coef", 0.0)
    one_process = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False
    )
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=weights is not None,
        vllm_importance_sampling_correction=True, _entropy_bonus_enabled=entropy_coef != 0, entropy_coef=entropy_coef,
        use_adaptive_entropy=False, current_gradient_accumulation_steps=1,
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=LOW, epsilon_high=high, beta=beta,
        max_completion_length=batch.mask.size(1), model=SimpleNamespace(training=True), accelerator=one_process,
        args=SimpleNamespace(**(arguments | options)), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.entropy, None),
    )  # fmt: skip
    ids = torch.zeros_like(batch.mask, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    inputs |= {"completion_mask": batch.mask.long(), "advantages": batch.advantages, "old_per_token_logps": batch.old}
    inputs |= {"ref_per_token_logps": batch.ref, "num_items_in_batch": batch.mask.sum()}
    inputs |= {"importance_sampling_ratio": weights}
    return getattr(trl(), of)(trainer, None, inputs)
