"""Log-probabilities from hidden states: the same run as by way of logits, and fused only where that is sure."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from python_trainer.config import UserError
from python_trainer.fused_head import LARGE, fused_head

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ({}, (float("inf"), 1.0)),
    "gemma2": ({"final_logit_softcapping": 5.0}, (5.0, 1.0)),
    "cohere": ({"logit_scale": 0.25}, (float("inf"), 0.25)),
    "granite": ({"logits_scaling": 6.0}, (float("inf"), 1 / 6.0)),
}
MODEL = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}


def model_of(family, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_found_and_done(family):
    settings, expected = FAMILIES[family]
    model = model_of(family, **settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100.0)  # a cap that is forgotten shows
    head = fused_head(model, "on", 1)
    assert (head.softcap, head.logit_scale) == pytest.approx(expected)
    ids = torch.randint(1, 50, (3, 7))
    for vocabulary in (None, 43):
        labels = ids[:, 1:] % 43
        keep = torch.arange(6)
        got = head.token_logprobs(model, {"input_ids": ids, "logits_to_keep": keep}, labels, vocabulary, entropy=True)
        logits = model(input_ids=ids).logits[:, :-1, :vocabulary].double()
        of_all = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(got[0].double(), of_all.log_prob(labels), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(got[1].double(), of_all.entropy(), atol=2e-5, rtol=1e-5)
    assert model(input_ids=ids).logits.shape == (3, 7, 50)  # the head is its own again


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo", "p3o", "online_dpo"])
def test_a_run_is_the_same_to_rounding(tiny, algorithm):
    rows = []
    for choice in ("on", "off"):
        trainer = tiny(algorithm=algorithm, fused_head=choice, entropy_coef=0.01, num_mini_batches=2)
        assert (trainer.actor.head is not None) is (trainer.reference.head is not None) is (choice == "on")
        rows.append([trainer.train_step() for _ in range(2)])
    for one, other in zip(*rows, strict=True):
        figures = {name for name in one if not name.startswith("time/")}
        assert figures == {name for name in other if not name.startswith("time/")}
        for name in figures:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5, nan_ok=True), name


def test_logits_that_are_small_are_computed_once():
    model = model_of("llama")
    fits = LARGE // (4 * 50)
    assert fused_head(model, "auto", fits) is None
    assert fused_head(model, "auto", fits + 1) is not None


def test_all_calls_of_a_run_go_one_way(tiny, monkeypatch):
    """Rollouts are scored by more rows than an update has; the two ways round differently."""
    sizes = {"local_rollout_forward_batch_size": 16, "per_device_train_batch_size": 2, "num_mini_batches": 2}
    plain = tiny(fused_head="off", **sizes)
    vocabulary = plain.actor.module.get_output_embeddings().out_features
    monkeypatch.setattr("python_trainer.fused_head.LARGE", 4 * plain.config.response_length * vocabulary * 8)
    trainer = tiny(fused_head="auto", **sizes)
    assert trainer.actor.head is not None
    assert trainer.reference.head is not None


def test_lora_beside_the_head_is_fused_and_on_it_is_not(tiny, monkeypatch):
    monkeypatch.setattr("python_trainer.fused_head.LARGE", 0)
    assert tiny(fused_head="auto", lora_r=2).actor.head is not None
    assert tiny(fused_head="on", lora_r=2).train_step()["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UserError, match=r"fused_head on: .* a Linear as its head.*set fused_head auto or off"):
        tiny(fused_head="on", lora_r=2, lora_target_modules="lm_head")
    assert tiny(fused_head="auto", lora_r=2, lora_target_modules="lm_head").actor.head is None


def test_zero_stage_3_has_no_head_to_fuse(tiny, monkeypatch):
    monkeypatch.setattr("python_trainer.fused_head.LARGE", 0)
    with pytest.raises(UserError, match="fused_head on: at ZeRO stage 3"):
        tiny(fused_head="on", deepspeed="ds_zero3.json")
    assert tiny(fused_head="auto", deepspeed="ds_zero3.json").actor.head is None


def test_a_head_that_does_more_is_not_fused():
    class Odd(type(model_of("llama"))):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = out.logits + 0.5 * out.logits.clamp(min=0.0)
            return out

    model = model_of("llama")
    model.__class__ = Odd
    assert fused_head(model, "auto", 2**40) is None
    with pytest.raises(UserError, match="does more to its logits than a scale and a soft cap"):
        fused_head(model, "on", 1)
    assert fused_head(model, "off", 1) is None
