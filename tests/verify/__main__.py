"""What `make test` leaves out, in named parts: ``python -m tests.verify [PART ...] [-- ARGUMENTS]``.

Without a part all run, one after the other, for hours; ``--list`` names them and shows their commands. Of a single
part the output is shown, and the arguments go to its command; of several it goes to ``build/verify/PART.log``, and its
end is shown where a part fails.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

from tests.lib.checkout import ROOT, environment

LOGS = ROOT / "build" / "verify"
OPS = "--ignore tests/verify --ignore tests/trainer --ignore tests/test_bench.py"
LIBRARIES = "--ignore tests/verify/trainer --ignore tests/verify/adapters"
WITH_CUDA = "tests --ignore tests/trainer --ignore tests/test_bench.py " + " ".join(
    f"--ignore tests/verify/{name}"
    for name in (
        "adapters",
        "aot",
        "mutants",
        "trainer",
        "test_build.py",
        "test_packages.py",
        "test_inductor.py",
        "test_gpu.py",
        "test_gpu_run.py",
        "test_host_path.py",
        "test_template.py",
    )
)
PARTS = {
    "patches": "pytest tests/verify/mutants",
    "build": "pytest tests/verify/test_build.py",
    "packages": "pytest tests/verify/test_packages.py",
    "template": "pytest tests/verify/test_template.py",
    "inductor": "pytest tests/verify/test_inductor.py",
    "metamorphic": "pytest tests/verify/test_metamorphic.py tests/verify/test_triton_losses.py",
    "aot": "pytest tests/verify/aot -rs",
    "host_cuda": f"PPO_KERNELS_HOST_CUDA=1 pytest {WITH_CUDA} -n 2 --dist loadfile --tier whole -k cuda",
    "sanitize_cuda": "tests.verify.sanitize.run --together cuda_address cuda_thread",
    "sanitize": "tests.verify.sanitize.run address thread",
    "meetings": "pytest tests/verify/test_meetings.py tests/verify/test_host_path.py",
    "gpu_run": "pytest tests/verify/test_gpu_run.py tests/verify/test_gpu.py",
    "host_path": "tests.verify.host_path",
    "accuracy": "bench --accuracy",
    "parity": "pytest tests/verify/test_parity.py tests/verify/test_parity_groups.py -rs",
    "fuzz": "tests.verify.fuzz",
    "sizes": "pytest tests/verify/test_sizes.py -n 2",
    "properties": f"pytest tests/verify -n 2 --dist loadfile -k properties {LIBRARIES}",
    "factorial": f"pytest tests -n 2 --dist loadfile --tier rest -k 'not triton and not cuda' {OPS}",
    "triton": f"pytest tests -n 2 --dist loadfile --tier rest -k triton {OPS}",
    "mutants": "tests.verify.mutants.run",
    "trainer": "pytest tests/verify/trainer -n 2 --dist loadfile",
    "faults": "tests.verify.trainer.faults",
    "hostile": "tests.verify.trainer.hostile",
    "learn": "pytest tests/verify/trainer/test_learn.py -m learn",
    "adapters": "pytest tests/verify/adapters -W ignore",
}
GROUPS = {"gpu_checks": ("host_cuda", "meetings", "sanitize_cuda", "aot")}  # the kernels of a GPU, without one


def command(part: str) -> tuple[list[str], dict[str, str]]:
    """What to run, and the variables that the line begins with."""
    words = shlex.split(PARTS[part])
    variables = {}
    while "=" in words[0]:
        name, variables[name] = words.pop(0).split("=", 1)
    return [sys.executable, "-m", *words, *(["-q"] if words[0] == "pytest" else [])], variables


def run(part: str, arguments: list[str], show: bool) -> bool:
    words, variables = command(part)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{part}.log"
    begin, before = time.monotonic(), os.times()
    with log.open("w") as file:
        env = environment(**({"OMP_NUM_THREADS": "1"} | variables))
        output = None if show else file
        done = subprocess.run([*words, *arguments], cwd=ROOT, env=env, stdout=output, stderr=output)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
    if done.returncode != 0 and not show:
        print("\n".join(log.read_text().splitlines()[-40:]))
    print(f"{part:<14} {verdict:<12} {cpu:7.0f} s of CPU {time.monotonic() - begin:7.0f} s", flush=True)
    return done.returncode == 0


def main(words: list[str]) -> int:
    end = words.index("--") if "--" in words else len(words)
    names, arguments = words[:end], words[end + 1 :]
    if {"-h", "--help"} & set(names):
        print(f"{__doc__}\nThe parts: {' '.join((*PARTS, *GROUPS))}")
        return 0
    if names == ["--list"]:
        print("\n".join(f"{name:<14} {line}" for name, line in PARTS.items()))
        print("\n".join(f"{name:<14} {' '.join(parts)}" for name, parts in GROUPS.items()))
        return 0
    parts = [part for name in names or PARTS for part in GROUPS.get(name, (name,))]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or (arguments and len(parts) != 1):
        wrong = f"there is no part {' '.join(unknown)}" if unknown else "arguments are for a single part"
        print(f"{wrong}; the parts are {' '.join((*PARTS, *GROUPS))}")
        return 2
    results = [run(part, arguments, show=len(parts) == 1) for part in parts]
    print(f"{sum(results)} of {len(results)} parts passed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
