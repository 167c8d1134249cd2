"""``python -m ppo_kernels.env`` prints versions, devices, what is built, and which implementation each op picks.

The report has to print on a broken machine too: only the standard library is imported here, and ``section``
guards every probe.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "deepspeed", "pybind11", "cmake", "ninja",
)  # fmt: skip
VARIABLES = (
    "PPO_KERNELS_CUDA", "PPO_KERNELS_SANITIZE", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET", "OMP_NUM_THREADS", "PPO_KERNELS_PATCH",
)  # fmt: skip

Lines = Iterator[tuple[str, object]]


def machine() -> Lines:
    yield "platform", platform.platform()
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "cpus", os.cpu_count()
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def packages() -> Lines:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def compilers() -> Lines:
    for name in ("c++", "nvcc"):
        path = shutil.which(name)
        if path is None:
            yield name, "not found"
            continue
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)  # noqa: S603
        lines = shown.stdout.strip().splitlines() or [f"exit code {shown.returncode}"]
        yield name, lines[-1] if name == "nvcc" else lines[0]


def devices() -> Lines:
    import torch

    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield "threads", torch.get_num_threads()
    if not torch.cuda.is_available():
        yield "cuda devices", "none"
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield (
            f"cuda:{i}",
            f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB",
        )


def triton_ops() -> str:
    kernels = importlib.import_module("ppo_kernels.triton")
    if not kernels.INSTALLED:
        return "none, Triton is not installed; pip install triton"
    try:
        importlib.import_module("triton")
    except Exception as error:  # only the import shows that an installation is broken
        return f"none, Triton cannot be imported: {type(error).__name__}: {error}"
    how = "interpreted" if kernels.INTERPRETED else "compiled at their first call"
    hint = "" if kernels.INTERPRETED else "; CPU tensors need TRITON_INTERPRET=1"
    return f"{how}, for {', '.join(kernels.DEVICE_TYPES)} tensors{hint}"


def binaries() -> Lines:
    native = importlib.import_module("ppo_kernels._native")
    yield "package", native.PACKAGE
    yield "C++ ops", native.CPU_ERROR or "loaded"
    yield "CUDA ops", native.CUDA_ERROR or "loaded"
    yield "Triton ops", triton_ops()
    info = native.build_info()
    if not info:
        return
    yield "instruction set", native.cpu_capability() + (", AVX-512 loops" if native.avx512_loops() else "")
    current = native.source_hash()
    if current is None:
        yield "sources", "not here (installed from a wheel)"
    else:
        fresh = current == info["source_hash"]
        yield "sources", "match the binary" if fresh else f"CHANGED since the build: {native.REBUILD}"
    for name, value in info.items():
        yield name, "none" if value is None else value


def implementations() -> Lines:
    backends = importlib.import_module("ppo_kernels.backends")
    for name in backends.OPS:
        picks = {device: backends.op(name).implementations(device) for device in ("cpu", "cuda")}
        yield name, "   ".join(f"{device}: {' > '.join(names)}" for device, names in picks.items())


SECTIONS: dict[str, Callable[[], Lines]] = {
    "machine": machine,
    "packages": packages,
    "compilers": compilers,
    "devices": devices,
    "ppo_kernels binaries": binaries,
    'implementations, best first (impl="auto" takes the first)': implementations,
}


def section(title: str, probe: Callable[[], Lines]) -> str:
    lines = [title]
    try:
        for name, value in probe():
            lines.append(f"  {name:<20} {value}")
    except (Exception, SystemExit) as error:  # the rest of the report still helps
        lines.append(f"  cannot tell: {type(error).__name__}: {error}")
    return "\n".join(lines)


def report() -> str:
    try:
        version = importlib.import_module("ppo_kernels").__version__
    except (Exception, SystemExit) as error:
        version = f"cannot be imported: {type(error).__name__}: {error}"
    head = f"ppo_kernels {version}. Copy this into a bug report."
    return "\n\n".join([head, *(section(title, probe) for title, probe in SECTIONS.items())])


def without_home(text: str) -> str:
    """With ~ for the home folder, where there is one: a service may have none, or the root of all folders."""
    try:
        home = Path.home()
    except RuntimeError:
        return text
    return text if len(home.parts) < 2 else re.sub(re.escape(str(home)) + r"(?![\w.-])", "~", text)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    print(without_home(report()))  # to nowhere where standard output is closed
