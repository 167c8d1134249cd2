"""The rules of dependent launches by which CUDA kernels are judged on the host: what breaks one is reported."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.lib import host_cuda

pytestmark = pytest.mark.skipif(not (host_cuda.ROOT / "csrc").is_dir(), reason="the sources are not here")
SOURCE = Path(__file__).with_name("host_cuda_rules.cpp")
RACE = "ThreadSanitizer: data race"
KEPT = ("pair", "pair_waits_twice", "chain", "chain_allows_late", "chain_of_four", "plain_after_pair")
BROKEN = {
    "pair_reads_early": RACE,
    "pair_writes_early": RACE,
    "chain_reads_the_first_early": RACE,
    "chain_reads_the_second_early": RACE,
    "chain_writes_early": RACE,
    "waits_of_some": "threads of a dependent launch have ended without waiting for its primary",
    "allows_of_some": "all threads of a primary say so, or none",
    "behind_none": "a dependent launch belongs behind one that allows it, and nowhere else",
    "followed_by_none": "a dependent launch belongs behind one that allows it, and nowhere else",
    "attribute_is_off": "a dependent launch belongs behind one that allows it, and nowhere else",
}
#: (architectures compiled for, has the wait, has it not), of devices as (major, minor)
DEVICES = (
    ("800,900,1000,1200", [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)], [(8, 0), (8, 9), (11, 0), (13, 0)]),
    ("800,1030", [(10, 3)], [(8, 0), (8, 6), (9, 0), (10, 0)]),
    ("800", [], [(8, 0), (9, 0)]),
)


def compile_for_host(*arguments: str | Path) -> None:
    folders = [f"-I{folder}" for folder in host_cuda.INCLUDES]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-g", *folders, *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("host_cuda")
    runtime, target = folder / "runtime.o", folder / "rules"
    compile_for_host("-DHOST_CUDA_BLOCKS=3", "-DHOST_CUDA_TSAN", "-c", host_cuda.HERE / "host_cuda.cpp", "-o", runtime)
    compile_for_host("-DHOST_CUDA_BLOCKS=3", "-fsanitize=thread", SOURCE, runtime, "-o", target)
    return target


def run(program: Path, name: str) -> tuple[int, str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program, name], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_the_rules_is_not_reported(program, name):
    assert run(program, name) == (0, "done\n")


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_rule_is_reported(program, name):
    code, output = run(program, name)
    assert code != 0
    assert BROKEN[name] in output


@pytest.mark.parametrize(("compiled", "have", "have_not"), DEVICES)
def test_only_a_device_that_runs_code_with_the_wait_gets_dependent_launches(tmp_path, compiled, have, have_not):
    checks = [f"static_assert(ppo::has_dependent_launch({a}, {b}));" for a, b in have]
    checks += [f"static_assert(!ppo::has_dependent_launch({a}, {b}));" for a, b in have_not]
    text = ["#include <cuda_runtime.h>", "#undef __CUDA_ARCH_LIST__", f"#define __CUDA_ARCH_LIST__ {compiled}"]
    text += ['#include "cuda/dependent_launch.cuh"', *checks]
    (tmp_path / "devices.cpp").write_text("\n".join(text) + "\n")
    compile_for_host("-fsyntax-only", tmp_path / "devices.cpp")
