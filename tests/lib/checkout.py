"""Copies of the sources, built in a folder of their own, in which a mutant may stand for a while."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = (
    *("csrc", "ppo_kernels", "python_trainer", "bench", "setup.py", "CMakeLists.txt"),
    *("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"),
)


def copy_sources(target: Path, *more: str) -> Path:
    """The sources without binaries, and what else is named. What is equal already is left alone: builds count on it."""
    wanted = {}
    for name in (*PACKAGED, *more):
        top = ROOT / name
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                wanted[target / path.relative_to(ROOT)] = path.read_bytes()
    for name in (*PACKAGED, *more):
        for path in (target / name).rglob("*"):
            if path.is_file() and path.suffix != ".so" and path not in wanted:
                path.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return target


def environment(**changes: str) -> dict[str, str]:
    """This process's, for commands in a copy: what the caller builds with and imports from stays outside."""
    outside = ("PYTHONPATH", *(f"PPO_KERNELS_{name}" for name in ("CUDA", "SANITIZE", "AVX512", "PATCH")))
    kept = {k: v for k, v in os.environ.items() if k not in outside}
    return {**kept, "PATH": sysconfig.get_path("scripts") + os.pathsep + kept["PATH"], **changes}


def build(copy: Path, **changes: str) -> None:
    """Build the C++ ops in place, without the CUDA half."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    env = environment(PPO_KERNELS_CUDA="OFF", **changes)
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{copy} does not build:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")


def build_host_cuda(copy: Path, **changes: str) -> None:
    """Compile the CUDA kernels for the host."""
    command = [sys.executable, "-m", "tests.lib.host_cuda"]
    done = subprocess.run(command, cwd=copy, env=environment(**changes), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{copy} does not build for the host:\n{done.stderr[-4000:]}")


def ops_of(tests: Iterable[str]) -> str:
    """The ops that files of tests are named after, for HOST_CUDA_OPS."""
    names = {re.sub(r".*test_(\w+?)(_api)?\.py.*", r"\1", test) for test in tests}
    return " ".join(sorted(names)) if all((ROOT / "csrc" / "cuda" / f"{name}.cu").exists() for name in names) else ""


def header(patch: str) -> dict[str, str]:
    """The ``Name: text`` lines above a unified diff; indented lines go on."""
    return dict(re.findall(r"^(\w[\w ]*): ((?:.|\n )+)", patch.partition("\n--- ")[0], re.M))


def patched(patch: str, copy: Path) -> dict[Path, str]:
    """The files of a unified diff as they are with it, by the lines it names: their numbers do not count.

    Old lines that are not there, or more than once, are an error: the patch would make another mutant.
    """
    texts: dict[Path, str] = {}
    for part in re.split(r"^--- ", patch, flags=re.M)[1:]:
        names, *hunks = re.split(r"^@@.*\n", part, flags=re.M)
        path = copy / names.rpartition("+++ b/")[2].strip()
        text = texts.get(path) or path.read_text()
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in side) for side in (" -", " +"))
            if text.count(old) != 1:
                raise ValueError(
                    f"does not apply: {path.name} has these lines {text.count(old)} times, not once:\n{old}"
                )
            text = text.replace(old, new)
        texts[path] = text
    return texts


@contextlib.contextmanager
def mutated(patch: str, copy: Path) -> Iterator[None]:
    """The copy's files with the patch, and as they were afterwards."""
    changed = patched(patch, copy)
    originals = {path: path.read_text() for path in changed}
    try:
        for path, text in changed.items():
            path.write_text(text)
        yield
    finally:
        for path, text in originals.items():
            path.write_text(text)
