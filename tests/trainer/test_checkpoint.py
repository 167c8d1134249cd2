"""A run that stops can go on as if it had not, and damage is noticed."""

import dataclasses
import fcntl
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from python_trainer import checkpoint, metrics
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


def test_resumed_run_is_bit_identical(tiny, tmp_path):
    settings = FOUR | {"deepspeed": "ds_zero2.json"}
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


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "train" / "checkpoints").iterdir())


def test_only_the_newest_checkpoints_are_kept(finished, tiny):
    assert checkpoints(finished) == ["step-000002", "step-000004"]
    trainer = tiny(**FOUR, resume_from_checkpoint="latest")
    checkpoint.save(finished / "train" / "checkpoints", 6, trainer.trained, trainer.config, trainer._memory())
    assert checkpoints(finished) == ["step-000004", "step-000006"]


def test_pruning_spares_the_step_just_written(finished, tiny):
    trainer = tiny(**FOUR, save_total_limit=1, resume_from_checkpoint="latest")
    checkpoint.save(finished / "train" / "checkpoints", 3, trainer.trained, trainer.config, trainer._memory())
    assert checkpoints(finished) == ["step-000003", "step-000004"]


def test_resuming_from_an_older_step_abandons_what_came_after(finished, tiny):
    first = finished / "train" / "checkpoints" / "step-000002"
    tiny(**FOUR | {"total_steps": 2}, resume_from_checkpoint=str(first)).train()
    assert checkpoints(finished) == ["step-000002"]
    assert [row["step"] for row in metric_rows(finished)] == [0, 1, 2]
    assert tiny(**FOUR, resume_from_checkpoint="latest").done == 2


def test_resuming_into_another_runs_folder(original, finished, tiny):
    """It would delete that run's later checkpoints; overwriting, it leaves none of its checkpoints."""
    source = str(original / "train" / "checkpoints" / "step-000002")
    with pytest.raises(UserError, match="holds an earlier run"):
        tiny(**FOUR, resume_from_checkpoint=source)
    assert checkpoints(finished) == ["step-000002", "step-000004"]
    (finished / "train" / "checkpoints" / "step-000002").rename(finished / "train" / "checkpoints" / "step-000001")
    tiny(**FOUR, resume_from_checkpoint=source, overwrite_output_dir=True).train()
    assert checkpoints(finished) == ["step-000004"]
    assert [row["step"] for row in metric_rows(finished)] == [3, 4]


def test_resuming_with_other_settings_is_refused(finished, tiny):
    with pytest.raises(UserError, match=r"learning_rate \(was 0.001, is 0.01\), lam") as refusal:
        tiny(**FOUR | {"save_steps": 1}, resume_from_checkpoint="latest", learning_rate=0.01, lam=0.9)
    assert "save_steps" not in str(refusal.value)


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(finished, tiny):
    folder = finished / "train" / "checkpoints" / "step-000004"
    state = checkpoint._trainer_state(folder, 0)
    trained = tiny(**FOUR, output_dir=str(finished.parent / "other")).trained
    del state["zero_stage"]
    with pytest.raises(UserError, match="step-000004 was written by an earlier version.*zero_stage"):
        checkpoint._refuse_another_layout(folder, state, trained)


def test_free_settings_exist():
    """A renamed setting must not stay free to change under its old name alone."""
    assert {field.name for field in dataclasses.fields(PPOConfig)} >= checkpoint.FREE_TO_CHANGE


def test_a_second_run_in_the_same_folder_stops(finished, tiny):
    second = tiny(**FOUR, resume_from_checkpoint="latest")
    before = checkpoints(finished), metric_rows(finished)
    with (finished / "train" / ".lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is at work"):
            second.train()
    assert (checkpoints(finished), metric_rows(finished)) == before
    second.train()


