"""Token log-probabilities and entropy from hidden states and the head's weight, without the logits ``[N, V]``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_kernels import backends
from ppo_kernels._compositions import register_composition
from ppo_kernels._registered import not_a_graph
from ppo_kernels._types import compute_dtype, element
from ppo_kernels.ops._autograd import first_order_only, has_tangent, once, recorded, traced_input, transformed
from ppo_kernels.ops._head import CountedRows, Gradients, Head
from ppo_kernels.ops._head_inputs import (
    check_head,
    check_logits_dtype,
    head_numbers,
    memory_bytes,
)
from ppo_kernels.ops._inputs import keepable, to_mask
from ppo_kernels.ops._logits_inputs import ANY_LABEL, check_entropy, check_shard, check_values
from ppo_kernels.ops._parts import finish, gathered, join, part_of, summed
from ppo_kernels.ops._public import public, refuse_tangents
from ppo_kernels.reference import linear_token_logprobs as reference
from ppo_kernels.reference import parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Of the head: what both schemas begin with, and what they go on with.
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, Tensor? temperature_rows"
_OPTIONS = (
    "float temperature, float softcap, float logit_scale, int ignore_index, ScalarType? logits_dtype, int memory,"
)
_OPTIONS += " int vocab_start, str group"


def _fake(hidden, weight, bias, labels, *others):
    entropy, save_logits, logits_dtype = others[-3], others[-2], others[6]
    dtype = compute_dtype(hidden, weight, bias)
    kept = (labels.numel() if save_logits else 0, weight.size(0))
    return (
        hidden.new_empty(labels.shape, dtype=dtype),
        hidden.new_empty((3 if entropy else 2, *labels.shape), dtype=dtype),
        hidden.new_empty(kept, dtype=logits_dtype or dtype),
    )


def _forward(
    hidden, weight, bias, labels, mask, temperatures, temperature, softcap, logit_scale, ignore_index,
    logits_dtype, memory, vocab_start, group, entropy, save_logits, impl,
):  # fmt: skip
    """The log-probabilities, what ``token_logprobs`` keeps of a row, and the tiles of the rows that count."""
    head = Head(hidden, weight, bias, softcap, logit_scale, logits_dtype)
    rows = CountedRows(hidden, labels, mask, ignore_index)
    kept = hidden.new_empty((labels.numel() if save_logits else 0, head.vocab), dtype=head.tile_dtype)
    tiling = head.tiling(rows, memory)
    buffer, found = head.buffer(*tiling), []
    y, taus = rows.pick(labels), rows.pick(temperatures)
    for block in tiling.blocks(len(rows)):
        x = head.operand(rows.hidden(block))
        tau, of_rows = head.temperature(temperature, None if taus is None else taus[block])
        found_here = []
        for columns in tiling.slabs(head.vocab):
            tile = buffer[: len(x), : columns.stop - columns.start]
            head.write(x, head.weight_of(columns), columns, tile)
            if save_logits:
                kept[block, columns] = tile
            found_here.append(part_of(impl, tile, y[block], vocab_start + columns.start, tau, of_rows, entropy))
        found.append(join(torch.stack(found_here), tau if of_rows is None else of_rows, head.dtype, entropy))
    logp = hidden.new_zeros(labels.shape, dtype=head.dtype)
    stats = hidden.new_zeros((3 if entropy else 2, *labels.shape), dtype=head.dtype)
    stats[1] = -1.0  # not read
    if found:
        tau, of_rows = head.temperature(temperature, taus)
        every, part = tau if of_rows is None else of_rows, torch.cat(found, 1)
        part = join(gathered(part, group), every, head.dtype, entropy) if group else part
        of_labels, of_rows = finish(part, every, head.dtype, entropy)
        rows.put(logp, of_labels[0])
        rows.put(stats, of_rows, 1)
    return logp, stats, kept


def _fake_backward(hidden, weight, bias, *others):
    dtype = compute_dtype(hidden, weight, bias)
    inputs = (hidden, weight, hidden.new_empty(0, dtype=dtype) if bias is None else bias)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, others[-4:-1], strict=True))


def _backward(
    hidden, weight, bias, labels, mask, temperatures, temperature, softcap, logit_scale, ignore_index,
    logits_dtype, memory, vocab_start, group, logprobs, stats, kept, grad_logprobs, grad_entropy, need_hidden,
    need_weight, need_bias, impl,
):  # fmt: skip
    """The gradients that are needed, the others empty."""
    head = Head(hidden, weight, bias, softcap, logit_scale, logits_dtype)
    rows = CountedRows(hidden, labels, mask, ignore_index)
    gradients = Gradients(head, rows, (need_hidden, need_weight, need_bias))
    given = (logprobs, stats, grad_logprobs, grad_entropy)
    _add_gradients(gradients, rows, labels, (temperatures, temperature), memory, vocab_start, kept, given, impl)
    if group and gradients.hidden is not None:
        summed(gradients.hidden, group)
    return gradients.finished(hidden, rows)


def _add_gradients(gradients, rows, labels, temperatures, memory, vocab_start, kept, given, impl):
    """Of all tiles, whose memory is free again then. Columns are the outer loop: the weight's are rounded once."""
    head, (temperatures, temperature) = gradients.head, temperatures
    logprobs, stats, grad_logprobs, grad_entropy = given
    tiling = head.tiling(rows, memory)
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


