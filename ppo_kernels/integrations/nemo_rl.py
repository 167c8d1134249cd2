"""NeMo-RL: its clipped policy loss, as an object of its ``LossFunction`` protocol; nothing is replaced.

    loss_fn = ClippedPGLoss(config.loss_fn)  # in your copy of its driver script, in place of ClippedPGLossFn

The protocol is that of ``nemo_rl/algorithms/loss/interfaces.py``, and the loss is ``ClippedPGLossFn`` of
``loss_functions.py`` beside it, with its settings and metrics (read in 0.7.0, of August 2026). Settings that it
refuses, that our ops do not cover, or that nothing would read are refused.

Two values differ from its own. ``sampling_importance_ratio`` of sequence-level ratios is the mean over the sequences;
``ClippedPGLossFn`` multiplies ``[B, 1]`` by ``[B]`` there, and so sums over all pairs of a weight and a sample. A
weight of the KL penalty that is not finite is 0 and has a gradient of 0; there it has a gradient of NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels.ops.importance_weights import importance_weights
from ppo_kernels.ops.policy_loss import policy_loss

__all__ = ["ClippedPGLoss"]

TINY = 1e-8  # its means add it to every denominator


class ClippedPGLoss:
    """PPO, dual clip, GSPO, CISPO, REINFORCE and the on-policy ratio, weighted by tis, icepop or seq-mask-tis, with the
    KL penalty of the loss."""

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer

        _check_loss(cfg)
        _check_truncation(cfg)
        self.cfg = cfg
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.input_type = LossInputType.LOGPROB
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.kl_coef = 0.0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        tokens, sequences, none = MetricNormalizer.TOKENS, MetricNormalizer.SEQUENCES, MetricNormalizer.NONE
        of_loss = tokens if cfg.token_level_loss else sequences
        of_ratio = sequences if cfg.sequence_level_importance_ratios else tokens
        of_filter = sequences if cfg.truncated_importance_sampling_type == "seq-mask-tis" else tokens
        self.metric_normalizations = {
            **dict.fromkeys(("loss", "kl_penalty"), of_loss),
            **dict.fromkeys(("probs_ratio", "probs_ratio_clamped", "approx_entropy"), tokens),
            **dict.fromkeys(
                ("token_mult_prob_error", "gen_kl_error", "policy_kl_error", "js_divergence_error"), tokens
            ),
            **dict.fromkeys(("probs_ratio_min", "probs_ratio_max"), none),
            **dict.fromkeys(("probs_ratio_clamped_min", "probs_ratio_clamped_max"), none),
            **dict.fromkeys(("num_valid_samples", "positive_nll_loss"), none),
            "sampling_importance_ratio": of_ratio,
        }
        if cfg.truncated_importance_sampling_type is not None:
            self.metric_normalizations["is_oob_ratio"] = of_filter

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """The masks hold 0 and 1; ``sample_mask`` may hold weights of the samples."""
        cfg, logprobs = self.cfg, next_token_logprobs
        tokens, samples, advantages = data["token_mask"][:, 1:], data["sample_mask"], data["advantages"][:, 1:]
        generation, detached = data["generation_logprobs"][:, 1:], logprobs.detach()
        old = detached if cfg.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        live = tokens * (samples != 0)[:, None]
        weight, normalizer = samples.float(), global_valid_toks + TINY
        if not cfg.token_level_loss:
            weight, normalizer = weight / (tokens.sum(-1) + TINY), global_valid_seqs + TINY
        ratios, filtered = self._importance(old, generation, live, samples, global_valid_seqs, global_valid_toks)
        loss, _ = policy_loss(
            logprobs,
            detached if cfg.disable_ppo_ratio else old,
            advantages,
            live,
            weights=ratios if cfg.use_importance_sampling_correction else None,
            row_weight=weight,
            normalizer=normalizer,
            **self._options(),
        )
        metrics = {"loss": loss.detach()}
        if self.kl_coef != 0:
            of_kl = data.get("curr_logprobs_unfiltered", logprobs), data["reference_policy_logprobs"][:, 1:], generation
            kl = self._kl(*(torch.where(live != 0, x, 0.0) for x in of_kl))
            penalty = (kl.sum(-1) * weight).sum() / normalizer
            loss = loss + self.kl_coef * penalty
            metrics = {"loss": loss.detach(), "kl_penalty": penalty.detach()}
        else:
            metrics["kl_penalty"] = torch.zeros_like(loss)
        with torch.no_grad():
            mask = tokens * samples[:, None]
            metrics |= filtered | self._metrics(detached, old, generation, mask, tokens, global_valid_toks)
            by = global_valid_seqs if cfg.sequence_level_importance_ratios else global_valid_toks
            of = samples * ratios[:, 0] if cfg.sequence_level_importance_ratios else mask * ratios
            metrics["sampling_importance_ratio"] = of.sum() / (by + TINY)
            metrics["num_valid_samples"] = samples.sum()
        numbers = torch.stack([x.double() for x in metrics.values()]).tolist()  # the one synchronisation
        return loss, dict(zip(metrics, numbers, strict=True)) | {"positive_nll_loss": 0.0}

    def _options(self) -> dict[str, Any]:
        """Of ``policy_loss``, without a bound of the log-ratio, as it has none."""
        cfg, bounds = self.cfg, (self.cfg.ratio_clip_min, self.cfg.ratio_clip_max)
        on_policy = cfg.force_on_policy_ratio  # by token, and 1, also without the ratio of PPO
        if cfg.disable_ppo_ratio and not on_policy:  # -A log p
            return {"surrogate": "cispo", "cliprange": None}
        if cfg.use_cispo:
            return {"surrogate": "cispo", "cliprange": bounds, "log_ratio_clamp": None}
        level = "sequence" if cfg.sequence_level_importance_ratios and not on_policy else "token"
        clip = {"cliprange": None if on_policy else bounds, "dual_clip": cfg.ratio_clip_c}
        return clip | {"importance_sampling_level": level, "log_ratio_clamp": None}

    def _importance(
        self, old: Tensor, generation: Tensor, live: Tensor, samples: Tensor, seqs: Tensor, toks: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights of the rollout, ``[B, T]``, and what share of tokens, or of rows, is out of bounds."""
        cfg, kind = self.cfg, self.cfg.truncated_importance_sampling_type
        bounds = (cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio)
        if cfg.sequence_level_importance_ratios:  # a sample's weight multiplies its log-ratio
            scale = samples[:, None].to(old.dtype)
            free = _ratio_of_rows("sequence", old * scale, generation * scale, live).expand_as(old)
        else:
            free, _, _ = importance_weights(old, generation, live, bounds=None, log_ratio_clamp=None)
        free = _finite(free)
        if kind is None:
            return free, {}
        low = 0.0 if bounds[0] is None else bounds[0]
        if kind == "seq-mask-tis":
            mean = _ratio_of_rows("geometric", _finite(old - generation), torch.zeros_like(old), live)
            inside = (mean >= low) & (mean <= bounds[1])
            share = (samples * ~inside[:, 0]).sum() / (seqs + TINY)
            return free * inside, {"is_oob_ratio": share}
        inside = (free >= low) & (free <= bounds[1])
        share = (live * samples[:, None] * ~inside).sum() / (toks + TINY)
        weights = free.clamp(low, bounds[1]) if kind == "tis" else torch.where(inside, free, 0.0)
        return weights, {"is_oob_ratio": share}

    def _kl(self, logprobs: Tensor, reference: Tensor, generation: Tensor) -> Tensor:
        """The estimate times a probability ratio whose gradient counts; in eager PyTorch, since its bounds switch off
        both gradients, which those of ``policy_loss`` do not."""
        cfg = self.cfg
        base = generation if cfg.use_on_policy_kl_approximation else logprobs.detach()
        log_ratio = logprobs - base
        ratio = torch.where(log_ratio.detach().exp().isfinite(), log_ratio, -torch.inf).exp()
        difference = reference - logprobs
        if cfg.kl_input_clamp_value is not None:
            bounded = difference.clamp(-cfg.kl_input_clamp_value, cfg.kl_input_clamp_value)
            ratio = torch.where(bounded == difference, ratio, ratio.detach())
            difference = bounded
        kl = ratio * _estimate(difference, cfg.reference_policy_kl_type)
        limit = cfg.kl_output_clamp_value
        return kl if limit is None else kl.clamp(-limit, limit)

    def _metrics(
        self, logprobs: Tensor, old: Tensor, generation: Tensor, mask: Tensor, tokens: Tensor, count: Tensor
    ) -> dict[str, Tensor]:
        """What it reports beside the loss, of values at valid tokens."""
        cfg, denominator = self.cfg, count + TINY
        if cfg.force_on_policy_ratio:
            ratio = clamped = torch.ones_like(logprobs)
        elif cfg.disable_ppo_ratio:
            ratio = clamped = logprobs
        else:
            ratio = logprobs - old
            if cfg.sequence_level_importance_ratios:
                mean = torch.where(tokens != 0, ratio, 0.0).sum(-1, keepdim=True) / (
                    tokens.sum(-1, keepdim=True) + TINY
                )
                ratio = mean.expand_as(ratio)
            ratio = ratio.exp()
            clamped = ratio.clamp(1.0 - cfg.ratio_clip_min, 1.0 + cfg.ratio_clip_max)
        between, kind = old - generation, cfg.reference_policy_kl_type
        mixture = torch.logaddexp(old, generation) - torch.log(torch.tensor(2.0, device=old.device))
        divergence = _estimate(old - mixture, "k3") + _estimate(generation - mixture, "k3")
        means = {
            "probs_ratio": ratio,
            "probs_ratio_clamped": clamped,
            "token_mult_prob_error": (between.abs() * mask).exp(),
            "gen_kl_error": _estimate(between, kind),
            "policy_kl_error": _estimate(-between, kind),
            "js_divergence_error": 0.5 * divergence,
            "approx_entropy": -(logprobs - generation).exp() * logprobs,
        }
        found = {name: torch.where(mask != 0, x * mask, 0.0).sum() / denominator for name, x in means.items()}
        for name, x in (("probs_ratio", ratio), ("probs_ratio_clamped", clamped)):
            found[f"{name}_min"] = torch.where(mask != 0, x, torch.inf).amin()
            found[f"{name}_max"] = torch.where(mask != 0, x, -torch.inf).amax()
        return found


