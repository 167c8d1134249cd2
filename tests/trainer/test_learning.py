"""The proof that it learns: distance to an optimum that is known exactly."""

import pytest
import yaml

from python_trainer.config import CONFIGS, PPOConfig, load
from python_trainer.loop import Trainer


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_comes_close_to_the_optimum(tmp_path, seed):
    options = [f"--output_dir={tmp_path}", f"--seed={seed}", "--disable_tqdm"]
    before, after = Trainer(load("train", "exact_cpu.yaml", options, PPOConfig)).train()
    assert abs(before.metrics["exact/score"]) < 1e-9
    assert before.metrics["exact/kl"] == 0
    assert after.metrics["exact/score"] >= 0.9
    assert after.metrics["exact/objective"] <= after.metrics["exact/optimum"]
    assert (tmp_path / "train" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "train" / "model" / "model.safetensors").exists()


def test_shipped_configurations_name_known_settings():
    from python_trainer.config import COMMANDS

    for path in CONFIGS.glob("*.yaml"):
        for command in COMMANDS.keys() & yaml.safe_load(path.read_text()).keys():
            load(command, str(path), [], COMMANDS[command])


def test_probabilities_of_all_responses_sum_to_one(tiny):
    """The enumeration misses no response and counts none twice."""
    import torch

    from python_trainer.tasks.exact import PROMPTS, _sequence_logprobs

    trainer = tiny()
    for prompt in PROMPTS:
        rollout = trainer.task._all_responses(prompt)
        total = _sequence_logprobs(trainer.reference, rollout).exp().sum()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
