"""Critics of another size, and who generates."""

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from python_trainer.distributed import gathered_params, merged_weights
from python_trainer.rollout import _unpartitioned
from tests.lib.trainer import TINY_MODEL


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
