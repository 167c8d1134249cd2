"""An op is its own files and two edits: one is added to a copy of the sources, and everything else knows of it.

The op, ``soft_clip``, lies in ``template`` as its files lie in the tree, with the two edits in ``shared.patch``. A new
op may start as a copy of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib import checkout

TEMPLATE = Path(__file__).parent / "template"
PATCH = (TEMPLATE / "shared.patch").read_text()
FILES = [path.relative_to(TEMPLATE) for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
OWN = sorted(path for path in FILES if path.name != "shared.patch")

pytestmark = pytest.mark.skipif(not (checkout.ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(scope="module")
def tree() -> Path:
    """A copy of the sources with the op, built."""
    copy = checkout.copy_sources(checkout.ROOT / "build" / "template", "tests")
    for path in OWN:
        assert not (checkout.ROOT / path).exists(), "the template's op is in the tree"
        (copy / path).write_bytes((TEMPLATE / path).read_bytes())
    for path, text in checkout.patched(PATCH, copy).items():
        path.write_text(text)
    checkout.build(copy)
    return copy


def run(tree: Path, *words: str) -> str:
    env = checkout.environment(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    words = words if words[0] == "-c" else ("-m", *words)
    done = subprocess.run([sys.executable, *words], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_each_file_is_named_by_the_op_and_two_others_are_edited():
    assert {path.stem.removeprefix("test_") for path in OWN} == {"soft_clip"}
    edited = set(re.findall(r"^\+\+\+ b/(.*)", PATCH, re.M))
    assert edited == {"csrc/ops.cpp", "ppo_kernels/__init__.py"}


def test_git_applies_the_edits(tree):
    """As CONTRIBUTING.md begins a new op; in the copy they are there, so that they can be taken away."""
    env = checkout.environment(GIT_CEILING_DIRECTORIES=str(tree.parent))
    command = ["git", "apply", "--check", "--reverse", str(TEMPLATE / "shared.patch")]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "git apply tests/verify/template/shared.patch" in (checkout.ROOT / "CONTRIBUTING.md").read_text()


def test_its_own_tests_pass(tree):
    assert " passed" in run(tree, "pytest", "-q", "--tier", "whole", "tests/test_soft_clip.py")


def test_the_contracts_hold_it_to_their_rules(tree):
    every = ("contracts", "contracts_dispatcher", "written_values", "tensor_kinds")
    files = [f"tests/test_{name}.py" for name in every]
    printed = run(tree, "pytest", "-v", "-k", "soft_clip or every_registered or another_kind or sharded", *files)
    for file in files:
        assert f"{file}::" in printed
    for impl in ("cpu", "triton", "torch"):
        assert re.search(rf"test_a_row_does_not_depend.*{impl}.* PASSED", printed)
    printed = run(tree, "pytest", "-v", "-k", "cpu and (outside or further)", "tests/test_contracts_memory.py")
    assert "PASSED" in printed


def test_its_options_and_its_derivatives_are_tried(tree):
    printed = run(tree, "pytest", "-v", "-k", "soft_clip", "tests/test_options.py", "tests/test_transforms.py")
    for name in ("a_number_may_come_in_any_form", "an_option_that_requires_grad", "a_tangent_of_another_input"):
        assert re.search(rf"::test_{name}\w*\[.*soft_clip\..* PASSED", printed), name


def test_the_accuracy_table_has_its_row(tree):
    only = "accuracy.CASES = [case for case in accuracy.CASES if case.op == 'soft_clip']"
    printed = run(tree, "-c", f"from bench import accuracy; {only}; accuracy.main()")
    (row,) = re.findall(r"^\| soft_clip .*", printed, re.M)
    assert len(re.findall(r"\d\.\de-\d\d \(", row)) == 3, "three implementations"


def test_the_benchmarks_have_its_rows(tree):
    assert re.search(r"^\| soft_clip .*µs", run(tree, "bench", "--tiny", "--only", "soft_clip"), re.M)
