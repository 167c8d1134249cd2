"""The benchmarks run, compare right with right, and end in a report. No times are asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, measure, peers, report, results, rows, source, trainers
from bench.rows import Row, Setup

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """One round of every row that needs no compiler, at tiny shapes."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "--bench-seconds", "0"]
    command += ["--bench-size", "tiny", "-k", "not compile", "--benchmark-json", str(folder / "results.json")]
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # its workers do not benchmark
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "policy_loss fwd+bwd fp32 [4, 40]" in run.stdout  # the table
    return folder / "results.json"


def test_every_row_is_timed_or_says_why_not(tiny):
    data = json.loads(tiny.read_text())
    read = results.Results(data)
    assert len(read.groups) >= 20
    for group, timed in read.groups.items():
        assert {"reference", "eager"} <= set(timed), group
        absent = {row["provider"]: row["why"] for row in data["untimed"] if row["group"] == group}
        work = timed["reference"]["extra_info"]["work"]
        assert {*rows.OURS, *peers.for_work(work)} <= {*timed, *absent}, group
        assert all(absent.values())
        assert "triton" in absent or torch.cuda.is_available()
    assert not [row for row in data["untimed"] if row["state"] == "wrong"]
    info = next(iter(read.groups.values()))["reference"]["extra_info"]
    assert {"bytes", "GB/s", "error", "extra_bytes", "torch", "commit"} <= set(info)


def test_the_rows_are_those_of_the_committed_results(tiny):
    """By name, so that ``--benchmark-compare`` finds them."""
    committed = json.loads(next((ROOT / "bench" / "results").glob("*/results.json")).read_text())
    known = {bench["fullname"] for bench in committed["benchmarks"]}
    assert {row.fullname for row in rows.all_of("full")} >= known
    names = {bench["fullname"] for bench in json.loads(tiny.read_text())["benchmarks"]}
    assert names <= {row.fullname for row in rows.all_of("tiny")}


def run_bench(*arguments):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_report_and_targets(tiny, tmp_path):
    run = run_bench("--results", tiny, "--report", tmp_path, "--check")
    assert run.returncode == 1, run.stderr
    assert "not measured" in run.stdout
    written = (tmp_path / "report.md").read_text()
    assert "## Speed" in written
    assert written.count("](") == 3  # the overview, speed and small calls: no scaling rows here
    assert all((tmp_path / name).stat().st_size > 10000 for name in ("overview.png", "speed.png", "small_calls.png"))


def test_a_report_of_rows_without_ours_is_written(tiny, tmp_path):
    """As where ours is wrong, or a run ended before it."""
    data = json.loads(tiny.read_text())
    for row in [b for b in data["benchmarks"] if b["extra_info"]["provider"] in rows.OURS]:
        data["benchmarks"].remove(row)
        data["untimed"].append({"group": row["group"], "state": "wrong", "why": "it is off", **row["extra_info"]})
    found = results.Results(data)
    assert report.write(found, tmp_path)
    assert "it is off" in (tmp_path / "report.md").read_text()
    assert "WRONG, not timed: " in report.overview(found)


def test_the_committed_results_meet_their_targets():
    run = run_bench("--results", next((ROOT / "bench" / "results").glob("*/results.json")), "--check")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MISSED" not in run.stdout
    assert "not measured" not in run.stdout
    assert "targets: 48 met, 10 refuted" in run.stdout


def test_a_run_without_pytest_writes_the_same_rows(tiny, tmp_path):
    run = run_bench("--tiny", "--only", "whiten fp32 [4, 40]", "--seconds", "0", "--json", tmp_path / "r.json")
    assert run.returncode == 0, run.stderr
    one, other = (json.loads(path.read_text()) for path in (tmp_path / "r.json", tiny))
    both = [{b["fullname"] for b in data["benchmarks"] if "eager" in b["name"]} for data in (one, other)]
    assert both[0]
    assert both[0] <= both[1]
    assert one["run"].keys() == other["run"].keys()
    assert one["untimed"][0].keys() == other["untimed"][0].keys()


def test_every_op_is_timed_and_every_contract_has_a_benchmark_or_says_why():
    timed = {case.op for case in cases.benchmarks()}
    assert timed == {case.op for case in cases.CASES if not case.not_timed}
    assert not [case.name for case in cases.benchmarks() if case.not_timed]
    for size in rows.SIZES:
        assert {row.setup.case.op for row in rows.works(size)} == timed, size
    assert {case.op for case in cases.CASES if case.accuracy} == timed


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the pages are not here")
def test_the_page_of_errors_has_every_op():
    page = (ROOT / "docs" / "accuracy.md").read_text()
    assert set(re.findall(r"^\| (\w+) \|", page, re.M)) == {"op", *(case.op for case in cases.CASES if case.accuracy)}


def test_other_libraries_are_asked_for_works_that_are_timed():
    asked = {work for peer in peers.PEERS.values() for work in peer.works}
    assert asked <= {case.work for case in cases.benchmarks()}


def test_a_function_that_torch_does_not_have_yet_is_absent_and_not_wrong(monkeypatch):
    """``F.linear_cross_entropy`` is of 2.13, and 2.11 is allowed."""
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    peers._loaded.cache_clear()
    with pytest.raises(peers.AbsentError, match="it has no linear_cross_entropy"):
        peers.call("F.linear_cross_entropy", "linear_token_logprobs", {})
    peers._loaded.cache_clear()


