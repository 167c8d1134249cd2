"""Advantages of the responses to one prompt over each other."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ppo_kernels._types import GroupStats, ProcessGroup, compute_dtype, wide_dtype
from ppo_kernels.backends import register
from ppo_kernels.ops._inputs import (
    check_choice,
    check_device,
    check_floating,
    check_group,
    check_integer,
    check_integer_option,
    check_number,
    check_real,
    check_shape,
    refuse_gradient,
)
from ppo_kernels.ops._public import public
from ppo_kernels.ops.whiten import shared_moments, whiten
from ppo_kernels.reference import group_advantages as reference


def _triton_kernel():
    from ppo_kernels.triton.group_advantages import group_advantages

    return group_advantages


def _fake(scores: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    heads = scores.shape if others[-1] else (0, scores.shape[1])
    return scores.new_empty(scores.shape), scores.new_empty(heads, dtype=torch.uint8)


_GROUP_ADVANTAGES = register(
    "group_advantages", fake=_fake, triton_kernel=_triton_kernel, reference=reference.group_advantages
)
#: What kernels compute of a group; they take the position.
BASELINES = ("rloo", "grpo", "dr_grpo", "maxrl", "rloo_scaled")
#: Public modes: the baseline of each, the default of eps, and whether the batch is standardised after it.
MODES = {
    "rloo": ("rloo", 1e-4),
    "grpo": ("grpo", 1e-4),
    "dr_grpo": ("dr_grpo", 1e-4),
    "maxrl": ("maxrl", 1e-6),
    "reinforce++_baseline": ("dr_grpo", 1e-8),
    "gdpo": ("grpo", 1e-4),
}
OF_THE_BATCH = ("reinforce++_baseline", "gdpo")
SCALES = ("group", "batch", "none")
#: What ``scale_rewards`` makes of the modes that take it.
SCALED = {
    ("rloo", "group"): "rloo_scaled",
    ("rloo", "none"): "rloo",
    ("grpo", "group"): "grpo",
    ("grpo", "batch"): "dr_grpo",
    ("grpo", "none"): "dr_grpo",
}


@overload
def group_advantages(
    scores: Tensor,
    group_ids: Tensor | None = ...,
    *,
    group_size: int | None = ...,
    mode: str = ...,
    scale_rewards: str | None = ...,
    reward_weights: Tensor | None = ...,
    eps: float | None = ...,
    process_group: ProcessGroup | None = ...,
    stats: Literal[False] = ...,
    impl: str = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def group_advantages(
    scores: Tensor,
    group_ids: Tensor | None = ...,
    *,
    group_size: int | None = ...,
    mode: str = ...,
    scale_rewards: str | None = ...,
    reward_weights: Tensor | None = ...,
    eps: float | None = ...,
    process_group: ProcessGroup | None = ...,
    stats: Literal[True],
    impl: str = ...,
    validate: bool = ...,
) -> tuple[Tensor, GroupStats]: ...


@public
def group_advantages(
    scores: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    mode: str = "rloo",
    scale_rewards: str | None = None,
    reward_weights: Tensor | None = None,
    eps: float | None = None,
    process_group: ProcessGroup | None = None,
    stats: bool = False,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, GroupStats]:
    r"""How much better each response is than the others to its prompt: one advantage per response, without a critic.

    With :math:`\mu` and :math:`\sigma` (unbiased) over the K responses of a group:

    ======================  =====================================================================================
    mode                    advantage
    ======================  =====================================================================================
    "rloo"                  :math:`r - \text{mean of the others} = \tfrac{K}{K-1}(r - \mu)`
    "grpo"                  :math:`(r - \mu) / (\sigma + \mathrm{eps})`
    "dr_grpo"               :math:`r - \mu`
    "maxrl"                 :math:`(r - \mu) / (\mu + \mathrm{eps})`, for scores from 0, such as success
    "reinforce++_baseline"  :math:`r - \mu`, then mean 0 and variance 1 over the whole batch (see ``whiten``)
    "gdpo"                  "grpo" of each reward, summed; then :math:`(x - \bar x) / (\sigma_x + \mathrm{eps})` over
                            the whole batch
    ======================  =====================================================================================

    ``scale_rewards`` divides by another deviation: with "grpo", "batch" takes :math:`\sigma` over all scores, and
    "none" is "dr_grpo"; with "rloo", "group" takes that of the others, and leaves the difference as it is where these
    do not differ.

    Several rewards, ``[B, R]``, are compared one by one, and the advantages summed with ``reward_weights``. (Rewards
    that are to be summed first are ``scores @ weights``.)

    A score that is NaN or infinite is no member of its group: it is in no mean, and its advantage is 0; ``stats``
    counts it. The only response of its group has nothing to be compared with and the advantage 0 in every mode. (verl
    lets the raw score through in "rloo", and divides it by 1 + eps in "grpo".)

    Args:
        scores: ``[B]`` or ``[B, R]``, floating or integer; with "rloo" usually after the KL penalty of the sequence.
        group_ids: ``[B]`` int32 or int64, equal for the responses to one prompt; any numbers, in any order. They are
            sorted on the device, without a synchronisation.
        group_size: instead of ``group_ids``: K responses per prompt, in rows iK to iK + K - 1. Needs no sorting.
        mode: one of the above.
        scale_rewards: "group", "batch" or "none", for "grpo" and "rloo"; None is the mode's own.
        reward_weights: ``[R]``, floating, on the scores' device. None means 1 each.
        eps: >= 0; None means 1e-4, added to a standard deviation, 1e-6 ("maxrl") to the mean, or 1e-8
            ("reinforce++_baseline") to the variance. What divides by nothing does not read it.
        process_group: the ranks that share the statistics of the batch, which "reinforce++_baseline", "gdpo" and
            ``scale_rewards="batch"`` have; see ``whiten``. The responses of one group must be on one rank.
        stats: return :class:`GroupStats` too.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check that "maxrl" has no score below 0 (synchronises with the device).

    Returns:
        ``[B]``, float32 (float64 if ``scores`` is), and :class:`GroupStats` if ``stats``. Nothing requires grad.

    REINFORCE++ itself and trainers that weigh by tokens whiten after the advantages are spread over the tokens:
    ``whiten(group_advantages(..., mode="dr_grpo")[:, None].expand(B, T), mask)``.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.

    Source: Ahmadian et al., "Back to Basics" (RLOO, 2024); Shao et al., "DeepSeekMath" (GRPO, 2024); Liu et al.,
    "Understanding R1-Zero-Like Training" (Dr. GRPO, 2025); Hu, "REINFORCE++" (2025); Tajwar et al., "Maximum
    Likelihood Reinforcement Learning" (MaxRL, 2602.02710); Liu et al., "GDPO" (2601.05242). The deviation of the others
    is NeMo-RL's, that of the batch and what becomes of missing scores TRL's.
    """
    op = "group_advantages"
    _check_groups(scores, group_ids, group_size)
    check_choice(op, "mode", mode, tuple(MODES))
    baseline, default_eps = MODES[mode]
    if scale_rewards is not None:
        baseline = _scaled(mode, scale_rewards)
    whole_batch = mode in OF_THE_BATCH or scale_rewards == "batch"
    adds_eps = whole_batch or baseline not in ("rloo", "dr_grpo")
    eps = default_eps if eps is None else check_number(op, "eps", eps, least=0.0, read=adds_eps)
    if process_group is not None:
        check_group(op, "process_group", process_group)
        if not whole_batch:
            raise ValueError(
                f"{op}: process_group is for mode='reinforce++_baseline', mode='gdpo' and scale_rewards='batch';"
                f" {mode!r} has no statistics of the batch"
            )
    scores = scores.detach().to(compute_dtype(scores))
    by_reward = (scores.t() if scores.dim() == 2 else scores[None]).contiguous()
    weights = _weights(reward_weights, by_reward)
    if validate and mode == "maxrl" and bool(((by_reward < 0) & by_reward.isfinite()).any()):
        raise ValueError(
            f"{op}: mode='maxrl' divides by the mean of scores from 0 on; got one below, which flips signs"
        )
    advantages, heads = _over_groups(by_reward, group_ids, group_size or 0, baseline, eps, stats, impl)
    finite = by_reward.isfinite() if whole_batch or stats else None
    if finite is not None and scale_rewards == "batch":
        pairs = zip(by_reward, finite, strict=True)
        scale = torch.stack([_deviation_and_mean(x, valid, process_group, impl)[0] for x, valid in pairs]) + eps
        weights = torch.where(scale == 0, 0.0, (1.0 if weights is None else weights) / scale)
    total = advantages[0] if weights is None and len(advantages) == 1 else _weighted_sum(advantages, weights)
    if finite is not None and mode in OF_THE_BATCH:
        total = _standardised(total, finite.any(0), mode, eps, process_group, impl)
    if finite is None or not stats:
        return total
    of_groups = heads.amax(0)
    return total, GroupStats((of_groups != 0).sum(), (of_groups == 1).sum(), (~finite).sum())


def _check_groups(scores: Tensor, group_ids: Tensor | None, group_size: int | None) -> None:
    op = "group_advantages"
    check_real(op, "scores", scores)
    if scores.dim() not in (1, 2) or (scores.dim() == 2 and scores.size(1) < 1):
        raise ValueError(f"{op}: scores must be [B], or [B, R] of R rewards; got shape {tuple(scores.shape)}")
    if (group_ids is None) == (group_size is None):
        raise ValueError(f"{op}: pass either group_ids [B] or group_size, and not both")
    count = scores.size(0)
    if group_ids is not None:
        check_integer(op, "group_ids", group_ids)
        check_shape(op, "group_ids", group_ids, (count,), "one number per response")
        check_device(op, "group_ids", group_ids, scores.device)
    elif count % check_integer_option(op, "group_size", group_size, least=1):
        raise ValueError(
            f"{op}: {count} scores are not groups of group_size={group_size}; pass group_ids if groups differ in size"
        )


def _scaled(mode: str, scale_rewards: str) -> str:
    op = "group_advantages"
    check_choice(op, "scale_rewards", scale_rewards, SCALES)
    if (mode, scale_rewards) not in SCALED:
        allowed = [scale for of_mode, scale in SCALED if of_mode == mode]
        raise ValueError(
            f"{op}: scale_rewards={scale_rewards!r} does not go with mode={mode!r}, which takes"
            f" {' or '.join(map(repr, allowed)) or 'None alone'}; 'grpo' takes all three"
        )
    return SCALED[mode, scale_rewards]


def _weights(reward_weights: Tensor | None, scores: Tensor) -> Tensor | None:
    if reward_weights is None:
        return None
    op, name = "group_advantages", "reward_weights"
    check_floating(op, name, reward_weights)
    check_shape(op, name, reward_weights, scores.shape[:1], "one number per reward")
    check_device(op, name, reward_weights, scores.device)
    refuse_gradient(op, name, reward_weights)
    return reward_weights.detach().to(wide_dtype(scores.device))


def _over_groups(
    scores: Tensor, group_ids: Tensor | None, group_size: int, baseline: str, eps: float, stats: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Advantages ``[R, B]`` of scores ``[R, B]``, and where groups begin."""
    impl = _GROUP_ADVANTAGES.choose(impl, scores.device.type, scores.dtype)
    if impl == "torch":
        if group_ids is None:
            group_ids = torch.arange(scores.size(1), device=scores.device) // group_size
        return _GROUP_ADVANTAGES.reference(scores, group_ids, mode=baseline, eps=eps, stats=stats)
    sorted_ids = order = None
    if group_ids is not None:
        sorted_ids, order = torch.sort(group_ids.to(torch.int64), stable=True)  # a group keeps the order of its scores
    code = BASELINES.index(baseline)
    return _GROUP_ADVANTAGES.call(impl, scores, sorted_ids, order, group_size, code, eps, stats)


def _weighted_sum(advantages: Tensor, weights: Tensor | None) -> Tensor:
    wide = advantages.to(wide_dtype(advantages.device))
    return (wide if weights is None else wide * weights[:, None]).sum(0).to(advantages.dtype)


def _deviation_and_mean(x: Tensor, valid: Tensor, group: ProcessGroup | None, impl: str) -> tuple[Tensor, Tensor]:
    count, mean, m2 = shared_moments(x, valid, group, impl)
    return (m2 / (count - 1.0).clamp(min=1.0)).sqrt(), mean


def _standardised(x: Tensor, valid: Tensor, mode: str, eps: float, group: ProcessGroup | None, impl: str) -> Tensor:
    """Mean 0 and deviation 1 over the responses that have a score; 0 for the others."""
    if mode == "reinforce++_baseline":
        return whiten(x, valid, eps=eps, group=group, impl=impl)
    deviation, mean = _deviation_and_mean(x, valid, group, impl)
    scale = deviation + eps
    return torch.where(valid & (scale != 0), (x - mean) / scale, 0.0).to(x.dtype)
