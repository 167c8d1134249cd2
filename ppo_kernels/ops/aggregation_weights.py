"""How token losses become one number: every mode in use as a weight per row and a normalizer."""

from __future__ import annotations

from torch import Tensor

from ppo_kernels.ops._inputs import check_choice, check_integer, check_number, check_tensor
from ppo_kernels.ops._public import public
from ppo_kernels.reference import aggregation_weights as reference

MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@public
def aggregation_weights(
    mask: Tensor,
    mode: str = "token-mean",
    *,
    max_length: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``row_weight`` and ``normalizer`` for ``policy_loss`` and ``value_loss``.

    With n_b the valid tokens of row b and B+ the number of rows that have any:

    ==========================  ================  ==============
    mode                        row_weight        normalizer
    ==========================  ================  ==============
    "token-mean"                1                 :math:`\sum_b n_b`
    "token-sum"                 1                 1
    "seq-mean-token-mean"       1 / n_b           B+
    "seq-mean-token-sum"        1                 B+
    "seq-mean-token-sum-norm"   1 / max_length    B+
    ==========================  ================  ==============

    Over several micro-batches or ranks, add up the normalizers and pass the sum: the losses then add up too.

    Args:
        mask: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``; non-zero = valid.
        mode: one of the above (verl's names).
        max_length: >= 1, for "seq-mean-token-sum-norm"; None means T, or 1 if T is 0 (a packed mask must say).
        cu_seqlens: ``[B+1]`` int32 or int64, row starts and the end of a packed batch.

    Returns:
        ``row_weight [B]`` float32 (0 for a row without valid tokens in "seq-mean-token-mean") and a 0-d ``normalizer``
        float64 (a count beyond 2**24 is exact), on the mask's device, without a synchronisation.

    Raises:
        TypeError: not a tensor. ValueError: an unknown mode, a wrong shape or max_length.
    """
    op = "aggregation_weights"
    check_tensor(op, "mask", mask)
    check_choice(op, "mode", mode, MODES)
    if cu_seqlens is not None:
        check_integer(op, "cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"{op}: cu_seqlens must be [B+1], got shape {tuple(cu_seqlens.shape)}")
    if mask.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"{op}: mask must be [B, T], or [N] with cu_seqlens; got shape {tuple(mask.shape)}")
    if max_length is not None:
        max_length = check_number(op, "max_length", max_length, least=1.0)
    if mode == "seq-mean-token-sum-norm" and max_length is None and cu_seqlens is not None:
        raise ValueError(f"{op}: a packed mask needs max_length for {mode!r}")
    return reference.aggregation_weights(mask, mode, max_length=max_length, cu_seqlens=cu_seqlens)
