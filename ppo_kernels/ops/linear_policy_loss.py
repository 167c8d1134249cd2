"""The policy loss from hidden states on: its value and its gradient in three matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ppo_kernels import backends
from ppo_kernels._compositions import compose
from ppo_kernels._registered import Refusal, not_a_graph
from ppo_kernels._types import PolicyStats, ProcessGroup, compute_dtype, wide_dtype
from ppo_kernels.ops._autograd import has_tangent, once, recorded, transformed
from ppo_kernels.ops._head import CountedRows, Gradients, Head, product_of_rows, released, rounded, spread
from ppo_kernels.ops._head_inputs import (
    check_head,
    check_logits_dtype,
    head_numbers,
    memory_bytes,
)
from ppo_kernels.ops._inputs import check_floating, check_packed, keepable, to_mask
from ppo_kernels.ops._logits_inputs import ANY_LABEL, check_entropy, check_ignore_index, check_shard, check_values
from ppo_kernels.ops._public import public, refuse_tangents
from ppo_kernels.ops.linear_token_logprobs import linear_token_logprobs
from ppo_kernels.ops.policy_loss import policy_loss

_LINEAR_POLICY_LOSS = compose(
    "linear_policy_loss", ("token_logprobs", "token_logprobs_backward_", "policy_loss", "linear_token_logprobs")
)
#: Options of ``policy_loss`` with a number for each token or, as advantages may have, for each row; and for each row.
_OF_TOKENS, _OF_ROWS = ("weights", "ref_logprobs"), ("row_weight",)
#: Options that a block of tokens has no use for, or values of its own.
_OF_ALL = ("cu_seqlens", "validate", "normalizer", "entropy_coef", "entropy_normalizer")


class _Loss:
    """``policy_loss`` with its inputs: of all tokens, and of a block of them, each a row of its own."""

    def __init__(
        self,
        rows: CountedRows,
        old_logprobs: Tensor,
        advantages: Tensor,
        valid: Tensor | None,
        entropy: bool | str,
        options: dict,
    ):
        self.inputs, self.options, self.entropy = (old_logprobs, advantages, valid), options, entropy is not False
        cu_seqlens, at = options.get("cu_seqlens"), rows.at
        row = at[0]
        if cu_seqlens is not None:  # offsets that lead elsewhere are taken for the nearest row
            row = torch.searchsorted(cu_seqlens.long(), at[0], right=True).clamp(1, len(cu_seqlens) - 1) - 1

        def of_tokens(x: Tensor) -> Tensor:
            return (x[at] if x.shape == old_logprobs.shape else x.reshape(-1)[row]).detach()

        self.old, self.advantages = of_tokens(old_logprobs), of_tokens(advantages)
        given = {name: options[name] for name in (*_OF_TOKENS, *_OF_ROWS) if options.get(name) is not None}
        self.of_tokens = {name: of_tokens(given[name]) for name in _OF_TOKENS if name in given}
        self.of_rows = {name: given[name].detach()[row] for name in _OF_ROWS if name in given}
        self.rest = {name: x for name, x in options.items() if name not in (*given, *_OF_ALL)}
        coef = options.get("entropy_coef", 0.0)
        self.bonus = entropy is True and (isinstance(coef, Tensor) or coef != 0)
        self.divisor = self._number("normalizer", len(rows))
        self.rest["normalizer"] = 1.0
        if self.bonus:
            self._share_divisor(coef)

    def _share_divisor(self, coef: float | Tensor) -> None:
        """What all gradients are divided by in the end is the normalizer of the loss, or that of the entropy where
        the loss's leaves nothing of it; blocks divide by what is left."""
        own = self.divisor
        of_entropy = own if self.options.get("entropy_normalizer") is None else self._number("entropy_normalizer", 0)
        usable = (own != 0) & ~own.isinf()
        self.divisor = torch.where(usable, own, of_entropy)
        left = torch.where(usable, of_entropy / own, (of_entropy != 0).to(own.dtype))
        self.rest |= {"normalizer": usable.to(own.dtype), "entropy_coef": coef, "entropy_normalizer": left}

    def _number(self, name: str, default: int) -> Tensor:
        device, value = self.old.device, self.options.get(name)
        value, wide = default if value is None else value, wide_dtype(device)
        if isinstance(value, Tensor):
            return value.detach().to(device, wide).reshape(())
        return torch.full((), float(value), dtype=wide, device=device)

    def whole(self, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, PolicyStats]:
        return policy_loss(logprobs, *self.inputs, entropy=entropy, **self.options)

    def gradients(self, logprobs: Tensor, entropy: Tensor, block: slice) -> tuple[Tensor, Tensor | None]:
        """Of what the divisor divides, by the log-probabilities of a block and by its entropies."""
        options = self.rest | {name: x[block, None] for name, x in self.of_tokens.items()}
        options |= {name: x[block] for name, x in self.of_rows.items()}
        old, advantages = self.old[block, None], self.advantages[block, None]
        leaves = [x.detach().requires_grad_() for x in ((logprobs, entropy) if self.bonus else (logprobs,))]
        with torch.enable_grad():
            loss, _ = policy_loss(
                leaves[0][:, None], old, advantages, entropy=leaves[1][:, None] if self.bonus else None, **options
            )
            found = [g.to(logprobs.dtype) for g in torch.autograd.grad(loss, leaves)]
        return found[0], found[1] if self.bonus else None


