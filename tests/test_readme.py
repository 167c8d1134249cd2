"""What the README and the documentation show runs as pasted, and what they link is there."""

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.lib import devices, text_models
from tests.lib.helpers import fresh_processes
from tests.lib.trainer import metric_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their examples run where those are installed: make verify PART=adapters.
OTHERS = ("trl", "verl", "openrlhf", "skyrl", "deepspeed_chat")
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES[1:]
    if page.is_file()  # the copies that mutants are made in have no pages
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    if not re.search(rf"\b({'|'.join(OTHERS)})\b", code)
]
EXAMPLES += [
    pytest.param(path.read_text(), id=path.stem)
    for path in sorted((ROOT / "docs" / "examples").glob("*.py"))
    if path.stem != "tensor_parallel"
]


def test_the_example_of_the_readme_runs_as_pasted(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    line = r"value loss \d\.\d\d, ratio 1\.00, KL \d\.\d\d, ran on \{'cpu': 1\}\n"
    assert re.fullmatch(line, run.stdout), run.stdout


def test_the_question_of_the_readme_is_asked_outside_the_checkout(tmp_path):
    """As it stands, beside an installed package; `make verify PART=packages` runs the line before it too."""
    (line,) = re.findall(r"^cd ~ && .*", README.read_text(), re.M)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-euc", line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for shown in ("C++ ops              loaded", "gae                  cpu: cpu > torch"):
        assert shown in done.stdout


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs_as_pasted(tmp_path, monkeypatch, capsys, code):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def start_as_torchrun_does(rank, port, printed):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    devices.serve()
    with Path(f"{printed}-{rank}").open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(ROOT / "docs" / "examples" / "tensor_parallel.py"), run_name="__main__")


def test_the_example_of_tensor_parallelism_runs_on_two_ranks(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    method = fresh_processes().get_start_method()
    torch.multiprocessing.start_processes(
        start_as_torchrun_does, (port, str(tmp_path / "printed")), 2, start_method=method
    )
    assert "rank 1 of 2: rows 2500 to 5000 of the head" in (tmp_path / "printed-1").read_text()


def test_the_training_command_trains(tmp_path):
    (commands,) = re.findall(r"```\n(mkdir -p mine.*?)```", README.read_text(), re.S)
    tokenizer = text_models.tokenizer_of()
    text_models.saved(tmp_path / "MODEL", tokenizer)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = [
        "bash",
        "-euo",
        "pipefail",
        "-c",
        commands.replace("--response_length 8", "--response_length 8 --total_steps 2"),
    ]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([row for row in metric_rows(tmp_path / "runs" / "mine") if "objective/scores" in row]) == 2
    assert (tmp_path / "runs" / "mine" / "train" / "model" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "module",
    [
        "bench",
        "bench.linear_head",
        "ppo_kernels.integrations",
        "python_trainer",
        "tests.verify",
        "tests.verify.aot.resources",
        "tests.verify.fuzz",
        "tests.verify.host_path",
        "tests.verify.mutants.run",
        "tests.verify.sanitize.run",
        "tests.verify.trainer.faults",
        "tests.verify.trainer.hostile",
    ],
)
def test_a_command_says_what_it_takes_and_begins_nothing(monkeypatch, capsys, module):
    """Some of them run for hours once they begin."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert not end.value.code
    assert f"python -m {module}" in capsys.readouterr().out


def test_the_readme_is_one_screen_and_every_link_leads_somewhere():
    assert len(README.read_text().splitlines()) <= 120
    links = [(page, to) for page in PAGES for to in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())]
    assert len(links) > 20
    assert not [(page.name, to) for page, to in links if not (page.parent / to).exists()]


def test_every_public_name_is_mentioned_or_reachable_from_one_that_is():
    import ppo_kernels

    text = README.read_text()
    results = {
        "PolicyStats": "policy_loss",
        "ValueStats": "value_loss",
        "P3OStats": "p3o_loss",
        "GroupStats": "group_advantages",
        "ImportanceStats": "importance_weights",
        "Experience": "prepare_experience",
        "LogprobExtras": "token_logprobs",
    }
    for name in ppo_kernels.__all__:
        assert results.get(name, name) in text, f"README.md does not mention {name}"