def test_a_crash_between_the_renames_loses_nothing(finished):
    model, retired = finished / "train" / "model", finished / "train" / ".tmp-old-model"
    model.rename(retired)
    (finished / "train" / ".tmp-model").mkdir()
    with checkpoint.claimed(finished / "train", overwrite=False, done=4):
        checkpoint.verify(model)
    assert not list((finished / "train").glob(".tmp-*"))


@pytest.mark.parametrize("torn", ['{"step": 4, "objec', "\0\0\0"])
def test_a_torn_last_line_of_the_record_is_dropped(finished, tiny, torn):
    path, whole = finished / "train" / "metrics.jsonl", metric_rows(finished)
    with path.open("a") as file:
        file.write(torn)
    tiny(**FOUR, resume_from_checkpoint="latest").train()
    assert metric_rows(finished) == whole
    path.write_text("{torn\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is not JSON"):
        metrics.read(path)


def test_a_damaged_model_is_refused(finished, tiny, tmp_path):
    model = finished / "train" / "model"
    settings = {"sft_model_path": str(model), "output_dir": str(tmp_path / "other")}
    tiny(**settings)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="content of .*model.safetensors has changed"):
        tiny(**settings)
    (model / "manifest.json").unlink()
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot load a model"):
        tiny(**settings)


@pytest.mark.parametrize("files", [{}, [], None, {"a": 1}, "a"])
def test_a_manifest_that_lists_nothing_is_refused(tmp_path, files):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.verify(tmp_path)


def test_a_failed_save_leaves_the_last_checkpoint(finished, tiny, monkeypatch):
    trainer = tiny(**FOUR, resume_from_checkpoint="latest")
    folder = finished / "train" / "checkpoints"

    def fail(*_, **__):
        raise ValueError("not today")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ValueError, match="not today"):  # the disk is not accused of what it has not done
        checkpoint.save(folder, 6, trainer.trained, trainer.config, trainer._memory())
    monkeypatch.undo()
    assert not list(folder.glob(".tmp-*"))
    assert tiny(**FOUR, resume_from_checkpoint="latest").done == 4


def test_the_room_of_a_moving_average_is_counted(tiny, tmp_path, monkeypatch):
    trainer, folder = tiny(ema_decay=0.9), tmp_path / "run" / "train" / "checkpoints"
    memory = trainer._memory()
    enough = sum(checkpoint._bytes_of(model) for model in trainer.trained.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=enough))
    checkpoint._refuse_without_room(folder, trainer.trained, memory | {"ema": {}})
    with pytest.raises(UserError, match="a checkpoint takes about"):
        checkpoint.save(folder, 1, trainer.trained, trainer.config, memory)


def test_state_is_read_to_the_cpu(finished, monkeypatch):
    """A first rank's GPU need not be there when the file is read, nor have the room."""
    places, plain = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: places.append(k.get("map_location")) or plain(*a, **k))
    assert checkpoint._trainer_state(finished / "train" / "checkpoints" / "step-000004", 0)["step"] == 4
    assert places == ["cpu"]


def test_a_checkpoint_becomes_a_plain_model(finished, tiny):
    """Resumed with nothing left to do, a run writes the folder that transformers reads."""
    shutil.rmtree(finished / "train" / "model")
    trainer = tiny(**FOUR, resume_from_checkpoint="latest")
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(finished / "train" / "model", use_safetensors=True)
    assert AutoTokenizer.from_pretrained(finished / "train" / "model")("a b").input_ids
    mine, read = trainer.actor.module.state_dict(), model.state_dict()
    assert mine.keys() == read.keys()
    assert all(torch.equal(mine[name], read[name]) for name in mine)


def test_two_runs_never_mix(finished, tiny):
    with pytest.raises(UserError, match="earlier run"):
        tiny(**FOUR)


def test_latest_without_a_checkpoint_is_an_error(tiny):
    with pytest.raises(UserError, match="no checkpoint"):
        tiny(resume_from_checkpoint="latest")