def _in_blocks(
    head: Head,
    rows: CountedRows,
    labels: Tensor,
    numbers: tuple,
    memory: int,
    loss: _Loss,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Gradients, tuple[Tensor, Tensor | None] | None]:
    """Log-probabilities and entropies of the rows that count, and the gradients before the divisor: all logits of some
    rows, then in place what the loss makes of them, which asks for nothing but these rows.

    Where these are all rows, the gradient of the logits and the hidden states are kept for the backward in place of the
    gradient of the weight, if they are smaller.
    """
    temperatures, temperature, ignore_index = numbers
    tiling = head.tiling(rows, memory, all_columns=True)
    later = needs[1] and 0 < len(rows) <= tiling.rows and head.keeps_less(len(rows))
    now = (needs[0], needs[1] and not later, needs[2])
    gradients = Gradients(head, rows, now, rounded=False)
    buffer, y, found = head.buffer(tiling.rows, head.vocab), rows.pick(labels), []
    taus = rows.pick(temperatures)
    forward, backward = backends.op("token_logprobs"), backends.op("token_logprobs_backward_")
    for block in tiling.blocks(len(rows)):
        x = head.operand(rows.hidden(block))
        tile = buffer[: len(x), : head.vocab]
        for columns in tiling.slabs(head.vocab):
            head.write(x, head.weight_of(columns), columns, tile[:, columns])
        tau, of_rows = head.temperature(temperature, None if taus is None else taus[block])
        logp, stats = forward.run(impl, tile, y[block], None, of_rows, tau, ignore_index, loss.entropy)
        found.append(torch.stack([logp, *stats[2:]]))
        if not any(needs):
            continue
        grads = loss.gradients(logp, stats[-1], block)
        slope = head.slope(tile)
        backward.run(impl, tile, y[block], of_rows, *grads, logp, stats, tau, ignore_index)
        if slope is not None:
            tile.mul_(slope)
        del slope  # before there is another
        for columns in tiling.slabs(head.vocab) if any(now) else ():
            into = gradients.begin(columns)
            gradients.add(tile[:, columns], x, head.weight_of(columns), block, columns, into)
    kept = (tile, keepable(x)) if later else None
    nothing = labels.new_empty((1 + loss.entropy, 0), dtype=head.dtype)
    return torch.cat([*found, nothing], 1), gradients, kept


