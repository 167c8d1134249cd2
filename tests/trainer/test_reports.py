"""Curves elsewhere, and what the glossary says of them."""

import importlib.util
import json
import re
import sys
import types

import pytest
import torch

from python_trainer import config as settings_of
from python_trainer.config import SftConfig, UserError
from python_trainer.logging import read
from python_trainer.ppo_config import PPOConfig
from python_trainer.sft import sft
from tests.lib.text_models import saved, tokenizer_of, write_rows
from tests.lib.trainer import ROOT, TINY, metric_rows

PACKAGE = ROOT / "python_trainer"
GLOSSARY = set(re.findall(r"`([a-z]+/[a-z_0-9]+)`", (PACKAGE / "METRICS.md").read_text()))


def test_the_glossary_explains_what_is_recorded(tiny, tmp_path):
    tiny(total_steps=1).train()
    recorded = {name for row in metric_rows(tmp_path / "run") for name in row} - {"step", "episode", "lr"}
    recorded |= {"time/rollout", "time/update"}
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r'"((?:objective|policy|val|loss|eval|exact|time|rollout)/[a-z_0-9]+)"', sources))
    assert {name for name in recorded | named if not name.endswith("_se")} == GLOSSARY


@pytest.mark.parametrize(("bound", "share"), [(0.25, 0.75), (5.0, 0.0), (None, None)])
def test_clipped_scores_are_counted(tiny, tmp_path, bound, share):
    trainer = tiny(total_steps=1, batch_size=4)
    trainer.config.score_clip = bound
    trainer.reward_fn = lambda rollout: torch.tensor([0.0, 0.5, -1.0, 2.0])
    trainer.train()
    assert metric_rows(tmp_path / "run")[-1].get("objective/score_clipfrac") == share


def test_every_setting_that_the_glossary_names_exists():
    text = (PACKAGE / "METRICS.md").read_text()
    settings = set(re.findall(r"(?:raise|lower|set|halve|use) `([a-z_]+)`", text))
    assert settings
    assert settings <= set(PPOConfig.__dataclass_fields__) | {"max_steps"}


def test_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny(report_to="tensorboard", total_steps=2, save_steps=1).train()
    tiny(report_to="tensorboard", total_steps=2, resume_from_checkpoint=str(last(tmp_path, 1))).train()
    events = EventAccumulator(str(tmp_path / "run" / "train" / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("objective/kl")}
    rows = {row["step"]: row["objective/kl"] for row in metric_rows(tmp_path / "run") if "objective/kl" in row}
    assert list(points) == [1, 2]
    assert points == pytest.approx(rows)


def last(folder, step):
    return folder / "run" / "train" / "checkpoints" / f"step-{step:06d}"


def test_wandb(tiny, tmp_path, monkeypatch):
    """A stand-in for the package, which wants an account: what is given to it."""
    began, logged, ended = [], [], []

    class Run:
        def log(self, metrics, step):
            json.dumps(metrics, allow_nan=False)
            logged.append(step)

        def finish(self):
            ended.append(True)

    package = types.ModuleType("wandb")
    package.__spec__ = importlib.util.spec_from_loader("wandb", None)
    package.init = lambda **settings: began.append(settings) or Run()
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="report_to wandb: not logged in.*WANDB_MODE"):
        tiny(report_to="wandb", output_dir=str(tmp_path / "refused")).train()
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny(report_to="wandb", total_steps=2, save_steps=1).train()
    tiny(report_to="wandb", total_steps=2, resume_from_checkpoint=str(last(tmp_path, 1))).train()
    assert logged == [0, 1, 2, 2]
    assert len(ended) == 2
    assert began[0]["id"] == began[1]["id"]
    assert began[0]["config"]["learning_rate"] == TINY["learning_rate"]


def test_a_missing_package_is_named(tiny, monkeypatch):
    monkeypatch.setattr(settings_of, "installed_reports", list)
    with pytest.raises(ValueError, match="report_to tensorboard: the package is not installed"):
        tiny(report_to="tensorboard")
    assert settings_of.report_packages("all") == []


def test_epochs_and_curves_of_sft(tmp_path, capsys):
    model = saved(tmp_path / "model", tokenizer_of(chat=True))
    answer = {"role": "assistant", "content": "yes"}
    chats = [{"messages": [{"role": "user", "content": f"q{n}"}, answer]} for n in range(20)]
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "train.jsonl", chats[:18])
    write_rows(tmp_path / "texts" / "test.jsonl", chats[18:])
    common = {"data_path": str(tmp_path), "model_path": model, "batch_size": 6, "max_length": 64, "disable_tqdm": True}
    config = SftConfig(
        **common,
        output_dir=str(tmp_path / "run"),
        num_train_epochs=2.5,
        learning_rate=1e-2,
        eval_steps=3,
        logging_steps=2,
    )
    perplexity = sft(config)["eval/perplexity"]
    rows = read(tmp_path / "run" / "sft" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [3, 6, 8]  # 2.5 * 18 / 6 steps
    assert rows[-1]["eval/perplexity"] == perplexity < rows[2]["eval/perplexity"]
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines == ["2", "3", "4", "6", "8"]
    with pytest.raises(ValueError, match="num_train_epochs must be positive"):
        SftConfig(**common, num_train_epochs=0)
