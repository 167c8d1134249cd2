"""Calls that differ in their sizes alone: Triton must not compile a kernel again for each of them."""

import collections

import torch

from bench.cases import CASES
from tests.lib import recorded

ARCHITECTURES = (90,)
LENGTHS = range(1025, 1057)  # of one block size, with every remainder that an address may have


def all_of():
    """By op, the arguments of its calls with all inputs."""
    found = collections.defaultdict(list)
    for case in (case for case in CASES if case.contract):
        dtype, shape, options = case.reach[0]
        chosen = {name: values[0] for name, values in case.choices.items()} | options
        for length in LENGTHS:
            inputs = case.inputs(torch.Generator().manual_seed(0), dtype, *shape[:-1], length)
            for op, args in recorded.full(case, inputs, "cpu", **chosen):
                found[op].append(args)
    return found
