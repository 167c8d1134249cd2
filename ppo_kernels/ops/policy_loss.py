"""The clipped policy loss, with its gradient and statistics from one pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ppo_kernels._types import KL_ESTIMATORS, PolicyStats
from ppo_kernels.backends import register
from ppo_kernels.ops import _fakes
from ppo_kernels.ops._autograd import first_order_only, fused_loss, has_tangent
from ppo_kernels.ops._inputs import (
    Tokens,
    bound,
    check_choice,
    check_floating,
    check_tensor,
    number_or_tensor,
)
from ppo_kernels.ops._public import public
from ppo_kernels.reference import policy_loss as reference


def _triton_kernel():
    from ppo_kernels.triton.policy_loss import policy_loss

    return policy_loss


_POLICY_LOSS = register(
    "policy_loss", fake=_fakes.loss(PolicyStats._fields), triton_kernel=_triton_kernel, reference=reference.policy_loss
)


@partial(public, differentiable=True)
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float | tuple[float | None, float | None] | None = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_log_clamp: float | None = 20.0,
    kl_clamp: float | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, PolicyStats]:
    r"""Clipped surrogate loss of PPO, differentiable in ``logprobs``.

    .. math::
        \rho = \exp(\mathrm{clamp}(\log\pi - \log\pi_{old})),\quad
        L_t = \max\big(-A\rho,\ -A\,\mathrm{clip}(\rho, 1-\epsilon_{lo}, 1+\epsilon_{hi})\big)

    With ``dual_clip`` c, where A < 0, ``L_t = min(L_t, -c A)``. Then ``L_t`` is multiplied by ``weights_t`` and
    ``kl_coef * k_t(logprobs, ref_logprobs)`` is added, and

    .. math:: \mathrm{loss} = \sum m\,w_b\,L_t / \mathrm{normalizer}

    Every aggregation mode in use is a ``row_weight`` and a ``normalizer``: see ``aggregation_weights``.

    Args:
        logprobs, old_logprobs: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating; nats.
            The gradient flows to ``logprobs`` alone.
        advantages: the tokens' shape, or one per row ``[B]`` or ``[B, 1]`` (where N = B in a packed
            batch, ``[N]`` is token-level).
        mask: the tokens' shape; non-zero = valid. None means all valid.
        cliprange: a number, or ``(low, high)``; each >= 0, or None or inf (off).
        dual_clip: > 1, or None or inf (off).
        log_ratio_clamp: bound of the log-ratio before exp, or None or inf (off).
        weights: importance weights that multiply the surrogate, shaped like ``advantages``.
        ref_logprobs: log-probabilities of the reference policy; needed if ``kl_coef`` is not 0.
        kl_coef: weight of the KL penalty in the loss, a number or a one-element tensor.
        kl_estimator, kl_log_clamp, kl_clamp: see ``kl_rewards``.
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
    Complex Control in MOBA Games with Deep Reinforcement Learning" (2020); separate bounds: DAPO (2025).
    """
    op = "policy_loss"
    device = check_tensor(op, "logprobs", logprobs).device
    if isinstance(cliprange, (tuple, list)) and len(cliprange) != 2:
        raise ValueError(f"policy_loss: cliprange must be a number or (low, high), got {cliprange}")
    low, high = cliprange if isinstance(cliprange, (tuple, list)) else (cliprange, cliprange)
    low = bound(op, "cliprange (low)", low, least=0.0)
    high = bound(op, "cliprange (high)", high, least=0.0)
    dual_bound = bound(op, "dual_clip", dual_clip, above=1.0)
    coef, coef_tensor = number_or_tensor(op, "kl_coef", kl_coef, device)
    if ref_logprobs is None and (isinstance(kl_coef, Tensor) or kl_coef != 0):
        raise ValueError(f"policy_loss: kl_coef={kl_coef} needs ref_logprobs; pass them or set kl_coef=0")
    code = check_choice(op, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    log_bound = bound(op, "log_ratio_clamp", log_ratio_clamp, least=0.0)
    kl_bounds = bound(op, "kl_log_clamp", kl_log_clamp, least=0.0), bound(op, "kl_clamp", kl_clamp, least=0.0)
    options = (low, high, dual_bound, log_bound, coef, code, *kl_bounds)
    usual = not validate and weights is row_weight is normalizer is cu_seqlens is coef_tensor is None
    ref = logprobs if ref_logprobs is None else ref_logprobs
    usual = usual and _POLICY_LOSS.shortcut(impl, mask, logprobs, old_logprobs, advantages, ref)
    if usual and logprobs.dtype == torch.float32 and advantages.dim() == 2:
        inputs = (old_logprobs, advantages, mask, None, ref_logprobs, None, None, None, None)
        try:
            return _fused("cpu", logprobs, *inputs, *options)
        except RuntimeError:
            pass
    check_floating(op, "advantages", advantages)
    if weights is not None:
        check_floating(op, "weights", weights)
    tensors = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    if ref_logprobs is not None:
        tensors["ref_logprobs"] = ref_logprobs
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

    impl = _POLICY_LOSS.choose(impl, logprobs.device.type, tokens.dtype)
    if impl == "torch" or has_tangent(logprobs):
        return _POLICY_LOSS.reference(
            first_order_only(op, logprobs), old_logprobs, advantages, mask,
            cliprange=(low, high), dual_clip=dual_bound, log_ratio_clamp=log_bound, weights=weights,
            ref_logprobs=ref_logprobs, kl_coef=coef if coef_tensor is None else coef_tensor, kl_estimator=kl_estimator,
            kl_log_clamp=kl_bounds[0], kl_clamp=kl_bounds[1], row_weight=row_weight, normalizer=normalizer,
            cu_seqlens=tokens.cu_seqlens,
        )  # fmt: skip
    rows = (row_weight, normalizer, tokens.cu_seqlens, coef_tensor)
    return _fused(impl, logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, *rows, *options)


def _fused(impl: str, logprobs: Tensor, *arguments: object) -> tuple[Tensor, PolicyStats]:
    loss, stats = fused_loss(_POLICY_LOSS, impl, logprobs, arguments)
    return loss, PolicyStats(*stats)
