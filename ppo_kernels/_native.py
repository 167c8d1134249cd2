"""Loads the compiled ops, and keeps the reason where that fails: "not built" and "cannot load" need other remedies.

Everything here happens once, at import. Afterwards ``CPU_ERROR`` and ``CUDA_ERROR`` are None, or the exception to
show to whoever asks for that library.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from ppo_kernels._process import claim, refuse_another_copy
from ppo_kernels._schemas import PACKAGE, SCHEMAS
from ppo_kernels._source_hash import source_hash

logger = logging.getLogger("ppo_kernels")

REBUILD = "pip install -e ."

CPU_ERROR: Exception | None = None
CUDA_ERROR: Exception | None = None
_C: ModuleType | None = None
_cuda: ctypes.CDLL | None = None


class NativeError(ImportError):
    """Why a compiled library cannot be used here, and what to do about it."""


def build_info() -> dict[str, str | None]:
    """Compiler, flags, versions and source hash of ``_C``; empty if it is not loaded."""
    return {} if _C is None else _C.build_info()


def cpu_capability() -> str | None:
    """The instruction set level of the CPU kernels, "x86-64-v3" for example; None if ``_C`` is not loaded."""
    return None if _C is None else _C.cpu_capability()


def avx512_loops() -> bool:
    """Whether ``token_logprobs`` runs its loops for AVX-512; ``PPO_KERNELS_AVX512=0`` leaves the portable ones."""
    return _C is not None and _C.avx512_loops()


@contextmanager
def portable_loops() -> Iterator[None]:
    """Within it ``token_logprobs`` runs the portable loops on a CPU with AVX-512 too, for comparisons."""
    if _C is None or not _C.avx512_loops():
        yield
        return
    _C.set_avx512_loops(False)
    try:
        yield
    finally:
        _C.set_avx512_loops(True)


def call_counts() -> dict[str, dict[str, int]]:
    """Calls of each registered op since the start, per library: ``{"cpu": {"gae": 3, ...}}``."""
    counts = {} if _C is None else {"cpu": _C.call_counts()}
    if _cuda is not None:
        lines = _cuda.ppo_kernels_call_counts().decode().splitlines()
        counts["cuda"] = {op: int(calls) for op, calls in (line.split() for line in lines)}
    return counts


def _check_schemas() -> None:
    """One op that differs makes the whole binary suspect."""
    for name, schema in SCHEMAS.items():
        op = getattr(torch.ops.ppo_kernels, name, None)
        found = "no such op" if op is None else op.default._schema
        try:
            wanted = torch._C.parse_schema(f"ppo_kernels::{schema}")
        except RuntimeError as error:
            raise _off(f"torch cannot parse the schema {schema!r} of ops.cpp; correct it: {error}") from error
        if op is None or found != wanted:
            raise _off(
                f"{_file_of(_C)} was built from other sources: it has {found}, this ppo_kernels expects {wanted};"
                f" rebuild it with: {REBUILD}"
            )


def _off(error: str) -> NativeError:
    warnings.warn(f"the native ops are off: {error}", stacklevel=4)
    return NativeError(error)


def _hidden_copy() -> Path | None:
    """An installed package with its libraries, which Python would find if it did not begin in a checkout."""
    for entry in sys.path:
        with suppress(OSError, RuntimeError, TypeError, ValueError):  # a path may hold anything
            other = Path(entry).resolve() / "ppo_kernels"
            if other != PACKAGE and any((other / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
                return other
    return None


def _load_cpu() -> ModuleType:
    suffixes = [suffix for suffix in EXTENSION_SUFFIXES if (PACKAGE / f"_C{suffix}").exists()]
    if not suffixes:
        others = sorted(path.name for path in PACKAGE.glob("_C.*so"))
        found = f"only for another Python ({', '.join(others)})" if others else "not"
        found = f"the C++ ops are {found} built in {PACKAGE}"
        if (hidden := _hidden_copy()) is not None:
            raise _off(f"{found}, which hides {hidden}; run Python from another folder, or build them with: {REBUILD}")
        raise NativeError(f"{found}; build them with: {REBUILD}")
    path = PACKAGE / f"_C{suffixes[0]}"
    try:
        _check_whole(path)
        return importlib.import_module("ppo_kernels._C")
    except (ImportError, OSError) as error:
        raise NativeError(_cannot_load(path, error)) from error


def _load_cuda() -> ctypes.CDLL:
    """Load the CUDA library into the process; what it offers besides its ops, it offers by name."""
    path = PACKAGE / "_C_cuda.so"
    if torch.version.cuda is None:
        raise NativeError(f"this torch ({torch.__version__}) has no CUDA; install a CUDA build of torch")
    if CPU_ERROR is not None:
        raise NativeError(f"the CUDA ops need the library of the C++ ops, and {CPU_ERROR}") from CPU_ERROR
    if not path.exists():
        raise NativeError(
            f"the CUDA ops are not built in {PACKAGE}; with nvcc on PATH, run: PPO_KERNELS_CUDA=ON {REBUILD}"
        )
    try:
        _check_whole(path)
        library = open_cuda_library(path)
    except OSError as error:
        raise NativeError(_cannot_load(path, error)) from error
    library.ppo_kernels_source_hash.restype = ctypes.c_char_p
    return library


def open_cuda_library(path: Path) -> ctypes.CDLL:
    """Load a library of CUDA ops: torch registers them, and ``call_counts`` has their calls under "cuda"."""
    global _cuda
    torch.ops.load_library(path)
    _cuda = ctypes.CDLL(str(path))
    _cuda.ppo_kernels_call_counts.restype = ctypes.c_char_p
    return _cuda


def _check_whole(path: Path) -> None:
    """A library without its end, or with zeros there, would kill the process with SIGBUS or SIGSEGV.

    That is what a full disk, a copy that broke off and a lost current leave. The linker writes the sections' headers
    last.
    """
    with path.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\2" or len(header) < 64:  # the loader itself refuses what is no library
            return
        segments, sections = struct.unpack_from("=QQ", header, 32)
        segment_size, segment_count, section_size, section_count, names = struct.unpack_from("=5H", header, 54)
        ends = [segments + segment_size * segment_count, sections + section_size * section_count]
        file.seek(segments)
        table = file.read(segment_size * segment_count)
        file.seek(sections + section_size * names)
        kind_of_names = file.read(8)[4:]
    ends += [sum(struct.unpack_from("=8xQ16xQ", table, at)) for at in range(0, len(table) - 55, 56)]
    size = path.stat().st_size
    if size < max(ends):
        raise OSError(f"it is cut short, {size} of {max(ends)} bytes; build it again: {REBUILD}")
    if section_count and kind_of_names != b"\3\0\0\0":  # a table of names
        raise OSError(f"its end is damaged; build it again: {REBUILD}")


def _cannot_load(path: Path, error: Exception) -> str:
    return f"cannot load {path} with torch {torch.__version__} (the oldest that works is 2.11) because {error}"


def _file_of(module: ModuleType | None) -> str:
    return str(getattr(module, "__file__", "_C"))


def _warn_if_stale(path: str, built_from: str | None) -> None:
    current = source_hash()
    if current is not None and built_from != current:
        message = f"{path} is stale: csrc/ or CMakeLists.txt changed after it was built; rebuild it with: {REBUILD}"
        warnings.warn(message, stacklevel=3)


def _load() -> None:
    global CPU_ERROR, CUDA_ERROR, _C
    try:
        _C = _load_cpu()
        logger.info("C++ ops: %s (%s)", _file_of(_C), _C.cpu_capability())
        _warn_if_stale(_file_of(_C), _C.build_info()["source_hash"])
        _check_schemas()
    except NativeError as error:
        CPU_ERROR = error
        logger.info("C++ ops: %s", error)
    try:
        library = _load_cuda()
        _warn_if_stale(str(PACKAGE / "_C_cuda.so"), library.ppo_kernels_source_hash().decode())
        logger.info("CUDA ops: %s", PACKAGE / "_C_cuda.so")
    except NativeError as error:
        CUDA_ERROR = error
        logger.info("CUDA ops: %s", error)


refuse_another_copy(PACKAGE, next(iter(SCHEMAS)))
_load()
claim(PACKAGE)
