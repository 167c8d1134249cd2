"""Every Triton kernel that is launched compiles for every architecture: no spills, 64-bit row offsets."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from ppo_kernels import triton
from tests.verify.aot import resources

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed")]
ROOT = pathlib.Path(__file__).resolve().parents[3]


def compile_all(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.verify.aot.compile_all", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def reports():
    return compile_all()


def test_every_launched_kernel_compiles_without_spills_and_with_64_bit_offsets(reports):
    kernels = {report["kernel"].partition(".")[0] for report in reports}
    files = {p.stem for p in pathlib.Path(triton.__file__).parent.glob("[!_]*.py")}
    assert files <= kernels, "a file whose kernels no call launches"
    bad = [f"{r['kernel']} sm_{r['arch']}: {problem}\n  {r['variant']}" for r in reports for problem in r["problems"]]
    assert not bad, "\n".join(bad)
    assert {r["arch"] for r in reports} == {80, 90, 100}


def test_no_kernel_needs_more_than_recorded(reports):
    found, recorded = resources.summarize_triton(reports), json.loads(resources.RECORD.read_text())["triton"]
    assert not resources.faults(found)
    if found["triton"] != recorded["triton"]:
        pytest.skip(f"the record is of Triton {recorded['triton']}, here is {found['triton']}")
    assert not resources.regressions(found, recorded), "if it must be: python -m tests.verify.aot.resources --write"


def test_variants_are_few(reports):
    """Nothing is compiled again for another length, batch, temperature or coefficient."""
    counts = collections.Counter(r["kernel"] for r in reports if r["arch"] == 90)
    assert counts.pop("policy_loss.policy_chunks") <= 61  # surrogates and levels are forms of one kernel
    assert max(counts.values()) <= 40, counts


def test_a_length_compiles_nothing_anew():
    """Triton makes a variant for each kind of integer. Lengths that fill vectors share one, and all others one."""
    kinds = collections.defaultdict(set)
    for report in compile_all("tests.verify.aot.lengths"):
        assert not report["problems"], report
        constexprs = {k: v for k, v in report["constexprs"].items() if k not in ("UNIT", "ALIGNED", "K", "U", "FLAT")}
        kinds[report["kernel"], str(constexprs)].add(report["variant"])
    assert len(kinds) >= 14
    assert max(map(len, kinds.values())) <= 2, kinds


@pytest.mark.parametrize("aligned", ["True", "False"])
def test_logits_are_read_in_16_byte_vectors_and_nothing_crosses_lanes_before_the_end(reports, aligned):
    found = [r for r in reports if r["kernel"] == "token_logprobs._forward" and r["constexprs"]["ALIGNED"] == aligned]
    assert len(found) >= 8
    for report in found:
        vectors = (1 if aligned == "True" else 2) * int(report["constexprs"]["U"])
        # A loop with two ways through it is listed twice.
        assert max(loop["vector_loads"] for loop in report["loops"]) == vectors, report["variant"]
        assert not any(loop["crossings"] for loop in report["loops"]), report["variant"]


def test_gradients_are_read_and_written_in_16_byte_vectors(reports):
    found = [r for r in reports if r["kernel"] == "token_logprobs._backward" and r["constexprs"]["K"] != "1"]
    assert len(found) >= 8
    for report in found:
        unroll = int(report["constexprs"]["U"])
        assert [(n["vector_loads"], n["vector_stores"]) for n in report["loops"]] == [(unroll, unroll)]
        assert not any(n["crossings"] for n in report["loops"])


def test_each_mutant_is_reported():
    problems = collections.defaultdict(str)
    for report in compile_all("tests.verify.aot.mutants"):
        problems[report["kernel"], report["options"]["num_warps"]] += " ".join(report["problems"])
    assert problems["mutants._copy_far", 4] == ""
    assert "32-bit offset" in problems["mutants._copy", 4]
    assert "spills" in problems["mutants._crowded", 1]
    assert "does not compile" in problems["mutants._broken", 4]
    assert "without _launch.launch" in problems["mutants._copy_far", 2]


def test_no_nan_is_lost_in_a_maximum(reports):
    """With an entropy, exponents are bounded. The interpreter keeps NaN in any maximum; a GPU may not."""
    for report in reports:
        options = report["constexprs"]
        if report["kernel"] == "token_logprobs._forward" and options["ENTROPY"] == "True":
            bounded = max(loop["nan_maxima"] for loop in report["loops"])
        elif report["kernel"] == "token_logprobs._backward" and "grad_entropy" not in options:
            bounded = min(loop["nan_maxima"] for loop in report["loops"])
        else:
            continue
        assert bounded >= int(options["U"]) * int(options["K"]), report["variant"]
