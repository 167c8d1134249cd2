"""From a rollout's log-probabilities, values and scores to what PPO learns from, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._compositions import compose
from ppo_kernels._types import Experience, ProcessGroup, compute_dtype
from ppo_kernels.ops._inputs import check_floating, check_real
from ppo_kernels.ops._public import public
from ppo_kernels.ops.gae import gae
from ppo_kernels.ops.kl_rewards import kl_rewards
from ppo_kernels.ops.whiten import whiten

_PREPARE_EXPERIENCE = compose("prepare_experience", ("kl_rewards", "gae", "whiten", "moments"))


@public
def prepare_experience(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float | Tensor = 0.1,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    kl_log_clamp: float | None = None,
    kl_clamp: float | None = None,
    score_index: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    masked_steps: str = "skip",
    bootstrap_value: Tensor | None = None,
    whiten_advantages: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> Experience:
    r"""``kl_rewards``, ``gae`` and ``whiten`` one after the other, with the options of each.

    .. math:: r = \mathrm{kl\_rewards},\quad A, R = \mathrm{gae}(r, V),\quad A \leftarrow \mathrm{whiten}(A)

    Args:
        logprobs, ref_logprobs, values: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating.
        scores: ``[B]``, one per sequence.
        mask: the tokens' shape; non-zero = valid. None means all valid.
        kl_coef, kl_estimator, score_clip, kl_log_clamp, kl_clamp, score_index: see ``kl_rewards``. ``gae``
            reads nothing after a row's last valid token: a ``score_index`` behind it has to be in the mask.
        gamma, lam, masked_steps, bootstrap_value: see ``gae``.
        whiten_advantages: False leaves the advantages as ``gae`` has them.
        shift_mean, unbiased, eps, group: see ``whiten``.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check values, as the three do (synchronises with the device).

    Returns:
        :class:`Experience`: ``rewards``, ``advantages`` and ``returns`` of the tokens' shape and ``kl [B]``, the
        KL estimate summed over each sequence. They do not require grad.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
    """
    op = "prepare_experience"
    for name, x in {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}.items():
        check_floating(op, name, x)
    of_rows = lam if isinstance(lam, Tensor) and lam.numel() != 1 else None
    bootstrap = None if bootstrap_value is None else check_real(op, "bootstrap_value", bootstrap_value)
    dtype = compute_dtype(logprobs, ref_logprobs, values, check_real(op, "scores", scores), of_rows, bootstrap)
    impl = _PREPARE_EXPERIENCE.choose(impl, logprobs.device.type, dtype)
    if dtype == torch.float64:  # of one input: then all that is computed
        logprobs, values = logprobs.to(dtype), values.to(dtype)
    rewards, kl = kl_rewards(
        logprobs, ref_logprobs, scores, mask, kl_coef=kl_coef, kl_estimator=kl_estimator, score_clip=score_clip,
        kl_log_clamp=kl_log_clamp, kl_clamp=kl_clamp, score_index=score_index, cu_seqlens=cu_seqlens, impl=impl,
        validate=validate,
    )  # fmt: skip
    advantages, returns = gae(
        rewards, values, mask, gamma=gamma, lam=lam, masked_steps=masked_steps, bootstrap_value=bootstrap_value,
        cu_seqlens=cu_seqlens, impl=impl, validate=validate,
    )  # fmt: skip
    if whiten_advantages:
        advantages = whiten(advantages, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps, group=group, impl=impl)
    return Experience(rewards, advantages, returns, kl)
