"""Log-probabilities from hidden states and a head's weight: the tiles, the registered ops and their autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import backends
from ppo_kernels._compositions import register_composition
from ppo_kernels._registered import not_a_graph
from ppo_kernels._types import compute_dtype, element
from ppo_kernels.ops._autograd import once, recorded, traced_input, transformed
from ppo_kernels.ops._extras import extras_of_rows
from ppo_kernels.ops._head import CountedRows, Gradients, Head
from ppo_kernels.ops._inputs import keepable
from ppo_kernels.ops._parts import finish, gathered, join, part_of, summed
from ppo_kernels.ops._public import refuse_tangents
from ppo_kernels.ops._support import clear_outside_
from ppo_kernels.reference import linear_token_logprobs as reference
from ppo_kernels.reference import parts

#: Of the head: what both schemas begin with, and what they go on with.
_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, Tensor? temperature_rows, Tensor? support"
)
_OPTIONS = (
    "float temperature, float softcap, float logit_scale, int ignore_index, ScalarType? logits_dtype, int memory,"
)
_OPTIONS += " int vocab_start, str group"


def _fake(hidden, weight, bias, labels, *others):
    (entropy, save_logits, extras), logits_dtype = others[-4:-1], others[7]
    dtype = compute_dtype(hidden, weight, bias)
    kept = (labels.numel() if save_logits else 0, weight.size(0))
    return (
        hidden.new_empty(labels.shape, dtype=dtype),
        hidden.new_empty((3 if entropy else 2, *labels.shape), dtype=dtype),
        hidden.new_empty(kept, dtype=logits_dtype or dtype),
        hidden.new_empty(labels.shape if extras > 1 else (0,), dtype=dtype),
        labels.new_empty(labels.shape if extras else (0,), dtype=torch.bool),
    )


def _parts(head, rows, of_rows, memory, vocab_start, kept, entropy, squares, impl):
    """Of all rows that count, the part that this weight is, and with ``squares`` that at half the temperature."""
    labels, support, temperatures, temperature = of_rows
    tiling = head.tiling(rows, memory, support=support)
    buffer, found, halves = head.buffer(*tiling), [], []
    y, taus, ids = rows.pick(labels), rows.pick(temperatures), rows.pick(support)
    for block in tiling.blocks(len(rows)):
        x = head.operand(rows.hidden(block))
        tau, of_block = head.temperature(temperature, None if taus is None else taus[block])
        every, found_here, at_half = tau if of_block is None else of_block, [], []
        for columns in tiling.slabs(head.vocab):
            tile = buffer[: len(x), : columns.stop - columns.start]
            head.write(x, head.weight_of(columns), columns, tile)
            if len(kept):
                kept[block, columns] = tile
            first = vocab_start + columns.start
            if ids is not None:
                clear_outside_(tile, ids[block], first)
            found_here.append(part_of(impl, tile, y[block], first, tau, of_block, entropy))
            if squares:
                half = None if of_block is None else of_block / 2
                at_half.append(part_of(impl, tile, y[block], first, tau / 2, half, False))
        found.append(join(torch.stack(found_here), every, head.dtype, entropy))
        if squares:
            halves.append(join(torch.stack(at_half), every / 2, head.dtype, False))
    return torch.cat(found, 1) if found else None, torch.cat(halves, 1) if halves else None


def _forward(
    hidden, weight, bias, labels, mask, temperatures, support, temperature, softcap, logit_scale, ignore_index,
    logits_dtype, memory, vocab_start, group, entropy, save_logits, extras, impl,
):  # fmt: skip
    """The log-probabilities, what ``token_logprobs`` keeps of a row, the tiles of the rows that count, and both extras,
    of which ``extras`` says how many are asked for: the second comes first."""
    head = Head(hidden, weight, bias, softcap, logit_scale, logits_dtype)
    rows = CountedRows(hidden, labels, mask, ignore_index)
    kept = hidden.new_empty((labels.numel() if save_logits else 0, head.vocab), dtype=head.tile_dtype)
    of_rows = (labels, support, temperatures, temperature)
    part, half = _parts(head, rows, of_rows, memory, vocab_start, kept, entropy, extras > 1, impl)
    logp = hidden.new_zeros(labels.shape, dtype=head.dtype)
    stats = hidden.new_zeros((3 if entropy else 2, *labels.shape), dtype=head.dtype)
    stats[1] = -1.0  # not read
    of_squares = hidden.new_zeros(labels.shape if extras > 1 else (0,), dtype=head.dtype)
    of_top = labels.new_zeros(labels.shape if extras else (0,), dtype=torch.bool)
    if part is not None:
        tau, taus = head.temperature(temperature, rows.pick(temperatures))
        every = tau if taus is None else taus
        if group:
            part = join(gathered(part, group), every, head.dtype, entropy)
            half = None if half is None else join(gathered(half, group), every / 2, head.dtype, False)
        (of_label,), of_all = finish(part, every, head.dtype, entropy)
        rows.put(logp, of_label)
        rows.put(stats, of_all, 1)
        squares, (top,) = extras_of_rows(part, entropy, half)
        if extras:
            rows.put(of_top, top)
        if extras > 1:
            rows.put(of_squares, squares.to(head.dtype))
    return logp, stats, kept, of_squares, of_top


def _fake_backward(hidden, weight, bias, *others):
    dtype = compute_dtype(hidden, weight, bias)
    inputs = (hidden, weight, hidden.new_empty(0, dtype=dtype) if bias is None else bias)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, others[-4:-1], strict=True))


def _backward(
    hidden, weight, bias, labels, mask, temperatures, support, temperature, softcap, logit_scale, ignore_index,
    logits_dtype, memory, vocab_start, group, logprobs, stats, kept, grad_logprobs, grad_entropy, need_hidden,
    need_weight, need_bias, impl,
):  # fmt: skip
    """The gradients that are needed, the others empty."""
    head = Head(hidden, weight, bias, softcap, logit_scale, logits_dtype)
    rows = CountedRows(hidden, labels, mask, ignore_index)
    gradients = Gradients(head, rows, (need_hidden, need_weight, need_bias))
    given = (logprobs, stats, grad_logprobs, grad_entropy)
    of_rows = (labels, support, temperatures, temperature)
    _add_gradients(gradients, rows, of_rows, memory, vocab_start, kept, given, impl)
    if group and gradients.hidden is not None:
        summed(gradients.hidden, group)
    return gradients.finished(hidden, rows)


def _add_gradients(gradients, rows, of_rows, memory, vocab_start, kept, given, impl):
    """Of all tiles, whose memory is free again then. Columns are the outer loop: the weight's are rounded once."""
    if len(rows) == 0:  # the gradients are zeros as they are, and no tile would write what is to be rounded
        return
    head, (labels, support, temperatures, temperature) = gradients.head, of_rows
    logprobs, stats, grad_logprobs, grad_entropy = given
    tiling, ids = head.tiling(rows, memory, support=support), rows.pick(support)
    buffer, blocks = head.buffer(*tiling), list(tiling.blocks(len(rows)))
    y, taus, logp, stats = rows.pick(labels), rows.pick(temperatures), rows.pick(logprobs), rows.pick(stats, 1)
    g_logp, g_entropy = rows.pick(grad_logprobs), rows.pick(grad_entropy)
    kernel = backends.op("token_logprobs_backward_")
    x = head.operand(rows.hidden(blocks[0])) if len(blocks) == 1 else None
    for columns in tiling.slabs(head.vocab):
        of_weight, into, width = head.weight_of(columns), gradients.begin(columns), columns.stop - columns.start
        for block in blocks:
            operand = head.operand(rows.hidden(block)) if x is None else x
            tile = buffer[: len(operand), :width]
            if kept.numel():
                tile.copy_(kept[block, columns])
            else:
                head.write(operand, of_weight, columns, tile)
            slope = head.slope(tile)
            if ids is not None:
                clear_outside_(tile, ids[block], vocab_start + columns.start)
            at = y[block] - vocab_start - columns.start
            here = (at >= 0) & (at < width)
            tau, of_rows = head.temperature(temperature, None if taus is None else taus[block])
            given = [None if g is None else g[block] for g in (g_logp, g_entropy)]
            of_block = stats[:, block].contiguous()
            if impl == "torch":
                of_labels = (given[0] if given[0] is None else given[0][:, None], given[1])
                local, every = torch.where(here, at, -1)[:, None], tau if of_rows is None else of_rows
                parts.gradient_(tile, local, every, of_labels, logp[block][:, None], of_block)
            else:  # a label of other columns has one column more here, whose gradient nobody reads
                wider, at = buffer[: len(operand), : width + 1], torch.where(here, at, width)
                kernel.run(impl, wider, at, of_rows, *given, logp[block], of_block, tau, -1)
            if slope is not None:
                tile.mul_(slope)
            del slope  # before there is another
            gradients.add(tile, operand, of_weight, block, columns, into)
        gradients.end(columns)


