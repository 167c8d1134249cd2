"""Token log-probabilities and entropy from hidden states and the head's weight, without the logits ``[N, V]``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_kernels._types import LogprobExtras, ProcessGroup, compute_dtype
from ppo_kernels.ops._autograd import first_order_only, has_tangent
from ppo_kernels.ops._extras import EXTRAS, check_extras, extras_of
from ppo_kernels.ops._head_inputs import check_head, check_logits_dtype, head_numbers, memory_bytes
from ppo_kernels.ops._inputs import to_mask
from ppo_kernels.ops._linear import FORWARD, differentiable
from ppo_kernels.ops._logits_inputs import ANY_LABEL, check_entropy, check_ignore_index, check_shard, check_values
from ppo_kernels.ops._public import public
from ppo_kernels.ops._support import with_support


@partial(public, differentiable=True)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    support: Tensor | tuple[Tensor, Tensor] | None = None,
    extras: Sequence[str] = (),
    logits_dtype: torch.dtype | None = None,
    memory_mib: float | None = None,
    save_logits: bool = False,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Any, ...]:
    r"""``token_logprobs`` of the logits of a linear head, which never exist as a whole.

    .. math:: z = c \tanh(s\,(x W^T + b) / c),\quad \log p_i = z_{i,y_i}/\tau - \mathrm{logsumexp}(z_i/\tau)

    The matrix products are torch's, a tile of logits at a time, and the kernels of ``token_logprobs`` read the tiles.
    Rows that do not count (``mask``, ``ignore_index``) enter no product. The backward computes each tile again and
    then, in place, its gradient: four products in all, fewer where ``hidden`` or ``weight`` needs no gradient.

    Args:
        hidden: ``[..., H]``, bfloat16, float16, float32 or float64, any strides.
        weight: ``[V, H]``, the head's; with ``hidden`` in half precision and this in float32, products are float32.
        labels: ``[...]``, int32 or int64.
        bias: ``[V]``. Gradients flow to ``hidden``, ``weight`` and ``bias``.
        temperature: tau, as in ``token_logprobs``: a number, or a tensor that broadcasts to ``[...]``.
        softcap: c > 0 (``final_logit_softcapping``), or None or inf (off).
        logit_scale: s > 0; 1 / ``logits_scaling`` of the models that divide.
        mask, ignore_index, entropy: as in ``token_logprobs``.
        group, vocab_start: ``weight`` and ``bias`` are this rank's shard of the vocabulary, its rows from
            ``vocab_start`` on, and hidden states, labels and masks are alike on all ranks of the ``torch.distributed``
            group, each of which calls. Three float64 numbers a row are gathered, four with the entropy, and merged in
            rank order; the gradient of the hidden states is summed over the ranks. Labels are those of the whole
            vocabulary.
        support, extras: as in ``token_logprobs``. A support spares no product: what is not in it is taken out of each
            tile. Extras come from the same products.
        logits_dtype: of a tile. None is float32 (float64 for float64 inputs), to which half-precision operands are
            multiplied exactly. bfloat16 or float16, if hidden and weight have it, rounds the logits to it: errors of
            4e-3 to 3e-2 nats, for products that may be faster (three times on a CPU that has them, where those of the
            gradients are rounded to it too, a tile's at a time, before float32 adds them up).
        memory_mib: what a call may take beside inputs, results and, in the backward, the gradient of the hidden states
            in float32. None is 64 on a CPU and 1024 elsewhere. A call that needs more for one row and 256 columns
            takes that.
        save_logits: keep the tiles for the backward: three products in place of four, and the memory of all logits.
        impl: "auto", "cuda", "triton", "cpu" or "torch" (all logits at once).
        validate: also check the labels and temperatures (synchronises with the device).

    Returns:
        ``logprobs [...]``, or ``(logprobs, entropy [...])``, and with extras a :class:`LogprobExtras` behind them, as
        ``token_logprobs`` has them. Gradients of the weight are added up in float32 and rounded once. Same inputs, same
        bits; with other rows in the batch or another number of threads torch's products may round differently. On a
        GPU, finding the rows that count waits for the device.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.
    """
    op = "linear_token_logprobs"
    check_head(op, hidden, weight, labels, bias)
    check_logits_dtype(op, logits_dtype, hidden, weight, bias)
    check_entropy(op, entropy)
    ignore_index = check_ignore_index(op, ignore_index)
    vocab_start = check_shard(op, group, vocab_start, hidden)
    memory, mask = memory_bytes(op, memory_mib, hidden.device, 64), to_mask(op, mask, labels)
    rows, *numbers = head_numbers(op, temperature, softcap, logit_scale, ignore_index, hidden)
    labels = labels.long().contiguous()
    if validate:
        check_values(op, labels, mask, rows, ignore_index, weight.size(0) if group is None else ANY_LABEL)
    impl = FORWARD.choose(impl, hidden.device.type, compute_dtype(hidden, weight, bias))
    extras = check_extras(op, extras)
    ids = None
    if support is not None:
        counted = labels if mask is None else torch.where(mask != 0, labels, ignore_index)
        ids, labels, ignore_index = with_support(op, counted, ignore_index, support, hidden, validate)
        numbers[-1] = ignore_index
    if group is None and (impl == "torch" or has_tangent(hidden)):
        hidden, weight = first_order_only(op, hidden), first_order_only(op, weight)
        bias = None if bias is None else first_order_only(op, bias)
        *found, z = FORWARD.reference(
            hidden, weight, labels, bias=bias, temperature=numbers[0] if rows is None else rows, softcap=numbers[1],
            logit_scale=numbers[2], mask=mask, ignore_index=ignore_index, entropy=entropy, support=ids,
        )  # fmt: skip
        if extras:
            given = (labels, None if mask is None else mask.contiguous(), rows, numbers[0], ignore_index)
            return *found, extras_of("torch", z, given, extras, None, 0)
        return found[0] if len(found) == 1 else tuple(found)
    constants = (labels, None if mask is None else mask.contiguous(), rows, ids)
    shard = (vocab_start, "" if group is None else group.group_name)
    flags = (entropy, bool(save_logits), 2 if "sum_sq_probs" in extras else len(extras), impl)
    options = (*numbers, logits_dtype, memory, *shard)
    *results, squares, top = differentiable(op, (hidden, weight, bias), constants, options, flags)
    if extras:
        named = zip(EXTRAS, (squares, top), strict=True)
        return *results, LogprobExtras(*(x if name in extras else None for name, x in named))
    return results[0] if len(results) == 1 else tuple(results)