_FORWARD = register_composition(
    f"linear_token_logprobs({_INPUTS}, {_OPTIONS}, bool entropy, bool save_logits, str impl)"
    " -> (Tensor logprobs, Tensor softmax_stats, Tensor logits)",
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
        return _FORWARD.kernel(impl), _BACKWARD.kernel(impl), options[:-1]
    numbers = torch.stack([element(x) for x in options[:3]])
    return _FORWARD.traced[impl], _BACKWARD.traced[impl], (numbers, *options[3:-1])


class _TracedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ops, hidden, weight, bias, constants, numbers, rest, flags):
        ctx.set_materialize_grads(False)
        entropy, save_logits, impl = flags
        inputs = (hidden, weight, bias, *constants)
        logprobs, stats, kept = ops[0](*inputs, *numbers, *rest, entropy is not False, save_logits, impl)
        ctx.backward_op, ctx.rest, ctx.entropy, ctx.impl = ops[1], rest, entropy, impl
        ctx.numbers = [x for x in numbers if not isinstance(x, Tensor)]
        tensors = [x for x in numbers if isinstance(x, Tensor)]
        ctx.save_for_backward(*inputs, logprobs.clone(), stats, kept, *tensors)
        h = _entropy_of(stats, entropy)
        if entropy is not True:
            ctx.mark_non_differentiable(h)
        return logprobs, h

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        none = (None,) * 4
        if ctx.entropy is not True:
            grad_entropy = None  # a traced graph passes zeros
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, *none
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:4]
        options = (*ctx.numbers, *saved[9:], *ctx.rest)
        found = _gradients(ctx.backward_op, needs, saved[:9], options, (grad_logprobs, grad_entropy), ctx.impl)
        return None, *found, *none


class _EagerLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, constants, options, flags):
        ctx.set_materialize_grads(False)
        entropy, save_logits, impl = flags
        inputs = (hidden, weight, bias, *constants)
        logprobs, stats, kept = _FORWARD.run(impl, *inputs, *options, entropy is not False, save_logits, impl)
        ctx.impl, ctx.options = impl, options
        # Copies: the caller may write to the results before the backward.
        ctx.save_for_backward(*map(keepable, inputs), logprobs.clone(), stats, kept)
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
    def forward(hidden, weight, bias, labels, mask, temperatures, options, flags):
        entropy, save_logits, impl = flags
        inputs = (hidden, weight, bias, labels, mask, temperatures)
        call = _FORWARD.kernel(impl)
        logprobs, stats, kept = call(*inputs, *options, entropy is not False, save_logits, impl)
        return logprobs, _entropy_of(stats, entropy), logprobs.clone(), stats, kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, (ctx.entropy, _, ctx.impl) = inputs
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.mark_non_differentiable(*output[1 if ctx.entropy is not True else 2 :])

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_logprobs, grad_entropy, *_others):
        saved, grads = ctx.saved_tensors, (grad_logprobs, grad_entropy if ctx.entropy is True else None)
        call, needs = _BACKWARD.kernel(ctx.impl), ctx.needs_input_grad[:3]
        with torch.no_grad():
            found = _gradients(call, needs, saved, ctx.options, grads, ctx.impl)
        return *_once(found, saved[:3], grads), *(None,) * 5


