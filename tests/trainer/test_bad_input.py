"""What is wrong is said in one line, before or instead of training."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from python_trainer import __main__ as commands
from python_trainer import distributed
from python_trainer.config import RewardConfig, UserError, resolve
from python_trainer.data import Prompt
from python_trainer.models import load_policy, load_scalar, load_tokenizer, save_model
from python_trainer.ppo_config import PPOConfig
from python_trainer.reward_functions import load as load_function
from python_trainer.sft import reward
from python_trainer.tasks.files import Files
from python_trainer.tokens import encode_prompts
from tests.lib.trainer import TINY, as_options, command


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder):
    """Settings that make a model of the exact task's kind serve prompts from a folder."""
    return {"task": "files", "data_path": str(folder)}


@pytest.fixture
def model(tiny, tmp_path):
    """A saved policy with its tokenizer."""
    trainer = tiny()
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "cannot read .*prompts.jsonl"),
        ([], "prompts.jsonl holds 0 rows; two different ones are needed.*eval_data_path"),
        ([{"prompt": "a"}], "prompts.jsonl holds 1 rows; two different ones are needed"),
        ([{"prompt": "a"}] * 9, "prompts.jsonl holds 9 rows, which are all the same, 'a'; two different ones"),
        ([{"prompt": "a " * 12}, {"prompt": "b"}], "prompt of 12 tokens and response_length 5 .* overlong_prompts"),
        ([{"prompt": ""}] * 2, "prompts.jsonl, row 1: prompt is empty"),
        ([{"prompt": "  "}, {"prompt": "a"}], "prompt '  ' has no tokens"),
        ([{"question": "a"}], "row 1: expected a column prompt and found question; column_mapping names yours"),
        ([{"prompt": "a"}, {"prompt": None}], "prompts.jsonl, row 2: prompt must be text or .* not None"),
    ],
)
def test_bad_prompts(tiny, model, tmp_path, prompts, message):
    if prompts is not None:
        write(tmp_path, "prompts.jsonl", prompts)
    with pytest.raises(UserError, match=message):
        tiny(**files(tmp_path), sft_model_path=model)


def test_fewer_held_out_prompts_than_ranks(tiny, tmp_path, monkeypatch):
    """Said before any model is read: there is none at this path."""
    write(tmp_path, "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="1 held-out prompts.*eval_prompts 500.*2 ranks.*eval_data_path"):
        tiny(**files(tmp_path), sft_model_path="nowhere")


def test_pairs_that_are_equal_once_cut(model, tmp_path, capsys):
    """A reward model would learn nothing of them; other cuts are counted."""
    write(tmp_path, "pairs.jsonl", [{"chosen": "a b c d", "rejected": "a b c e"}, {"chosen": "a", "rejected": "b"}])
    settings = files(tmp_path) | {"model_path": model, "output_dir": str(tmp_path / "run"), "max_steps": 1}
    with pytest.raises(UserError, match="1 of 2 pairs have the same first 3 tokens .max_length.*raise max_length.*a b"):
        reward(RewardConfig(**settings, max_length=3))
    assert not (tmp_path / "run" / "reward").exists()
    reward(RewardConfig(**settings, max_length=4, batch_size=2))
    assert "2 of 4 texts are cut at max_length 4" in capsys.readouterr().out


def test_missing_model(tiny, tmp_path):
    with pytest.raises(UserError, match="cannot load a model from"):
        tiny(sft_model_path=str(tmp_path / "nothing"))


def test_missing_reward_model(tiny, model, tmp_path):
    write(tmp_path, "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError, match="no reward model"):
        tiny(**files(tmp_path), sft_model_path=model)


@pytest.mark.parametrize(("labels", "message"), [(None, ".*score.weight missing"), (2, " gives 2 numbers")])
def test_a_model_that_scores_nothing_is_refused(model, tmp_path, labels, message):
    """A language model would get a random head."""
    if labels is not None:
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"reward_model_path: .*model{message}.*num_labels 1"):
        load_scalar(model, "reward_model_path", RewardConfig())


def test_nan_reward_stops_before_the_weights(tiny):
    trainer = tiny()
    trainer.reward_fn = lambda rollout: torch.full((len(rollout),), float("nan"))
    before = [p.clone() for p in trainer.actor.module.parameters()]
    with pytest.raises(UserError, match="score of 16 of 16 responses is not finite .nan for one to '"):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.actor.module.parameters(), strict=True))


