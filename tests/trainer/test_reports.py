"""Curves elsewhere, and what the glossary says of them."""

import importlib.util
import json
import re
import sys
import types

import pytest

from python_trainer import config as settings_of
from python_trainer.config import UserError
from python_trainer.ppo_config import PPOConfig
from tests.lib.trainer import ROOT, TINY, metric_rows

PACKAGE = ROOT / "python_trainer"
GLOSSARY = set(re.findall(r"`([a-z]+/[a-z_0-9]+)`", (PACKAGE / "METRICS.md").read_text()))


def test_the_glossary_explains_what_is_recorded(tiny, tmp_path):
    tiny(total_steps=1).train()
    recorded = {name for row in metric_rows(tmp_path / "run") for name in row} - {"step", "episode", "lr"}
    recorded |= {"time/rollout", "time/update"}
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r'"((?:objective|policy|val|loss|eval|exact|time)/[a-z_0-9]+)"', sources))
    assert {name for name in recorded | named if not name.endswith("_se")} == GLOSSARY


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
