"""Architectures, sizes and ZeRO stages; and every implementation of the ops makes the same run."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from python_trainer.deepspeed_engine import gathered_params, merged_weights
from python_trainer.rollout import _unpartitioned

from .conftest import TINY_MODEL

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


def test_a_critic_of_another_size(tiny, tmp_path):
    config = AutoConfig.for_model(**TINY_MODEL | {"n_embd": 32, "n_layer": 2}, vocab_size=7, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "critic")
    trainer = tiny(value_model_path=str(tmp_path / "critic"))
    assert trainer.critic.module.model.config.n_embd == 32
    assert trainer.actor.module.config.n_embd == 16
    row = trainer.train_step()
    assert row["loss/value_avg"] > 0
    assert trainer.critic.skipped == 0


def test_a_policy_that_is_whole_generates_itself(tiny):
    trainer = tiny()
    with _unpartitioned(trainer.actor) as module:
        assert module is trainer.actor.module


@pytest.mark.parametrize("rank", [None, 4])
def test_generation_gathers_once(tiny, rank):
    """At stage 3 a whole copy generates; it has the weights of now, and none between rollouts."""
    if rank is not None:
        pytest.importorskip("peft", reason="LoRA needs peft")
    trainer = tiny(deepspeed="ds_zero3.json", learning_rate=1e-2, lora_r=rank)
    for _ in range(2):
        trainer.train_step()
        assert sum(parameter.numel() for parameter in trainer.actor.copy.parameters()) == 0
    with _unpartitioned(trainer.actor) as module:
        copied = {name: weight.clone() for name, weight in module.state_dict().items()}
        assert not any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    with gathered_params(trainer.actor.module.parameters()):
        expected = merged_weights(trainer.actor.module)
        assert copied.keys() == expected.keys()
        assert all(copied[name].equal(weight) for name, weight in expected.items())


def test_bfloat16(tiny):
    """The losses stay in float32; the ratio of the first update is only near 1."""
    trainer = tiny(bf16=True, deepspeed="ds_zero2.json", total_steps=2)
    rows = [trainer.train_step() for _ in range(2)]
    assert next(trainer.actor.module.parameters()).dtype == torch.bfloat16
    assert all(row["val/skipped_updates"] == 0 for row in rows)
    assert rows[0]["val/ratio"] == pytest.approx(1, abs=0.02)


def test_the_optimizer_can_live_in_host_memory(tiny, tmp_path):
    """ZeRO-Offload by DeepSpeed's own setting, with torch's AdamW (its own CPU Adam would be compiled first)."""
    path = tmp_path / "offload.json"
    zero = {"stage": 2, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
    offloaded, plain = tiny(deepspeed=str(path)), tiny(deepspeed="ds_zero2.json")
    for trainer in (offloaded, plain):
        trainer.train_step()
    for one, other in zip(offloaded.actor.module.parameters(), plain.actor.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


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