def _computed(
    needs: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor | None,
    numbers: tuple, head_options: tuple, loss_inputs: tuple, impl: str,
) -> tuple[tuple[Tensor, PolicyStats, Tensor], CountedRows, tuple]:  # fmt: skip
    """Loss, statistics and log-probabilities, the rows that count, and the gradients' totals with their divisor."""
    softcap, logit_scale, logits_dtype, memory = head_options
    try:
        head = Head(hidden, weight, bias, softcap, logit_scale, logits_dtype)
    except Refusal as refusal:
        raise RuntimeError(f"linear_policy_loss: {refusal}") from None
    rows = CountedRows(hidden, labels, mask, numbers[-1])
    loss = _Loss(rows, *loss_inputs)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        found, gradients, kept = _in_blocks(head, rows, labels, numbers, memory, loss, needs, impl)
        of_tokens = hidden.new_zeros((len(found), *labels.shape), dtype=head.dtype)
        rows.put(of_tokens, found, 1)
        logprobs = of_tokens[0]
        value, stats = loss.whole(logprobs, of_tokens[1] if loss.entropy else None)
    totals = (
        gradients.hidden, gradients.weight, gradients.bias, *(kept or (None, None)), loss.divisor,
    )  # fmt: skip
    return (value, stats, logprobs.to(value.dtype)), rows, totals


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[:3]
        (value, stats, logprobs), rows, totals = _computed(needs, hidden, weight, bias, *rest)
        ctx.at, ctx.all, ctx.shape, ctx.dtype = rows.at, rows.all, weight.shape, compute_dtype(hidden, weight, bias)
        leaves = (x if needed else None for x, needed in zip((hidden, weight, bias), needs, strict=True))
        ctx.save_for_backward(*leaves, *totals)
        ctx.mark_non_differentiable(logprobs, *stats)
        return value, logprobs, *stats

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_loss, *_others):
        none = (None,) * 6
        if grad_loss is None:
            return None, None, None, *none
        refuse_tangents("linear_policy_loss", grad_loss)
        *inputs, of_hidden, of_weight, of_bias, of_logits, x, divisor = ctx.saved_tensors
        hidden, weight, bias = inputs
        if weight is not None and weight.shape != ctx.shape:
            raise RuntimeError(f"linear_policy_loss: {released(weight)}")
        over = not _may_come_again()
        with torch.no_grad(), torch.autocast(grad_loss.device.type, enabled=False):
            scale = grad_loss * torch.where(divisor != 0, 1.0 / divisor, 0.0)
            if of_logits is not None:
                of_weight = product_of_rows(of_logits, x, ctx.shape, weight.dtype, ctx.dtype, scale)
            elif of_weight is not None:
                of_weight = rounded(of_weight, weight.dtype, scale, over=over)
            grads = (
                None if of_hidden is None else spread(of_hidden, ctx.at, ctx.all, hidden, scale, over=over),
                of_weight,
                None if of_bias is None else rounded(of_bias, bias.dtype, scale, over=over),
            )
        return *(None if g is None else once("linear_policy_loss", g, *inputs, grad_loss) for g in grads), *none


def _saved_selectively() -> bool:
    """Whether selective checkpointing looks at each operation: it may keep none of those that write to a block."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    modes = [getattr(checkpoint, f"_Cach{end}TorchDispatchMode", ()) for end in ("ing", "ed")]
    return any(isinstance(mode, tuple(modes)) for mode in _get_current_dispatch_mode_stack())


def _may_come_again() -> bool:
    """Whether there may be another backward, which would need the gradients as they are now."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or _keeps_graph()


def _keeps_graph() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