FORWARD = register_composition(
    f"linear_token_logprobs({_INPUTS}, {_OPTIONS}, bool entropy, bool save_logits, int extras, str impl)"
    " -> (Tensor logprobs, Tensor softmax_stats, Tensor logits, Tensor sum_sq_probs, Tensor top1)",
    ("token_logprobs", "token_logprobs_backward_"),
    fake=_fake,
    kernel=_forward,
    reference=reference.linear_token_logprobs,
)
_BACKWARD = register_composition(
    f"linear_token_logprobs_backward({_INPUTS}, {_OPTIONS}, Tensor logprobs, Tensor softmax_stats, Tensor logits,"
    " Tensor? grad_logprobs, Tensor? grad_entropy, bool need_hidden, bool need_weight, bool need_bias, str impl)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    ("token_logprobs_backward_",),
    fake=_fake_backward,
    kernel=_backward,
)


def _for_a_graph(options: tuple) -> tuple[Any, Any, tuple]:
    """The two ops as graphs hold them, with the options: floats as one tensor, which an export keeps as they are."""
    impl = options[-1]
    if torch.compiler.is_exporting():
        return FORWARD.kernel(impl), _BACKWARD.kernel(impl), options[:-1]
    numbers = torch.stack([element(x) for x in options[:3]])
    return FORWARD.traced[impl], _BACKWARD.traced[impl], (numbers, *options[3:-1])


