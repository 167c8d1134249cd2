"""A run that stops can go on as if it had not, and damage is noticed."""

import dataclasses
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from python_trainer import atomic, checkpoint, frontier, zero_state
from python_trainer.config import UserError
from python_trainer.logging import read
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from python_trainer.settings import load
from tests.lib.trainer import TINY, metric_rows

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


def save(trainer: Trainer, step: int) -> None:
    trainer.done = step
    trainer.save_checkpoint(trainer.folder / "checkpoints")


def test_only_the_newest_checkpoints_are_kept(finished, tiny):
    assert checkpoints(finished) == ["step-000002", "step-000004"]
    save(tiny(**FOUR, resume_from_checkpoint="latest"), 6)
    assert checkpoints(finished) == ["step-000004", "step-000006"]


def test_pruning_spares_the_step_just_written(finished, tiny):
    save(tiny(**FOUR, save_total_limit=1, resume_from_checkpoint="latest"), 3)
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
    assert checkpoints(finished) == ["step-000001", "step-000004"]  # the first is no checkpoint of step 1
    assert [row["step"] for row in metric_rows(finished)] == [3, 4]


def test_resuming_with_other_settings_is_refused(finished, tiny):
    with pytest.raises(UserError, match=r"learning_rate \(was 0.001, is 0.01\), lam") as refusal:
        tiny(**FOUR | {"save_steps": 1}, resume_from_checkpoint="latest", learning_rate=0.01, lam=0.9)
    assert "save_steps" not in str(refusal.value)


@pytest.mark.parametrize("written", [None, '{"format": 3}'])
def test_a_checkpoint_of_another_version_is_named_as_such(finished, tiny, written):
    """What DeepSpeed wrote for earlier versions has no such file."""
    source = finished / "train" / "checkpoints" / "step-000004"
    (source / checkpoint.STATE).unlink()
    if written is not None:
        (source / checkpoint.STATE).write_text(written)
    commit(source)
    with pytest.raises(UserError, match="step-000004 was written by another version.*sft_model_path"):
        tiny(**FOUR, resume_from_checkpoint="latest")


def test_a_renamed_setting_is_the_same(finished, tiny, tmp_path):
    """In a checkpoint, in the settings of a frontier's run, and to a person who still writes the old name."""
    source = finished / "train" / "checkpoints" / "step-000004"
    state = (source / checkpoint.STATE).read_text()
    (source / checkpoint.STATE).write_text(state.replace("weight_clip", "cliprange_ratio"))
    commit(source)
    assert tiny(**FOUR, resume_from_checkpoint="latest").done == 4
    (source / checkpoint.STATE).write_text(state.replace('"weight_clip": 10.0', '"cliprange_ratio": 20.0'))
    commit(source)
    with pytest.raises(UserError, match=r"weight_clip \(was 20.0, is 10.0\)"):
        tiny(**FOUR, resume_from_checkpoint="latest")
    settings = finished / "train" / "config.yaml"
    settings.write_text(settings.read_text().replace("weight_clip", "cliprange_ratio"))
    assert frontier.is_done(finished, PPOConfig(**TINY | FOUR))
    with pytest.raises(UserError, match="'cliprange_ratio' has a new name: 'weight_clip'"):
        load("train", None, ["--cliprange_ratio=3"], PPOConfig)


def commit(folder: Path) -> None:
    """A manifest that fits."""
    with atomic.atomic_dir(folder) as place:
        for path in folder.iterdir():
            if path.name != atomic.MANIFEST:
                shutil.copy(path, place)


def test_a_checkpoint_of_another_model_is_refused(finished, tiny, tmp_path):
    other = {"model_config": TINY["model_config"].replace('"n_embd": 16', '"n_embd": 8')}
    source = finished / "train" / "checkpoints" / "step-000004"
    trainer = tiny(**FOUR | other, output_dir=str(tmp_path / "other"))
    saved = checkpoint._content(source)["models"]["actor"]
    with pytest.raises(UserError, match=r"step-000004 is of another actor: .*bias was \[48\] and is \[24\]"):
        zero_state.restore(trainer.trained["actor"], source, [], "actor", saved)


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
    model, work = finished / "train" / "model", finished / "train" / ".tmp-model-01234567"
    atomic.begin(work)
    model.rename(work / atomic.OLD)
    with checkpoint.lock_run_dir(finished / "train", overwrite=False, done=4):
        atomic.verify(model)
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
        read(path)


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
        atomic.verify(tmp_path)


def test_a_failed_save_leaves_the_last_checkpoint(finished, tiny, monkeypatch):
    trainer = tiny(**FOUR, resume_from_checkpoint="latest")
    folder = finished / "train" / "checkpoints"

    def fail(*_, **__):
        raise ValueError("not today")

    monkeypatch.setattr(zero_state, "save", fail)
    with pytest.raises(ValueError, match="not today"):  # the disk is not accused of what it has not done
        save(trainer, 6)
    monkeypatch.undo()
    assert not list(folder.glob(".tmp-*"))
    assert tiny(**FOUR, resume_from_checkpoint="latest").done == 4


def test_the_room_that_is_asked_for_is_what_the_tensors_take(tiny, monkeypatch):
    trainer = tiny(ema_decay=0.9)
    trainer.train_step()
    save(trainer, 1)
    files = (trainer.folder / "checkpoints" / "step-000001").glob("*.safetensors")
    taken = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=taken))
    save(trainer, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=taken - 1))
    with pytest.raises(UserError, match="a checkpoint takes about"):
        save(trainer, 3)


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


def test_what_is_saved_can_be_read_by_whom_the_umask_allows(finished):
    mask = os.umask(0o022)
    os.umask(mask)
    if mask & 0o077 == 0o077:
        pytest.skip("the umask here allows nobody else")
    for path in (finished / "train").rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_two_runs_never_mix(finished, tiny):
    with pytest.raises(UserError, match="earlier run"):
        tiny(**FOUR)


def test_latest_without_a_checkpoint_is_an_error(tiny):
    with pytest.raises(UserError, match="no checkpoint"):
        tiny(resume_from_checkpoint="latest")
