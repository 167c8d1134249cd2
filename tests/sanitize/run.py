"""The tests of the C++ ops under sanitizers, in copies of the sources built for them: ``run.py [address] [thread]``.

"address" looks for accesses outside of memory and, in the same binary, for undefined behaviour; "thread" for races.
Afterwards the patches of this folder are planted one by one, and each must be reported: a silent sanitizer is no news.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import checkout  # noqa: E402

FLAGS = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}
LIBRARY = {"address": "libasan.so", "thread": "libtsan.so"}
OPS = ("token_logprobs", "token_logprobs_api", "kl_rewards", "gae", "whiten", "policy_loss", "value_loss")
FILES = [*(f"tests/test_{op}.py" for op in OPS), "tests/test_contracts.py", "tests/test_contracts_dispatcher.py"]
# The C++ kernels alone; what torch.compile builds is not theirs, a group starts processes, and refusals are Python's.
CHOICE = "not torch and not triton and not compile and not group and not refused"
REPORT = re.compile(r"AddressSanitizer|runtime error|ThreadSanitizer")


def gcc_file(name: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def prepare(kind: str) -> tuple[Path, dict[str, str]]:
    """A built copy, and the environment in which its tests see the sanitizer."""
    copy = checkout.copy_sources(checkout.ROOT / "build" / "sanitize" / kind, "tests")
    checkout.build(copy, PPO_KERNELS_SANITIZE=FLAGS[kind])
    preload = [gcc_file(LIBRARY[kind])]
    if kind == "address":
        preload.append(gcc_file("libstdc++.so.6"))  # else the interceptor of exceptions finds none to call
    else:
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
    )


def run_tests(copy: Path, env: dict[str, str], tests: list[str]) -> tuple[int, str]:
    # Reports go to the real stderr: pytest would lose them when the process ends.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-k", CHOICE, *tests]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def excerpt(output: str) -> str:
    found = REPORT.search(output)
    return output[found.start() :][:3000] if found else output[-3000:]


def noticed(patch: Path, copy: Path, env: dict[str, str]) -> bool:
    text = patch.read_text()
    fields = checkout.header(text)
    spoiled = checkout.patched(text, copy)
    originals = {path: path.read_text() for path in spoiled}
    try:
        for path, content in spoiled.items():
            path.write_text(content)
        checkout.build(copy, PPO_KERNELS_SANITIZE=FLAGS[fields["Sanitizer"]])
        code, output = run_tests(copy, env, fields["Tests"].split())
    finally:
        for path, content in originals.items():
            path.write_text(content)
    found = code != 0 and fields["Report"] in output
    print(f"planted {patch.stem}: {'reported' if found else 'NOT reported'}", flush=True)
    if not found:
        print(excerpt(output))
    return found


def check(kind: str) -> bool:
    begin = time.monotonic()
    copy, env = prepare(kind)
    print(f"{kind}: built with -fsanitize={FLAGS[kind]} in {time.monotonic() - begin:.0f} s", flush=True)
    code, output = run_tests(copy, env, FILES)
    clean = code == 0 and not REPORT.search(output)
    print(f"{kind}: {output.strip().splitlines()[-1] if clean else excerpt(output)}", flush=True)
    patches = [path for path in sorted(HERE.glob("*.patch")) if f"\nSanitizer: {kind}\n" in path.read_text()]
    proven = [noticed(path, copy, env) for path in patches] if clean else []
    good = clean and bool(proven) and all(proven)
    print(f"{kind}: {'no report' if good else 'FAILED'} ({time.monotonic() - begin:.0f} s)", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(0 if all([check(kind) for kind in sys.argv[1:] or FLAGS]) else 1)
