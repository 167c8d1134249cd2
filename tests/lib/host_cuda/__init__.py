"""Builds the CUDA kernels and launchers for the host: their ops then serve CPU tensors.

``python -m tests.lib.host_cuda`` prints the path of the library. HOST_CUDA_FLAGS adds compiler flags
(``-fsanitize=address,undefined``), HOST_CUDA_OPS names the ops to build (``gae whiten``; default all).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
INCLUDES = (HERE / "include", ROOT / "csrc")  # what is in both is taken from the first
BUILT = ROOT / "build" / "host_cuda"
NAMESPACE = "ppo_kernels_host_cuda"  # as include/torch/csrc/stable/library.h makes it


def _sources() -> list[Path]:
    wanted = os.environ.get("HOST_CUDA_OPS", "").split()
    wanted += ["exports", "loss_backward"] if wanted else []  # the second is called by every loss
    kernels = [p for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if not wanted or p.stem in wanted]
    return [HERE / "host_cuda.cpp", ROOT / "csrc" / "ops.cpp", *kernels]


def _with_headers(path: Path, seen: set[Path]) -> set[Path]:
    """The file and what it includes of ours."""
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'#include ["<]([\w./]+)[">]', path.read_text()):
            for folder in (path.parent, *INCLUDES):
                if (folder / name).exists():
                    _with_headers(folder / name, seen)
                    break
    return seen


def _run(command: list[str], target: Path) -> None:
    """Run a compiler; the target appears whole or not at all."""
    part = target.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(part)], check=True)
    part.rename(target)


def build() -> Path:
    """The path of the library; only what changed is compiled again."""
    compiler = os.environ.get("CXX", "c++")
    extra = shlex.split(os.environ.get("HOST_CUDA_FLAGS", ""))
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [*(f"-I{folder}" for folder in INCLUDES), "-isystem", str(torch_root / "include")]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *extra]
    if extra:
        flags += ["-Wno-maybe-uninitialized"]  # of which gcc warns wrongly in instrumented code
    BUILT.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        command = [compiler, *flags]
        if source.parent == HERE and any("thread" in flag for flag in extra):
            command += ["-fno-sanitize=all", "-DHOST_CUDA_TSAN"]
        state = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
        for path in sorted(_with_headers(source, set())):
            state.update(path.read_bytes())
        target = BUILT / f"{source.stem}-{state.hexdigest()[:16]}.o"
        if not target.exists():
            _run([*command, "-x", "c++", "-c", str(source)], target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compiled, _sources())]
    library = BUILT / f"host_cuda-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _run([compiler, "-shared", *extra, *objects, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"], library)
    return library
