"""Models as the loop needs them, whoever built them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from python_trainer.data import Policy
from python_trainer.deepspeed_engine import Trainable, frozen
from python_trainer.models import ScalarModel, load_policy, load_tokenizer, save_model
from python_trainer.ppo_config import PPOConfig
from tests.lib.text_models import FAMILIES, saved, tokenizer_of
from tests.lib.trainer import TINY, wide

OPT = {"word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "layerdrop": 0.5}
BLOOM = {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.5, "attention_dropout": 0.5}
EXPERTS = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS |= {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.5}
NOISY = {"opt": OPT | {"dropout": 0.5}, "bloom": BLOOM, "mixtral": EXPERTS, "phimoe": EXPERTS}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", NOISY)
def test_a_trained_model_makes_no_noise(tiny, kind, checkpointing):
    """Dropout, some of it a plain number that a layer hands to a function; router jitter; draws of experts."""
    torch.manual_seed(0)
    config = PPOConfig(**TINY, gradient_checkpointing=checkpointing)
    tiny()  # starts DeepSpeed
    settings = {"vocab_size": 32, "hidden_size": 16, "pad_token_id": 0} | NOISY[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).train()
    ids = torch.arange(2, 26).view(2, 12)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    trained = Trainable(model, config, 1e-3, 1)
    assert torch.equal(trained(input_ids=ids).logits, trained(input_ids=ids).logits)
    assert any(layer.training for layer in model.modules()) == checkpointing


@pytest.mark.parametrize("stage", [0, 3])
def test_the_module_of_a_frozen_policy_is_the_model(tiny, stage):
    """At stage 3 the model comes inside an engine, whose `config` is another one."""
    policy = tiny().actor.module
    config = PPOConfig(**TINY, deepspeed=f"ds_zero{stage}.json")
    module = Policy(frozen(policy, config), 1.0, "auto").module
    assert isinstance(module, PreTrainedModel)
    assert module.config.n_embd == 16


@pytest.mark.parametrize("stage", [0, 3])
def test_in_bfloat16_the_reference_is_the_policy(tiny, stage):
    """Weights are rounded and rotary frequencies are not, in both: else the KL is off before the first update."""
    trainer = tiny(bf16=True, deepspeed=f"ds_zero{stage}.json", model_config=wide("llama"))
    experience = trainer.collect_experience()
    assert torch.equal(experience.logprobs, experience.ref_logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_saved_reward_model_where_it_was_trained(tiny, tmp_path, family):
    """At the end token, also where that is the padding token."""
    tiny()
    source = saved(tmp_path / "policy", tokenizer_of(family))
    tokenizer = load_tokenizer(source)
    policy = load_policy(source, PPOConfig(**TINY), tokenizer)
    scalar = ScalarModel.on(policy, zero_head=False).eval()
    save_model(scalar, tokenizer, tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, tokenizer.eos_token_id]])
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()(ids).logits
        torch.testing.assert_close(theirs[:, 0], scalar(input_ids=ids)[:, -1])
