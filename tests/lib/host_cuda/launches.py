"""What the launchers launch, read off the library of host_cuda: kernels, blocks, threads, memsets.

``recorded()`` runs a call with the launchers' own formulas and without the kernels, so that sizes which only a GPU can
compute are launched here all the same. ``skipped()`` leaves out even the record: what remains is
the host's part of a call.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.lib import devices, host_cuda

RUN, RECORD, SKIP = range(3)


class Launch(NamedTuple):
    kernel: str  # as in the sources: gae_teams_kernel<32>; "memset" for one
    blocks: int
    threads: int


@functools.cache
def library() -> ctypes.CDLL:
    """Of the CUDA ops for the host, which serve impl="cuda" from now on."""
    devices.serve_cuda_from_host()
    found = ctypes.CDLL(str(host_cuda.build()))
    found.host_cuda_recorded.restype = ctypes.c_char_p
    return found


_modes = [RUN]  # the last one holds


@contextmanager
def _mode(how: int) -> Iterator[None]:
    _modes.append(how)
    library().host_cuda_record(how)
    try:
        yield
    finally:
        _modes.pop()
        library().host_cuda_record(_modes[-1])


def skipped():
    """Within it no kernel runs: outputs hold what was in memory."""
    return _mode(SKIP)


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of the call, in order."""
    library().host_cuda_recorded()
    with _mode(RECORD):
        call()
    lines = library().host_cuda_recorded().decode().splitlines()
    return [_launch(*map(int, line.split())) for line in lines]


def _launch(offset: int, blocks: int, threads: int) -> Launch:
    return Launch(kernels()[offset] if offset else "memset", blocks, threads)


@functools.cache
def kernels() -> dict[int, str]:
    """The names of the library's kernels by their offsets."""
    lines = subprocess.check_output(["nm", "--defined-only", str(host_cuda.build())], text=True).splitlines()
    symbols = {int(line.split()[0], 16): line.split()[2] for line in lines if "_kernel" in line}
    return dict(zip(symbols, plain(list(symbols.values())), strict=True))


def plain(names: list[str]) -> list[str]:
    """Mangled names as in the sources: token_logprobs_kernel<BFloat16, true>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"\((?:ppo::)?\w+\)(?=\d)", "", line) for line in text.splitlines()]  # (ppo::KlEstimator)2
    return [re.sub(r"\(.*|^void |ppo::", "", line) for line in lines]
