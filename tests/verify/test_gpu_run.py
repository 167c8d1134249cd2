"""The script for a GPU runs dry without one: tests are collected, every timing is built, the report is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cases import benchmarks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_run.sh"
PARTS = ["gpu_tests", "tests", "sanitizers", "timings"]

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists() or shutil.which("bash") is None, reason="the sources are not here"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run bench/gpu_run.sh itself"),
]


def dry_run(out):
    env = {**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "0", "TORCHDYNAMO_DISABLE": "1"}
    env["GPU_RUN_STATE"] = str(out)
    return subprocess.run(
        [str(SCRIPT), "--dry-run", str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )


def test_a_dry_run_writes_the_report_and_skips_what_is_done(tmp_path):
    (tmp_path / "done").write_text("build\n")  # make takes minutes, and is tested elsewhere
    done = dry_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build: done before" in done.stdout
    assert (tmp_path / "done").read_text().split() == ["build", *PARTS]
    results = json.loads((tmp_path / "results.json").read_text())
    assert not [row for row in results["untimed"] if row["state"] != "absent"]
    assert {"cpu", "eager", "torch.compile"} <= {row["extra_info"]["provider"] for row in results["benchmarks"]}
    timed = {row["group"] for row in results["benchmarks"]}
    assert timed == {case.group(shape) for case in benchmarks() for shape in case.shapes.get("tiny", ())}
    assert {case.work for case in benchmarks() if "gpu" in case.shapes} == {
        case.work for case in benchmarks() if "tiny" in case.shapes
    }
    assert "tiny" in (tmp_path / "report.md").read_text()

    (tmp_path / "report.md").unlink()
    again = dry_run(tmp_path)
    assert again.stdout.count("done before") == 1 + len(PARTS)
    assert not (tmp_path / "report.md").exists()


def test_a_part_that_fails_is_named_and_not_marked_as_done(tmp_path):
    (tmp_path / "done").write_text("\n".join(["build", *PARTS[:-1]]) + "\n")
    (tmp_path / "results.json").mkdir()
    done = dry_run(tmp_path)
    assert done.returncode != 0
    assert "timings: FAILED" in done.stdout
    assert "timings" not in (tmp_path / "done").read_text()