@partial(public, differentiable=True)
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool | str = False,
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    support: Tensor | tuple[Tensor, Tensor] | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_mib: float | None = None,
    impl: str = "auto",
    validate: bool = False,
    **policy_options: Any,
) -> tuple[Tensor, PolicyStats, Tensor]:
    r"""``policy_loss`` of ``linear_token_logprobs``: loss and gradient from three matrix products in place of four.

    The loss of a token needs that token's log-probability and entropy alone. So for a block of rows at a time there are
    all logits, the log-probabilities, the gradient of the loss in their place, and what that adds to the gradients of
    ``hidden`` and ``weight``; the backward multiplies these by the incoming gradient over the normalizer, on the
    device. Where one block holds all rows, and they are fewer than H, the product for the weight is the backward's.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``.
        weight, labels, bias, temperature, softcap, logit_scale, group, vocab_start, support, logits_dtype: as in
            ``linear_token_logprobs``; labels have the tokens' shape.
        old_logprobs, advantages: as in ``policy_loss``.
        mask: the tokens' shape; non-zero = valid. A token whose label is ``ignore_index`` is not valid either.
        entropy: True takes the entropy of each token to ``policy_loss``: it costs no product, and with
            ``entropy_coef=0`` it is a metric, ``stats.entropy``. "detached" takes it there without a gradient.
        memory_mib: what a call may take beside inputs, results and the gradients of ``hidden`` and ``weight`` in
            float32, which there are from the forward to the backward; in place of that of the weight the gradient of
            all logits, where that is smaller and within ``memory_mib``. None is 256 on a CPU and 1024 elsewhere. Each
            block of rows reads and writes the gradient of the weight, so that fewer and larger ones are faster. All
            logits of one row are made whatever it is.
        policy_options: every other keyword of ``policy_loss``, ``entropy_coef`` and ``entropy_normalizer`` among them.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check labels, temperatures and ``cu_seqlens`` (synchronises with the device).

    Returns:
        ``(loss, stats, logprobs)``: those of ``policy_loss``, and the log-probabilities ``[B, T]``, which take no
        gradient. Four products, by ``linear_token_logprobs`` and ``policy_loss`` one after the other, are computed
        where a token's gradient needs others of its row (a ratio of the sequence), with ``group`` or ``support``, with
        impl="torch", in a graph of torch.compile, under torch.func and under selective checkpointing; one product where
        no gradient is asked for. On a GPU, finding the rows that count waits for the device.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.
    """
    op = "linear_policy_loss"
    check_head(op, hidden, weight, labels, bias)
    check_logits_dtype(op, logits_dtype, hidden, weight, bias)
    check_shard(op, group, vocab_start, hidden)
    check_entropy(op, entropy)
    ignore_index = check_ignore_index(op, ignore_index)
    coef = policy_options.get("entropy_coef", 0.0)
    if entropy is False and (isinstance(coef, Tensor) or coef != 0):
        raise ValueError(f"{op}: entropy_coef={coef} needs the entropy; pass entropy=True or set entropy_coef=0")
    numbers = head_numbers(op, temperature, softcap, logit_scale, ignore_index, hidden)
    memory, mask = memory_bytes(op, memory_mib, hidden.device, 256), to_mask(op, mask, labels)
    impl = _LINEAR_POLICY_LOSS.choose(impl, hidden.device.type, compute_dtype(hidden, weight, bias))
    labels = labels.long()  # before it is compared: ignore_index may be beyond its dtype
    valid = labels != ignore_index
    valid = valid if mask is None else valid & (mask != 0)
    if (cu_seqlens := policy_options.get("cu_seqlens")) is not None:
        check_packed(op, cu_seqlens, "labels", labels)
        at = torch.arange(len(valid), device=valid.device)  # tokens of no row do not count
        valid = valid & (at >= cu_seqlens[0]) & (at < cu_seqlens[-1])
    options = policy_options | {"impl": impl, "validate": validate}
    check_floating(op, "old_logprobs", old_logprobs)
    if old_logprobs.shape != labels.shape:
        raise ValueError(
            f"{op}: old_logprobs must have the labels' shape {tuple(labels.shape)}, got {tuple(old_logprobs.shape)}"
        )
    if validate:
        check_values(op, labels, valid, numbers[0], ignore_index, weight.size(0) if group is None else ANY_LABEL)
    of_tokens = policy_options.get("importance_sampling_level", "token") == "token"
    eager = not (torch.compiler.is_compiling() or transformed() or has_tangent(hidden))
    eager = eager and not isinstance(hidden, FakeTensor)  # which does not say how many rows count
    eager = eager and not _saved_selectively()
    if impl == "torch" or group is not None or support is not None or not (of_tokens and eager):
        found: Any = linear_token_logprobs(
            hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            mask=valid, ignore_index=ignore_index, entropy=entropy, group=group, vocab_start=vocab_start,
            support=support, logits_dtype=logits_dtype, memory_mib=memory_mib, impl=impl, validate=validate,
        )  # fmt: skip
        logprobs, of_tokens = (found, None) if entropy is False else found
        value, stats = policy_loss(logprobs, old_logprobs, advantages, valid, entropy=of_tokens, **options)
        return value, stats, logprobs.detach().clone().to(value.dtype)
    with torch.no_grad():  # refuses what does not fit before anything is multiplied
        zero = torch.zeros_like(old_logprobs)
        of_tokens = None if entropy is False else zero
        policy_loss(zero, old_logprobs, advantages, valid, entropy=of_tokens, **options)
    rows, tau, cap, scale, _ = numbers
    inputs: Any = (hidden, weight, bias)
    rest: Any = (
        labels, valid, (rows, tau, ignore_index), (cap, scale, logits_dtype, memory),
        (old_logprobs, advantages, valid, entropy, options), impl,
    )  # fmt: skip
    if not any(x is not None and recorded(x) for x in inputs):
        return _computed((False,) * 3, *inputs, *rest)[0]
    value, logprobs, *stats = _EagerLoss.apply(*inputs, *rest)
    return value, PolicyStats(*stats), logprobs
