"""Advantages of the responses to one prompt over each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype
from ppo_kernels.backends import register
from ppo_kernels.ops._fakes import like_first
from ppo_kernels.ops._inputs import (
    check_choice,
    check_device,
    check_group,
    check_integer,
    check_integer_option,
    check_number,
    check_real,
    check_shape,
)
from ppo_kernels.ops._public import public
from ppo_kernels.ops.whiten import whiten
from ppo_kernels.reference import group_advantages as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _triton_kernel():
    from ppo_kernels.triton.group_advantages import group_advantages

    return group_advantages


_GROUP_ADVANTAGES = register(
    "group_advantages", fake=like_first, triton_kernel=_triton_kernel, reference=reference.group_advantages
)
#: The baselines that kernels compute; they take the position.
BASELINES = ("rloo", "grpo", "dr_grpo")
MODES = (*BASELINES, "reinforce++_baseline")


@public
def group_advantages(
    scores: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    mode: str = "rloo",
    eps: float | None = None,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""How much better each response is than the others to its prompt: one advantage per response, without a critic.

    With :math:`\mu` and :math:`\sigma` (unbiased) over the K responses of a group:

    ======================  =====================================================================================
    mode                    advantage
    ======================  =====================================================================================
    "rloo"                  :math:`r - \text{mean of the others} = \tfrac{K}{K-1}(r - \mu)`
    "grpo"                  :math:`(r - \mu) / (\sigma + \mathrm{eps})`
    "dr_grpo"               :math:`r - \mu`
    "reinforce++_baseline"  :math:`r - \mu`, then mean 0 and variance 1 over the whole batch (see ``whiten``)
    ======================  =====================================================================================

    The only response of its group has nothing to be compared with: its :math:`r - \mu` is 0 in every mode. (verl lets
    the raw score through in "rloo", and divides it by 1 + eps in "grpo".) A NaN score shows in its whole group.

    Args:
        scores: ``[B]``, floating or integer; with "rloo" usually after the KL penalty of the sequence.
        group_ids: ``[B]`` int32 or int64, equal for the responses to one prompt; any numbers, in any order. They are
            sorted on the device, without a synchronisation.
        group_size: instead of ``group_ids``: K responses per prompt, in rows iK to iK + K - 1. Needs no sorting.
        mode: one of the above.
        eps: >= 0; None means 1e-4, added to the standard deviation ("grpo"), or 1e-8, added to the variance
            ("reinforce++_baseline").
        process_group: for "reinforce++_baseline", the ranks that share its statistics; see ``whiten``. The responses of
            one group must be on one rank.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: accepted for symmetry; there is no value to check.

    Returns:
        ``[B]``, float32 (float64 if ``scores`` is). It does not require grad.

    REINFORCE++ itself and trainers that weigh by tokens whiten after the advantages are spread over the tokens:
    ``whiten(group_advantages(..., mode="dr_grpo")[:, None].expand(B, T), mask)``.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.

    Source: Ahmadian et al., "Back to Basics" (RLOO, 2024); Shao et al., "DeepSeekMath" (GRPO, 2024); Liu et al.,
    "Understanding R1-Zero-Like Training" (Dr. GRPO, 2025); Hu, "REINFORCE++" (2025).
    """
    op = "group_advantages"
    check_real(op, "scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"{op}: scores must be [B], one per response; got shape {tuple(scores.shape)}")
    if (group_ids is None) == (group_size is None):
        raise ValueError(f"{op}: pass either group_ids [B] or group_size, and not both")
    check_choice(op, "mode", mode, MODES)
    if group_ids is not None:
        check_integer(op, "group_ids", group_ids)
        check_shape(op, "group_ids", group_ids, scores.shape, "scores")
        check_device(op, "group_ids", group_ids, scores.device)
    else:
        group_size = check_integer_option(op, "group_size", group_size, least=1)
        if scores.numel() % group_size != 0:
            raise ValueError(
                f"{op}: {scores.numel()} scores are not groups of group_size={group_size}; pass group_ids if groups"
                " differ in size"
            )
    if eps is not None:
        eps = check_number(op, "eps", eps, least=0.0)
    whitened = mode == "reinforce++_baseline"
    if process_group is not None:
        check_group(op, "process_group", process_group)
    if process_group is not None and not whitened:
        raise ValueError(f'{op}: process_group is for mode="reinforce++_baseline"; {mode!r} has no batch statistics')
    scores = scores.detach().to(compute_dtype(scores)).contiguous()
    advantages = _over_groups(
        scores, group_ids, group_size or 0, "dr_grpo" if whitened else mode, 1e-4 if eps is None else eps, impl
    )
    if not whitened:
        return advantages
    return whiten(advantages, eps=1e-8 if eps is None else eps, group=process_group, impl=impl)


def _over_groups(scores: Tensor, group_ids: Tensor | None, group_size: int, mode: str, eps: float, impl: str) -> Tensor:
    impl = _GROUP_ADVANTAGES.choose(impl, scores.device.type, scores.dtype)
    if impl == "torch":
        if group_ids is None:
            group_ids = torch.arange(scores.numel(), device=scores.device) // group_size
        return _GROUP_ADVANTAGES.reference(scores, group_ids, mode=mode, eps=eps)
    sorted_ids = order = None
    if group_ids is not None:
        sorted_ids, order = torch.sort(group_ids.to(torch.int64), stable=True)  # a group keeps the order of its scores
    code = BASELINES.index(mode)
    return _GROUP_ADVANTAGES.call(impl, scores, sorted_ids, order, group_size, code, eps)