class _TracedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ops, hidden, weight, bias, constants, numbers, rest, flags):
        ctx.set_materialize_grads(False)
        entropy, save_logits, extras, impl = flags
        inputs = (hidden, weight, bias, *constants)
        logprobs, stats, kept, *more = ops[0](*inputs, *numbers, *rest, entropy is not False, save_logits, extras, impl)
        ctx.backward_op, ctx.rest, ctx.entropy, ctx.impl = ops[1], rest, entropy, impl
        ctx.numbers = [x for x in numbers if not isinstance(x, Tensor)]
        tensors = [x for x in numbers if isinstance(x, Tensor)]
        ctx.save_for_backward(*inputs, logprobs.clone(), stats, kept, *tensors)
        h = _entropy_of(stats, entropy)
        ctx.mark_non_differentiable(*more, *([] if entropy is True else [h]))
        return logprobs, h, *more

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, *_others):
        none = (None,) * 4
        if ctx.entropy is not True:
            grad_entropy = None  # a traced graph passes zeros
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, *none
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:4]
        options = (*ctx.numbers, *saved[10:], *ctx.rest)
        found = _gradients(ctx.backward_op, needs, saved[:10], options, (grad_logprobs, grad_entropy), ctx.impl)
        return None, *found, *none


class _EagerLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, constants, options, flags):
        ctx.set_materialize_grads(False)
        entropy, save_logits, extras, impl = flags
        inputs = (hidden, weight, bias, *constants)
        logprobs, stats, kept, *more = FORWARD.run(
            impl, *inputs, *options, entropy is not False, save_logits, extras, impl
        )
        ctx.impl, ctx.options = impl, options
        # Copies: the caller may write to the results before the backward.
        ctx.save_for_backward(*map(keepable, inputs), logprobs.clone(), stats, kept)
        h = _entropy_of(stats, entropy)
        ctx.mark_non_differentiable(*more, *([] if entropy is True else [h]))
        return logprobs, h, *more

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_logprobs, grad_entropy, *_others):
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        refuse_tangents("linear_token_logprobs", grad_logprobs, grad_entropy)
        grads, saved = (grad_logprobs, grad_entropy), ctx.saved_tensors
        call = partial(_BACKWARD.run, ctx.impl)
        found = _gradients(call, ctx.needs_input_grad[:3], saved, ctx.options, grads, ctx.impl)
        return *_once(found, saved[:3], grads), None, None, None


