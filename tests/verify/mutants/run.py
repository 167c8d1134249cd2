"""How good are the tests? Plants each bug of this folder in a copy of the sources and runs what should notice it.

A patch is a unified diff with a header:

    Planted: what is wrong
    Noticed by: pytest's names of tests, each with or without (the start of) its parameters: test_gae.py::test_x[cpu
    Crash: why a process must die of it, or a child of the test's (where that is how the tests notice)
    Environment: NAME=VALUE that its tests need to take the spoiled path

It is killed if one of its tests fails by an assertion. It is an error, not a kill, if the patch no longer applies, the
copy does not build, a test is missing, or one ends in another way than by an assertion. Unspoiled, all tests must pass.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ppo_kernels import _native
from tests.lib import checkout

HERE = Path(__file__).resolve().parent

NOTICED = re.compile(r"assert|AssertionError|Failed: DID NOT RAISE|\S*GradcheckError|\S*OpCheckError")
DIED = re.compile(r"exit code -\d+")
SECONDS = 240
# Files change within a second and keep their size: bytecode of the last bug must not be taken for this one's.
ENVIRONMENT = checkout.environment(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
HOST_CUDA = {"PPO_KERNELS_HOST_CUDA": "1"}


class Bug(NamedTuple):
    name: str
    planted: str
    tests: tuple[str, ...]
    crash: bool
    environment: dict[str, str]
    patch: str

    @property
    def place(self) -> str:
        """The copy that it is planted in; CUDA kernels are compiled for the host."""
        if "+++ b/csrc/cuda/" in self.patch:
            return "cuda"
        return "compiled" if "+++ b/csrc/" in self.patch else "python"

    @property
    def runs_here(self) -> bool:
        return "+++ b/csrc/cpu/avx512.h" not in self.patch or _native.avx512_loops()


def read(path: Path) -> Bug:
    patch = path.read_text()
    fields = checkout.header(patch)
    environment = dict(pair.split("=", 1) for pair in fields.get("Environment", "").split())
    return Bug(path.stem, fields["Planted"], tuple(fields["Noticed by"].split()), "Crash" in fields, environment, patch)


def bugs() -> list[Bug]:
    """Bugs of the same file one after the other: a rebuild then undoes the last one and compiles the next."""
    found = [read(path) for path in HERE.glob("*.patch")]
    return sorted(found, key=lambda bug: (re.findall(r"^\+\+\+ b/(.*)", bug.patch, re.M), bug.name))


def collect(copy: Path) -> list[str]:
    """What `make test` runs."""
    without = [f"--ignore=tests/{name}" for name in ("verify", "test_bench.py")]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *without, "tests"]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT | HOST_CUDA, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def resolve(bug: Bug, collected: list[str]) -> list[str]:
    found = []
    for test in bug.tests:
        start = test if "[" in test else f"{test}["
        matches = [name for name in collected if name in (test, f"tests/{test}") or name.startswith(f"tests/{start}")]
        if bug.place != "cuda":  # only the copy for bugs in CUDA has these kernels
            matches = [name for name in matches if not re.search(r"[\[-]cuda[\]-]", name)]
        if not matches:
            raise ValueError(f"there is no test {test}")
        found += matches
    return found


def run_tests(copy: Path, tests: list[str], *options: str, env: dict, seconds: int = SECONDS) -> tuple:
    """pytest's exit code, the first words of each failure, and what it printed."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *options, *tests]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT | env, capture_output=True, text=True, timeout=seconds)
    failures = [x.get("message", "") for x in ET.parse(report).iter("failure")] if report.exists() else []
    return done.returncode, failures, done.stdout + done.stderr


def plant(bug: Bug, copy: Path, tests: list[str]) -> str | None:
    """None if the tests notice, else what happened."""
    env = {}
    with checkout.mutated(bug.patch, copy):
        if bug.place == "compiled":
            checkout.build(copy)
        elif bug.place == "cuda":
            env = HOST_CUDA | {"HOST_CUDA_OPS": checkout.ops_of(tests)}
            checkout.build_host_cuda(copy, **env)
        code, failures, output = run_tests(copy, tests, "-x", env=env | bug.environment)
    if code == 0:
        return "SURVIVED"
    if code < 0 and bug.crash:
        return None
    if code != 1 or not failures:
        return f"ERROR: pytest ended with {code}\n{output[-3000:]}"
    if not bug.crash and (DIED.search(failures[0]) or not NOTICED.match(failures[0])):
        return f"ERROR: no assertion about it failed, but\n{output[-3000:]}"
    return None


def attempt(bug: Bug, copy: Path, collected: list[str]) -> bool:
    begin = time.monotonic()
    try:
        complaint = plant(bug, copy, resolve(bug, collected))
    except subprocess.TimeoutExpired:
        complaint = f"ERROR: not done in {SECONDS} s"
    except (RuntimeError, ValueError, OSError) as error:
        complaint = f"ERROR: {error}"
    print(f"{time.monotonic() - begin:6.1f} s  {bug.name}: {complaint or 'killed'}", flush=True)
    if complaint:
        print(f"          planted: {bug.planted}", flush=True)
    return complaint is None


def main(names: list[str]) -> int:
    """``names`` of patches to try, or how they begin; none means all."""
    begin = time.monotonic()
    unknown = [name for name in names if not any(bug.name.startswith(name) for bug in bugs())]
    if unknown:
        print(f"no patch in {HERE} begins with: {', '.join(unknown)}")
        return 2
    place = checkout.ROOT / "build" / "planted"
    place.mkdir(parents=True, exist_ok=True)
    lock = (place / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second run would plant its bugs in the same copies
    wanted = [bug for bug in bugs() if not names or bug.name.startswith(tuple(names))]
    chosen = [bug for bug in wanted if bug.runs_here]
    copies = {name: place / name for name in ("compiled", "cuda", "python")}
    for copy in copies.values():
        checkout.copy_sources(copy, "tests")
    checkout.build(copies["compiled"])
    for binary in (copies["compiled"] / "ppo_kernels").glob("_C.*so"):
        for name in ("cuda", "python"):
            (copies[name] / "ppo_kernels" / binary.name).write_bytes(binary.read_bytes())

    collected = collect(copies["python"])
    host_cuda = HOST_CUDA if any(bug.place == "cuda" for bug in chosen) else {}  # which takes minutes to compile
    unspoiled: dict[tuple, set[str]] = {}
    for bug in chosen:
        with contextlib.suppress(ValueError):  # said when its turn comes
            unspoiled.setdefault(tuple(bug.environment.items()), set()).update(resolve(bug, collected))
    for changes, tests in unspoiled.items():
        env = host_cuda | dict(changes)
        code, _, output = run_tests(copies["cuda"], sorted(tests), env=env, seconds=4 * SECONDS)
        if code != 0:
            print(f"without any bug the tests do not pass (pytest: {code})\n{output[-6000:]}")
            return 1
        print(f"{time.monotonic() - begin:6.1f} s  without any bug: {output.strip().splitlines()[-1]}", flush=True)

    def work(name: str) -> list[bool]:
        return [attempt(bug, copies[name], collected) for bug in chosen if bug.place == name]

    with ThreadPoolExecutor(2) as pool:
        killed = [one for part in pool.map(work, copies) for one in part]
    if len(chosen) < len(wanted):
        print(f"left out {len(wanted) - len(chosen)} in csrc/cpu/avx512.h, which does not run here")
    print(f"killed {sum(killed)}/{len(killed)} in {time.monotonic() - begin:.0f} s")
    return 0 if all(killed) and killed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
