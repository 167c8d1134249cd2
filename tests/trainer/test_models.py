"""Models as the loop needs them, whoever built them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from python_trainer.config import PPOConfig
from python_trainer.deepspeed_engine import Policy, frozen
from python_trainer.models import without_dropout
from tests.lib.trainer import TINY

OPT = {"word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "layerdrop": 0.5}
BLOOM = {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.5, "attention_dropout": 0.5}


@pytest.mark.parametrize(("kind", "settings"), [("opt", OPT | {"dropout": 0.5}), ("bloom", BLOOM)])
def test_no_dropout_is_left(kind, settings):
    """Some models keep the rate as a plain number and pass it to a function."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=32, hidden_size=16, pad_token_id=0, **settings)
    ).train()
    ids = torch.arange(2, 26).view(2, 12)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_module_of_a_frozen_policy_is_the_model(tiny, stage):
    """At stage 3 the model comes inside an engine, whose `config` is another one."""
    policy = tiny().actor.module
    config = PPOConfig(**TINY, deepspeed=f"ds_zero{stage}.json")
    module = Policy(frozen(policy, config), 1.0, "auto").module
    assert isinstance(module, PreTrainedModel)
    assert module.config.n_embd == 16
