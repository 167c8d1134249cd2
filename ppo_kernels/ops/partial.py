"""Logits in shards of the vocabulary: what each rank knows of a row, and what all of them together say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_kernels._compositions import register_composition
from ppo_kernels._types import ProcessGroup, compute_dtype
from ppo_kernels.ops._autograd import transformed
from ppo_kernels.ops._inputs import check_device, check_floating, check_integer_option, unit_last_stride
from ppo_kernels.ops._logits_inputs import ANY_LABEL, check_logits, check_values, refuse_forward_mode
from ppo_kernels.ops._logprobs import TOKEN_LOGPROBS, differentiable
from ppo_kernels.ops._overwrite import check_overwritable
from ppo_kernels.ops._parts import gathered, part_of, world_size
from ppo_kernels.ops._public import public


def _numbers(logits: Tensor, labels: Tensor, entropy: bool) -> int:
    """How many a part has for each row."""
    return 2 + bool(entropy) + (labels.size(-1) if labels.dim() == logits.dim() else 1)


def _fake(logits, labels, mask, rows, temperature, ignore_index, entropy, vocab_start, impl):
    shape = (_numbers(logits, labels, entropy), *logits.shape[:-1])
    return logits.new_empty(shape, dtype=compute_dtype(logits))


def _part(logits, labels, mask, rows, temperature, ignore_index, entropy, vocab_start, impl):
    live = labels != ignore_index
    live = live.any(-1) if labels.dim() == logits.dim() else live
    live = live if mask is None else live & (mask != 0)
    return part_of(impl, logits, labels, vocab_start, temperature, rows, entropy, live)


_PARTIAL = register_composition(
    "token_logprobs_partial(Tensor logits, Tensor labels, Tensor? mask, Tensor? temperature_rows, float temperature,"
    " int ignore_index, bool entropy, int vocab_start, str impl) -> Tensor",
    ("token_logprobs",),
    fake=_fake,
    kernel=_part,
)
_GATHER = register_composition(
    "token_logprobs_gather(Tensor part, str group, str impl) -> Tensor",
    ("token_logprobs",),
    fake=lambda part, group, _impl: part.new_empty((world_size(group), *part.shape)),
    kernel=lambda part, group, _impl: gathered(part, group),
)


def part_of_shard(impl, logits, labels, mask, rows, temperature, ignore_index, entropy, vocab_start):
    """``partial`` of arguments as kernels take them."""
    options = (temperature, ignore_index, entropy is not False, vocab_start, impl)
    return _PARTIAL.call(impl, logits.detach(), labels, mask, rows, *options)


def gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """The parts of all ranks, in their order."""
    return _GATHER.call("torch", part, group.group_name, "torch")


@public
def partial(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int = 0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""What a shard of the vocabulary knows of each row, for ``merge``: where a trainer communicates by itself.

    .. math:: m = \max_v z_v,\quad s = \log \sum_v e^{(z_v - m)/\tau},\quad H = -\sum_v q_v \log q_v,\quad z_y

    over the shard's logits, with q their own softmax. ``token_logprobs(group=...)`` is this, an all-gather, and
    ``merge``. There is no ``support`` and there are no ``extras`` here, as these take parts of another width and at
    another temperature: call ``token_logprobs`` with ``group`` for them, or make the logits outside of a support -inf.

    Args:
        logits: ``[..., V]``, this shard's, as in ``token_logprobs``.
        labels: ``[...]`` or ``[..., K]``, those of the whole vocabulary.
        vocab_start: the label that the first of these logits belongs to.
        temperature, mask, ignore_index, entropy: as in ``token_logprobs``, and alike for all shards and ``merge``.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check labels and temperatures (synchronises with the device).

    Returns:
        ``[3, ...]``, with the entropy ``[4, ...]``, and K - 1 more for K labels: float32, float64 for float64 logits.
        It does not require grad: gradients come from ``merge``. Its contents are for ``merge``, and may change.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
    """
    op = "partial"
    vocab_start = check_integer_option(op, "vocab_start", vocab_start, least=0)
    labels, mask, rows, tau, ignore_index = check_logits(op, logits, labels, temperature, mask, ignore_index, entropy)
    if validate:
        check_values(op, labels, mask, rows, ignore_index, ANY_LABEL)
    impl = TOKEN_LOGPROBS.choose(impl, logits.device.type, logits.dtype)
    return part_of_shard(impl, unit_last_stride(logits), labels, mask, rows, tau, ignore_index, entropy, vocab_start)


@public
def merge(
    parts: Tensor | Sequence[Tensor],
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int = 0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
    inplace_backward: bool = False,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``token_logprobs`` of the whole vocabulary, from what ``partial`` has given for each shard of it.

    .. math:: \log p = (z_y - m)/\tau - \log \sum_r e^{(m_r - m)/\tau + s_r},\quad m = \max_r m_r

    Differentiable in this rank's logits, whose gradient needs no communication: that of a logit is made from the row's
    statistics. Every rank has to take the same gradient of the same results, as replicas of a loss do.

    Args:
        parts: ``[R, ...]``, those of all shards in the same order on every rank, or a sequence of R. They are added
            up in this order in float64.
        logits, labels, vocab_start, temperature, mask, ignore_index, entropy: as this rank's ``partial`` got them.
        inplace_backward: as in ``token_logprobs``.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: also check labels and temperatures (synchronises with the device).

    Returns:
        ``logprobs``, or ``(logprobs, entropy [...])``, as ``token_logprobs`` has them; a label of no shard gives NaN.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
        RuntimeError: a second differentiation.
    """
    op = "merge"
    vocab_start = check_integer_option(op, "vocab_start", vocab_start, least=0)
    labels, mask, rows, tau, ignore_index = check_logits(op, logits, labels, temperature, mask, ignore_index, entropy)
    parts = check_parts(op, parts, logits, labels, entropy)
    refuse_forward_mode(op, logits)
    if inplace_backward and not (torch.compiler.is_compiling() or transformed()):
        check_overwritable(op, logits)
    if validate:
        check_values(op, labels, mask, rows, ignore_index, ANY_LABEL)
    impl = TOKEN_LOGPROBS.choose(impl, logits.device.type, logits.dtype)
    arguments, more = (labels, mask, rows, tau, ignore_index, entropy), (parts, vocab_start, impl)
    inplace = inplace_backward and impl != "torch"
    return differentiable(op, impl, unit_last_stride(logits), arguments, inplace, more)


def check_parts(op: str, parts: Any, logits: Tensor, labels: Tensor, entropy: object) -> Tensor:
    if isinstance(parts, (list, tuple)) and parts and all(isinstance(part, Tensor) for part in parts):
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"{op}: parts must be alike in shape, got {[tuple(part.shape) for part in parts]}")
        parts = torch.stack(list(parts))
    elif not isinstance(parts, Tensor):
        raise TypeError(f"{op}: parts must be a tensor [R, ...] or a sequence of R >= 1 tensors, got {parts!r:.60}")
    check_floating(op, "parts", parts)
    check_device(op, "parts", parts, logits.device)
    shape = (_numbers(logits, labels, entropy is not False), *logits.shape[:-1])
    if parts.dim() == 0 or parts.size(0) == 0 or tuple(parts.shape[1:]) != tuple(shape):
        raise ValueError(
            f"{op}: parts must be [R, {', '.join(map(str, shape))}], R >= 1 results of partial with the same labels and"
            f" entropy; got {tuple(parts.shape)}"
        )
    return parts.detach().to(compute_dtype(logits)).contiguous()
