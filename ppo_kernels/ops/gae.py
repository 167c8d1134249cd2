"""Generalised advantage estimation: a reverse affine scan along time."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import wide_dtype
from ppo_kernels.backends import register, vmap_by_calls
from ppo_kernels.ops._inputs import (
    Tokens,
    beside,
    check_choice,
    check_number,
    refuse_gradient,
    reraise_unless_refused,
)
from ppo_kernels.ops._public import public
from ppo_kernels.reference import gae as reference


def _fake(rewards, *_others):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _triton_kernel():
    from ppo_kernels.triton.gae import gae

    return gae


_GAE = register("gae", fake=_fake, triton_kernel=_triton_kernel, reference=reference.gae)

_library = torch.library.Library("ppo_kernels_traced", "FRAGMENT")
_library.define("reverse_affine_scan(Tensor a, Tensor b, Tensor row, SymInt longest) -> Tensor")
_library.impl("reverse_affine_scan", reference.reverse_affine_scan, "CompositeExplicitAutograd")
_SCAN = torch.ops.ppo_kernels_traced.reverse_affine_scan.default
torch.library.register_fake(_SCAN, lambda a, b, row, longest: torch.empty_like(b), lib=_library)
torch.library.register_vmap(_SCAN, vmap_by_calls(_SCAN), lib=_library)

#: What a masked token does; kernels take the position.
MASKED_STEPS = ("skip", "zero", "keep")


@public
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    masked_steps: str = "skip",
    bootstrap_value: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns of generalised advantage estimation.

    .. math:: \delta_t = r_t + \gamma V^+ - V_t,\quad A_t = \delta_t + \gamma\lambda A^+,\quad R_t = A_t + V_t

    With L the last valid token of a row: tokens after L are never read, ``V+`` after L is ``bootstrap_value`` or 0,
    and ``A+`` after L is 0.

    Args:
        rewards, values: ``[B, T]`` with any row stride, or packed ``[N]`` with ``cu_seqlens``; floating.
        mask: same shape; non-zero = valid. None means all valid.
        gamma: discount per token, in [0, 1].
        lam: a number in [0, 1], or ``[B]`` with one per row.
        masked_steps: what a masked token before L does.
            "skip": only valid tokens are transitions; ``V+`` and ``A+`` pass over it (verl, NeMo-RL, AReaL).
            "zero": a transition with r = V = 0 (OpenRLHF).
            "keep": a transition with r and V as given (DeepSpeed-Chat, TRL).
        bootstrap_value: ``[B]``, the value after the last token of a truncated row; None means 0.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch (first 0, last N).
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the values of ``cu_seqlens`` and ``lam`` (synchronises with the device).

    Returns:
        ``(advantages, returns)`` of the inputs' shape, float32 (float64 if an input is); 0 at masked tokens.
        They do not require grad.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2015).
    """
    gamma = check_number("gae", "gamma", gamma, least=0.0, most=1.0)
    lam_tensor = lam if isinstance(lam, Tensor) else None
    if lam_tensor is None:
        lam = check_number("gae", "lam", lam, least=0.0, most=1.0)
    code = check_choice("gae", "masked_steps", masked_steps, MASKED_STEPS)
    usual = not validate and lam_tensor is bootstrap_value is cu_seqlens is None
    if usual and _GAE.shortcut(impl, mask, rewards, values) and rewards.dtype == torch.float32:
        try:
            return _GAE.run("cpu", rewards, values, mask, None, None, None, gamma, lam, code)
        except RuntimeError as error:
            reraise_unless_refused("gae", error)
    tokens = Tokens(
        "gae",
        cu_seqlens,
        rewards=rewards,
        values=values,
        extra=(bootstrap_value, lam if isinstance(lam, Tensor) and lam.numel() != 1 else None),
    )
    mask = tokens.mask(mask)
    if isinstance(lam, Tensor):
        refuse_gradient("gae", "lam", lam)
    lam_rows = None
    if isinstance(lam, Tensor) and lam.numel() == 1 and lam.device.type != "cpu":
        lam_rows = beside("gae", "lam", lam, tokens.like.device).reshape(1).expand(tokens.rows).contiguous()
    elif isinstance(lam, Tensor) and lam.numel() != 1:
        lam_rows = tokens.per_row("lam", lam).detach().to(wide_dtype(lam.device))
    else:
        lam = check_number("gae", "lam", lam, least=0.0, most=1.0)
        if torch.compiler.is_compiling():  # a float would become a constant of the graph
            lam_rows = (
                torch.full((tokens.rows,), 0.0, dtype=wide_dtype(tokens.like.device), device=tokens.like.device) + lam
            )
    if bootstrap_value is not None:
        bootstrap_value = tokens.per_row("bootstrap_value", bootstrap_value).detach()
    if validate:
        tokens.validate_cu_seqlens()
        if lam_rows is not None and not bool(((lam_rows >= 0) & (lam_rows <= 1)).all()):
            raise ValueError(f"gae: every lam must be in [0, 1], got {lam_rows.min()} to {lam_rows.max()}")
    rewards, values = tokens.constant(rewards), tokens.constant(values)

    impl = _GAE.choose(impl, rewards.device.type, tokens.dtype)
    if impl == "torch":
        return _GAE.reference(
            rewards, values, mask,
            gamma=gamma, lam=lam if lam_rows is None else lam_rows, masked_steps=masked_steps,
            bootstrap_value=bootstrap_value,
            cu_seqlens=tokens.cu_seqlens,
        )  # fmt: skip
    lam_number = 0.0 if lam_rows is not None else lam
    return _GAE.call(impl, rewards, values, mask, lam_rows, bootstrap_value, tokens.cu_seqlens, gamma, lam_number, code)
