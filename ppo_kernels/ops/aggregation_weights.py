"""How token losses become one number: every mode in use as a weight per row and a normalizer."""

from __future__ import annotations

from torch import Tensor

from ppo_kernels.ops._inputs import (
    check_choice,
    check_device,
    check_integer,
    check_integer_option,
    check_mask,
    check_number,
    check_packed,
    check_shape,
)
from ppo_kernels.ops._public import public
from ppo_kernels.reference import aggregation_weights as reference

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "prompt-mean",
)
COUNTS = ("original", "surviving")


@public
def aggregation_weights(
    mask: Tensor,
    mode: str = "token-mean",
    *,
    max_length: float | None = None,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    keep: Tensor | None = None,
    count: str = "original",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``row_weight`` and ``normalizer`` for ``policy_loss`` and ``value_loss``.

    With n_b the valid tokens of row b, B+ the number of rows that have any, n_p the valid tokens of the rows of prompt
    p and P+ the number of prompts that have any:

    ==========================  ================  ==============
    mode                        row_weight        normalizer
    ==========================  ================  ==============
    "token-mean"                1                 :math:`\sum_b n_b`
    "token-sum"                 1                 1
    "seq-mean-token-mean"       1 / n_b           B+
    "seq-mean-token-sum"        1                 B+
    "seq-mean-token-sum-norm"   1 / max_length    B+
    "prompt-mean"               1 / n_p           P+
    ==========================  ================  ==============

    DAPO is "token-mean", GRPO "seq-mean-token-mean", Dr. GRPO "seq-mean-token-sum-norm", LUSPO "seq-mean-token-sum",
    SkyRL's prompt_mean "prompt-mean".

    Over several micro-batches or ranks, add up the normalizers and pass the sum: the losses then add up too. In
    "prompt-mean" a prompt's rows must be in one of them, or the weights are taken of the whole batch.

    Args:
        mask: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``; non-zero = valid.
        mode: one of the above (verl's names, and SkyRL's last one).
        max_length: >= 1, for "seq-mean-token-sum-norm"; None means T, or 1 if T is 0 (a packed mask must say).
        group_ids, group_size: for "prompt-mean", one of them, as in ``group_advantages``: ``[B]`` integers, equal for
            the responses to one prompt, in any order; or how many neighbours answer one prompt.
        keep: like ``mask``, the tokens that a correction such as a rejection keeps; the loss gets ``mask & keep``.
        count: what n counts where ``keep`` is given: "original", the tokens of ``mask``, so that what is rejected
            counts as a loss of 0; or "surviving", those of ``mask & keep``, so that the others weigh more.
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch.

    Returns:
        ``row_weight [B]`` float32 (0 for a row without valid tokens in "seq-mean-token-mean") and a 0-d ``normalizer``
        float64 (a count beyond 2**24 is exact), on the mask's device, without a synchronisation.

    Raises:
        TypeError: a dtype that no mask has. ValueError: shapes, devices or options that do not fit.
    """
    op = "aggregation_weights"
    check_mask(op, "mask", mask)
    check_choice(op, "mode", mode, MODES)
    if cu_seqlens is not None:
        check_packed(op, cu_seqlens, "mask", mask)
    elif mask.dim() != 2:
        raise ValueError(f"{op}: mask must be [B, T], or [N] with cu_seqlens; got shape {tuple(mask.shape)}")
    if max_length is not None:
        max_length = check_number(op, "max_length", max_length, least=1.0, read=mode == "seq-mean-token-sum-norm")
    if mode == "seq-mean-token-sum-norm" and max_length is None and cu_seqlens is not None:
        raise ValueError(f"{op}: a packed mask needs max_length for {mode!r}")
    check_choice(op, "count", count, COUNTS)
    if keep is not None:
        check_mask(op, "keep", keep)
        check_shape(op, "keep", keep, mask.shape, "mask")
        check_device(op, "keep", keep, mask.device)
    elif count == "surviving":
        raise ValueError(f"{op}: count='surviving' needs keep, the tokens that do; pass it or set count='original'")
    batch = mask.size(0) if cu_seqlens is None else cu_seqlens.numel() - 1
    if mode == "prompt-mean" or group_ids is not None or group_size is not None:
        _check_groups(mask, mode, group_ids, group_size, batch)
    return reference.aggregation_weights(
        mask, mode, max_length=max_length, group_ids=group_ids, group_size=group_size, keep=keep, count=count,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _check_groups(mask: Tensor, mode: str, group_ids: Tensor | None, group_size: int | None, batch: int) -> None:
    op = "aggregation_weights"
    if mode != "prompt-mean":
        raise ValueError(f"{op}: group_ids and group_size are for mode='prompt-mean'; {mode!r} knows no prompts")
    if (group_ids is None) == (group_size is None):
        raise ValueError(f"{op}: {mode!r} needs either group_ids [B] or group_size, and not both")
    if group_ids is not None:
        check_integer(op, "group_ids", group_ids)
        check_shape(op, "group_ids", group_ids, (batch,), "one number per row")
        check_device(op, "group_ids", group_ids, mask.device)
    elif batch % check_integer_option(op, "group_size", group_size, least=1):
        raise ValueError(
            f"{op}: {batch} rows are not groups of group_size={group_size}; pass group_ids if groups differ in size"
        )
