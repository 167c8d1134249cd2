"""What ends a run costs no step, and a run continues with what it began with."""

import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from python_trainer import __main__ as command_line
from python_trainer import atomic, checkpoint, deepspeed_engine, distributed
from python_trainer.config import SharedError, UserError
from python_trainer.data import fingerprint
from python_trainer.models import save_model
from tests.lib.hostile import commit
from tests.lib.trainer import metric_rows


def steps(folder) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "train" / "checkpoints").glob("step-*"))


def fails_at(trainer, step: int, error: Exception):
    """A reward function that has had enough."""
    plain = trainer.reward_fn

    def reward(rollout):
        if trainer.done == step:
            raise error
        return plain(rollout)

    trainer.reward_fn = reward


def test_a_failing_reward_function_keeps_the_last_step(tiny, tmp_path):
    trainer = tiny(total_steps=5, save_steps=2)
    fails_at(trainer, 3, UserError("mine.py:f ended in KeyError"))
    with pytest.raises(UserError, match=r"ended in KeyError; step 3 is saved: .*--resume_from_checkpoint latest"):
        trainer.train()
    assert steps(tmp_path) == ["step-000002", "step-000003"]
    tiny(total_steps=5, save_steps=2, resume_from_checkpoint="latest").train()
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def in_the_foreground():
    """Where these tests run in the background, their shell has ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def asks_at(trainer, step: int, times: int):
    """A terminal, in a rollout."""
    plain = trainer.reward_fn

    def reward(rollout):
        for _ in range(times if trainer.done == step else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return plain(rollout)

    trainer.reward_fn = reward


def test_ctrl_c_ends_the_run_after_the_step_at_hand(in_the_foreground, tiny, tmp_path, capfd):
    """Also where a launcher passes it on, so that it comes twice."""
    trainer = tiny(total_steps=5)
    asks_at(trainer, 1, times=2)
    with pytest.raises(distributed.Stopped, match="step 2 is saved; --resume_from_checkpoint latest") as stop:
        trainer.train()
    assert stop.value.by_hand
    assert capfd.readouterr().err.count("ctrl-C: it ends after the step at hand; once more") == 1
    assert steps(tmp_path) == ["step-000002"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    tiny(total_steps=5, resume_from_checkpoint="latest").train()
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_a_second_ctrl_c_ends_it_at_once(in_the_foreground, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", -1.0)
    trainer = tiny(total_steps=5)
    asks_at(trainer, 1, times=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_command_says_in_a_line_that_it_was_interrupted(monkeypatch, capsys):
    by_hand = distributed.Stopped("step 2 is saved")
    by_hand.by_hand = True
    for end, said in ((KeyboardInterrupt(), "error: interrupted; what is committed is safe"), (by_hand, "is saved")):

        def ends(*_, end=end):
            raise end

        monkeypatch.setattr(command_line, "run_command", ends)
        assert command_line.main(["train"]) == command_line.INTERRUPTED == 130
        assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_that_is_saved_or_none_is_not_saved_again(tiny, tmp_path, step):
    trainer = tiny(total_steps=5, save_steps=2)
    fails_at(trainer, step, UserError("mine.py:f ended in KeyError"))
    with pytest.raises(UserError, match="ended in KeyError$"):
        trainer.train()
    assert steps(tmp_path) == ["step-000002"][: step // 2]


def test_half_an_update_is_not_kept(tiny, tmp_path, monkeypatch):
    trainer = tiny(total_steps=5, num_mini_batches=2)

    def fail(*_):
        if trainer.done == 1:
            raise UserError("in the middle")
        return False

    monkeypatch.setattr(trainer, "_moved_too_far", fail)
    with pytest.raises(UserError, match="in the middle$"):
        trainer.train()
    assert steps(tmp_path) == []


def test_a_disk_that_is_full_for_the_record_keeps_the_last_step(tiny, tmp_path, monkeypatch):
    trainer = tiny(total_steps=5)
    plain = trainer._step_of_a_run

    def step(log, after):
        if trainer.done == 1:
            monkeypatch.setattr(log, "_file", SimpleNamespace(write=full, close=lambda: None))
        return plain(log, after)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "_step_of_a_run", step)
    with pytest.raises(UserError, match=r"metrics.jsonl could not be written: No space left .*; step 2 is saved"):
        trainer.train()
    assert steps(tmp_path) == ["step-000002"]


def test_both_are_said_where_the_last_step_cannot_be_saved(tiny, tmp_path, monkeypatch):
    trainer = tiny(total_steps=5)
    fails_at(trainer, 1, UserError("mine.py:f ended in KeyError"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        UserError, match="ended in KeyError; nor could the last step be saved: a checkpoint takes about"
    ):
        trainer.train()


def test_room_is_made_of_what_would_go_anyway(tiny, tmp_path, monkeypatch):
    """Two are kept: the older goes before the new one is written, never the only one."""
    trainer = tiny(save_total_limit=2)
    folder = tmp_path / "run" / "train" / "checkpoints"
    for step in (1, 2):
        trainer.done = step
        trainer.save_checkpoint(folder)
    room = {"free": 10**9}
    plain = atomic.discard

    def discard(path):
        plain(path)
        room["free"] = 10**9

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room["free"]))
    monkeypatch.setattr(atomic, "discard", discard)
    room["free"], trainer.done = 10, 3
    trainer.save_checkpoint(folder)
    assert steps(tmp_path) == ["step-000002", "step-000003"]
    monkeypatch.setattr(atomic, "discard", pytest.fail)
    shutil.rmtree(folder / "step-000002")
    room["free"], trainer.done = 10, 4
    with pytest.raises(UserError, match="a checkpoint takes about"):
        trainer.save_checkpoint(folder)


def test_checkpoints_that_would_make_no_room_stay(tiny, tmp_path, monkeypatch):
    """Their files have a second name, which keeps them on the disk."""
    trainer = tiny(save_total_limit=2)
    folder = tmp_path / "run" / "train" / "checkpoints"
    for step in (1, 2):
        trainer.done = step
        trainer.save_checkpoint(folder)
    for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        os.link(path, tmp_path / f"copy-{number}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    trainer.done = 3
    with pytest.raises(UserError, match="a checkpoint takes about .* earlier ones are as they were"):
        trainer.save_checkpoint(folder)
    assert steps(tmp_path) == ["step-000001", "step-000002"]


def test_ranks_save_together_or_not_at_all(monkeypatch):
    """An error that one rank may be alone with leaves it to no save, for which it would wait for ever."""
    saved = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for error in (UserError("of one"), OSError(errno.ENOSPC, "of one"), SharedError("of all")):
        with pytest.raises(type(error), match="of"), checkpoint.last_step_kept(lambda: saved.append(1)):
            raise error
    assert saved == [1]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_more_steps_continue_the_schedule(tiny, tmp_path, kind):
    """As if the run had been that long from the beginning."""
    settings = {"lr_scheduler_type": kind, "save_steps": 2}
    tiny(total_steps=2, **settings).train()
    tiny(total_steps=4, **settings, resume_from_checkpoint="latest").train()
    longer = tiny(total_steps=4, **settings, output_dir=str(tmp_path / "longer"))
    longer.train()
    found, wanted = ([row["lr"] for row in metric_rows(tmp_path / name)[3:]] for name in ("run", "longer"))
    assert found == pytest.approx(wanted, rel=1e-12)
    assert min(found) > 0


@pytest.fixture
def files(tiny, tmp_path):
    """Settings of a run on prompts of one's own."""
    trainer = tiny()
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "model")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", [f"{a} {b}" for a in "abcd" for b in "abcd"])
    (tmp_path / "mine.py").write_text("def f(completions): return [float(len(text)) for text in completions]\n")
    return {
        "task": "files",
        "data_path": str(tmp_path / "data"),
        "reward_function": f"{tmp_path / 'mine.py'}:f",
        "sft_model_path": str(tmp_path / "model"),
        "save_steps": 1,
        "total_steps": 1,
    }


