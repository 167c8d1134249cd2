"""A run that stops can go on as if it had not, and damage is noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from python_trainer import checkpoint
from python_trainer.config import PPOConfig, UserError
from python_trainer.loop import Trainer

from .conftest import TINY, metric_rows

FOUR = {"total_steps": 4, "num_ppo_epochs": 2, "num_mini_batches": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("original") / "run"
    Trainer(PPOConfig(**TINY | FOUR | {"output_dir": str(folder)})).train()
    return folder


@pytest.fixture
def finished(original, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.mark.parametrize("stage", [0, 2])
def test_resumed_run_is_bit_identical(tiny, tmp_path, stage):
    settings = FOUR | {"deepspeed": f"ds_zero{stage}.json"}
    tiny(**settings).train()
    run, interrupted = tmp_path / "run", tmp_path / "interrupted"
    shutil.copytree(run, interrupted)
    shutil.rmtree(interrupted / "train" / "checkpoints" / "step-000004")
    shutil.rmtree(interrupted / "train" / "model")
    torch.manual_seed(12345)  # whatever the generators hold must not matter
    resumed = tiny(**settings, output_dir=str(interrupted), resume_from_checkpoint="latest")
    assert resumed.done == 2
    resumed.train()
    assert metric_rows(run) == metric_rows(interrupted)
    straight, after = (load_file(path / "train" / "model" / "model.safetensors") for path in (run, interrupted))
    assert straight.keys() == after.keys()
    assert all(torch.equal(straight[name], after[name]) for name in straight)


def test_only_the_newest_checkpoints_are_kept(finished):
    steps = sorted(path.name for path in (finished / "train" / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_refused(finished, tiny, damage):
    folder = finished / "train" / "checkpoints" / "step-000004"
    victim = max(folder.rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-100])
    elif damage == "remove":
        victim.unlink()
    else:
        (folder / "manifest.json").unlink()
    expected = "complete" if damage == "manifest" else victim.name
    with pytest.raises(UserError, match=expected):
        tiny(**FOUR, resume_from_checkpoint=str(folder))


def test_loading_runs_no_code(finished, tiny, tmp_path):
    """A pickle that would create a file is refused, even with a manifest that fits it."""
    folder = finished / "train" / "checkpoints" / "step-000004"
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return open, (str(canary), "w")

    victim = max(folder.rglob("*.pt"), key=lambda path: path.stat().st_size)
    torch.save({"module": Bomb()}, victim)
    manifest = json.loads((folder / "manifest.json").read_text())
    name = str(victim.relative_to(folder))
    manifest["files"][name] = {"bytes": victim.stat().st_size, "sha256": checkpoint._sha256(victim)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="(?i)weights.?only|unsupported"):
        tiny(**FOUR, resume_from_checkpoint=str(folder))
    assert not canary.exists()


def test_a_crash_while_saving_leaves_the_last_checkpoint(finished, tiny, monkeypatch):
    trainer = tiny(**FOUR, resume_from_checkpoint="latest")
    folder = finished / "train" / "checkpoints"

    def crash(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, 6, trainer.trained, keep=2)
    monkeypatch.undo()
    assert (folder / ".tmp-step-000006").exists()
    assert tiny(**FOUR, resume_from_checkpoint="latest").done == 4
    checkpoint.claim(finished / "train", overwrite=False, resume=True)
    assert not (folder / ".tmp-step-000006").exists()


def test_two_runs_never_mix(finished, tiny):
    with pytest.raises(UserError, match="earlier run"):
        tiny(**FOUR)


def test_latest_without_a_checkpoint_is_an_error(tiny):
    with pytest.raises(UserError, match="no checkpoint"):
        tiny(resume_from_checkpoint="latest")
