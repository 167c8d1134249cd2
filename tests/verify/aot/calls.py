"""Calls of every Triton launcher that together reach the variants users meet: arguments only, nothing is computed."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

INF = math.inf
# (dtype, V): every block size, with rows that begin at 16-byte boundaries and with rows that do not.
VOCABULARIES = (
    (torch.bfloat16, 300),
    (torch.bfloat16, 5000),
    (torch.bfloat16, 32000),
    (torch.bfloat16, 50257),
    (torch.bfloat16, 151936),
    (torch.float16, 151935),
    (torch.float32, 32001),
    (torch.float32, 128256),
)
# [B, T]: short and long rows, sizes that 16 divides and odd ones.
TOKENS = ((4, 64), (3, 7), (2, 8192), (5, 3001))
ESTIMATORS, MASKED_STEPS = range(4), range(3)


def token_logprobs():
    for dtype, vocab in VOCABULARIES:
        logits, row = torch.empty(2, 3, vocab, dtype=dtype), torch.empty(2, 3)
        labels, mask, tau = row.long(), row.to(torch.uint8), row.double()
        yield logits, labels, mask, tau, 1.0, -100, True
        yield logits[:, :-1], labels[:, :-1], None, None, 0.7, -100, False


def token_logprobs_backward():
    for dtype, vocab in VOCABULARIES:
        logits, row = torch.empty(2, 3, vocab, dtype=dtype), torch.empty(2, 3)
        labels, tau, saved = row.long(), row.double(), (row, row, row, row, 0.7)
        yield logits, labels, tau, row, row, *saved
        yield logits, labels, None, row, None, *saved
    yield logits, labels, None, None, row, *saved
    padded = torch.empty(2, 3, 305, dtype=torch.bfloat16)[..., :300]  # its gradient has rows of other alignments
    yield padded, labels, None, row, None, *saved


def token_logprobs_backward_():
    yield from itertools.islice(token_logprobs_backward(), 0, None, 3)


def _new(shape: tuple[int, ...], offset: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)


def _tokens():
    """(B, maker of tokens, cu_seqlens), padded and packed; every second shape lies off a 16-byte boundary."""
    for i, (batch, length) in enumerate(TOKENS):
        yield batch, functools.partial(_new, (batch, length), i % 2), None
        yield batch, functools.partial(_new, (batch * length,), i % 2), torch.arange(batch + 1) * length


def _full_and_bare():
    """As :func:`_tokens`, with every optional tensor and with none."""
    for full in (True, False):
        for batch, new, bounds in _tokens():
            yield full, batch, new, bounds, new(dtype=torch.uint8) if full else None


def kl_rewards():
    for (full, batch, new, bounds, mask), estimator in zip(_full_and_bare(), itertools.cycle(ESTIMATORS)):
        index = torch.zeros(batch, dtype=torch.int64) if full else None
        coef = torch.zeros((), dtype=torch.float64) if full else None
        yield new(), new(), torch.empty(batch), mask, index, bounds, coef, 0.1, estimator, 5.0, 20.0, INF


def gae():
    for (full, batch, new, bounds, mask), masked_steps in zip(_full_and_bare(), itertools.cycle(MASKED_STEPS)):
        lam, bootstrap = (torch.empty(batch).double(), torch.empty(batch)) if full else (None, None)
        yield new(), new(), mask, lam, bootstrap, bounds, 0.99, 0.95, masked_steps


def moments():
    for _, _, new, _, mask in _full_and_bare():
        yield new(), mask


def whiten():
    for full, _, new, _, mask in _full_and_bare():
        given = [torch.zeros((), dtype=torch.float64) if full else None] * 3
        yield new(), mask, *given, full, full, 1e-8


def policy_loss():
    estimators = itertools.cycle(ESTIMATORS)
    for (full, batch, new, bounds, mask), per_row in itertools.product(_full_and_bare(), (False, True)):
        adv = torch.empty(batch, 1) if per_row else new()
        row, one = (torch.empty(batch), torch.zeros((), dtype=torch.float64)) if full else (None, None)
        optional = (mask, adv if full else None, new() if full else None, row, one, bounds, one)
        clips = (0.2, 0.3, 3.0, 20.0, 0.1, next(estimators), 20.0, INF)
        yield new(), new(), adv, *optional, *clips, full


def value_loss():
    for full, batch, new, bounds, mask in _full_and_bare():
        row, one = (torch.empty(batch), torch.zeros((), dtype=torch.float64)) if full else (None, None)
        yield new(), new(), new(), mask, row, one, bounds, 0.2 if full else INF, full


def p3o_loss():
    for full, batch, new, bounds, mask in _full_and_bare():
        one = torch.zeros((), dtype=torch.float64) if full else None
        for variant, group_size in ((0, batch), (1, 1)):
            options = (variant, group_size, 0.1, 0.2, 10.0, 20.0 if full else INF, full)
            yield new(), new(), new(), torch.empty(batch), mask, one, bounds, one, *options
    large = torch.empty(64, 512)
    yield large, large, large, large[:, 0], None, None, None, None, 1, 16, 0.1, 0.2, 10.0, 20.0, True
    yield large, large, large, large[:, 0], None, None, None, None, 0, 64, 0.1, 0.2, 10.0, 20.0, True


def group_advantages():
    for batch, mode in itertools.product((64, 37), range(3)):
        scores, ids = torch.empty(batch), torch.arange(batch)
        yield scores, ids, ids, 0, mode, 1e-4
        yield scores, None, None, 1, mode, 1e-4


def far(op: str, args: tuple) -> tuple | None:
    """The call with the rows of its first tensor further apart than 32 bits count; None for ops of dense tensors."""
    if op in ("moments", "whiten", "group_advantages"):
        return None
    x, *rest = (a.to("meta") if torch.is_tensor(a) else a for a in args)
    return (torch.empty_strided(x.shape, (*[2**33] * (x.dim() - 1), 1), dtype=x.dtype, device="meta"), *rest)
