"""Launchers with the faults that compiling ahead of time has to find: each must be reported."""

import torch
import triton
import triton.language as tl

from ppo_kernels.triton._launch import launch


@triton.jit
def _copy(x, out, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _copy_far(x, out, stride, BLOCK: tl.constexpr):
    at = (tl.program_id(0) % 7) * 5 + tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _crowded(x, out, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    z = tl.load(x + at)
    tl.store(out + at, z / tl.sum(z, 0))


@triton.jit
def _broken(x, out, stride, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 3)))


ARCHITECTURES = (90,)
LAUNCHERS = {
    "good": lambda x, out: launch(_copy_far, 4, x, out, 128, num_warps=4, BLOCK=128),
    "narrow_offset": lambda x, out: launch(_copy, 4, x, out, 127, num_warps=4, BLOCK=128),
    "crowded": lambda x, out: launch(_crowded, 4, x, out, 128, num_warps=1, BLOCK=16384),
    "does_not_compile": lambda x, out: launch(_broken, 4, x, out, 128, num_warps=4, BLOCK=128),
    "bare": lambda x, out: _copy_far[(4,)](x, out, 128, num_warps=2, BLOCK=128),
}


def all_of():
    return {name: [(torch.empty(4, 128), torch.empty(4, 128))] for name in LAUNCHERS}
