"""Tensors between pages that cannot be touched, and rows so far apart that their offsets need 64 bits."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections import Counter

import torch

PROT_NONE = 0
ALLOCATIONS = {
    torch: ("empty", "zeros", "full", "empty_like", "zeros_like"),
    torch.Tensor: ("new_empty", "new_zeros", "new_full"),
}


def fenced(x: torch.Tensor, front: bool) -> torch.Tensor:
    """A copy whose memory begins, or ends, at a page that cannot be touched: one element too far is a crash."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    if size == 0:
        return x
    room = -(-size // page) * page
    area = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (start, start + page + room):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), PROT_NONE) == 0
    begin = page if front else page + room - size
    out = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape)
    return out.copy_(x)


def fence_allocations(front: bool) -> Counter:
    """From now on in this process, what Python code allocates lies between guard pages too: a Triton launcher's
    outputs and scratch. Returns the counts, so that a launcher that allocates by other means shows."""
    count: Counter = Counter()

    def wrap(function):
        @functools.wraps(function)
        def allocate(*args, **kwargs):
            count[function.__name__] += 1
            return fenced(function(*args, **kwargs), front)

        return allocate

    for owner, names in ALLOCATIONS.items():
        for name in names:
            setattr(owner, name, wrap(getattr(owner, name)))
    return count


def far_rows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The rows of x, ``stride`` elements apart, in memory that the system provides only where it is touched."""
    size = ((x.size(0) - 1) * stride + x[0].numel()) * x.element_size()
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    whole = torch.frombuffer(area, dtype=x.dtype, count=size // x.element_size())
    return whole.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)


def outputs_and_gradient(case, impl, tensors):
    """As ``cases.run``, but with the differentiable tensor used where it lies, not copied."""
    if case.leaf is None:
        return case.call(tensors, impl)
    leaf = tensors[case.leaf].detach().requires_grad_()
    out = case.call(tensors | {case.leaf: leaf}, impl)
    torch.autograd.backward([x.sum() * (1 + i) for i, x in enumerate(out) if x.requires_grad])
    return (*(x.detach() for x in out), leaf.grad)