def test_a_wrong_row_is_never_timed():
    case = cases.benchmark("whiten")
    right = Setup(case, (4, 16))
    off = Setup(dataclasses.replace(case, eager=lambda x, mask: case.eager(x, mask) * 1.001), (4, 16))
    broken = Setup(dataclasses.replace(case, eager=lambda x, mask: x[:0, 0] @ x), (4, 16))
    group = [Row("g", right, "reference"), *(Row("g", setup, "eager") for setup in (right, off, broken))]
    reference, same, wrong, raised = measure.measure(group, 0.0).values()
    assert reference.samples
    assert same.samples
    assert not wrong.samples
    assert "against float64" in wrong.wrong
    assert not raised.samples
    assert "Error" in raised.wrong


def test_errors_see_what_is_wrong_and_not_what_is_masked():
    setup = Setup(cases.benchmark("gae"), (16, 32))
    exact = setup.exact()
    mask = setup.inputs["mask"]
    got = [x.float() for x in exact]
    assert max(setup.errors(got, exact)) < 1e-6
    assert not mask.all()
    under = [torch.where(mask, x, float("nan")) for x in got]
    assert max(setup.errors(under, exact)) < 1e-6
    last = mask.sum(1)[0] - 1
    got[1][0, last] = float("nan")
    assert setup.errors(got, exact)[1] == float("inf")
    got[1][0, last] = exact[1][0, last] + 0.1
    assert setup.errors(got, exact)[1] > 1e-3
    with pytest.raises(AssertionError, match="shape"):
        setup.errors([got[0][:1]], exact)


def test_a_step_of_our_trainer_is_timed(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="the trainer is not installed")
    for name, size in {"ROWS": 4, "GENERATIONS": 2, "PROMPT": 3, "RESPONSE": 4, "STEPS": 1}.items():
        monkeypatch.setattr(trainers, name, size)
    turns: list[str] = []
    watch = SimpleNamespace(begin=lambda: turns.append("begin"), end=lambda: turns.append("end"))
    trainers.make_inputs(tmp_path, 50)
    trainers.run_ours("grpo", tmp_path, watch)
    assert turns == ["begin", "end"] * 2


def test_without_trl_the_command_says_what_to_install(monkeypatch, capsys):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trainers, "version", version)
    assert trainers.main() == 2
    assert "trl is not here; install it with: pip install --no-deps --target" in capsys.readouterr().err


def test_calls_take_turns():
    order: list[str] = []
    timed = {name: measure.Timed([lambda name=name: order.append(name)]) for name in "ab"}
    measure.in_turns(timed, 0.0)
    assert [len(one.samples) for one in timed.values()] == [1, 1]
    slow = measure.Timed([lambda: torch.randn(400, 400) @ torch.randn(400, 400)])
    measure.in_turns({"slow": slow, **{name: measure.Timed([lambda: None]) for name in "ab"}}, 0.05)
    assert len(slow.samples) >= measure.LEAST


def test_functions_of_a_file_whose_package_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy-1.0.dist-info").mkdir()
    (tmp_path / "heavy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 1.0\n")
    (tmp_path / "heavy" / "ops.py").write_text(
        "import math\nimport not_there\nFACTOR = 2.0\n"
        "def helper(x: not_there.Type) -> float:\n    return FACTOR * math.sqrt(x)\n"
        "def wanted(x):\n    return helper(x) + given(x)\n"
        "class Owner:\n    @staticmethod\n    def method(x): return x\n"
        "def other():\n    return not_there.thing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = source.functions("heavy", "heavy/ops.py", "wanted", "Owner.method", given=lambda x: 100.0 * x)
    assert found["wanted"](4.0) == 404.0
    assert found["method"](3) == 3
    with pytest.raises(ImportError):
        source.functions("heavy", "heavy/ops.py", "other")
    with pytest.raises(LookupError, match="gone"):
        source.functions("heavy", "heavy/ops.py", "gone")


def test_exponents_and_targets():
    linear = results.Line("x", "T", [(2**k, 1e-6 * 2**k) for k in range(8)], [1] * 8)
    assert results.exponents(linear) == pytest.approx((1.0, 1.0))
    cliff = results.Line("x", "T", [(2**k, 1e-6 * 2**k * (4 if k > 2 else 1)) for k in range(8)], [1] * 8)
    slope, steepest = results.exponents(cliff)
    assert slope == pytest.approx(1.0)
    assert steepest > results.CLIFF

    def bench(provider, group, median):
        info = {"provider": provider, "work": "w", "GB/s": 1.0, "extra_bytes": 0}
        return {"group": group, "extra_info": info, "stats": {"median": median, "min": median, "iqr": 0.0}}

    case = cases.benchmark("gae")
    target, (shape,) = case.targets[0], case.shapes["full"]
    for factor, verdict in ((1.01, "met"), (0.99, "MISSED")):
        times = {"cpu": 1.0, target.provider: target.ratio * factor}
        data = {"benchmarks": [bench(provider, case.group(shape), at) for provider, at in times.items()]}
        table, bad = report.targets(results.Results(data))
        assert table.lines[[line[0] for line in table.lines].index(case.group(shape))][-1] == verdict
        assert bad > 0  # the others were not measured
    refuted = cases.Target("p", 5, reached=2, limit="why")
    verdicts = [refuted.verdict(measured) for measured in (None, 5, 2, 1.9)]
    assert verdicts == ["not measured", "met", "refuted: why", "MISSED"]
