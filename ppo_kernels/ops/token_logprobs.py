"""Token log-probabilities and entropy from logits, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ppo_kernels._types import LogprobExtras, ProcessGroup
from ppo_kernels.ops._autograd import first_order_only, has_tangent, recorded, transformed
from ppo_kernels.ops._extras import check_extras, extras_of
from ppo_kernels.ops._inputs import reraise_unless_refused, unit_last_stride
from ppo_kernels.ops._logits_inputs import ANY_LABEL, check_logits, check_shard, check_values
from ppo_kernels.ops._logprobs import TOKEN_LOGPROBS, differentiable, eager
from ppo_kernels.ops._overwrite import check_overwritable
from ppo_kernels.ops._public import public
from ppo_kernels.ops._support import narrowed
from ppo_kernels.ops.partial import gather, part_of_shard


@overload
def token_logprobs(  # type: ignore[overload-overlap]
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    group: ProcessGroup | None = ...,
    vocab_start: int = ...,
    support: Tensor | tuple[Tensor, Tensor] | None = ...,
    extras: tuple[()] = ...,
    impl: str = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def token_logprobs(  # type: ignore[overload-overlap]
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: Literal[True, "detached"],
    inplace_backward: bool = ...,
    group: ProcessGroup | None = ...,
    vocab_start: int = ...,
    support: Tensor | tuple[Tensor, Tensor] | None = ...,
    extras: tuple[()] = ...,
    impl: str = ...,
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: bool | str = ...,
    inplace_backward: bool = ...,
    group: ProcessGroup | None = ...,
    vocab_start: int = ...,
    support: Tensor | tuple[Tensor, Tensor] | None = ...,
    extras: Sequence[str],
    impl: str = ...,
    validate: bool = ...,
) -> tuple[Tensor, LogprobExtras] | tuple[Tensor, Tensor, LogprobExtras]: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    support: Tensor | tuple[Tensor, Tensor] | None = None,
    extras: Sequence[str] = (),
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Any, ...]:
    r"""Log-probabilities of the labels, and optionally the entropy of each row, differentiable in ``logits``.

    .. math:: \log p_i = z_{i,y_i}/\tau - \mathrm{logsumexp}(z_i/\tau),\quad H_i = -\sum_v p_{iv} \log p_{iv}

    One pass over the logits, no float32 copy of them and no ``[..., V]`` temporary; the backward is one read and one
    write. ``-inf`` logits are legal anywhere; ``+inf`` or NaN makes its own row NaN, and so does ``-inf`` throughout.

    Args:
        logits: ``[..., V]``, bfloat16, float16, float32 or float64; any strides but a last one of 1
            (``logits[:, :-1]`` is not copied).
        labels: ``[...]``, int32 or int64; or ``[..., K]``, K >= 1 labels for each row, which may repeat.
        temperature: tau > 0, a number, or a tensor of one element or one that broadcasts to ``[...]`` (not
            differentiated). With t the least normal number of the dtype that is computed in, one below 8192 t or above
            1 / t is taken as that: the largest logits alone count, or all alike. In a tensor, of one element too,
            infinity is legal, and what is not above 0 gives NaN: only ``validate=True`` looks at its values.
        mask: ``[...]``, or of the labels' shape; non-zero = valid. None means all valid. Rows without a valid label
            are not read.
        ignore_index: a label that is masked.
        entropy: True also returns the entropy; "detached" returns it without a gradient.
        inplace_backward: write the gradient over the logits (they must not be a leaf, nor overlap themselves). Saves
            a tensor of their size; nothing else may need the logits after the backward. Ignored by impl="torch", by
            torch.func and under torch.compile.
        group, vocab_start: the logits are this rank's shard of the vocabulary, its labels from ``vocab_start`` on, and
            labels, masks and temperatures are alike on all ranks of the ``torch.distributed`` group, each of which
            calls. Three numbers a row are gathered, four with the entropy, and merged in rank order in float64; the
            backward makes this rank's part of the gradient and asks the others nothing. Labels are those of the whole
            vocabulary. ``partial`` and ``merge`` are the same around a communication of your own.
        support: the tokens that sampling allowed in each row, over which the probabilities add up to 1 (top-k and top-p
            replayed): ids ``[..., S]``, int32 or int64, -1 where there are fewer; or a pair (ids ``[M]``, offsets
            ``[R + 1]`` of the R rows), which waits for the device and is refused in a graph. An id that stands there
            twice counts once. Entropy and extras are those of the support. A label outside it gives NaN as one outside
            the vocabulary does. Torch gathers the logits, and the kernels read those.
        extras: names of more results: "sum_sq_probs", "top1". Each asked for is a pass of the same kernels, the first
            two.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the labels and temperatures (synchronises with the device).

    Returns:
        ``logprobs`` of the labels' shape, or ``(logprobs, entropy [...])``, and with extras a
        :class:`LogprobExtras` behind them; nats; float32, float64 for float64 logits.
        Both are 0 where masked or ignored. A label outside [0, V) gives NaN, and so are its row's entropy and gradient
        (but 0 where the row's incoming gradients are 0, as for every row; autograd of the reference has NaN there);
        other labels of the row keep their values. What the labels of a row add to its gradient is summed in the dtype
        of the results and rounded once.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.

    Source: online softmax, Milakov and Gimelshein (2018).
    """
    usual = type(temperature) is float and 0.0 < temperature < math.inf and type(ignore_index) is int
    usual = usual and type(entropy) is bool and not (validate or inplace_backward) and group is None and support is None
    usual = usual and type(vocab_start) is int and vocab_start == 0 and extras == ()
    if usual and TOKEN_LOGPROBS.shortcut(impl, mask, logits, labels) and labels.dtype == torch.int64:
        try:
            if recorded(logits):
                return eager("cpu", logits, (labels, mask, None, temperature, ignore_index, entropy), False)
            logp, stats = TOKEN_LOGPROBS.run("cpu", logits, labels, mask, None, temperature, ignore_index, entropy)
            return (logp, stats[2]) if entropy else logp
        except RuntimeError as error:
            reraise_unless_refused("token_logprobs", error)
    shard, flags = (group, vocab_start, extras), (entropy, inplace_backward, validate)
    return _every_call(logits, labels, temperature, mask, ignore_index, support, shard, flags, impl)


@partial(public, op="token_logprobs", differentiable=True)
def _every_call(logits, labels, temperature, mask, ignore_index, support, shard, flags, impl):
    op, (group, vocab_start, extras), (entropy, inplace, validate) = "token_logprobs", shard, flags
    labels, mask, rows, tau, ignore_index = check_logits(op, logits, labels, temperature, mask, ignore_index, entropy)
    vocab_start, extras = check_shard(op, group, vocab_start, logits), check_extras(op, extras)
    if validate:
        check_values(op, labels, mask, rows, ignore_index, logits.size(-1) if group is None else ANY_LABEL)
    if support is not None:
        if mask is not None:
            labels = torch.where((mask if mask.dim() == labels.dim() else mask[..., None]) != 0, labels, ignore_index)
        logits, labels, ignore_index = narrowed(op, logits, labels, ignore_index, support, vocab_start, validate)
        vocab_start = 0  # every rank has a column for each token of the support
    if inplace and not (torch.compiler.is_compiling() or transformed()):
        check_overwritable(op, logits)
    logits, impl = unit_last_stride(logits), TOKEN_LOGPROBS.choose(impl, logits.device.type, logits.dtype)
    constants = (labels, mask, rows, tau, ignore_index)
    more: tuple = ()
    if group is not None:
        more = (gather(part_of_shard(impl, logits, *constants, entropy, vocab_start), group), vocab_start, impl)
    if group is None and (impl == "torch" or has_tangent(logits)):
        found = TOKEN_LOGPROBS.reference(
            first_order_only(op, logits),
            labels,
            temperature=tau if rows is None else rows,
            mask=mask,
            ignore_index=ignore_index,
            entropy=entropy,
        )
    else:
        found = differentiable(op, impl, logits, (*constants, entropy), inplace and impl != "torch", more)
    if not extras:
        return found
    beside = extras_of(impl, logits, constants, extras, group, vocab_start)
    return (found, beside) if entropy is False else (*found, beside)
