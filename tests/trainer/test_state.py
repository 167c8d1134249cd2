"""What a checkpoint holds of models and optimizers is whole, and what is not is refused."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from python_trainer import checkpoint, zero_state
from python_trainer.config import UserError
from tests.lib.hostile import commit


def test_deepspeed_makes_no_update_of_its_own(tiny):
    """In half precision without ZeRO it steps once by zero gradients, which would count as the first of Adam."""
    trainer = tiny(bf16=True)
    assert set(zero_state.describe(trainer.trained["actor"])["updates"].values()) == {0}
    trainer.train_step()
    assert set(zero_state.describe(trainer.trained["actor"])["updates"].values()) == {1}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_in_half_precision_goes_on(tiny, tmp_path, stage):
    """Without ZeRO its optimizer is one of DeepSpeed's, of another form."""
    settings = {"bf16": True, "deepspeed": f"ds_zero{stage}.json", "ema_decay": 0.9}
    trainer = tiny(**settings)
    trainer.train_step()
    trainer.save_checkpoint(tmp_path)
    state = json.loads((tmp_path / "step-000001" / checkpoint.STATE).read_text())
    state["models"]["actor"]["loss_scale"]["last_overflow_iter"] = None  # as earlier versions wrote it
    (tmp_path / "step-000001" / checkpoint.STATE).write_text(json.dumps(state))
    commit(tmp_path / "step-000001")
    wanted = trainer.train_step()
    again = tiny(**settings, resume_from_checkpoint=str(tmp_path / "step-000001"))
    found = again.train_step()
    for name in ("objective/kl", "loss/policy_avg", "actor/grad_norm", "critic/grad_norm"):
        assert found[name] == wanted[name], name


def test_weights_that_checkpoints_would_not_find_are_refused_at_the_start(tiny, monkeypatch):
    actor = tiny().trained["actor"]
    with monkeypatch.context() as patch:
        patch.setattr(actor.engine, "zero_offload_optimizer", lambda: SimpleNamespace(device="nvme"))
        with pytest.raises(UserError, match="deepspeed: .*the actor's weights .*nvme"):
            zero_state.refuse_unknown_layout("actor", actor)
    zero_state.refuse_unknown_layout("actor", actor)
    with monkeypatch.context() as patch:
        patch.setattr(actor.engine, "super_offload", lambda: True)
        with pytest.raises(UserError, match="SuperOffload"):
            zero_state.refuse_unknown_layout("actor", actor)
    monkeypatch.setattr(zero_state, "_masters", lambda _: iter(()))
    with pytest.raises(UserError, match="the actor's weights"):
        tiny()


@pytest.mark.parametrize("largest", [7, 100, 1 << 26])
def test_files_hold_no_more_than_is_allowed(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(zero_state, "LARGEST", largest)
    values = {name: torch.randn(size) for name, size in (("a", 250), ("b", 3), ("c", 4), ("d", 0), ("e", 100))}
    zero_state.write(
        tmp_path, "it", [zero_state.Slice(name, 0, held, everywhere=True) for name, held in values.items()]
    )
    assert all(sum(map(len, load_file(path).values())) <= largest for path in tmp_path.iterdir())
    inner = {name: torch.zeros(max(len(held) - 2, 0)) for name, held in values.items()}
    zero_state.read(
        tmp_path,
        os.listdir(tmp_path),
        "it",
        [zero_state.Slice(name, 1, part, everywhere=False) for name, part in inner.items()],
    )
    assert all(part.equal(values[name][1:-1]) for name, part in inner.items())


def test_every_element_is_there_once(tmp_path):
    for number, start in enumerate((0, 1)):  # the second again, the last two not at all
        held = [zero_state.Slice("a", start, torch.ones(3), everywhere=True)]
        zero_state.write(tmp_path, "it", held)
        (tmp_path / "it-rank0-0000.safetensors").rename(tmp_path / f"it-rank{number}-0007.safetensors")
    with pytest.raises(UserError, match="does not hold all of a of it, each element once"):
        zero_state.read(
            tmp_path, os.listdir(tmp_path), "it", [zero_state.Slice("a", 0, torch.zeros(6), everywhere=True)]
        )


def test_a_missing_or_another_kind_of_tensor_is_refused(tmp_path):
    zero_state.write(tmp_path, "it", [zero_state.Slice("a", 0, torch.ones(4), everywhere=True)])
    for name, values, message in (
        ("a", torch.ones(5), "does not hold all of a of it"),
        ("b", torch.ones(1), "does not hold all of b of it"),
        ("a", torch.ones(4).bfloat16(), "a is torch.float32 there and torch.bfloat16 in this run"),
    ):
        with pytest.raises(UserError, match=message):
            zero_state.read(tmp_path, os.listdir(tmp_path), "it", [zero_state.Slice(name, 0, values, everywhere=True)])