class _TransformedLogprobs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @not_a_graph
    def forward(hidden, weight, bias, labels, mask, temperatures, support, options, flags):
        entropy, save_logits, extras, impl = flags
        inputs = (hidden, weight, bias, labels, mask, temperatures, support)
        call = FORWARD.kernel(impl)
        logprobs, stats, kept, *more = call(*inputs, *options, entropy is not False, save_logits, extras, impl)
        return logprobs, _entropy_of(stats, entropy), *more, logprobs.clone(), stats, kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, (ctx.entropy, _, _, ctx.impl) = inputs
        ctx.save_for_backward(*tensors, *output[4:])
        ctx.mark_non_differentiable(*output[1 if ctx.entropy is not True else 2 :])

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_logprobs, grad_entropy, *_others):
        saved, grads = ctx.saved_tensors, (grad_logprobs, grad_entropy if ctx.entropy is True else None)
        call, needs = _BACKWARD.kernel(ctx.impl), ctx.needs_input_grad[:3]
        with torch.no_grad():
            found = _gradients(call, needs, saved, ctx.options, grads, ctx.impl)
        return *_once(found, saved[:3], grads), *(None,) * 6


def _entropy_of(stats, entropy):
    """A copy, for the caller may write to it; something empty if it was not asked for."""
    return stats[2].clone() if entropy is not False else stats.new_empty(0)


def _gradients(call: Any, needs: tuple, saved: tuple, options: tuple, grads: tuple, impl: str) -> tuple:
    """Of hidden, weight and bias, None where nobody needs it."""
    grads = tuple(None if g is None else g.contiguous() for g in grads)
    found = call(*saved[:7], *options, *saved[7:], *grads, *needs, impl)
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


def _once(found: tuple, inputs: tuple, grads: tuple) -> tuple:
    return tuple(None if g is None else once("linear_token_logprobs", g, *inputs, *grads) for g in found)


def differentiable(op: str, leaves: tuple, constants: tuple, options: tuple, flags: tuple) -> tuple[Tensor, ...]:
    """Log-probabilities, the entropy if asked for, and both extras, empty where not asked for."""
    entropy, _, extras, impl = flags
    if torch.compiler.is_compiling():
        inputs = [x if x is None else traced_input(op, x, kernel=True) for x in leaves]
        *ops, options = _for_a_graph((*options, impl))
        first = 3 if torch.compiler.is_exporting() else 1
        logprobs, h, *more = _TracedLogprobs.apply(ops, *inputs, constants, options[:first], options[first:], flags)
    elif transformed():
        logprobs, h, *more = _TransformedLogprobs.apply(*leaves, *constants, options, flags)[:4]
    elif any(x is not None and recorded(x) for x in leaves):
        logprobs, h, *more = _EagerLogprobs.apply(*leaves, constants, options, flags)
    else:
        given = (*leaves, *constants, *options)
        logprobs, stats, _, *more = FORWARD.run(impl, *given, entropy is not False, False, extras, impl)
        h = stats[2] if entropy is not False else None
    return (logprobs, *more) if entropy is False else (logprobs, h, *more)
