"""Do the tests of `make test` tell wrong code from right? Makes each mutant of this folder, runs what should kill it.

A patch is a unified diff with a header:

    Mutant: what is wrong
    Killed by: pytest's names of tests, each with or without (the start of) its parameters: test_gae.py::test_x[cpu
    Crash: why a process must die of it, or a child of the test's (where that is what kills it)
    Environment: NAME=VALUE that its tests need to take the changed path

A mutant is killed if one of its tests fails by an assertion. It is an error, not a kill, if the patch does not apply,
the copy does not build, `make test` has no such test, or one ends in another way than by an assertion. Without a mutant
all tests must pass.
"""

from __future__ import annotations

import argparse
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

KILLED = re.compile(r"assert|AssertionError|Failed: DID NOT RAISE|\S*GradcheckError|\S*OpCheckError")
DIED = re.compile(r"exit code -\d+")
SECONDS = 240
# Files change within a second and keep their size: bytecode of the last mutant must not be taken for this one's.
ENVIRONMENT = checkout.environment(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
HOST_CUDA = {"PPO_KERNELS_HOST_CUDA": "1"}


class Mutant(NamedTuple):
    name: str
    what: str
    tests: tuple[str, ...]
    crash: bool
    environment: dict[str, str]
    patch: str

    @property
    def place(self) -> str:
        """The copy that it is made in; CUDA kernels are compiled for the host."""
        if "+++ b/csrc/cuda/" in self.patch:
            return "cuda"
        return "compiled" if "+++ b/csrc/" in self.patch else "python"

    @property
    def runs_here(self) -> bool:
        return "+++ b/csrc/cpu/avx512.h" not in self.patch or _native.avx512_loops()


def read(path: Path) -> Mutant:
    patch = path.read_text()
    fields = checkout.header(patch)
    environment = dict(pair.split("=", 1) for pair in fields.get("Environment", "").split())
    tests = tuple(fields["Killed by"].split())
    return Mutant(path.stem, fields["Mutant"], tests, "Crash" in fields, environment, patch)


def mutants() -> list[Mutant]:
    """Those of the same file one after the other: a rebuild then undoes the last one and compiles the next."""
    found = [read(path) for path in HERE.glob("*.patch")]
    return sorted(found, key=lambda mutant: (re.findall(r"^\+\+\+ b/(.*)", mutant.patch, re.M), mutant.name))


def collect(copy: Path) -> list[str]:
    """What `make test` runs; for mutants in csrc/cuda the same tests of CUDA compiled for the host."""
    without = [f"--ignore=tests/{name}" for name in ("verify", "test_bench.py")]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *without, "tests"]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT | HOST_CUDA, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def resolve(mutant: Mutant, collected: list[str]) -> list[str]:
    found = []
    for test in mutant.tests:
        start = test if "[" in test else f"{test}["
        matches = [name for name in collected if name in (test, f"tests/{test}") or name.startswith(f"tests/{start}")]
        if mutant.place != "cuda":  # only the copy for mutants in CUDA has these kernels
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


def complaint_about(mutant: Mutant, copy: Path, tests: list[str]) -> str | None:
    """None if the tests kill it, else what happened."""
    env = {}
    with checkout.mutated(mutant.patch, copy):
        if mutant.place == "compiled":
            checkout.build(copy)
        elif mutant.place == "cuda":
            env = HOST_CUDA | {"HOST_CUDA_OPS": checkout.ops_of(tests)}
            checkout.build_host_cuda(copy, **env)
        code, failures, output = run_tests(copy, tests, "-x", env=env | mutant.environment)
    if code == 0:
        return "SURVIVED"
    if code < 0 and mutant.crash:
        return None
    if code != 1 or not failures:
        return f"ERROR: pytest ended with {code}\n{output[-3000:]}"
    if not mutant.crash and (DIED.search(failures[0]) or not KILLED.match(failures[0])):
        return f"ERROR: no assertion about it failed, but\n{output[-3000:]}"
    return None


def attempt(mutant: Mutant, copy: Path, collected: list[str]) -> bool:
    begin = time.monotonic()
    try:
        complaint = complaint_about(mutant, copy, resolve(mutant, collected))
    except subprocess.TimeoutExpired:
        complaint = f"ERROR: not done in {SECONDS} s"
    except (RuntimeError, ValueError, OSError) as error:
        complaint = f"ERROR: {error}"
    print(f"{time.monotonic() - begin:6.1f} s  {mutant.name}: {complaint or 'killed'}", flush=True)
    if complaint:
        print(f"          {mutant.what}", flush=True)
    return complaint is None


def main(names: list[str]) -> int:
    """``names`` of patches to try, or how they begin; none means all."""
    begin = time.monotonic()
    unknown = [name for name in names if not any(mutant.name.startswith(name) for mutant in mutants())]
    if unknown:
        print(f"no patch in {HERE} begins with: {', '.join(unknown)}")
        return 2
    place = checkout.ROOT / "build" / "mutants"
    place.mkdir(parents=True, exist_ok=True)
    lock = (place / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second run would make its mutants in the same copies
    wanted = [mutant for mutant in mutants() if not names or mutant.name.startswith(tuple(names))]
    chosen = [mutant for mutant in wanted if mutant.runs_here]
    copies = {name: place / name for name in ("compiled", "cuda", "python")}
    for copy in copies.values():
        checkout.copy_sources(copy, "tests")
    checkout.build(copies["compiled"])
    for binary in (copies["compiled"] / "ppo_kernels").glob("_C.*so"):
        for name in ("cuda", "python"):
            (copies[name] / "ppo_kernels" / binary.name).write_bytes(binary.read_bytes())

    collected = collect(copies["python"])
    host_cuda = HOST_CUDA if any(mutant.place == "cuda" for mutant in chosen) else {}  # which takes minutes to compile
    passing: dict[tuple, set[str]] = {}
    for mutant in chosen:
        with contextlib.suppress(ValueError):  # said when its turn comes
            passing.setdefault(tuple(mutant.environment.items()), set()).update(resolve(mutant, collected))
    for changes, tests in passing.items():
        env = host_cuda | dict(changes)
        code, _, output = run_tests(copies["cuda"], sorted(tests), env=env, seconds=4 * SECONDS)
        if code != 0:
            print(f"without a mutant the tests do not pass (pytest: {code})\n{output[-6000:]}")
            return 1
        print(f"{time.monotonic() - begin:6.1f} s  without a mutant: {output.strip().splitlines()[-1]}", flush=True)

    def work(name: str) -> list[bool]:
        return [attempt(mutant, copies[name], collected) for mutant in chosen if mutant.place == name]

    with ThreadPoolExecutor(2) as pool:
        killed = [one for part in pool.map(work, copies) for one in part]
    if len(chosen) < len(wanted):
        print(f"left out {len(wanted) - len(chosen)} in csrc/cpu/avx512.h, which does not run here")
    print(f"killed {sum(killed)}/{len(killed)} in {time.monotonic() - begin:.0f} s")
    return 0 if all(killed) and killed else 1


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tests.verify.mutants.run", description=__doc__, formatter_class=as_written
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of patches to try, or how they begin; by default all")
    sys.exit(main(parser.parse_args().names))