def _finite(x: Tensor) -> Tensor:
    """With 0 for what is not finite."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _ratio_of_rows(level: str, logprobs: Tensor, base: Tensor, live: Tensor) -> Tensor:
    """``[B, 1]``, where ``importance_weights`` has it at valid tokens alone: 1 for a row without one."""
    ratio, _, _ = importance_weights(logprobs, base, live, level=level, bounds=None, log_ratio_clamp=None)
    return torch.where(live.any(-1, keepdim=True), ratio.amax(-1, keepdim=True), 1.0)


def _estimate(difference: Tensor, kind: str) -> Tensor:
    """Of the divergence, by the reference's log-probability less the policy's."""
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    return difference.exp() - 1 - difference


def _check_loss(cfg: Any) -> None:
    """Refuse what ``ClippedPGLossFn`` refuses, here or at its first step, and what our ops do not cover."""
    by_rows, dual_clip = cfg.sequence_level_importance_ratios, cfg.ratio_clip_c
    if cfg.positive_example_nll_weight:
        raise ValueError(
            "ClippedPGLoss: positive_example_nll_weight is not covered; set it to 0 or take ClippedPGLossFn"
        )
    if cfg.use_cispo:
        for name, needed, word in (
            ("disable_ppo_ratio", False, "false"),
            ("force_on_policy_ratio", False, "false"),
            ("sequence_level_importance_ratios", False, "false"),
            ("ratio_clip_c", None, "null"),
            ("token_level_loss", True, "true"),
        ):
            if getattr(cfg, name) != needed:
                raise ValueError(
                    f"ClippedPGLoss: use_cispo needs {name} {word}, got {getattr(cfg, name)}; set it to {word}, or"
                    " use_cispo to false"
                )
    if cfg.disable_ppo_ratio and (dual_clip is not None or by_rows):
        raise ValueError(
            "ClippedPGLoss: disable_ppo_ratio has no ratio to clip or to average; set ratio_clip_c to null and"
            " sequence_level_importance_ratios to false"
        )
    if by_rows and cfg.token_level_loss:
        raise ValueError("ClippedPGLoss: sequence_level_importance_ratios needs token_level_loss false")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"ClippedPGLoss: ratio_clip_c must be above 1, or null for no dual clip, got {dual_clip}")
    if cfg.reference_policy_kl_type not in ("k1", "k2", "k3"):
        raise ValueError(
            f"ClippedPGLoss: reference_policy_kl_type must be k1, k2 or k3, got {cfg.reference_policy_kl_type!r}"
        )


def _check_truncation(cfg: Any) -> None:
    """Refuse a truncation that would not be done as it is set."""
    prefix, kind = "truncated_importance_sampling", cfg.truncated_importance_sampling_type
    low, high = cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio
    if kind is None:
        if low is not None or high is not None:
            raise ValueError(
                f"ClippedPGLoss: {prefix}_ratio {high} and {prefix}_ratio_min {low} are read with {prefix}_type alone;"
                " set it to tis, icepop or seq-mask-tis, or both of them to null"
            )
        return
    if kind not in ("tis", "icepop", "seq-mask-tis"):
        raise ValueError(f"ClippedPGLoss: {prefix}_type must be tis, icepop, seq-mask-tis or null, got {kind!r}")
    if not cfg.use_importance_sampling_correction:
        raise ValueError(
            f"ClippedPGLoss: {prefix}_type {kind} needs use_importance_sampling_correction true; set it, or the type to"
            " null"
        )
    if high is None or not high > 0:
        raise ValueError(f"ClippedPGLoss: {prefix}_ratio must be above 0 with {prefix}_type {kind}, got {high}")
    if low is None and kind != "tis":
        raise ValueError(f"ClippedPGLoss: {prefix}_ratio_min must be set with {prefix}_type {kind}, got None")
    if low is not None and not low <= high:
        raise ValueError(f"ClippedPGLoss: {prefix}_ratio_min must be at most {prefix}_ratio {high}, got {low}")
    if kind == "seq-mask-tis" and cfg.sequence_level_importance_ratios:
        raise ValueError(
            f"ClippedPGLoss: {prefix}_type seq-mask-tis weighs by token, got sequence_level_importance_ratios true; set"
            " it to false, or the type to tis or icepop"
        )
