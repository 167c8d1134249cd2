"""KL-shaped token rewards."""

from __future__ import annotations

from torch import Tensor

from ppo_kernels._types import KL_ESTIMATORS
from ppo_kernels.backends import register
from ppo_kernels.ops._inputs import (
    Tokens,
    bound,
    check_choice,
    check_device,
    check_integer,
    check_shape,
    number_or_tensor,
)
from ppo_kernels.ops._public import public
from ppo_kernels.reference import kl_rewards as reference


def _fake(logprobs, ref_logprobs, scores, *_others):
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(scores.shape)


def _triton_kernel():
    from ppo_kernels.triton.kl_rewards import kl_rewards

    return kl_rewards


_KL_REWARDS = register("kl_rewards", fake=_fake, triton_kernel=_triton_kernel, reference=reference.kl_rewards)


@public
def kl_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float | Tensor = 0.1,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    kl_log_clamp: float | None = None,
    kl_clamp: float | None = None,
    score_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Token rewards: minus the KL penalty at every token, plus the sequence's score at one of them.

    .. math:: r_t = -\mathrm{kl\_coef}\, k_t + [t = \mathrm{score\_index}_b]\,\mathrm{clip}(\mathrm{score}_b, \pm c)

    with, for ``x = clamp(ref - logp, +-kl_log_clamp)``, ``k1 = -x``, ``abs = |x|``, ``k2 = x^2 / 2``,
    ``k3 = expm1(x) - x``, then bounded to ``+-kl_clamp``.

    Args:
        logprobs, ref_logprobs: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating; nats.
        scores: ``[B]`` floating or integer, one score per sequence.
        mask: same shape as the log-probabilities; non-zero = valid. None means all valid.
        kl_coef: weight of the penalty (reward per nat), a number or a one-element tensor.
        kl_estimator: "k1", "abs", "k2" or "k3".
        score_clip: bound of the score (DeepSpeed-Chat: 5); None, the default, or inf switches it off. To watch how many
            it changes, count ``(scores.abs() > score_clip).sum()``.
        kl_log_clamp, kl_clamp: bounds of the log-ratio and of the estimate; None or inf switches them off.
            verl uses 20 and 10, OpenRLHF 10 for the second alone.
        score_index: ``[B]`` int32 or int64, the token of the row that gets the score; it may be masked. -1, or any
            index outside the row, places no score. None means the last valid token.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the values of ``cu_seqlens`` and ``score_index`` (synchronises with the device).

    Returns:
        ``(rewards, kl)``: rewards of the inputs' shape, 0 at masked tokens without a score; ``kl [B]`` the sum of
        ``k_t`` over each row's valid tokens. float32 (float64 if an input is). They do not require grad. A row without
        valid tokens gets no score.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019); estimators: Schulman,
    "Approximating KL Divergence" (2020).
    """
    op = "kl_rewards"
    tokens = Tokens(op, cu_seqlens, logprobs=logprobs, ref_logprobs=ref_logprobs, extra=(scores,))
    scores = tokens.per_row("scores", scores).detach()
    coef, coef_tensor = number_or_tensor(op, "kl_coef", kl_coef, tokens.like.device)
    code = check_choice(op, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    bounds = (
        bound(op, "score_clip", score_clip, least=0.0),
        bound(op, "kl_log_clamp", kl_log_clamp, least=0.0),
        bound(op, "kl_clamp", kl_clamp, least=0.0),
    )
    mask = tokens.mask(mask)
    if score_index is not None:
        check_integer(op, "score_index", score_index)
        check_shape(op, "score_index", score_index, (tokens.rows,), "one index per row")
        check_device(op, "score_index", score_index, logprobs.device)
        score_index = score_index.long().contiguous()
    if validate:
        tokens.validate_cu_seqlens()
        _validate_score_index(tokens, score_index)
    logprobs, ref_logprobs = tokens.constant(logprobs), tokens.constant(ref_logprobs)

    impl = _KL_REWARDS.choose(impl, logprobs.device.type, tokens.dtype)
    if impl == "torch":
        return _KL_REWARDS.reference(
            logprobs, ref_logprobs, scores, mask,
            kl_coef=coef if coef_tensor is None else coef_tensor, kl_estimator=kl_estimator, score_clip=bounds[0],
            kl_log_clamp=bounds[1], kl_clamp=bounds[2], score_index=score_index, cu_seqlens=tokens.cu_seqlens,
        )  # fmt: skip
    return _KL_REWARDS.call(
        impl, logprobs, ref_logprobs, scores, mask, score_index, tokens.cu_seqlens, coef_tensor, coef, code, *bounds
    )


def _validate_score_index(tokens: Tokens, score_index: Tensor | None) -> None:
    if score_index is None:
        return
    cu = tokens.cu_seqlens
    lengths = cu[1:] - cu[:-1] if cu is not None else score_index.new_full((tokens.rows,), tokens.like.size(1))
    bad = (score_index < -1) | (score_index >= lengths)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"kl_rewards: score_index must be -1 or in [0, {int(lengths[row])}) in row {row},"
            f" got {int(score_index[row])}"
        )
