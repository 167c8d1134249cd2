"""The policy loss, with its gradient and statistics from one pass."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_kernels._types import KL_ESTIMATORS, RATIO_LEVELS, SURROGATES, PolicyStats
from ppo_kernels.backends import register
from ppo_kernels.ops import _fakes
from ppo_kernels.ops._autograd import first_order_only, fused_loss, has_tangent
from ppo_kernels.ops._entropy import with_entropy
from ppo_kernels.ops._inputs import (
    Tokens,
    bound,
    check_choice,
    check_floating,
    check_number,
    check_tensor,
    number_or_tensor,
    reraise_unless_refused,
)
from ppo_kernels.ops._public import public
from ppo_kernels.reference import policy_loss as reference


def _triton_kernel():
    from ppo_kernels.triton.policy_loss import policy_loss

    return policy_loss


_POLICY_LOSS = register(
    "policy_loss", fake=_fakes.loss(PolicyStats._fields), triton_kernel=_triton_kernel, reference=reference.policy_loss
)


@partial(public, differentiable=True, also="entropy")
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    surrogate: str = "clip",
    importance_sampling_level: str = "token",
    cliprange: float | tuple[float | None, float | None] | None = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    log_ratio_clamp: float | None = 20.0,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_log_clamp: float | None = 20.0,
    kl_clamp: float | None = None,
    unbiased_kl: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    entropy_normalizer: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, PolicyStats]:
    r"""Policy loss of PPO and its relatives, differentiable in ``logprobs`` and ``entropy``: a surrogate of a ratio.

    .. math::
        \rho = \exp(\mathrm{clamp}(\log\pi - \log\pi_{old})),\quad
        L_t = \max\left(-A\rho,\ -A\,\mathrm{clip}(\rho, 1-\epsilon_{lo}, 1+\epsilon_{hi})\right)

    With ``dual_clip`` c, where A < 0, ``L_t = min(L_t, -c A)``. Then ``L_t`` is multiplied by ``weights_t`` and
    ``kl_coef * k_t(logprobs, ref_logprobs)`` is added, and

    .. math::
        \mathrm{loss} = \sum m\,w_b\,L_t / \mathrm{normalizer}
        - \mathrm{entropy\_coef} \sum m\,w_b\,H_t / \mathrm{entropy\_normalizer}

    The other surrogates, with sg the stop-gradient:

    - "cispo": ``L = -A sg(clip(rho)) logp``. An absolute cap c and no lower bound is ``cliprange=(None, c - 1)``.
    - "sapo": ``L = -A sigmoid(tau (rho - 1)) 4 / tau``.
    - "dppo_tv", "dppo_kl": ``L = -A rho``, and 0 where the token's probability p has moved from that under
      ``old_logprobs``, q, in the direction of its advantage and by more than ``cliprange``: by ``|p - q|`` or by
      ``q log(q / p) + (1 - q) log((1 - q) / (1 - p))``. The paper's q is the rollout's: pass its log-probabilities as
      ``old_logprobs``. With ``delta``, ``L = -A sg(min(rho, delta)) logp`` where it is not 0.

    ``docs/losses.md`` says which trainer's loss is which arguments.
    Every aggregation mode in use is a ``row_weight`` and a ``normalizer``: see ``aggregation_weights``.

    Args:
        logprobs, old_logprobs: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating; nats.
            The gradient flows to ``logprobs``, and to ``entropy``.
        advantages: the tokens' shape, or one per row ``[B]`` or ``[B, 1]`` (where N = B in a packed
            batch, ``[N]`` is token-level).
        mask: the tokens' shape; non-zero = valid. None means all valid.
        surrogate: "clip", "cispo", "sapo", "dppo_tv" or "dppo_kl".
        importance_sampling_level: whose ratio: "token"; "sequence", for every token exp of the mean log-ratio of its
            row's valid tokens (GSPO; ``importance_weights`` calls that mean "geometric", and "sequence" the product of
            the row's ratios); "sequence_token", the same as a constant, times ``pi / sg(pi)`` of the token
            (GSPO-token); "geometric", that mean after each log-ratio is clipped to ``[-low, high]`` on the side of its
            advantage (of 0, on that of negative ones), and no other clip (GMPO, "clip" only). dppo takes "token".
        cliprange: a number, or ``(low, high)``; each >= 0, or None or inf (off).
        dual_clip: > 1, or None or inf (off); "clip" only.
        delta: upper bound of the ratio that is not clipped, > 1, or None or inf (off); "clip" and dppo only.
        sapo_temperature_pos, sapo_temperature_neg: sapo's tau where A > 0, and elsewhere; > 0.
        log_ratio_clamp: bound of the log-ratio before exp, or None or inf (off). Beyond it the ratio has no gradient.
        weights: importance weights that multiply the surrogate, shaped like ``advantages``.
        ref_logprobs: log-probabilities of the reference policy; needed if ``kl_coef`` is not 0.
        kl_coef: weight of the KL penalty in the loss, a number or a one-element tensor.
        kl_estimator, kl_log_clamp, kl_clamp: see ``kl_rewards``.
        unbiased_kl: multiply the penalty by the ratio, with the gradient of both. With "k3" the gradient is then
            ``rho (logp - ref)``, whose expectation is that of the divergence. Level "token" only.
        entropy: H, one per token, such as ``token_logprobs(..., entropy=True)`` returns it. Where it is a metric and no
            bonus, pass it detached.
        entropy_coef: weight of the entropy bonus, a number or a one-element tensor. 0 is off: an entropy that is not
            finite then reaches neither the loss nor a gradient.
        entropy_normalizer: what the sum of the entropies is divided by, as ``normalizer``. None means the loss's.
        row_weight: ``[B]``, one weight per row.
        normalizer: what the sum is divided by, a number or a one-element tensor such as a count over all ranks.
            None means the number of valid tokens. 0 gives loss 0.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the values of ``cu_seqlens`` (synchronises with the device).

    Returns:
        ``(loss, stats)``: a 0-d tensor, float32 (float64 if an input is), and :class:`PolicyStats`.
        If the incoming gradient of the loss is inf or NaN (a loss scaled beyond its dtype), every entry of the kernels'
        gradient is NaN or inf, masked ones too, since 0 times inf is NaN. ``impl="torch"`` keeps those 0.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017); dual clip: Ye et al., "Mastering
    Complex Control in MOBA Games with Deep Reinforcement Learning" (2020); separate bounds: DAPO (2025); cispo:
    MiniMax-M1 (2025); sapo: arXiv 2511.20347; dppo: 2602.04879; GSPO: 2507.18071; GMPO: 2507.20673; unbiased KL:
    2512.02556.
    """
    op = "policy_loss"
    device = check_tensor(op, "logprobs", logprobs).device
    if isinstance(cliprange, (tuple, list)) and len(cliprange) != 2:
        raise ValueError(f"policy_loss: cliprange must be a number or (low, high), got {cliprange}")
    low, high = cliprange if isinstance(cliprange, (tuple, list)) else (cliprange, cliprange)
    kind = check_choice(op, "surrogate", surrogate, SURROGATES)
    level = check_choice(op, "importance_sampling_level", importance_sampling_level, RATIO_LEVELS)
    is_sapo, has_ref = surrogate == "sapo", ref_logprobs is not None
    low = bound(op, "cliprange (low)", low, least=0.0, read=not is_sapo)
    high = bound(op, "cliprange (high)", high, least=0.0, read=not is_sapo)
    dual_bound = bound(op, "dual_clip", dual_clip, above=1.0)
    coef, coef_tensor = number_or_tensor(op, "kl_coef", kl_coef, device)
    if ref_logprobs is None and (isinstance(kl_coef, Tensor) or kl_coef != 0):
        raise ValueError(f"policy_loss: kl_coef={kl_coef} needs ref_logprobs; pass them or set kl_coef=0")
    if entropy is None and (isinstance(entropy_coef, Tensor) or entropy_coef != 0):
        raise ValueError(f"policy_loss: entropy_coef={entropy_coef} needs entropy; pass it or set entropy_coef=0")
    code = check_choice(op, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    log_bound = bound(op, "log_ratio_clamp", log_ratio_clamp, least=0.0)
    kl_bounds = (
        bound(op, "kl_log_clamp", kl_log_clamp, least=0.0, read=has_ref),
        bound(op, "kl_clamp", kl_clamp, least=0.0, read=has_ref),
    )
    ratio_bound = bound(op, "delta", delta, above=1.0)
    if level or kind or delta is not None or unbiased_kl:
        _refuse_combinations(surrogate, importance_sampling_level, dual_bound, ratio_bound, unbiased_kl)
    taus = (
        check_number(op, "sapo_temperature_pos", sapo_temperature_pos, above=0.0, read=is_sapo),
        check_number(op, "sapo_temperature_neg", sapo_temperature_neg, above=0.0, read=is_sapo),
    )
    codes = (bool(unbiased_kl), kind, level)
    options = (low, high, dual_bound, log_bound, coef, code, *kl_bounds, *codes, ratio_bound, *taus)
    usual = not validate and weights is entropy is row_weight is normalizer is cu_seqlens is coef_tensor is None
    ref = logprobs if ref_logprobs is None else ref_logprobs
    usual = usual and _POLICY_LOSS.shortcut(impl, mask, logprobs, old_logprobs, advantages, ref)
    if usual and logprobs.dtype == torch.float32 and advantages.dim() == 2:
        inputs = (old_logprobs, advantages, mask, None, ref_logprobs, None, None, None, None)
        try:
            return _fused("cpu", logprobs, *inputs, *options)
        except RuntimeError as error:
            reraise_unless_refused("policy_loss", error)
    check_floating(op, "advantages", advantages)
    if weights is not None:
        check_floating(op, "weights", weights)
    tensors = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    if ref_logprobs is not None:
        tensors["ref_logprobs"] = ref_logprobs
    if entropy is not None:
        tensors["entropy"] = entropy
    tokens = Tokens(op, cu_seqlens, **tensors, extra=(advantages, weights, row_weight))
    mask = tokens.mask(mask)
    advantages = tokens.per_token("advantages", advantages.detach())
    if weights is not None:
        weights = tokens.per_token("weights", weights.detach())
    if row_weight is not None:
        row_weight = tokens.per_row("row_weight", row_weight).detach()
    normalizer = tokens.normalizer(normalizer)
    if validate:
        tokens.validate_cu_seqlens()
    logprobs, old_logprobs = tokens.cast(logprobs), tokens.constant(old_logprobs)
    if ref_logprobs is not None:
        ref_logprobs = tokens.constant(ref_logprobs)

    of_entropy: dict[str, Any] = {}
    if entropy is not None:
        number, on_device = number_or_tensor(op, "entropy_coef", entropy_coef, device)
        scale = tokens.normalizer(entropy_normalizer, "entropy_normalizer")
        of_entropy = {
            "entropy": tokens.cast(entropy),
            "entropy_coef": number if on_device is None else on_device,
            "entropy_normalizer": normalizer if scale is None else scale,
        }

    impl = _POLICY_LOSS.choose(impl, logprobs.device.type, tokens.dtype)
    if impl == "torch" or has_tangent(logprobs) or (entropy is not None and has_tangent(entropy)):
        if entropy is not None:
            of_entropy["entropy"] = first_order_only(op, of_entropy["entropy"])
        return _POLICY_LOSS.reference(
            first_order_only(op, logprobs), old_logprobs, advantages, mask,
            surrogate=surrogate, importance_sampling_level=importance_sampling_level,
            cliprange=(low, high), dual_clip=dual_bound, delta=ratio_bound, sapo_temperature_pos=taus[0],
            sapo_temperature_neg=taus[1], log_ratio_clamp=log_bound, weights=weights,
            ref_logprobs=ref_logprobs, kl_coef=coef if coef_tensor is None else coef_tensor, kl_estimator=kl_estimator,
            kl_log_clamp=kl_bounds[0], kl_clamp=kl_bounds[1], unbiased_kl=unbiased_kl, **of_entropy,
            row_weight=row_weight, normalizer=normalizer, cu_seqlens=tokens.cu_seqlens,
        )  # fmt: skip
    rows = (row_weight, normalizer, tokens.cu_seqlens, coef_tensor)
    loss, stats = _fused(impl, logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, *rows, *options)
    if entropy is None:
        return loss, stats
    return with_entropy(op, loss, stats, tokens.cu_seqlens, mask, row_weight, **of_entropy)


def _fused(impl: str, logprobs: Tensor, *arguments: object) -> tuple[Tensor, PolicyStats]:
    loss, stats = fused_loss(_POLICY_LOSS, impl, logprobs, arguments)
    return loss, PolicyStats(*stats)


def _refuse_combinations(surrogate: str, level: str, dual_clip: float, delta: float, unbiased_kl: bool) -> None:
    """What has no meaning together. A bound that is off by inf is off."""
    is_dppo = surrogate.startswith("dppo")
    if is_dppo and level != "token":
        raise ValueError(
            f"policy_loss: surrogate={surrogate!r} compares probabilities of tokens; set"
            f" importance_sampling_level='token', got {level!r}"
        )
    if level == "geometric" and surrogate != "clip":
        raise ValueError(
            f"policy_loss: importance_sampling_level='geometric' takes surrogate='clip', got {surrogate!r}"
        )
    if level != "token" and unbiased_kl:
        raise ValueError(
            "policy_loss: unbiased_kl multiplies the penalty by the token's ratio; set"
            f" importance_sampling_level='token', got {level!r}, or unbiased_kl=False"
        )
    for name, value, takes in (
        ("dual_clip", dual_clip, surrogate == "clip" and level != "geometric"),
        ("delta", delta, (surrogate == "clip" or is_dppo) and level != "geometric"),
    ):
        if not takes and not (isinstance(value, float) and value == math.inf):
            raise ValueError(
                f"policy_loss: {name} is not an option of surrogate={surrogate!r} with importance_sampling_level="
                f"{level!r}; leave it None, got {value}"
            )
