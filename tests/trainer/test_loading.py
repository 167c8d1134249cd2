"""What is loaded is what was asked for: a weight, a module or a setting that is not there ends the command by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.activations import GELUTanh

from python_trainer.config import UserError
from python_trainer.models import load_scalar, save_model
from python_trainer.ppo_config import PPOConfig
from tests.lib.trainer import TINY, TINY_MODEL
from tests.lib.zoo import architecture

BLOCK = "transformer.h.0."


@pytest.fixture
def saved(tiny, tmp_path):
    """A policy and its tokenizer, as a run saves them."""
    trainer = tiny(algorithm="rloo")
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scorer(tiny, saved, tmp_path):
    """A reward model."""
    model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    model.save_pretrained(tmp_path / "scorer")
    return tmp_path / "scorer"


def edited(folder, edit):
    """The folder with other weights: `edit` takes their dictionary and returns it."""
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without_a_block(weights):
    return {name: weight for name, weight in weights.items() if not name.startswith(BLOCK)}


def prefixed(weights):
    return {f"module.{name}": weight for name, weight in weights.items()}


def with_one_more(weights):
    return weights | {"v_head.weight": torch.zeros(1, 16)}


def narrower(weights):
    return weights | {f"{BLOCK}ln_1.bias": torch.zeros(8)}


EDITS = [
    (without_a_block, rf"{BLOCK}attn.c_attn.bias and 11 more missing"),
    (prefixed, "take the prefix 'module.' off their names"),
    (with_one_more, "v_head.weight not part of it"),
    (narrower, rf"{BLOCK}ln_1.bias of shape \(8,\), not \(16,\)"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=lambda value: getattr(value, "__name__", ""))
def test_other_weights_are_refused(tiny, saved, scorer, edit, message):
    """In a policy, in a reward model and in a critic."""
    with pytest.raises(UserError, match=f"model does not hold the weights of a GPT2LMHeadModel .*{message}"):
        tiny(sft_model_path=str(edited(saved, edit)))
    edited(scorer, edit)
    for setting in ("reward_model_path", "value_model_path"):
        with pytest.raises(UserError, match=f"{setting}: .*GPT2ForSequenceClassification .*{message}.*num_labels 1"):
            load_scalar(scorer, setting, PPOConfig(**TINY))
    with pytest.raises(UserError, match=f"value_model_path: .*{message}"):
        tiny(value_model_path=str(scorer))


def test_a_reward_model_is_no_policy(tiny, saved, scorer):
    shutil.copy(saved / "tokenizer.json", scorer)
    shutil.copy(saved / "tokenizer_config.json", scorer)
    with pytest.raises(UserError, match="GPT2LMHeadModel .score.weight not part of it"):
        tiny(sft_model_path=str(scorer))


@pytest.mark.parametrize("kind", ["bert", "rwkv"])
def test_what_does_not_read_from_left_to_right_is_no_policy(tiny, kind):
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    match = {"bert": "BertLMHeadModel sees the tokens", "rwkv": "RwkvForCausalLM gives other logits.*padded"}[kind]
    with pytest.raises(UserError, match=f"model_config: a {match}"):
        tiny(model_config=json.dumps(settings | {"model_type": kind, "initializer_range": 0.2}))


def test_what_gives_no_number_per_token_is_no_critic_and_no_reward_model(tiny, tmp_path):
    with pytest.raises(UserError, match="no model of type codegen that gives one number .*algorithm without a critic"):
        tiny(algorithm="ppo", model_config=architecture("codegen"))
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = AutoConfig.for_model("bert", **settings, vocab_size=7, num_labels=1)
    AutoModelForSequenceClassification.from_config(encoder).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="BertForSequenceClassification has no `score` head.*reward_function"):
        load_scalar(tmp_path / "encoder", "reward_model_path", PPOConfig(**TINY))


def test_a_quantized_model_is_refused(tiny, saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load a model from .*model: .*bitsandbytes"):
        tiny(sft_model_path=str(saved))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": [1,', "cannot load a model from .*generation_config.json"),
        ('{"eos_token_id": [1, 999]}', "generation_config.json ends at 999, and the model has tokens 0 to 6"),
    ],
)
def test_a_broken_generation_config_is_refused(tiny, saved, content, message):
    (saved / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        tiny(sft_model_path=str(saved))


def test_a_model_without_tokenizer_is_refused(tiny, saved):
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="model has no tokenizer: save the one there that its model was trained with"):
        tiny(sft_model_path=str(saved))


def test_settings_of_an_architecture_that_fail_in_its_code(tiny):
    with pytest.raises(UserError, match="model_config: .*n_layer"):
        tiny(model_config=json.dumps(TINY_MODEL | {"n_layer": "two"}))


def test_attention_is_computed_as_asked_for(tiny, saved):
    for path in (None, str(saved)):
        trainer = tiny(attn_implementation="eager", sft_model_path=path)
        for model in (trainer.actor.module, trainer.reference.module, trainer.critic.module.model):
            assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_an_activation_that_transformers_writes_out_is_one_operation(tiny, name):
    policy = tiny(algorithm="rloo", model_config=json.dumps(TINY_MODEL | {"activation_function": name})).actor.module
    assert policy.config.activation_function == name  # as it is saved
    x = torch.linspace(-8, 8, 1001, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    exact = wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))) / 2
    assert type(policy.transformer.h[0].mlp.act) is GELUTanh
    got = policy.transformer.h[0].mlp.act(x)
    torch.testing.assert_close(got, exact.float(), atol=1e-6, rtol=0)
    gradients = torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(exact.sum(), wide)[0].float()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_a_precision_to_read_and_save_in(tiny, saved, tmp_path):
    trainer = tiny(torch_dtype="bfloat16", sft_model_path=str(saved))
    source = AutoModelForCausalLM.from_pretrained(saved)
    for mine, its in zip(trainer.actor.module.parameters(), source.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, its.bfloat16().float())
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").dtype == torch.bfloat16
