"""What the op tests share: the metric, inputs, and the eager float32 code that a kernel must not be worse than."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from bench.cases import ESTIMATORS as ESTIMATORS
from bench.cases import with_holes as holey_mask  # noqa: F401

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
JUNK = (NAN, INF, -INF, 1e30)
MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)
MASKED_STEPS = ("skip", "zero", "keep")
MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def out_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def as_array(x) -> np.ndarray:
    return np.asarray(x.detach().double().numpy() if torch.is_tensor(x) else x, dtype=np.float64)


def assert_close_to_oracle(actual, oracle, *, eager=None, ceiling=None, scale=None, what="value") -> None:
    """The one metric: same NaN and infinities, error at most twice that of eager code plus noise, and a ceiling.

    ``ceiling`` is absolute, or relative to ``scale`` (a number or an array that broadcasts). Noise is one rounding of
    the output dtype at the size of the value; what is beyond its largest number has to be infinite. Without ``eager``
    and ``ceiling`` float64 gets 1e-11, others 1e-6.
    """
    got, want = as_array(actual), as_array(oracle)
    dtype = actual.dtype if torch.is_tensor(actual) else torch.float64
    want = np.where(np.isfinite(want) & (np.abs(want) > torch.finfo(dtype).max), np.copysign(INF, want), want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, oracle {want.shape}"
    for name, same in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        off = same(got) != same(want)
        assert not off.any(), f"{what}: {name} at other places than the oracle, {int(off.sum())} of {off.size}"
    finite = np.isfinite(want)
    if not finite.any():
        return
    eps = torch.finfo(dtype).eps
    error = np.where(finite, np.abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0)), 0.0)
    size = np.abs(want[finite]).max()
    if eager is not None:
        base = as_array(eager)
        both = finite & np.isfinite(base)
        bound = 2.0 * np.abs(base[both] - want[both]).max(initial=0.0) + 2.0 * eps * max(size, 1.0)
        assert error.max() <= bound, f"{what}: error {error.max():.3e} > {bound:.3e} (twice eager plus noise)"
    if ceiling is None and eager is None:
        ceiling, scale = (1e-11 if dtype == torch.float64 else max(1e-6, eps)), max(size, 1.0)
    if ceiling is not None:
        limit = np.broadcast_to(ceiling * (1.0 if scale is None else np.asarray(scale)), error.shape)
        worst = np.unravel_index(np.argmax(error - limit), error.shape)
        assert (error <= limit).all(), f"{what}: error {error[worst]:.3e} > {limit[worst]:.3e} at {worst}"


def bit_equal(a, b) -> bool:
    """Same shape, dtype and bits, NaN equal to NaN, -0 equal to 0."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(bit_equal(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def with_junk(x: torch.Tensor, mask: torch.Tensor, junk: float) -> torch.Tensor:
    return torch.where(mask, x, torch.full((), junk, dtype=x.dtype))


def strided(x: torch.Tensor, pad: int = 3, offset: int = 1) -> torch.Tensor:
    """The same values in a view with padded rows that starts off a vector boundary; the padding is NaN."""
    if x.numel() == 0:
        return x
    wide = torch.full((x.numel() // x.shape[-1] * (x.shape[-1] + pad) + offset,), NAN, dtype=x.dtype)
    view = wide[offset:].view(*x.shape[:-1], x.shape[-1] + pad)[..., : x.shape[-1]]
    return view.copy_(x)


def pack(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])


def unpack(x: torch.Tensor, lengths: list[int], length: int) -> torch.Tensor:
    out = x.new_zeros(len(lengths), length)
    for row, part in zip(out, x.split(lengths), strict=True):
        row[: len(part)] = part
    return out


def cu(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=dtype)


def grad_of(fn, x: torch.Tensor, grad_output=None) -> tuple:
    """``fn(leaf)`` detached, and the gradient of it (or of its first element) at the leaf."""
    leaf = x.detach().requires_grad_()  # not a copy: that would lose the strides
    out = fn(leaf)
    first = out[0] if isinstance(out, tuple) else out
    first.backward(grad_output)
    return out, leaf.grad


def assert_raises(error, fn, *mentions: str) -> None:
    """The message must say what was given and what is allowed: each of ``mentions``."""
    with pytest.raises(error) as caught:
        fn()
    text = str(caught.value)
    for mention in mentions:
        assert mention in text, f"{mention!r} is not in the message {text!r}"


def eager_logprobs(logits, labels, temperature=1.0):
    """What trainers write: float32 log_softmax and gather; the labels must be legal."""
    tau = temperature[..., None] if torch.is_tensor(temperature) else temperature
    log_p = torch.log_softmax(logits.to(out_dtype(logits.dtype)) / tau, -1)
    many = labels.dim() == logits.dim()
    return log_p.gather(-1, labels.long() if many else labels.long()[..., None]).view(labels.shape)


def eager_entropy(logits, temperature=1.0):
    tau = temperature[..., None] if torch.is_tensor(temperature) else temperature
    log_p = torch.log_softmax(logits.to(out_dtype(logits.dtype)) / tau, -1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)


#: What every fresh process loads, none of it ours: with a server that has it each takes a tenth of a second.
LIBRARIES = ["numpy", "torch", "torch._dynamo", "triton.language", "hypothesis", "pytest"]


def fresh_processes():
    """How to start processes that share no state with this one; their environment is that of the first's start."""
    if torch.cuda.is_available():  # which does not outlive a fork
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def _serve_and_run(target, args) -> None:
    from tests.lib import devices

    devices.serve()
    target(*args)


def in_fresh_process(target, *args, start=fresh_processes) -> None:
    """Run ``target(*args)`` in a process of its own: a wild read then fails the test and not the session."""
    process = start().Process(target=_serve_and_run, args=(target, args))
    process.start()
    process.join(200)
    assert process.exitcode == 0, f"{target.__name__}: exit code {process.exitcode}"


def magnitude(x) -> np.ndarray:
    """|x|, and 0 for what is not finite."""
    x = np.asarray(x, dtype=np.float64)
    return np.where(np.isfinite(x), np.abs(x), 0.0)


def row_scale(*arrays: np.ndarray) -> np.ndarray:
    """For each row the largest magnitude in any of the arrays, kept 2-d."""
    sizes = [magnitude(a).max(-1, keepdims=True, initial=0.0) for a in arrays]
    return np.maximum(functools.reduce(np.maximum, sizes), math.ulp(1.0))
