"""Lets the op tests, which are written on CPU tensors, drive the CUDA and Triton kernels.

Without a GPU the CUDA kernels are compiled for the host (``host_cuda``). With one, a wrapper moves every argument to
it, storage and strides as they are, and the results back.
"""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest
import torch

from ppo_kernels import _native, backends
from ppo_kernels._registered import guard
from ppo_kernels._schemas import SCHEMAS
from ppo_kernels.triton import INSTALLED, INTERPRETED
from tests.lib import interpreter

#: Compile the CUDA kernels for the host and test them too.
HOST_CUDA = os.environ.get("PPO_KERNELS_HOST_CUDA") == "1" and not torch.cuda.is_available()
#: What is tested here, and of that what has kernels.
IMPLEMENTATIONS = [*(["cuda"] if HOST_CUDA or torch.cuda.is_available() else []), "cpu", "triton", "torch"]
KERNELS = IMPLEMENTATIONS[:-1]
#: Of these, what can be called with the tensors of a CPU as they are.
ON_CPU = ["cpu"] if torch.cuda.is_available() else KERNELS
_host_cuda = torch.library.Library("ppo_kernels_host_cuda", "FRAGMENT")


@functools.cache
def serve() -> None:
    """Make ``IMPLEMENTATIONS`` serve CPU tensors in this process."""
    if INSTALLED and INTERPRETED:
        interpreter.improve()
    if torch.cuda.is_available():
        serve_from_gpu("cuda")
        serve_from_gpu("triton")
    elif HOST_CUDA:
        serve_cuda_from_host()


@functools.cache
def serve_cuda_from_host() -> None:
    """Make ``impl="cuda"`` serve CPU tensors with the kernels compiled for the host. Ops are registered once."""
    from tests.lib import host_cuda

    path = host_cuda.build()
    _native.open_cuda_library(path)
    ops = getattr(torch.ops, host_cuda.NAMESPACE)
    for name, schema in SCHEMAS.items():
        guard(_host_cuda, schema)
        torch.library.register_fake(f"{host_cuda.NAMESPACE}::{name}", backends.op(name).fake, lib=_host_cuda)
    _serve("cuda", lambda op: _float32_only("cuda", getattr(ops, op.name).default))


def registered(name: str, impl: str) -> torch._ops.OpOverload:
    """The op that ``impl`` serves CPU tensors by, itself."""
    if impl == "cuda":
        return getattr(torch.ops.ppo_kernels_host_cuda, name).default
    return backends.op(name).kernel(impl)


def serve_from_gpu(impl: str) -> None:
    """Make ``impl`` ("cuda" or "triton") serve CPU tensors with its kernels on the GPU."""
    _serve(impl, lambda op: _float32_only(impl, _through_gpu(op.kernel(impl))))


def _serve(impl: str, kernel_of) -> None:
    """Let ``impl`` serve CPU tensors by the callable that ``kernel_of`` makes of each op."""
    for op in map(backends.op, SCHEMAS):
        kernel = kernel_of(op)
        op.serve(impl, kernel)
        if impl in op.traced or "cpu" in op.traced:
            name = f"{op.name}_of_{impl}"
            op.traced[impl] = backends.register_traced(name, SCHEMAS[op.name], op.floats, op.fake, kernel)
        if impl not in op.available["cpu"]:
            op.available["cpu"] += (impl,)


def _float32_only(impl: str, kernel):
    """GPU kernels have no float64: ``choose`` sends such tensors on a GPU elsewhere, so there is nothing to test."""

    def call(*args):
        if args[0].dtype == torch.float64:
            if hypothesis.currently_in_test_context():
                hypothesis.reject()  # this example; a skip would end all
            pytest.skip(f"{impl} has no float64 kernels on a GPU")
        return kernel(*args)

    return call


def _through_gpu(kernel):
    def call(*args):
        moved = [to_gpu(a) if torch.is_tensor(a) else a for a in args]
        result = kernel(*moved)
        for argument, value, at in zip(kernel._schema.arguments, args, moved, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value.copy_(at)
        if result is None:
            return None
        return result.cpu() if torch.is_tensor(result) else tuple(x.cpu() for x in result)

    return call


def to_gpu(x: torch.Tensor) -> torch.Tensor:
    """The same storage, offset and strides on the GPU; only as much of the storage as the tensor reaches."""
    reach = x.storage_offset() + (
        1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    )
    flat = torch.as_strided(x, (reach,), (1,), 0)
    return torch.as_strided(flat.cuda(), x.shape, x.stride(), x.storage_offset())
