"""Which path through an op each CUDA kernel is, and how it is measured: one line for each kind of kernel.

A new kernel needs a line here, or the record refuses it. The first line that matches counts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LOOP, STRAIGHT, REST = "loop", "straight", "rest"


class Path(NamedTuple):
    kernel: str  # the names, as in the sources
    what: str  # for people
    way: str  # LOOP: a round of the hot loop is the hot way; STRAIGHT: from the begin to the end; REST: none
    elements: int = 0  # of a lane on this way; 0: as many as exponentials
    odd: str = ""  # what the second way is for, by narrower loads or moved vectors


PATHS = (
    Path(r"token_logprobs_kernel<", "logits", LOOP, odd="odd V"),
    Path(r"token_logprobs_backward_kernel<", "gradient of logits", STRAIGHT),
    Path(r"label_gradients_kernel<", "several labels, gradient", REST),
    Path(r"\w*fold_kernel|merge_\w+_kernel|kl_rows_kernel", "joins the parts of blocks", REST),
    Path(r"(gae|kl)_teams_kernel<8>", "rows up to 64 tokens", STRAIGHT, 8, "unaligned"),
    Path(r"(gae|kl)_teams_kernel<32>", "a row per warp", STRAIGHT, 8, "unaligned"),
    Path(r"gae_segments_kernel<0>", "a row per block", STRAIGHT, 8, "unaligned"),
    Path(r"gae_segments_kernel<1>", "long rows, their maps", STRAIGHT, 8, "unaligned"),
    Path(r"gae_segments_kernel<2>", "long rows, their tokens", STRAIGHT, 8, "unaligned"),
    Path(r"kl_segments_kernel", "rows in segments", STRAIGHT, 8, "unaligned"),
    Path(r"prepare_packed_kernel", "packed: bounds", REST),
    Path(r"(policy|value)_loss_kernel<true", "flat", STRAIGHT, 8),
    Path(r"(policy|value)_loss_kernel<false", "generic", STRAIGHT, 8, "unaligned"),
    Path(r"loss_backward_kernel", "gradient, scaled", STRAIGHT, 8),
    Path(r"(policy|importance)_rows_kernel", "ratios of rows", REST),
    Path(r"importance_weights_kernel<true", "flat", STRAIGHT, 8),
    Path(r"importance_weights_kernel<false", "generic", STRAIGHT, 8, "unaligned"),
    Path(r"p3o_(rows|gradient)_kernel", "a row per block", STRAIGHT, 8),
    Path(r"p3o_pairs_kernel", "pairs of a group", REST),
    Path(r"(moments|whiten)_kernel", "flat", STRAIGHT, 16),
    Path(r"group_advantages_kernel", "groups of numbers", REST),
)


def of(kernel: str) -> Path:
    for path in PATHS:
        if re.match(path.kernel, kernel):
            return path
    raise KeyError(f"{kernel}: say in tests/verify/aot/paths.py which path it is")


class Limits(NamedTuple):
    """What a streaming multiprocessor has (CUDA C++ Programming Guide, compute capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int


REGISTERS, REGISTER_UNIT, BLOCK_RESERVES = 65536, 256, 1024
MULTIPROCESSORS = {
    80: Limits(2048, 32, 164 * 1024),
    90: Limits(2048, 32, 228 * 1024),
    100: Limits(2048, 32, 228 * 1024),
    120: Limits(1536, 24, 100 * 1024),
}


def blocks_per_sm(arch: int, registers: int, shared_bytes: int, threads: int) -> int:
    """How many blocks are resident at a time, by registers, shared memory and threads."""
    limits, warps = MULTIPROCESSORS[arch], -(-threads // 32)
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = (REGISTERS // 4 // of_a_warp) * 4 // warps  # each quarter has its own file
    by_shared = limits.shared_bytes // (shared_bytes + BLOCK_RESERVES)
    return min(limits.blocks, limits.threads // (32 * warps), by_registers, by_shared)
