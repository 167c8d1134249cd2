"""The script for a GPU runs dry without one: the same lists of tests and rows, timings made, the report written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cases import benchmarks
from bench.rows import all_of, phase
from ppo_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_run.sh"
GRACE = 5  # seconds between an interrupt and a kill

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists() or shutil.which("bash") is None, reason="the sources are not here"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run bench/gpu_run.sh itself"),
]


def parts() -> list[list[tuple[str, int]]]:
    """Names and seconds, those that run at the same time together."""
    listed = subprocess.run([str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [[(name, int(seconds)) for name, seconds in re.findall(r"(\w+) (\d+) s", together)] for together in listed]


NAMES = [name for together in parts() for name, _ in together] if SCRIPT.exists() else []


def dry_run(out, *done, **environment):
    (out / "done").write_text("\n".join(done) + "\n")
    env = {**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "0", "TORCHDYNAMO_DISABLE": "1"}
    env |= {"GPU_RUN_STATE": str(out), "PPO_KERNELS_COMMIT": "abc123"} | environment
    return subprocess.run(
        [str(SCRIPT), "--dry-run", str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600
    )


def test_the_parts_fit_nine_minutes_and_ours_come_first():
    assert sum(max(seconds for _, seconds in together) + GRACE for together in parts()) + 15 <= 9 * 60
    assert NAMES[:3] == ["build", "smoke", "ours"]
    assert {"memcheck", "racecheck"} in [{name for name, _ in together} for together in parts()]


def test_a_dry_run_writes_the_report_and_skips_what_is_done(tmp_path):
    done = dry_run(tmp_path, "build")  # it takes minutes, and is tested elsewhere
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build: done before" in done.stdout
    assert sorted((tmp_path / "done").read_text().split()) == sorted(NAMES)
    results = json.loads((tmp_path / "results.json").read_text())
    assert not [row for row in results["untimed"] if row["state"] != "absent"]
    assert {row["extra_info"]["commit"] for row in results["benchmarks"]} == {"abc123"}
    # Each row once, whichever part timed it.
    timed = [(row["group"], row["extra_info"]["provider"]) for row in results["benchmarks"]]
    timed += [(row["group"], row["provider"]) for row in results["untimed"]]
    assert sorted(timed) == sorted((row.group, row.provider) for row in all_of("tiny"))
    assert {"ours", "others", "compile"} == {phase(provider) for _, provider in timed}
    assert {case.work for case in benchmarks() if "gpu" in case.shapes} == {
        case.work for case in benchmarks() if "tiny" in case.shapes
    }
    assert "tiny" in (tmp_path / "report.md").read_text()

    collected = {name: (tmp_path / f"{name}.log").read_text() for name in NAMES if name != "build"}
    assert "test_gpu.py" in collected["smoke"]
    assert "triton" not in collected["smoke"].replace("test_triton", "")
    assert "[cuda" in collected["cuda_tests"]
    assert collected["memcheck"] == collected["racecheck"]
    for op in backends.OPS:
        if ROOT.joinpath("tests", f"test_{op}.py").exists():
            assert f"tests/test_{op}" in collected["memcheck"], op

    log = "\n" + (tmp_path / "log.txt").read_text()
    assert log.count("\n== ") == len(NAMES) - 1  # all but build

    (tmp_path / "report.md").unlink()
    again = dry_run(tmp_path, *NAMES)
    assert again.stdout.count("done before") == len(NAMES)
    assert "tiny" in (tmp_path / "report.md").read_text()  # it is of all that there is


def test_a_part_that_fails_is_named_and_not_marked_as_done(tmp_path):
    (tmp_path / "results.json").mkdir()
    done = dry_run(tmp_path, *(name for name in NAMES if name != "ours"))
    assert done.returncode != 0
    assert "ours: FAILED" in done.stdout
    assert "failed: ours report" in done.stdout
    assert "ours" not in (tmp_path / "done").read_text().split()


def test_rows_that_are_there_are_not_timed_again(tmp_path):
    """A run that was cut off goes on after the last group that it wrote; one of another commit begins anew."""
    others = [name for name in NAMES if name != "ours"]
    assert dry_run(tmp_path, *others).returncode == 0
    data = json.loads((tmp_path / "results.json").read_text())
    kept, dropped = data["benchmarks"][:-1], data["benchmarks"][-1]
    kept[0]["stats"]["median"] = 123.0
    (tmp_path / "results.json").write_text(json.dumps(data | {"benchmarks": kept}))
    assert dry_run(tmp_path, *others).returncode == 0
    again = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert again[0]["stats"]["median"] == 123.0
    assert [row["fullname"] for row in again] == [row["fullname"] for row in [*kept, dropped]]
    assert dry_run(tmp_path, *others, PPO_KERNELS_COMMIT="def456").returncode == 0
    anew = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert {row["extra_info"]["commit"] for row in anew} == {"def456"}
    assert anew[0]["stats"]["median"] != 123.0


def test_a_run_without_a_commit_is_refused(tmp_path):
    """Where only files arrive, nothing else tells what was measured."""
    (tmp_path / "bench").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "bench")
    env = {name: value for name, value in os.environ.items() if name != "PPO_KERNELS_COMMIT"}
    env["GIT_CEILING_DIRECTORIES"] = str(tmp_path)
    done = subprocess.run([script, "--dry-run"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PPO_KERNELS_COMMIT" in done.stderr
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "bench/gpu_run.sh [--dry-run] [OUT]"),
        (["--dryrun"], 2, "--dryrun is no option"),
        (["--dry-run", "--list"], 2, "--list is no option"),
        ([], 2, "sees no GPU with torch, so nothing was run"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(tmp_path, words, status, said):
    """Else a wrong word is the name of a folder, and nine minutes go by in parts that fail."""
    env = {**os.environ, "PYTHON": sys.executable, "GPU_RUN_STATE": str(tmp_path / "state"), "PPO_KERNELS_COMMIT": "a"}
    done = subprocess.run([str(SCRIPT), *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert not (tmp_path / "state").exists()
