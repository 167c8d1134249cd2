"""The proof that it learns: distance to an optimum that is known exactly."""

from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from python_trainer.settings import load


def test_ppo_comes_close_to_the_optimum(tmp_path):
    """One seed; `make verify PART=learn` has three, and every algorithm."""
    options = [f"--output_dir={tmp_path}", "--disable_tqdm"]
    before, after = Trainer(load("train", "exact_cpu.yaml", options, PPOConfig)).train()
    assert abs(before.metrics["exact/score"]) < 1e-9
    assert before.metrics["exact/kl"] == 0
    assert after.metrics["exact/score"] >= 0.9
    assert after.metrics["exact/objective"] <= after.metrics["exact/optimum"]
    assert (tmp_path / "train" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "train" / "model" / "model.safetensors").exists()
