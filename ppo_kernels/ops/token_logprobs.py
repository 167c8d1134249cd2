"""Token log-probabilities and entropy from logits, in one pass over them."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ppo_kernels._registered import not_a_graph
from ppo_kernels._types import compute_dtype, element
from ppo_kernels.backends import register
from ppo_kernels.ops._autograd import first_order_only, has_tangent, is_batch, once, recorded, traced_input, transformed
from ppo_kernels.ops._fakes import like_first
from ppo_kernels.ops._inputs import (
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_tensor,
    keepable,
    reraise_unless_refused,
    temperature_rows,
    to_mask,
    unit_last_stride,
)
from ppo_kernels.ops._overwrite import Chunk, check_overwritable, saved_as_they_are
from ppo_kernels.ops._public import public, refuse_tangents
from ppo_kernels.reference import token_logprobs as reference


def _fake(logits, labels, mask, temperature_rows, temperature, ignore_index, entropy):
    def empty(shape):
        return logits.new_empty(shape, dtype=compute_dtype(logits))

    return empty(labels.shape), empty((3 if entropy else 2, *logits.shape[:-1]))


def _triton_kernels():
    from ppo_kernels.triton import token_logprobs

    return token_logprobs


_TOKEN_LOGPROBS = register(
    "token_logprobs",
    fake=_fake,
    triton_kernel=lambda: _triton_kernels().token_logprobs,
    reference=reference.token_logprobs,
)
_BACKWARD = register(
    "token_logprobs_backward",
    fake=like_first,
    triton_kernel=lambda: _triton_kernels().token_logprobs_backward,
)
_BACKWARD_INPLACE = register(
    "token_logprobs_backward_",
    fake=lambda *_arguments: None,
    triton_kernel=lambda: _triton_kernels().token_logprobs_backward_,
)


def _entropy_of(stats, entropy):
    """A copy, for the caller may write to it; something empty if it was not asked for, of which no graph is made."""
    return stats[2].clone() if entropy is not False else stats.new_empty(0)


def _contiguous(grads):
    return [None if g is None else g.contiguous() for g in grads]


def _gradient(impl, logits, labels, temperature_rows, grads, rest, numbers):
    arguments = (logits, labels, temperature_rows, *_contiguous(grads), *rest, *numbers)
    if torch.compiler.is_compiling() or transformed():
        return _BACKWARD.kernel(impl)(*arguments)
    return _BACKWARD.run(impl, *arguments)


class _TracedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy, _inplace):
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.numbers, ctx.entropy = impl, (temperature, ignore_index), entropy
        logprobs, stats = _TOKEN_LOGPROBS.kernel(impl)(
            logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False
        )
        # Copies: the caller may write to the results before the backward.
        ctx.save_for_backward(logits, labels, temperature_rows, logprobs.clone(), stats)
        h = _entropy_of(stats, entropy)
        if entropy is not True:
            ctx.mark_non_differentiable(h)
        return logprobs, h

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        none = (None,) * 7
        if ctx.entropy is not True:
            grad_entropy = None  # a traced graph passes zeros
        if grad_logprobs is None and grad_entropy is None:
            return None, None, *none
        logits, labels, temperature_rows, *rest = ctx.saved_tensors
        grads = (grad_logprobs, grad_entropy)
        return None, _gradient(ctx.impl, logits, labels, temperature_rows, grads, rest, ctx.numbers), *none


class _EagerLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, logits, rest):
        ctx.set_materialize_grads(False)
        labels, mask, temperature_rows, temperature, ignore_index, entropy, inplace = rest
        logprobs, stats = _TOKEN_LOGPROBS.run(
            impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False
        )
        if ctx.needs_input_grad[1]:
            ctx.impl, ctx.numbers, ctx.entropy, ctx.inplace = impl, (temperature, ignore_index), entropy, inplace
            ctx.chunk = Chunk(logits) if inplace and saved_as_they_are() else None
            saved = None if ctx.chunk is not None else logits
            # Copies: the caller may write to the results before the backward.
            ctx.save_for_backward(saved, keepable(labels), keepable(temperature_rows), logprobs.clone(), stats)
        if entropy is False:
            return logprobs
        h = _entropy_of(stats, entropy)
        if entropy is not True:
            ctx.mark_non_differentiable(h)
        return logprobs, h

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_logprobs, grad_entropy=None):
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None
        logits, labels, temperature_rows, *rest = ctx.saved_tensors
        refuse_tangents("token_logprobs", grad_logprobs, grad_entropy)
        others = (labels, temperature_rows, *_contiguous((grad_logprobs, grad_entropy)), *rest, *ctx.numbers)
        if not ctx.inplace:
            grad = _BACKWARD.run(ctx.impl, logits, *others)
            return None, once("token_logprobs", grad, logits, grad_logprobs, grad_entropy), None
        if torch.is_grad_enabled():
            raise RuntimeError(
                "token_logprobs: inplace_backward=True overwrites what a second differentiation would need;"
                " pass inplace_backward=False, or call backward without create_graph=True"
            )
        chunk = ctx.chunk or (Chunk(logits) if logits is not None else None)
        if chunk is None:
            raise RuntimeError(
                "token_logprobs: inplace_backward=True has overwritten the logits in a first backward; pass"
                " inplace_backward=False for a second one"
            )
        if is_batch(grad_logprobs) or is_batch(grad_entropy):
            raise RuntimeError(
                "token_logprobs: inplace_backward=True overwrites the logits with one gradient, and is_grads_batched or"
                " vmap asks for several; pass inplace_backward=False"
            )
        chunk.begin()
        _BACKWARD_INPLACE.run(ctx.impl, chunk.logits, *others)
        chunk.end()
        ctx.chunk = None  # else the logits would live as long as the loss
        return None, chunk.logits, None


class _TransformedLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @not_a_graph
    def forward(impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy):
        logprobs, stats = _TOKEN_LOGPROBS.kernel(impl)(
            logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False
        )
        return logprobs, _entropy_of(stats, entropy), logprobs.clone(), stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, logits, labels, _, temperature_rows, *ctx.numbers, ctx.entropy = inputs
        ctx.save_for_backward(logits, labels, temperature_rows, *output[2:])
        ctx.mark_non_differentiable(*output[1 if ctx.entropy is not True else 2 :])

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_logprobs, grad_entropy, *_others):
        logits, labels, temperature_rows, *rest = ctx.saved_tensors
        grads = (grad_logprobs, grad_entropy if ctx.entropy is True else None)
        with torch.no_grad():
            grad = _gradient(ctx.impl, logits, labels, temperature_rows, grads, rest, ctx.numbers)
        none = (None,) * 6
        return None, once("token_logprobs", grad, logits, *grads), *none


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    impl: str = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    entropy: Literal[True, "detached"],
    inplace_backward: bool = ...,
    impl: str = ...,
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
    inplace_backward: bool = False,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of the labels, and optionally the entropy of each row, differentiable in ``logits``.

    .. math:: \log p_i = z_{i,y_i}/\tau - \mathrm{logsumexp}(z_i/\tau),\quad H_i = -\sum_v p_{iv} \log p_{iv}

    One pass over the logits, no float32 copy of them and no ``[..., V]`` temporary; the backward is one read and one
    write. ``-inf`` logits are legal anywhere; ``+inf`` or NaN makes its own row NaN.

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
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check the labels and temperatures (synchronises with the device).

    Returns:
        ``logprobs`` of the labels' shape, or ``(logprobs, entropy [...])``; nats; float32, float64 for float64 logits.
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
    usual = usual and type(entropy) is bool and not (validate or inplace_backward)
    if usual and _TOKEN_LOGPROBS.shortcut(impl, mask, logits, labels) and labels.dtype == torch.int64:
        try:
            return _eager("cpu", logits, labels, mask, None, temperature, ignore_index, entropy, False)
        except RuntimeError as error:
            reraise_unless_refused("token_logprobs", error)
    return _every_call(logits, labels, temperature, mask, ignore_index, entropy, inplace_backward, impl, validate)


@partial(public, op="token_logprobs", differentiable=True)
def _every_call(logits, labels, temperature, mask, ignore_index, entropy, inplace_backward, impl, validate):
    op = "token_logprobs"
    if not (entropy is False or entropy is True or (isinstance(entropy, str) and entropy == "detached")):
        raise ValueError(f'{op}: entropy must be False, True or "detached", got {entropy!r}')
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must fit an int64, got {ignore_index}")
    rows = temperature if isinstance(temperature, Tensor) else None
    tau = check_number(op, "temperature", temperature, above=0.0) if rows is None else 1.0
    check_floating(op, "logits", logits)
    check_integer(op, "labels", labels)
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ValueError(f"{op}: logits must be [..., V] with V >= 1, got shape {tuple(logits.shape)}")
    _check_labels(logits, labels)
    mask = _mask(mask, logits, labels)
    if mask is not None and mask.dim() == logits.dim():
        labels, mask = torch.where(mask != 0, labels.long(), ignore_index), None
    if rows is None and torch.compiler.is_compiling():  # a float would become a constant of the graph
        rows, tau = element(tau), 1.0
    if rows is not None:
        rows = temperature_rows(op, rows, logits)
    if inplace_backward and not (torch.compiler.is_compiling() or transformed()):
        check_overwritable(logits)
    if validate:
        _validate(logits, labels, mask, rows, ignore_index)
    logits = unit_last_stride(logits)

    impl = _TOKEN_LOGPROBS.choose(impl, logits.device.type, logits.dtype)
    if impl == "torch" or has_tangent(logits):
        return _TOKEN_LOGPROBS.reference(
            first_order_only(op, logits),
            labels,
            temperature=tau if rows is None else rows,
            mask=mask,
            ignore_index=ignore_index,
            entropy=entropy,
        )
    arguments = (
        (labels if labels.dtype == torch.int64 else labels.long()).contiguous(),
        None if mask is None else mask.contiguous(),
        rows,
        tau,
        ignore_index,
        entropy,
    )
    if torch.compiler.is_compiling():
        logprobs, h = _TracedLogprobs.apply(impl, traced_input(op, logits, kernel=True), *arguments, False)
    elif transformed():
        logprobs, h = _TransformedLogprobs.apply(impl, logits, *arguments)[:2]
    else:
        return _eager(impl, logits, *arguments, inplace_backward)
    if entropy is False:
        return logprobs
    return logprobs, h


def _eager(impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy, inplace):
    if recorded(logits):
        rest = (labels, mask, temperature_rows, temperature, ignore_index, entropy, inplace)
        return _EagerLogprobs.apply(impl, logits, rest)  # as one, because torch looks at each input
    logprobs, stats = _TOKEN_LOGPROBS.run(
        impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False
    )
    return logprobs if entropy is False else (logprobs, stats[2])  # nothing else will read them


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    rows = logits.shape[:-1]
    many = labels.dim() == logits.dim() and labels.size(-1) > 0
    if tuple(labels.shape[:-1] if many else labels.shape) != tuple(rows):
        raise ValueError(
            f"token_logprobs: labels must have the shape of the logits without V {tuple(rows)}, or that and K >= 1"
            f" labels for each row; got {tuple(labels.shape)}"
        )
    check_device("token_logprobs", "labels", labels, logits.device)


def _mask(mask: object, logits: Tensor, labels: Tensor) -> Tensor | None:
    """The mask of the rows, or of the labels where there are several for each row."""
    if mask is None:
        return None
    of_rows = labels.dim() == logits.dim() > check_tensor("token_logprobs", "mask", mask).dim()
    return to_mask("token_logprobs", mask, logits[..., 0] if of_rows else labels)


def _validate(logits: Tensor, labels: Tensor, mask: Tensor | None, rows: Tensor | None, ignore_index: int) -> None:
    live = labels != ignore_index
    if mask is not None:
        live = live & ((mask if mask.dim() == labels.dim() else mask[..., None]) != 0)
    bad = labels[live & ((labels < 0) | (labels >= logits.size(-1)))]
    if bad.numel():
        raise ValueError(
            f"token_logprobs: labels must be in [0, {logits.size(-1)}) or ignore_index={ignore_index};"
            f" {bad.numel()} are not, the first is {int(bad[0])}"
        )
    if rows is not None and not bool((rows > 0).all()):
        raise ValueError(f"token_logprobs: every temperature must be > 0, the least is {float(rows.min())}")
