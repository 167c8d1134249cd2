"""The reviews task: the whole pipeline on a few made-up snippets."""

import json
import os
import signal

import pytest

from python_trainer import sft as stages
from python_trainer.compare import beside_reference
from python_trainer.config import EvalConfig, RewardConfig, SftConfig, UserError
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from python_trainer.sft import reward, sft
from tests.lib.trainer import command

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
    reference, policy = beside_reference(EvalConfig(**common, **sampling))
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