def test_run_stops_after_too_many_skipped_updates(tiny, monkeypatch):
    trainer = tiny(max_skipped_steps=2, total_steps=5)
    plain = trainer.algorithm.policy_loss

    def poisoned(*arguments):
        loss, stats = plain(*arguments)
        return loss * float("nan"), stats

    monkeypatch.setattr(trainer.algorithm, "policy_loss", poisoned)
    with pytest.raises(UserError, match="2 updates had a non-finite"):
        trainer.train()


def test_paths_that_lead_nowhere(tmp_path):
    """A name too long and a circle of links: each who looks would end in an error of its own."""
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, why in (("x" * 300, "File name too long"), (str(tmp_path / "circle"), "Too many levels")):
        for name in (
            *("output_dir", "deepspeed", "resume_from_checkpoint", "data_path", "eval_data_path"),
            *("sft_model_path", "reward_model_path", "value_model_path"),
        ):
            with pytest.raises(UserError, match=f"{name} leads nowhere: {why}"):
                PPOConfig(**TINY | {"output_dir": str(tmp_path)} | {name: path})
        with pytest.raises(UserError, match="no such file"):
            resolve(path)
        with pytest.raises(UserError, match="cannot load reward_function"):
            load_function(f"{path}.py:f")


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts/one.jsonl", "train.json"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_in_the_place_of_data_is_not_waited_for(tmp_path, name, linked):
    place = tmp_path / "data" / name
    place.parent.mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe" if linked else place)
    if linked:
        place.symlink_to(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"{name} is a (pipe|link): data are read from a file"):
        Files(str(tmp_path / "data")).prompts()


def test_a_pipe_in_a_models_folder_is_not_waited_for(model, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "adapter_config.json", "chat_template.jinja"):
        copied = shutil.copytree(model, tmp_path / f"with {name}")
        (copied / name).unlink(missing_ok=True)
        os.mkfifo(copied / name)
        for load, more in (
            (load_policy, (RewardConfig(), None)),
            (load_scalar, ("reward_model_path", RewardConfig())),
            (load_tokenizer, ()),
        ):
            with pytest.raises(UserError, match=f"{name} is a pipe, and a model is read from files"):
                load(copied, *more)


def test_a_models_first_pass_is_part_of_its_loading(model, tmp_path):
    """Settings that nobody looks at before."""
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 2**70}))
    with pytest.raises(UserError, match="cannot load a model from .*model: int too big to convert"):
        load_policy(model, RewardConfig(), load_tokenizer(model))


def test_half_a_character_is_no_prompt(tiny):
    trainer = tiny()
    trainer.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for prompt in ("\ud800", [{"role": "user", "content": "a \udfff"}]):
        with pytest.raises(UserError, match="half a character"):
            encode_prompts([Prompt(prompt)], trainer.tokenizer, trainer.config, 16)


def test_what_the_disk_refuses_is_said_in_one_line(monkeypatch, capsys):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/prompts.jsonl")

    monkeypatch.setattr(commands, "run_command", denied)
    assert commands.main(["train"]) == 1
    assert capsys.readouterr().err == "error: Permission denied: /data/prompts.jsonl; what is committed is safe\n"


def test_command_says_it_in_one_line(tmp_path):
    result = command("train", *as_options(TINY | {"output_dir": tmp_path, "kl_coeff": 1}))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: unknown setting 'kl_coeff'; did you mean 'kl_coef'?"
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_columns_that_nobody_reads_are_told(tmp_path, capsys):
    """Half of a question may be in one."""
    asked = {"prompt": "a", "input": "x", "source": "y"}
    for kind, row, told in (
        ("texts", asked | {"completion": "b"}, "2 of 4 columns of .*texts.jsonl are not read: input, source"),
        (
            "texts",
            {"text": "a", "messages": [{"role": "assistant", "content": "b"}]},
            "1 of 2 columns of .*texts.jsonl are not read: text",
        ),
        ("pairs", asked | {"chosen": "b", "rejected": "c"}, "2 of 5 columns of .*pairs.jsonl are not read: input"),
        ("prompts", asked, "2 of 3 columns of .*prompts.jsonl are not read: input, source"),
    ):
        write(tmp_path, f"{kind}.jsonl", [row])
        getattr(Files(str(tmp_path), eval_path=str(tmp_path)), kind)()
        assert re.search(told, capsys.readouterr().out)
    Files(str(tmp_path), eval_path=str(tmp_path), for_function=True).prompts()  # it gets them
    assert "not read" not in capsys.readouterr().out
