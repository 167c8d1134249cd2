"""The command, the environment variable, and what the adapters say of themselves."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

import ppo_kernels
from ppo_kernels import integrations
from ppo_kernels.integrations.__main__ import main
from ppo_kernels.integrations._target import difference, of_object, of_text, text
from tests.lib.checkout import ROOT
from tests.lib.fake_trainer import SIGNATURE, UTILS


@pytest.mark.parametrize("name", integrations.TRAINERS)
def test_replacements_take_what_their_targets_take(name):
    for target in integrations.adapter(name).targets:
        own = of_object(target.replacement)
        expected = target.signature
        if expected is None:  # an autograd Function's apply takes what its forward takes behind ctx
            (forward,) = target.reads.values()
            expected = forward.replace("(ctx, ", "(")
        assert difference(target.attribute, expected, own) is None, target.attribute


@pytest.mark.parametrize("name", integrations.TRAINERS)
def test_the_docs_name_every_target(name):
    page = (ROOT / "docs" / "adapters.md").read_text()
    adapter = integrations.adapter(name)
    missing = [target.attribute for target in adapter.targets if f"`{target.attribute}`" not in page]
    assert not missing
    assert all(version.partition(",")[0] in page for version in adapter.tested)


def test_signatures_as_text():
    for signature in ("()", "(a, b=1, *c, d, e=2, **f)", "(a, *, b=None)", SIGNATURE):
        assert text(of_text(signature)) == signature
    assert difference("f", "(a, b=NAME)", of_text("(a, b=(1, 2))")) is None, (
        "a constant's name says nothing of its value"
    )
    assert difference("f", "(a, b=NAME)", of_text("(a, b)")) is not None


def test_the_command_reads_sources_and_says_what_changed(trainer, adapter, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "TRAINERS", ("fake",))
    monkeypatch.setattr(integrations, "adapter", lambda name: adapter)
    old = trainer.parent
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "fake of no known version (tested with 1.0)" in out
    assert out.count(" fits ") == 3
    new = old / "newer" / "fake_trainer"
    new.mkdir(parents=True)
    (new / "__init__.py").write_text("")
    moved = UTILS.replace("def double(", "# moved\n\ndef double(").replace("self.clip, x)", "self.clip, -x)")
    (new / "utils.py").write_text(moved)
    assert main(["fake", "--path", str(new.parent)]) == 0
    capsys.readouterr()
    assert main(["fake", "--path", str(new.parent), "--since", str(old)]) == 1
    out = capsys.readouterr().out
    assert out.count("text differs") == 1
    assert "read Loss.forward again" in out
    (new / "utils.py").write_text(UTILS.replace("times=2", "times=3").replace("class Loss", "class Lost"))
    assert main(["fake", "--path", str(new.parent)]) == 1
    out = capsys.readouterr().out
    assert "signature differs" in out
    assert "has no Loss.forward" in out
    assert main(["--path", str(old / "empty")]) == 0
    assert "fake: not installed" in capsys.readouterr().out
    assert "fake_trainer" not in sys.modules
    assert main(["--import"]) == 0
    assert capsys.readouterr().out.count(" replaced ") == 3
    with pytest.raises(SystemExit):
        main(["trll"])


CHAT = """
import torch.nn.functional as F

def gather_log_probs(logits, labels):
    return F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
"""
SCRIPT = """
import sys
import torch
from dschat.rlhf.ppo_trainer import gather_log_probs
logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
gather_log_probs(logits, labels)
from ppo_kernels import integrations
print(sys.argv[1:], integrations.status()["deepspeed_chat"])
"""
SERVED = "{'gather_log_probs': {'served': 1, 'not covered': {}}}"


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """DeepSpeed-Chat, which is a folder, with one function of this test, and a script that calls it."""
    for name, content in {"dschat/__init__": "", "dschat/rlhf/__init__": "", "dschat/rlhf/ppo_trainer": CHAT}.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    integrations.revert("deepspeed_chat")
    integrations.adapter("deepspeed_chat").reset_status()
    for name in [name for name in sys.modules if name.partition(".")[0] == "dschat"]:
        del sys.modules[name]


def test_the_environment_puts_adapters_in_place(chat, monkeypatch, capsys, caplog):
    """When ``ppo_kernels`` is imported: once more here, in a fresh process in ``tests/verify/adapters``."""
    monkeypatch.setenv("PPO_KERNELS_PATCH", "deepspeed_chat")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    before = set(sys.modules)
    importlib.reload(ppo_kernels)
    assert not [name for name in set(sys.modules) - before if name.partition(".")[0] != "ppo_kernels"]
    exec(compile(SCRIPT, "script.py", "exec"), {})
    assert capsys.readouterr().out.strip() == f"[] {SERVED}"
    absent = "compute_rewards is not replaced: dschat.rlhf.ppo_trainer has no DeepSpeedPPOTrainer.compute_rewards"
    assert any(absent in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("what", [["script.py"], ["-m", "script"]])
def test_the_command_run_puts_adapters_in_place(chat, monkeypatch, capsys, what):
    monkeypatch.chdir(chat)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PPO_KERNELS_PATCH", "none")  # and as it was afterwards
    assert main(["run", "deepspeed_chat", *what, "--argument"]) == 0
    assert capsys.readouterr().out.strip() == f"['--argument'] {SERVED}"
    assert os.environ["PPO_KERNELS_PATCH"] == "deepspeed_chat", "for what it starts"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trll", "script.py"], "there is no adapter for trll; the trainers are deepspeed_chat, openrlhf"),
        (["trl", "nothing.py"], "there is no script nothing.py here; -m in front of it runs a module by its name"),
        (["trl"], "usage: .* run TRAINER.* SCRIPT_OR_MODULE"),
        (["trl", "-m"], "usage: .* run TRAINER.* SCRIPT_OR_MODULE"),
    ],
)
def test_the_command_run_says_what_it_cannot_run(chat, monkeypatch, words, said):
    monkeypatch.chdir(chat)
    monkeypatch.setenv("PPO_KERNELS_PATCH", "none")
    with pytest.raises(SystemExit, match=said):
        main(["run", *words])
    assert os.environ["PPO_KERNELS_PATCH"] == "none"


def test_the_environment_names_trainers(monkeypatch):
    for value, names in (("trl, verl", ("trl", "verl")), ("none", ()), ("", ())):
        monkeypatch.setenv("PPO_KERNELS_PATCH", value)
        assert integrations.named_by_environment() == names
    monkeypatch.setenv("PPO_KERNELS_PATCH", "trll")
    with pytest.raises(
        ValueError, match="PPO_KERNELS_PATCH=trll names trll; the trainers are deepspeed_chat, openrlhf"
    ):
        integrations.from_environment()
    with pytest.raises(ValueError, match="no adapter for 'trll'"):
        integrations.apply("trll")