def write(folder, prompts):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": 1}) + "\n" for text in prompts))


def test_changed_data_are_noticed_and_moved_ones_are_not(tiny, tmp_path, files):
    tiny(**files).train()
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    again = files | {"data_path": str(tmp_path / "elsewhere"), "resume_from_checkpoint": "latest"}
    assert tiny(**again).done == 1
    source = tmp_path / "elsewhere" / "prompts.jsonl"
    whole = source.read_text()
    for changed in (whole.replace("a b", "a c", 1), whole.replace('"answer": 1', '"answer": 2', 1), whole + whole[:30]):
        source.write_text(changed if changed.endswith("\n") else whole + '{"prompt": "e", "answer": 1}\n')
        with pytest.raises(UserError, match="cannot resume from .*step-000001: the data have changed since then"):
            tiny(**again)


def test_another_reference_is_noticed(tiny, tmp_path, files):
    tiny(**files).train()
    trainer = tiny(output_dir=str(tmp_path / "other"))
    with torch.no_grad():
        next(trainer.actor.module.parameters()).add_(1e-3)
    shutil.rmtree(tmp_path / "model")
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="the reference's weights .sft_model_path. have changed"):
        tiny(**files, resume_from_checkpoint="latest")


def test_a_checkpoint_of_before_that_knows_no_data_holds_to_their_place(tiny, tmp_path, files):
    tiny(**files).train()
    folder = tmp_path / "run" / "train" / "checkpoints" / "step-000001"
    content = json.loads((folder / checkpoint.STATE).read_text())
    for key in (*checkpoint.SAME, "best"):
        del content["memory"][key]
    (folder / checkpoint.STATE).write_text(json.dumps(content))
    commit(folder)
    assert tiny(**files, resume_from_checkpoint="latest").done == 1
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"other settings: data_path \(was"):
        tiny(**files | {"data_path": str(tmp_path / "elsewhere")}, resume_from_checkpoint="latest")


def test_a_checkpoint_of_before_a_setting_had_its_default(tiny, tmp_path):
    tiny(save_steps=1, total_steps=1).train()
    folder = tmp_path / "run" / "train" / "checkpoints" / "step-000001"
    content = json.loads((folder / checkpoint.STATE).read_text())
    del content["config"]["surrogate"]
    (folder / checkpoint.STATE).write_text(json.dumps(content))
    commit(folder)
    assert tiny(save_steps=1, resume_from_checkpoint="latest").done == 1
    with pytest.raises(UserError, match=r"other settings: cliprange \(was"):
        tiny(save_steps=1, resume_from_checkpoint="latest", cliprange=0.3)


def test_a_fingerprint_of_weights_is_of_all_of_them(tiny):
    """At every ZeRO stage, in which the parts of a rank differ."""
    prints = {deepspeed_engine.fingerprint(tiny(deepspeed=f"ds_zero{n}.json").reference.module) for n in (0, 3)}
    assert len(prints) == 1
    assert fingerprint(["a"], ["b"]) != fingerprint(["a", "b"], [])
