"""The tests of the ops under sanitizers, in copies of the sources built for them: ``run.py [--together] [KIND ...]``.

"address" looks for accesses outside of memory and, in the same binary, for undefined behaviour; "thread" for races:
both in the C++ ops. "cuda_address" and "cuda_thread" do so in the CUDA kernels, compiled for the host.
Afterwards the mutants of this folder are made one by one, and each must be reported: a silent sanitizer proves nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.lib import checkout, op_tests

HERE = Path(__file__).resolve().parent

FILES = tuple(op_tests.files())
CONTRACTS = ("tests/test_contracts.py", "tests/test_contracts_dispatcher.py")
FUZZ = "tests/test_fuzz.py"
MEETINGS = "tests/verify/test_meetings.py"
QUIET = ("-p", "no:cacheprovider", "-p", "no:warnings")
SECONDS = 900  # for the tests of one run
REPORT = re.compile(r"AddressSanitizer|runtime error|ThreadSanitizer")


class Kind(NamedTuple):
    flags: str
    library: str
    tests: tuple[str, ...]  # and options of pytest
    choice: str
    cuda: bool = False  # the CUDA kernels, compiled for the host

    @property
    def host_cuda(self) -> dict[str, str]:
        blocks = "-DHOST_CUDA_BLOCKS=3 " if self.library == "libtsan.so" else ""
        return {"PPO_KERNELS_HOST_CUDA": "1", "HOST_CUDA_FLAGS": f"{blocks}-fsanitize={self.flags} -fno-sanitize=vptr"}


# What torch.compile builds is not the kernels', a group starts processes, and refusals are Python's.
OTHERS = "not compile and not a_group_whitens and not refused"
ADDRESS = ("address,undefined,float-cast-overflow", "libasan.so")
THREAD = ("thread", "libtsan.so")
KINDS = {
    "address": Kind(
        *ADDRESS,
        (*FILES, *CONTRACTS, FUZZ, "tests/test_avx512.py"),
        f"{OTHERS} and not torch and not triton and not portable",
    ),
    "thread": Kind(*THREAD, FILES + CONTRACTS, f"{OTHERS} and not torch and not triton"),
    "cuda_address": Kind(*ADDRESS, (*FILES, FUZZ), f"{OTHERS} and cuda and not wrong_arguments", cuda=True),
    "cuda_thread": Kind(*THREAD, (*FILES, MEETINGS, "--several-blocks"), "cuda", cuda=True),
}


def gcc_file(name: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def build(kind: Kind, copy: Path) -> None:
    if kind.cuda:
        checkout.build_host_cuda(copy, **kind.host_cuda)
    else:
        checkout.build(copy, PPO_KERNELS_SANITIZE=kind.flags)


def prepare(name: str) -> tuple[Path, dict[str, str]]:
    """A built copy, and the environment in which its tests see the sanitizer."""
    kind, copy = KINDS[name], checkout.copy_sources(checkout.ROOT / "build" / "sanitize" / name, "tests")
    build(kind, copy)
    preload, more = [gcc_file(kind.library)], {}
    if kind.library == "libasan.so":
        preload.append(gcc_file("libstdc++.so.6"))  # else the interceptor of exceptions finds none to call
    if kind.cuda:
        more = kind.host_cuda
        for binary in (checkout.ROOT / "ppo_kernels").glob("_C.*so"):  # the schemas, not sanitized
            (copy / "ppo_kernels" / binary.name).write_bytes(binary.read_bytes())
    elif kind.library == "libtsan.so":
        threads = copy / "threads.so"
        options = ("-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-fsanitize=thread")
        subprocess.run(["g++", *options, HERE / "threads.cpp", "-o", threads], check=True)
        preload.append(str(threads))
    return copy, checkout.environment(
        LD_PRELOAD=" ".join(preload),
        OMP_NUM_THREADS="1",
        PYTHONDONTWRITEBYTECODE="1",
        ASAN_OPTIONS="detect_leaks=0",  # Python frees little at its end
        UBSAN_OPTIONS="print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
        **more,
    )


def run_tests(copy: Path, env: dict[str, str], tests: Iterable[str], choice: str) -> tuple[int, str]:
    # Reports go to the real stderr: pytest would lose them when the process ends.
    command = [sys.executable, "-m", "pytest", "-q", "--tier", "whole", "--capture=sys", *QUIET, "-k", choice, *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as stuck:  # blocks that wait for each other, perhaps
        return 1, f"not done in {SECONDS} s\n{(stuck.stdout or b'').decode()}{(stuck.stderr or b'').decode()}"
    return done.returncode, done.stdout + done.stderr


def excerpt(output: str) -> str:
    found = REPORT.search(output)
    return output[found.start() :][:3000] if found else output[-3000:]


def reported(patch: Path, copy: Path, env: dict[str, str]) -> bool:
    text = patch.read_text()
    fields = checkout.header(text)
    kind, tests = KINDS[fields["Sanitizer"]], fields["Tests"].split()
    with checkout.mutated(text, copy):
        if kind.cuda:  # the ops that its tests need
            env = {**env, "HOST_CUDA_OPS": checkout.ops_of(tests)}
            checkout.build_host_cuda(copy, **kind.host_cuda, HOST_CUDA_OPS=env["HOST_CUDA_OPS"])
        else:
            build(kind, copy)
        code, output = run_tests(copy, env, tests, kind.choice)
    found = code != 0 and fields["Report"] in output
    print(f"mutant {patch.stem}: {'reported' if found else 'NOT reported'}", flush=True)
    if not found:
        print(excerpt(output))
    return found


def check(name: str) -> bool:
    begin = time.monotonic()
    copy, env = prepare(name)
    kind = KINDS[name]
    print(f"{name}: built with -fsanitize={kind.flags} in {time.monotonic() - begin:.0f} s", flush=True)
    code, output = run_tests(copy, env, kind.tests, kind.choice)
    clean = code == 0 and not REPORT.search(output)
    print(f"{name}: {output.strip().splitlines()[-1] if clean else excerpt(output)}", flush=True)
    patches = [path for path in sorted(HERE.glob("*.patch")) if f"\nSanitizer: {name}\n" in path.read_text()]
    proven = [reported(path, copy, env) for path in patches] if clean else []
    good = clean and bool(proven) and all(proven)
    print(f"{name}: {'no report' if good else 'FAILED'} ({time.monotonic() - begin:.0f} s)", flush=True)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.verify.sanitize.run", description=__doc__)
    parser.add_argument("--together", action="store_true", help="all at the same time")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; by default all")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"there is no kind {', '.join(sorted(unknown))}; the kinds are {', '.join(KINDS)}")
    names = given.kinds or list(KINDS)
    with ThreadPoolExecutor(len(names) if given.together else 1) as pool:
        sys.exit(0 if all(list(pool.map(check, names))) else 1)
