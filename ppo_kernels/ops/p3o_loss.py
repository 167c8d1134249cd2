"""Pairwise proximal policy optimization: the loss of every pair of responses to a prompt."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ppo_kernels._types import P3OStats
from ppo_kernels.backends import register
from ppo_kernels.ops import _fakes
from ppo_kernels.ops._autograd import first_order_only, fused_loss, has_tangent
from ppo_kernels.ops._inputs import Tokens, bound, check_choice, check_integer_option, number_or_tensor
from ppo_kernels.ops._public import public
from ppo_kernels.reference import p3o_loss as reference


def _triton_kernel():
    from ppo_kernels.triton.p3o_loss import p3o_loss

    return p3o_loss


_P3O_LOSS = register(
    "p3o_loss", fake=_fakes.loss(P3OStats._fields), triton_kernel=_triton_kernel, reference=reference.p3o_loss
)
#: The two losses of the paper; kernels take the position.
VARIANTS = ("separate", "joint")


@partial(public, differentiable=True)
def p3o_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    variant: str = "joint",
    group_size: int = 2,
    kl_coef: float | Tensor = 0.05,
    cliprange: float | None = 0.2,
    weight_clip: float | None = 10.0,
    log_ratio_clamp: float | None = 20.0,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, P3OStats]:
    r"""Pairwise policy loss of P3O, differentiable in ``logprobs``.

    Rows ``i`` and ``j`` are responses to the same prompt, r their scores. Per row, over valid tokens,
    :math:`S = \sum \log\pi - \log\pi_{ref}`, :math:`D = \sum \log\pi - \log\pi_{old}` and :math:`\rho = e^D`. With
    :math:`q = r_i - r_j - \mathrm{kl\_coef}\,(S_i - S_j)` and, like it, constant weights w, a pair's loss is

    .. math::
        \text{joint:}\quad & \tfrac{1}{2} \max\left(-q w\,d,\ -q w\,\mathrm{clip}(d, d_{old} \pm \epsilon)\right)
        \\
        \text{separate:}\quad & \tfrac{1}{2} \max\left(-q w_j \rho_i,\ -q w_j\,\mathrm{clip}(\rho_i, 1 \pm
        \epsilon)\right) + \tfrac{1}{2} \max\left(q w_i \rho_j,\ q w_i\,\mathrm{clip}(\rho_j, 1 \pm \epsilon)\right)

    where :math:`d = S_i - S_j`, :math:`w = \mathrm{clip}(\rho_i \rho_j, 1/c, c)`, :math:`w_i =
    \mathrm{clip}(\rho_i, 1/c, c)`,
    and loss = sum over all pairs of all prompts / normalizer. Only score differences enter: adding any number to all
    scores of a prompt changes nothing. Of "joint" only the gradient has a meaning; its value contains d itself.

    Args:
        logprobs, old_logprobs, ref_logprobs: of the current, the rollout and the frozen reference policy; ``[B, T]``
            with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating; nats. The gradient flows to
            ``logprobs`` alone.
        scores: ``[B]``, floating or integer: one per response, without any KL penalty.
        mask: the tokens' shape; non-zero = valid. None means all valid. A pair counts if both of its rows have a valid
            token: a row that is masked out drops out with its score.
        variant: "joint" (the paper's V2) or "separate" (its V1).
        group_size: K >= 2 responses per prompt, in rows iK to iK + K - 1; K (K - 1) / 2 pairs each.
        kl_coef: weight of the sequence KL in q, a number or a one-element tensor.
        cliprange: half-width of the clip, >= 0, or None or inf (off); of a ratio ("separate") or of a difference in
            nats ("joint").
        weight_clip: bound c of the importance weights, >= 1, or None or inf (off).
        log_ratio_clamp: bound of D before exp ("separate", statistics), or None or inf (off). The weights have theirs.
        normalizer: what the sum is divided by, a number or a one-element tensor such as a count over all ranks.
            None means the number of pairs that count. 0 gives loss 0.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the values of ``cu_seqlens`` (synchronises with the device).

    Returns:
        ``(loss, stats)``: a 0-d tensor, float32 (float64 if an input is), and :class:`P3OStats`.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit, or a
        number of rows that is no multiple of ``group_size``. RuntimeError: a second differentiation.

    Source: Wu et al., "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment" (2023,
    arXiv 2310.00212). Without clipping, the gradient is that of RLOO.
    """
    op = "p3o_loss"
    code = check_choice(op, "variant", variant, VARIANTS)
    group_size = check_integer_option(op, "group_size", group_size, least=2)
    tokens = Tokens(
        op,
        cu_seqlens,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        extra=(scores,),
    )
    if tokens.rows % group_size != 0:
        raise ValueError(
            f"p3o_loss: {tokens.rows} rows are not groups of group_size={group_size}; pass the responses to a prompt"
            " in neighbouring rows, as many for each, or change group_size"
        )
    coef, coef_tensor = number_or_tensor(op, "kl_coef", kl_coef, tokens.like.device)
    clip = bound(op, "cliprange", cliprange, least=0.0)
    weight_bound = bound(op, "weight_clip", weight_clip, least=1.0)
    log_bound = bound(op, "log_ratio_clamp", log_ratio_clamp, least=0.0)
    mask = tokens.mask(mask)
    scores = tokens.per_row("scores", scores).detach()
    normalizer = tokens.normalizer(normalizer)
    if validate:
        tokens.validate_cu_seqlens()
    logprobs = tokens.cast(logprobs)
    old_logprobs, ref_logprobs = tokens.constant(old_logprobs), tokens.constant(ref_logprobs)

    impl = _P3O_LOSS.choose(impl, logprobs.device.type, tokens.dtype)
    if impl == "torch" or has_tangent(logprobs):
        return _P3O_LOSS.reference(
            first_order_only(op, logprobs), old_logprobs, ref_logprobs, scores, mask,
            variant=variant, group_size=group_size, kl_coef=coef if coef_tensor is None else coef_tensor,
            cliprange=clip, weight_clip=weight_bound, log_ratio_clamp=log_bound, normalizer=normalizer,
            cu_seqlens=tokens.cu_seqlens,
        )  # fmt: skip
    inputs = (old_logprobs, ref_logprobs, scores, mask, normalizer, tokens.cu_seqlens, coef_tensor)
    options = (code, group_size, coef, clip, weight_bound, log_bound)
    loss, stats = fused_loss(_P3O_LOSS, impl, logprobs, (*inputs, *options))
    return loss, P3OStats(*stats)
