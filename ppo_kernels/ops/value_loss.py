"""The clipped value loss, with its gradient and statistics from one pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ppo_kernels._types import ValueStats
from ppo_kernels.backends import register
from ppo_kernels.ops import _fakes
from ppo_kernels.ops._autograd import first_order_only, fused_loss, has_tangent
from ppo_kernels.ops._inputs import Tokens, bound, reraise_unless_refused
from ppo_kernels.ops._public import public
from ppo_kernels.reference import value_loss as reference


def _triton_kernel():
    from ppo_kernels.triton.value_loss import value_loss

    return value_loss


_VALUE_LOSS = register(
    "value_loss", fake=_fakes.loss(ValueStats._fields), triton_kernel=_triton_kernel, reference=reference.value_loss
)


@partial(public, differentiable=True)
def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange_value: float | None = 0.2,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, ValueStats]:
    r"""Clipped squared error of the value function, differentiable in ``values``.

    .. math:: L_t = \tfrac{1}{2} \max\left((V - R)^2, (\mathrm{clip}(V, V_{old} \pm \epsilon_v) - R)^2\right),\quad
              \mathrm{loss} = \sum m\,w_b\,L_t / \mathrm{normalizer}

    Args:
        values, old_values, returns: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating.
            The gradient flows to ``values`` alone.
        mask: same shape; non-zero = valid. None means all valid.
        cliprange_value: half-width of the clip around the old values, >= 0; None or inf is plain ``(V - R)^2 / 2``.
        row_weight: ``[B]``, one weight per row; see ``aggregation_weights``.
        normalizer: what the sum is divided by, a number or a one-element tensor such as a count over all ranks.
            None means the number of valid tokens. 0 gives loss 0.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the values of ``cu_seqlens`` (synchronises with the device).

    Returns:
        ``(loss, stats)``: a 0-d tensor, float32 (float64 if an input is), and :class:`ValueStats`.
        If the incoming gradient of the loss is inf or NaN (a loss scaled beyond its dtype), every entry of the kernels'
        gradient is NaN or inf, masked ones too, since 0 times inf is NaN. ``impl="torch"`` keeps those 0.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.

    Source: OpenAI baselines ppo2 (value clipping); Ziegler et al. (2019).
    """
    op = "value_loss"
    clip = bound(op, "cliprange_value", cliprange_value, least=0.0)
    usual = not validate and row_weight is normalizer is cu_seqlens is None
    usual = usual and _VALUE_LOSS.shortcut(impl, mask, values, old_values, returns)
    if usual and values.dtype == torch.float32:
        try:
            return _fused("cpu", values, old_values, returns, mask, None, None, None, clip)
        except RuntimeError as error:
            reraise_unless_refused("value_loss", error)
    tokens = Tokens(op, cu_seqlens, values=values, old_values=old_values, returns=returns, extra=(row_weight,))
    mask = tokens.mask(mask)
    if row_weight is not None:
        row_weight = tokens.per_row("row_weight", row_weight).detach()
    normalizer = tokens.normalizer(normalizer)
    if validate:
        tokens.validate_cu_seqlens()
    values = tokens.cast(values)
    old_values, returns = tokens.constant(old_values), tokens.constant(returns)

    impl = _VALUE_LOSS.choose(impl, values.device.type, tokens.dtype)
    if impl == "torch" or has_tangent(values):
        return _VALUE_LOSS.reference(
            first_order_only(op, values),
            old_values,
            returns,
            mask,
            cliprange_value=clip,
            row_weight=row_weight,
            normalizer=normalizer,
            cu_seqlens=tokens.cu_seqlens,
        )
    return _fused(impl, values, old_values, returns, mask, row_weight, normalizer, tokens.cu_seqlens, clip)


def _fused(impl: str, values: Tensor, *arguments: object) -> tuple[Tensor, ValueStats]:
    loss, stats = fused_loss(_VALUE_LOSS, impl, values, arguments)
    return loss, ValueStats(*stats)
