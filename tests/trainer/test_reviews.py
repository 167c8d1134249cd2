"""The reviews task: where its data comes from, and the whole pipeline on a few made-up snippets."""

import hashlib
import json
import os
import signal
import subprocess

import pytest

from python_trainer import sft as stages
from python_trainer.__main__ import compare, demo, refuse_failure
from python_trainer.config import EvalConfig, PPOConfig, RewardConfig, SftConfig, UserError
from python_trainer.evaluate import Evaluation
from python_trainer.ppo import Trainer
from python_trainer.sft import reward, sft
from python_trainer.tasks import reviews

from .conftest import command

MODEL = json.dumps({"model_type": "gpt2", "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2})


def test_pipeline_on_small_data(ratings, tmp_path):
    common = {
        "task": "reviews",
        "data_path": str(ratings),
        "output_dir": str(tmp_path / "run"),
        "model_config": MODEL,
        "disable_tqdm": True,
    }
    training = {"batch_size": 32, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    assert sft(SftConfig(**common, **training, max_steps=60))["eval/perplexity"] < 10
    accuracy = reward(RewardConfig(**common, **training, max_steps=30))["eval/accuracy"]
    assert accuracy > 0.8
    sampling = {"response_length": 8, "eval_prompts": 20}
    trainer = Trainer(PPOConfig(**common, **training, **sampling, total_steps=2, value_model_init="reward"))
    before, after = trainer.train()
    assert before.metrics["eval/kl"] == 0
    assert after.metrics["eval/kl"] > 0
    assert -1 <= after.metrics["eval/gold"] <= 1
    reference, policy = compare(EvalConfig(**common, **sampling))
    assert reference.metrics["eval/gold"] == before.metrics["eval/gold"]
    assert policy.metrics["eval/gold"] == pytest.approx(after.metrics["eval/gold"], abs=1e-6)
    assert policy.completions == after.completions


def test_sigterm_ends_sft_and_reward_between_two_steps(ratings, tmp_path, monkeypatch):
    """No model, and said so; asked in the last step, they finish."""
    plain = stages.step_together

    def asked_in_each(models):
        plain(models)
        os.kill(os.getpid(), signal.SIGTERM)

    common = {"task": "reviews", "data_path": str(ratings), "output_dir": str(tmp_path), "model_config": MODEL}
    common |= {"batch_size": 8, "disable_tqdm": True}
    for name, run, kind in (("sft", sft, SftConfig), ("reward", reward, RewardConfig)):
        monkeypatch.setattr(stages, "step_together", asked_in_each)
        with pytest.raises(UserError, match=f"asked to stop after step 1 of 2: {name} keeps no checkpoints"):
            run(kind(**common, max_steps=2))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [".lock", "config.yaml", "metrics.jsonl"]
        run(kind(**common, max_steps=1, overwrite_output_dir=True))
        assert (tmp_path / name / "model" / "manifest.json").exists()
        monkeypatch.setattr(stages, "step_together", plain)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_demo_fails_when_nothing_is_learned(ratings, tmp_path):
    """A demonstration that cannot fail demonstrates nothing."""
    config = tmp_path / "demo.yaml"
    stage = {"max_steps": 1, "batch_size": 8}
    config.write_text(
        json.dumps(
            {
                "task": "reviews",
                "data_path": str(ratings),
                "output_dir": str(tmp_path / "run"),
                "model_config": json.loads(MODEL),
                "sft": stage,
                "reward": stage,
                "train": {"total_steps": 1, "batch_size": 8, "response_length": 4, "eval_prompts": 8},
            }
        )
    )
    result = command("demo", "--config", str(config))
    assert result.returncode == 1
    assert "error: the demonstration failed: the gold score rose by" in result.stderr
    assert "completions of held-out prompts" in result.stdout


@pytest.mark.parametrize(("gain", "kl"), [(float("nan"), 1.0), (0.5, float("nan")), (0.1, 1.0), (0.5, 13.0)])
def test_gates_of_the_demo(gain, kl):
    before, after = (Evaluation({"eval/gold": gold, "eval/kl": kl}, [], []) for gold in (0.0, gain))
    with pytest.raises(UserError, match="the demonstration failed"):
        refuse_failure(before, after)


def test_demo_without_a_judge_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="independent judge; task exact has none"):
        demo("exact_cpu.yaml", [f"--output_dir={tmp_path / 'run'}"])
    assert list(tmp_path.iterdir()) == []


def test_held_out_rows_are_independent(ratings):
    """No prompt is one of the training prompts, and no snippet is in two of the pairs."""
    task = reviews.Reviews(str(ratings))
    train, heldout = task.prompts()
    assert heldout
    assert not set(heldout) & set(train)
    shown = [text for pair in task.pairs()[1] for text in pair[:2]]
    assert shown
    assert len(shown) <= len(task.heldout)
    rating = dict(task.heldout)
    assert all(rating[chosen] > rating[rejected] for chosen, rejected, _ in task.pairs()[1])


def test_without_a_network_the_wanted_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path))
    failure = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(UserError, match=f"no matching distribution.*{reviews.RATINGS}.*put it at {tmp_path}"):
        reviews.fetch_ratings()
    assert list(tmp_path.iterdir()) == []


def test_a_ratings_file_that_is_not_one_is_refused(tmp_path):
    path = tmp_path / "other.txt"
    for first in ("some text", "id\trating\ttext", "1\tnan\ta text of some words"):
        path.write_text(f"{first}\n")
        with pytest.raises(UserError, match="other.txt, line 1: expected id, mean rating and text"):
            reviews.Reviews(str(path))
    path.write_text("1\t2.5\ta text of some words\n")
    with pytest.raises(UserError, match="1 texts of more than 4 words"):
        reviews.Reviews(str(path))
    with pytest.raises(UserError, match="cannot read the ratings file"):
        reviews.Reviews(str(tmp_path / "nothing"))


def test_real_ratings(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path))
    try:
        path = reviews.fetch_ratings()
    except UserError as error:
        pytest.skip(f"the ratings cannot be fetched here: {error}")
    assert [file.name for file in tmp_path.iterdir()] == [reviews.RATINGS]
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("c8293b0d942e90e2")
    task = reviews.Reviews()
    assert len(task.train) + len(task.heldout) > 10_000
    assert not {text for text, _ in task.heldout} & {text for text, _ in task.train}
    assert len(task.prompts()[1]) >= 500
    chosen, rejected, _ = task.pairs()[0][0]
    rating = dict(task.train)
    assert rating[chosen] > rating[rejected]
