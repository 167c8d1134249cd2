"""The autograd of token log-probabilities: of logits that are all columns of their rows, or a shard of them."""

from __future__ import annotations

import torch

from ppo_kernels._compositions import register_composition
from ppo_kernels._registered import not_a_graph
from ppo_kernels._types import compute_dtype
from ppo_kernels.backends import register
from ppo_kernels.ops._autograd import is_batch, once, recorded, traced_input, transformed
from ppo_kernels.ops._fakes import like_first
from ppo_kernels.ops._inputs import keepable
from ppo_kernels.ops._overwrite import Chunk, saved_as_they_are
from ppo_kernels.ops._parts import finish, gradient_of_part, join
from ppo_kernels.ops._public import refuse_tangents
from ppo_kernels.reference import token_logprobs as reference


def _fake(logits, labels, mask, temperature_rows, temperature, ignore_index, entropy):
    def empty(shape):
        return logits.new_empty(shape, dtype=compute_dtype(logits))

    return empty(labels.shape), empty((3 if entropy else 2, *logits.shape[:-1]))


def _triton_kernels():
    from ppo_kernels.triton import token_logprobs

    return token_logprobs


TOKEN_LOGPROBS = register(
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


_MERGE = register_composition(
    "token_logprobs_merge(Tensor logits, Tensor labels, Tensor? mask, Tensor? temperature_rows, float temperature,"
    " int ignore_index, bool entropy, Tensor parts, int vocab_start, str impl)"
    " -> (Tensor logprobs, Tensor softmax_stats)",
    ("token_logprobs",),
    fake=lambda *arguments: _fake(*arguments[:7]),
    kernel=lambda *arguments: _merged(*arguments),
)
_MERGE_BACKWARD = register_composition(
    "token_logprobs_merge_backward(Tensor logits, Tensor labels, Tensor? temperature_rows, Tensor? grad_logprobs,"
    " Tensor? grad_entropy, Tensor logprobs, Tensor softmax_stats, float temperature, int ignore_index,"
    " int vocab_start, str impl) -> Tensor",
    ("token_logprobs_backward",),
    fake=like_first,
    kernel=lambda *arguments: _merged_backward(*arguments),
)


def _merged(logits, labels, mask, rows, temperature, ignore_index, entropy, parts, _vocab_start, _impl):
    many, dtype = labels.dim() == logits.dim(), compute_dtype(logits)
    live = labels != ignore_index
    if mask is not None:
        live = live & ((mask[..., None] if many else mask) != 0)
    live = live.movedim(-1, 0) if many else live[None]
    every = temperature if rows is None else rows
    logp, stats = finish(join(parts, every, dtype, entropy), every, dtype, entropy, live)
    return (logp.movedim(0, -1).contiguous() if many else logp[0].clone()), stats


def _merged_backward(
    logits, labels, rows, grad_logprobs, grad_entropy, logprobs, stats, temperature, ignore_index, vocab_start, impl,
    *, over=False,
):  # fmt: skip
    grads = (grad_logprobs, grad_entropy)
    return gradient_of_part(
        impl, logits, labels, vocab_start, temperature, rows, grads, logprobs, stats, ignore_index, over=over
    )


def _forward_op(more):
    """Of logits that are all columns, or with ``more``, the parts of all ranks, some of them."""
    return _MERGE if more else TOKEN_LOGPROBS


def _entropy_of(stats, entropy):
    """A copy, for the caller may write to it; something empty if it was not asked for, of which no graph is made."""
    return stats[2].clone() if entropy is not False else stats.new_empty(0)


def _contiguous(grads):
    return [None if g is None else g.contiguous() for g in grads]


def _gradient(impl, logits, labels, temperature_rows, grads, rest, numbers):
    arguments = (logits, labels, temperature_rows, *_contiguous(grads), *rest, *numbers)
    op = _MERGE_BACKWARD if len(numbers) > 2 else _BACKWARD
    if torch.compiler.is_compiling() or transformed():
        return op.kernel(impl)(*arguments)
    return op.run(impl, *arguments)


class _TracedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy, more):
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.numbers, ctx.entropy = impl, (temperature, ignore_index, *more[1:]), entropy
        logprobs, stats = _forward_op(more).kernel(impl)(
            logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False, *more
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
        labels, mask, temperature_rows, temperature, ignore_index, entropy, inplace, more = rest
        logprobs, stats = _forward_op(more).run(
            impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False, *more
        )
        if ctx.needs_input_grad[1]:
            ctx.impl, ctx.entropy, ctx.inplace = impl, entropy, inplace
            ctx.numbers = (temperature, ignore_index, *more[1:])
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
            grad = (_MERGE_BACKWARD if len(ctx.numbers) > 2 else _BACKWARD).run(ctx.impl, logits, *others)
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
        if len(ctx.numbers) > 2:
            _merged_backward(chunk.logits, *others, over=True)
        else:
            _BACKWARD_INPLACE.run(ctx.impl, chunk.logits, *others)
        chunk.end()
        ctx.chunk = None  # else the logits would live as long as the loss
        return None, chunk.logits, None


class _TransformedLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @not_a_graph
    def forward(impl, logits, labels, mask, temperature_rows, temperature, ignore_index, entropy, *more):
        logprobs, stats = _forward_op(more).kernel(impl)(
            logits, labels, mask, temperature_rows, temperature, ignore_index, entropy is not False, *more
        )
        return logprobs, _entropy_of(stats, entropy), logprobs.clone(), stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, logits, labels, _, temperature_rows, *numbers, ctx.entropy = inputs[:8]
        ctx.numbers, ctx.inputs = (*numbers, *inputs[9:]), len(inputs)
        ctx.save_for_backward(logits, labels, temperature_rows, *output[2:])
        ctx.mark_non_differentiable(*output[1 if ctx.entropy is not True else 2 :])

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_logprobs, grad_entropy, *_others):
        logits, labels, temperature_rows, *rest = ctx.saved_tensors
        grads = (grad_logprobs, grad_entropy if ctx.entropy is True else None)
        with torch.no_grad():
            grad = _gradient(ctx.impl, logits, labels, temperature_rows, grads, rest, ctx.numbers)
        return None, once("token_logprobs", grad, logits, *grads), *(None,) * (ctx.inputs - 2)


def eager(impl, logits, arguments, inplace, more=()):
    """``token_logprobs`` of arguments as kernels take them, without a graph or a transform around it."""
    if recorded(logits):  # the rest is one argument, because torch looks at each
        return _EagerLogprobs.apply(impl, logits, (*arguments, inplace, more))
    *constants, entropy = arguments
    logprobs, stats = _forward_op(more).run(impl, logits, *constants, entropy is not False, *more)
    return logprobs if entropy is False else (logprobs, stats[2])  # nothing else will read them


def differentiable(op, impl, logits, arguments, inplace, more=()):
    """``eager``, or the same where a graph is made or a transform runs."""
    if torch.compiler.is_compiling():
        logprobs, h = _TracedLogprobs.apply(impl, traced_input(op, logits, kernel=True), *arguments, more)
    elif transformed():
        logprobs, h = _TransformedLogprobs.apply(impl, logits, *arguments, *more)[:2]
    else:
        return eager(impl, logits, arguments, inplace, more)
    return logprobs if arguments[-1] is False else (logprobs, h)
