"""Architectures, sizes and ZeRO stages; and every implementation of the ops makes the same run."""

import json

import pytest
import torch

from tests.lib.trainer import TINY_MODEL

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}
ROTARY = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 32}
ARCHITECTURES = {
    "gpt2": TINY_MODEL,
    "llama": ROTARY | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": ROTARY | {"model_type": "qwen2", "use_sliding_window": False},
    "qwen3": ROTARY | {"model_type": "qwen3"},
}


@pytest.mark.parametrize("algorithm", ["ppo", "p3o"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_causal_language_model(tiny, kind, algorithm):
    """Sampling and scoring agree (the ratio is checked at every first update) and the exact figures move."""
    settings = {"model_config": json.dumps(ARCHITECTURES[kind]), "learning_rate": 1e-2, "total_steps": 4}
    trainer = tiny(algorithm=algorithm, batch_size=64, per_device_train_batch_size=64, num_ppo_epochs=4, **settings)
    before, after = trainer.train()
    assert before.metrics["exact/score"] == pytest.approx(0, abs=1e-9)
    assert after.metrics["exact/score"] > 0.1


def test_bfloat16(tiny):
    """The losses stay in float32; the ratio of the first update is only near 1."""
    trainer = tiny(bf16=True, deepspeed="ds_zero2.json", total_steps=2)
    rows = [trainer.train_step() for _ in range(2)]
    assert next(trainer.actor.module.parameters()).dtype == torch.bfloat16
    assert all(row["val/skipped_updates"] == 0 for row in rows)
    assert rows[0]["val/ratio"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("algorithm", ["ppo", "p3o"])
def test_fifty_updates_with_reference_ops_and_with_the_chosen_ones(tiny, algorithm):
    """Rounding differs, so runs part slowly; at first they agree to it, and at the end J is the same within noise."""
    names = ["loss/policy_avg", "actor/grad_norm", "objective/kl"] + ["loss/value_avg"] * (algorithm == "ppo")
    settings = {"batch_size": 64, "per_device_train_batch_size": 64, "num_ppo_epochs": 2, "num_mini_batches": 1}
    runs = {}
    for impl in ("torch", "auto"):
        trainer = tiny(algorithm=algorithm, ops_impl=impl, total_steps=25, learning_rate=3e-3, kl_coef=0.1, **settings)
        rows = [trainer.train_step() for _ in range(25)]
        runs[impl] = rows, trainer.evaluate(trainer.actor).metrics["exact/objective"]
    for step in range(5):
        for name in names:
            plain, chosen = runs["torch"][0][step][name], runs["auto"][0][step][name]
            assert chosen == pytest.approx(plain, abs=2e-5, rel=1e-4), (step, name)
    assert runs["auto"][1] == pytest.approx(runs["torch"][1], abs=0.03)
