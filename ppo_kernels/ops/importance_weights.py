"""Importance weights of tokens that another policy sampled, what a rejection keeps, and how far the two are apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_kernels._types import ImportanceStats
from ppo_kernels.backends import register
from ppo_kernels.ops._inputs import Tokens, bound, check_choice, check_number, check_tensor
from ppo_kernels.ops._public import public
from ppo_kernels.reference import importance_weights as reference

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask", "icepop")
ESTIMATORS = ("k1", "k2", "k3")
REJECT_LEVELS = ("token", "sum", "mean", "max")


def _triton_kernel():
    from ppo_kernels.triton.importance_weights import importance_weights

    return importance_weights


def _fake(x: Tensor, *_others: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool), x.new_empty(len(ImportanceStats._fields))


_IMPORTANCE_WEIGHTS = register(
    "importance_weights", fake=_fake, triton_kernel=_triton_kernel, reference=reference.importance_weights
)
Bounds = tuple[float | None, float | None] | float | None


@public
def importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    mode: str = "truncate",
    bounds: Bounds = (None, 2.0),
    reject: str | None = None,
    reject_level: str = "token",
    reject_bounds: Bounds = None,
    log_ratio_clamp: float | None = 20.0,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor, ImportanceStats]:
    r"""Weights that correct for a rollout by another policy, an inference engine or an older version; no gradient.

    With :math:`d = \log\pi - \log\pi_{rollout}` of a token, clamped, the ratio :math:`\rho` is

    ============  ==========================================================
    level         ratio
    ============  ==========================================================
    "token"       :math:`\exp(d)`
    "sequence"    exp of the sum of d over the row's valid tokens
    "geometric"   exp of the mean of d over them
    ============  ==========================================================

    (``policy_loss(importance_sampling_level="sequence")``, GSPO's word, is the mean: "geometric" here.) With
    ``bounds`` (low, high),

    ============  ================================================  ==================================
    mode          weight                                            keep
    ============  ================================================  ==================================
    "truncate"    :math:`\mathrm{clip}(\rho, low, high)` (TIS)      valid
    "mask"        :math:`\rho` within the bounds, else 0 (MIS)      valid and within the bounds
    "icepop"      :math:`\rho` within the bounds, else 0 (IcePop)   valid
    ============  ================================================  ==================================

    ``reject`` drops further tokens: those where an estimate of the divergence, the token's, or the sum, the mean or the
    maximum over its row, is outside of ``reject_bounds``. What is dropped has weight 0. Then
    ``policy_loss(..., mask & keep, weights=weights)``, and ``aggregation_weights(mask, keep=keep, count=...)``.

    Args:
        logprobs, rollout_logprobs: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating;
            nats. Usually of the policy before the update and of the engine that sampled.
        mask: the tokens' shape; non-zero = valid. None means all valid.
        level, mode: see above.
        bounds: of the ratio: ``(low, high)``, or high alone; each >= 0, None is off.
        reject: None, "k1" (-d), "k2" (d^2 / 2) or "k3" (exp(d) - 1 - d).
        reject_level: "token", "sum", "mean" or "max" ("k2" and "k3" only).
        reject_bounds: of the estimate, like ``bounds``; any sign. verl's bounds of k1 are those of exp(k1).
        log_ratio_clamp: bound of log-ratios before exp, or None or inf (off).
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the values of ``cu_seqlens`` (synchronises with the device).

    Returns:
        ``(weights, keep, stats)``: weights float32 (float64 if an input is) and keep bool, both shaped like the tokens
        and 0 where masked, and :class:`ImportanceStats`. A NaN is within no bounds; truncated it stays one.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.

    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); IcePop (Ling
    team, 2025); verl's rollout correction.
    """
    op = "importance_weights"
    check_tensor(op, "logprobs", logprobs)
    codes = check_choice(op, "level", level, LEVELS), check_choice(op, "mode", mode, MODES)
    by = 0 if reject is None else check_choice(op, "reject", reject, ESTIMATORS) + 1
    reject_code = check_choice(op, "reject_level", reject_level, REJECT_LEVELS) if reject is not None else 0
    if reject == "k1" and reject_level == "max":
        raise ValueError(f"{op}: reject_level='max' is for estimates that are not negative; set reject='k2' or 'k3'")
    limits = _pair(op, "bounds", bounds, 0.0)
    reject_limits = _pair(op, "reject_bounds", reject_bounds, -math.inf)
    if reject is None and (reject_level != "token" or reject_bounds is not None):
        raise ValueError(f"{op}: reject_level and reject_bounds are read with reject alone; set it to k1, k2 or k3")
    log_bound = bound(op, "log_ratio_clamp", log_ratio_clamp, least=0.0)
    tokens = Tokens(op, cu_seqlens, logprobs=logprobs, rollout_logprobs=rollout_logprobs)
    mask = tokens.mask(mask)
    if validate:
        tokens.validate_cu_seqlens()
    logprobs, rollout_logprobs = tokens.constant(logprobs), tokens.constant(rollout_logprobs)
    impl = _IMPORTANCE_WEIGHTS.choose(impl, logprobs.device.type, tokens.dtype)
    if impl == "torch":
        return _IMPORTANCE_WEIGHTS.reference(
            logprobs, rollout_logprobs, mask, level=level, mode=mode, bounds=limits, reject=reject,
            reject_level=reject_level, reject_bounds=reject_limits, log_ratio_clamp=log_bound,
            cu_seqlens=tokens.cu_seqlens,
        )  # fmt: skip
    weights, keep, stats = _IMPORTANCE_WEIGHTS.call(
        impl, logprobs, rollout_logprobs, mask, tokens.cu_seqlens, *codes, by, reject_code, *limits, *reject_limits,
        log_bound,
    )  # fmt: skip
    return weights, keep, ImportanceStats(*stats.unbind(0))


def _pair(op: str, name: str, value: Bounds, least: float) -> tuple[float, float]:
    """Bounds as kernels take them: what is off is the least number, or infinite."""
    if isinstance(value, (tuple, list)) and len(value) != 2:
        raise ValueError(f"{op}: {name} must be (low, high), or high alone, got {value}")
    low, high = value if isinstance(value, (tuple, list)) else (None, value)
    lowest = least if low is None else check_number(op, f"{name} (low)", low, least=least)
    highest = bound(op, f"{name} (high)", high, least=least)
    if isinstance(lowest, float) and isinstance(highest, float) and lowest > highest:
        raise ValueError(f"{op}: {name} must be (low, high) with low <= high, got {value}")
    return lowest, highest