def _entropy_of(stats, entropy):
    """A copy, for the caller may write to it; something empty if it was not asked for."""
    return stats[2].clone() if entropy is not False else stats.new_empty(0)


def _gradients(call: Any, needs: tuple, saved: tuple, options: tuple, grads: tuple, impl: str) -> tuple:
    """Of hidden, weight and bias, None where nobody needs it."""
    grads = tuple(None if g is None else g.contiguous() for g in grads)
    found = call(*saved[:6], *options, *saved[6:], *grads, *needs, impl)
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


def _once(found: tuple, inputs: tuple, grads: tuple) -> tuple:
    return tuple(None if g is None else once("linear_token_logprobs", g, *inputs, *grads) for g in found)


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
    logits_dtype: torch.dtype | None = None,
    memory_mib: float | None = None,
    save_logits: bool = False,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        ``logprobs [...]``, or ``(logprobs, entropy [...])``, as ``token_logprobs`` has them. Gradients of the weight
        are added up in float32 and rounded once. Same inputs, same bits; with other rows in the batch or another number
        of threads torch's products may round differently. On a GPU, finding the rows that count waits for the device.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.
    """
    op = "linear_token_logprobs"
    check_head(op, hidden, weight, labels, bias)
    check_logits_dtype(op, logits_dtype, hidden, weight, bias)
    check_entropy(op, entropy)
    vocab_start = check_shard(op, group, vocab_start, hidden)
    memory, mask = memory_bytes(op, memory_mib, hidden.device, 64), to_mask(op, mask, labels)
    rows, *numbers = head_numbers(op, temperature, softcap, logit_scale, ignore_index, hidden)
    if validate:
        check_values(op, labels, mask, rows, ignore_index, weight.size(0) if group is None else ANY_LABEL)
    impl = _FORWARD.choose(impl, hidden.device.type, compute_dtype(hidden, weight, bias))
    if group is None and (impl == "torch" or has_tangent(hidden)):
        hidden, weight = first_order_only(op, hidden), first_order_only(op, weight)
        bias = None if bias is None else first_order_only(op, bias)
        return _FORWARD.reference(
            hidden, weight, labels, bias=bias, temperature=numbers[0] if rows is None else rows, softcap=numbers[1],
            logit_scale=numbers[2], mask=mask, ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
    constants = (labels.long().contiguous(), None if mask is None else mask.contiguous(), rows)
    shard = (vocab_start, "" if group is None else group.group_name)
    options, flags = (*numbers, logits_dtype, memory, *shard), (entropy, bool(save_logits), impl)
    if torch.compiler.is_compiling():
        inputs = [x if x is None else traced_input(op, x, kernel=True) for x in (hidden, weight, bias)]
        *ops, options = _for_a_graph((*options, impl))
        first = 3 if torch.compiler.is_exporting() else 1
        logprobs, h = _TracedLogprobs.apply(ops, *inputs, constants, options[:first], options[first:], flags)
    elif transformed():
        logprobs, h = _TransformedLogprobs.apply(hidden, weight, bias, *constants, options, flags)[:2]
    elif any(x is not None and recorded(x) for x in (hidden, weight, bias)):
        return _EagerLogprobs.apply(hidden, weight, bias, constants, options, flags)
    else:
        given = (hidden, weight, bias, *constants, *options)
        logprobs, stats, _ = _FORWARD.run(impl, *given, entropy is not False, False, impl)
        h = stats[2] if entropy is not False else None
    return logprobs if entropy is False else (logprobs, h)
