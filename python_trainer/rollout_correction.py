"""Corrects for the engine that drew a rollout: how much likelier a token is to the policy than it was to the engine."""

from dataclasses import replace

from ppo_kernels import importance_weights

from .data import Experience
from .ppo_config import PPOConfig
from .rollout import restricted


def corrected(experience: Experience, config: PPOConfig) -> tuple[Experience, dict[str, float]]:
    """The global batch with its weights, without what is not kept; and how far engine and policy are apart.

    Without a correction the figures alone; and none for transformers' generate, whose weights are the policy's own.
    """
    if config.generation_engine == "hf":
        return experience, {}
    off = config.rollout_correction == "none"
    weights, keep, stats = importance_weights(
        experience.logprobs,
        experience.rollout_logprobs,
        experience.mask,
        level=config.rollout_correction_level,
        mode="truncate" if off else config.rollout_correction,
        bounds=None if off else (config.rollout_correction_low, config.rollout_correction_high),
        impl=config.ops_impl,
    )
    figures = {
        "rollout/ess": stats.ess,
        "rollout/kl_k1": stats.kl_k1,
        "rollout/kl_k3": stats.kl_k3,
        "rollout/ratio_max": stats.ratio_max,
        "rollout/clipfrac": stats.clipfrac_high + stats.clipfrac_low,
        "rollout/kept": 1.0 - stats.rejectfrac,
    }
    if not off:
        experience = replace(restricted(experience, keep), weights=weights)
    return experience, {name: figure.item() for name, figure in figures.items()}
