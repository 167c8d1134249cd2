"""Builds the CUDA kernels and launchers for the host: their ops then serve CPU tensors.

``python tests/host_cuda/__init__.py`` prints the path of the library. HOST_CUDA_FLAGS adds compiler flags
(``-fsanitize=address,undefined``).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMESPACE = "ppo_kernels_host_cuda"
DEFINES = ("PPO_HOST_CUDA", f"PPO_OPS={NAMESPACE}", "TORCH_TARGET_VERSION=0x020b000000000000")


def _sources() -> list[Path]:
    return [HERE / "host_cuda.cpp", ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def build() -> Path:
    """The path of the library, built if these sources and flags have not been built before."""
    compiler = os.environ.get("CXX", "c++")
    extra = shlex.split(os.environ.get("HOST_CUDA_FLAGS", ""))
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", *(f"-D{define}" for define in DEFINES)]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{HERE / 'include'}", "-isystem", str(torch_root / "include")]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *extra]

    headers = [p for folder in (ROOT / "csrc", HERE) for p in folder.rglob("*") if p.suffix in (".h", ".cuh")]
    state = hashlib.sha256(" ".join([compiler, torch.__version__, *flags]).encode())
    for path in sorted({*headers, *_sources()}):
        state.update(path.read_bytes())
    folder = ROOT / "build" / f"host_cuda-{state.hexdigest()[:16]}"
    library = folder / "host_cuda.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target, own = folder / f"{source.stem}.o", []
        if source.parent == HERE and any("thread" in flag for flag in extra):
            own = ["-fno-sanitize=all", "-DHOST_CUDA_TSAN"]
        subprocess.run([compiler, *flags, *own, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _sources()))
    linked = library.with_suffix(f".{os.getpid()}")
    link = [compiler, "-shared", *extra, "-o", str(linked), *objects, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(link, check=True)
    linked.rename(library)
    return library


if __name__ == "__main__":
    print(build())
