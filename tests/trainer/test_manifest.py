"""A checkpoint is exactly what its manifest lists, and of its content only what has a meaning is used."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from python_trainer import atomic, checkpoint
from python_trainer.config import UserError
from python_trainer.models import undamaged
from tests.lib.hostile import commit


@pytest.fixture
def saved(tiny, tmp_path):
    """A trainer, and the checkpoint that it wrote after a step."""
    trainer = tiny(ema_decay=0.9)
    trainer.train_step()
    trainer.save_checkpoint(tmp_path)
    return trainer, tmp_path / "step-000001"


def loads(trainer, folder) -> bool:
    try:
        trainer.load_checkpoint(folder)
    except UserError:
        return False
    return True


def test_files_that_are_not_listed_are_not_read(saved):
    """Files with the names of weights."""
    trainer, folder = saved
    before = {name: weight.clone() for name, weight in trainer.actor.module.state_dict().items()}
    average = load_file(folder / "ema-rank0-0000.safetensors")
    other = {key: torch.full_like(value, 7.0) for key, value in average.items()}
    save_file(other, folder / "ema-rank9-0000.safetensors")
    shutil.copy(folder / "actor-rank0-0000.safetensors", folder / "actor-rank8-0000.safetensors")
    with torch.no_grad():
        for weight in trainer.actor.module.parameters():
            weight.zero_()
    assert loads(trainer, folder)
    assert all(weight.equal(before[name]) for name, weight in trainer.actor.module.state_dict().items())
    assert not any((average == 7).all() for average in trainer.ema.average.values())


def test_a_pipe_is_not_waited_for_and_a_state_must_be_listed(saved):
    trainer, folder = saved
    for name in ("actor", "critic", "ema"):
        os.mkfifo(folder / f"{name}-rank9-0000.safetensors")
    assert loads(trainer, folder)
    manifest = json.loads((folder / atomic.MANIFEST).read_text())
    del manifest["files"][checkpoint.STATE]
    (folder / atomic.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was written by another version"):
        trainer.load_checkpoint(folder)


def test_only_known_counters_are_set(saved):
    trainer, folder = saved
    engine = trainer.trained["actor"].engine
    content = json.loads((folder / checkpoint.STATE).read_text())
    of_actor = content["models"]["actor"]
    of_actor["counters"] |= {"injected": "by the file", "forward": "x"}
    of_actor["schedule"] |= {"step": "x", "optimizer": None, "injected": 1}
    of_actor["loss_scale"] |= {"injected": 1}
    content["memory"] |= {"injected": 1}
    (folder / checkpoint.STATE).write_text(json.dumps(content))
    commit(folder)
    trainer.load_checkpoint(folder)
    assert not any(hasattr(holder, "injected") for holder in (engine, engine.lr_scheduler, trainer))
    assert callable(engine.forward)
    trainer.train_step()


HOSTILE = {
    ("step",): [-1, 1.5, True, "1", None, 1 << 60],
    ("config",): [[], "x", None],
    ("memory",): [[], None],
    ("memory", "kl_coef"): ["x", None, [], float("nan"), float("inf"), True, 10**400],
    ("memory", "scores"): [1, []],
    ("memory", "scores", "mean"): ["x", {}],
    ("models",): [[], None, {}],
    ("models", "actor"): [[], 3],
    ("models", "actor", "shapes"): [[], None],
    ("models", "actor", "updates"): [[], {"a": "x"}, {"a": -1}, {"a": 1.5}],
    ("models", "actor", "schedule"): [[], {}, {"last_epoch": "x"}, {"last_epoch": -1}],
    ("models", "actor", "counters"): [[], {}, {"global_steps": "x", "global_samples": 0, "skipped_steps": 0}],
    ("models", "actor", "loss_scale"): [[], {"cur_scale": "x"}],
    ("models", "actor", "skipped"): ["x", None],
}


def test_a_state_of_another_form_is_refused_by_name(saved):
    """Each value that is used, put to something that it cannot be."""
    trainer, folder = saved
    whole = json.loads((folder / checkpoint.STATE).read_text())
    for keys, values in HOSTILE.items():
        for value in values:
            content = json.loads(json.dumps(whole))
            *path, last = keys
            inner = content
            for key in path:
                inner = inner[key]
            inner[last] = value
            (folder / checkpoint.STATE).write_text(json.dumps(content))
            commit(folder)
            with pytest.raises(UserError, match="state.json is not what a checkpoint"):
                trainer.load_checkpoint(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "model-00001.safetensors", "chat_template.jinja", "vocab.txt"])
def test_a_file_that_was_put_into_a_model_is_named(tmp_path, name):
    """transformers would read it; notes beside a model are nobody's business."""
    with atomic.atomic_dir(tmp_path / "model") as place:
        (place / "config.json").write_text("{}")
    (tmp_path / "model" / "README.md").write_text("mine")
    undamaged(tmp_path / "model")
    os.mkfifo(tmp_path / "model" / name)
    with pytest.raises(UserError, match=f"{name} is a pipe that its manifest.json does not list; take it away"):
        undamaged(tmp_path / "model")
