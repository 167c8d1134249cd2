"""LoRA adapters as models to start from: merged or trained further, judged by peft's own loading of them."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from python_trainer.config import RewardConfig, SftConfig, UserError
from python_trainer.models import load_policy, load_scalar, load_tokenizer, save_model
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import score_tokens
from python_trainer.sft import reward, sft
from tests.lib.trainer import TINY

IDS = torch.tensor([[2, 3, 4, 5, 6]])
LORA = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


@pytest.fixture
def base(tiny, tmp_path):
    trainer = tiny(algorithm="rloo")
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """``adapter(**settings)`` is the folder of one whose weights are not 0."""

    def make(model=None, **settings):
        model = AutoModelForCausalLM.from_pretrained(base) if model is None else model
        wrapped = get_peft_model(model, LoraConfig(**LORA | settings))
        torch.manual_seed(1)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "magnitude" in name or "modules_to_save" in name:
                torch.nn.init.normal_(weight, std=0.3)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def by_peft(base, folder) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["wte", "c_fc"]},  # the embedding, to which the head is tied, and stays as it was
        {"target_modules": ["lm_head"], "fan_in_fan_out": False},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "embedding", "head", "dora", "head saved"],
)
def test_an_adapter_is_merged(tiny, base, adapter, settings, tmp_path):
    """Policy and reference are what peft makes of it, all weights are trained, and a whole model is saved."""
    folder = adapter(**settings)
    load_tokenizer(base).save_pretrained(folder)
    expected = by_peft(base, folder)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    trainer = tiny(sft_model_path=str(folder), algorithm="rloo")
    for policy in (trainer.actor, trainer.reference):
        torch.testing.assert_close(logits(policy.module), expected, atol=1e-5, rtol=0)
    assert all(weight.requires_grad for weight in trainer.actor.module.parameters())
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "whole")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("targets", [["c_attn"], ["wte"]])
def test_an_adapter_is_trained_further_and_saved_as_one(tiny, base, adapter, tmp_path, stage, targets):
    """Its tokenizer lies beside its base alone."""
    folder = adapter(target_modules=targets, lora_alpha=12, fan_in_fan_out=targets == ["c_attn"])
    expected = by_peft(base, folder)
    settings = {"algorithm": "rloo", "lora_r": 4, "lora_save": "adapter", "deepspeed": f"ds_zero{stage}.json"}
    trainer = tiny(sft_model_path=str(folder), learning_rate=1e-2, **settings)
    torch.testing.assert_close(logits(trainer.actor.module), expected, atol=1e-5, rtol=0)
    rows = [trainer.train_step() for _ in range(2)]
    assert abs(rows[0]["objective/kl"]) < 1e-6
    assert abs(rows[1]["objective/kl"]) > 1e-3
    trained = [name for name, weight in trainer.actor.module.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "again", "adapter")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    content = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["lora_alpha"]) == (str(base), 12)
    torch.testing.assert_close(logits(trainer.actor.module), by_peft(base, tmp_path / "again"), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(trainer.actor.module), expected, atol=1e-3)
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(trainer.actor.module), logits(whole), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2}, "has rank 2, not 4: set lora_r to it, or leave lora_r out to merge it"),
        ({"use_dora": True}, "has use_dora, with which it cannot be continued: leave lora_r out to merge it"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"bias": "lora_only"}, "has bias"),
    ],
)
def test_what_is_more_than_plain_lora_is_not_continued(tiny, adapter, settings, message):
    with pytest.raises(UserError, match=f"lora_r: the adapter .*adapter {message}"):
        tiny(sft_model_path=str(adapter(**settings)), lora_r=4)


def test_an_adapter_that_is_not_whole_is_refused(tiny, base, adapter, tmp_path):
    folder = adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    first = sorted(weights)[0]
    for change, message in (
        ({name: weight for name, weight in weights.items() if name != first}, "lora_A.default.weight missing"),
        (weights | {f"{first}.more": weights[first].clone()}, "more.*without a place"),
        ({name: weight[:, :-1].contiguous() for name, weight in weights.items()}, "does not fit.*size mismatch for"),
    ):
        save_file(change, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            tiny(sft_model_path=str(folder))


def test_an_adapter_with_tokens_of_its_own_is_refused(tiny, base, adapter):
    """peft saves the embeddings of a model that was given more of them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(9)
    with pytest.raises(UserError, match="does not fit its base .*wte.*shape.*name the base that it was trained on"):
        tiny(sft_model_path=str(adapter(model)))


def test_an_adapter_without_its_base_is_refused(tiny, base, adapter, tmp_path):
    folder = adapter()
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    for place, message in (
        (None, "does not name its base .base_model_name_or_path"),
        (str(tmp_path / "gone"), "needs its base .base_model_name_or_path.: cannot load a model from .*gone"),
        (str(folder), "needs its base .*is an adapter too"),
    ):
        file.write_text(json.dumps(content | {"base_model_name_or_path": place}))
        with pytest.raises(UserError, match=f"the adapter .*{message}"):
            load_policy(folder, PPOConfig(**TINY), load_tokenizer(base))
    for change, message in (({"peft_type": "SOMETHING"}, "does not know"), ({"use_new_idea": 1}, "use_new_idea")):
        file.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            load_policy(folder, PPOConfig(**TINY), load_tokenizer(base))


def test_a_prompt_that_is_tuned_is_no_policy(base, tmp_path):
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="of type PROMPT_TUNING, which is no change of weights"):
        load_policy(tmp_path / "prompt", PPOConfig(**TINY), load_tokenizer(base))


@pytest.mark.parametrize("labels", [1, 2])
def test_a_reward_model_is_an_adapter(tiny, base, adapter, labels):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    folder = adapter(model, task_type="SEQ_CLS")
    if labels == 2:
        with pytest.raises(UserError, match="reward_model_path: .*num_labels 1"):
            load_scalar(folder, "reward_model_path", PPOConfig(**TINY))
        return
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    expected = PeftModel.from_pretrained(whole, folder).eval()(input_ids=IDS, attention_mask=IDS.clip(max=1)).logits
    scorer = load_scalar(folder, "reward_model_path", PPOConfig(**TINY))
    torch.testing.assert_close(scorer(input_ids=IDS)[:, -1:], expected, atol=1e-5, rtol=0)
    assert tiny(value_model_path=str(folder), critic_lora_r=2).train_step()["loss/value_avg"] > 0


def test_every_command_saves_and_takes_adapters(tiny, base, tmp_path):
    """sft of a model, a reward model of that policy, and the policy trained further."""
    letters = "abcde"
    rows = {
        "texts": [{"text": f"{one} {other} c"} for one in letters for other in letters],
        "pairs": [{"chosen": f"a {one}", "rejected": f"c {one}"} for one in letters],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    common = {"task": "files", "data_path": str(tmp_path), "output_dir": str(tmp_path / "run"), "disable_tqdm": True}
    common |= {"max_steps": 2, "batch_size": 4, "lora_r": 2, "learning_rate": 1e-2}
    sft(SftConfig(**common, model_path=str(base), lora_save="adapter"))
    policy = tmp_path / "run" / "sft" / "model"
    assert (policy / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="lora_save adapter: .*nowhere on disk.*set lora_save merged"):
        reward(RewardConfig(**common, lora_save="adapter"))
    reward(RewardConfig(**common, model_path=str(base), lora_save="adapter", lora_target_modules="all-linear"))
    scorer = load_scalar(tmp_path / "run" / "reward" / "model", "reward_model_path", PPOConfig(**TINY))
    assert scorer.model.score.weight.abs().max() > 0
    trainer = tiny(sft_model_path=str(policy), lora_r=2, algorithm="rloo")
    expected = by_peft(base, policy)
    torch.testing.assert_close(logits(trainer.reference.module), expected, atol=1e-5, rtol=0)
    rollout = trainer.collect_experience().rollout
    both = [score_tokens(each, rollout) for each in (trainer.actor, trainer.reference)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)


def test_every_named_module_gets_an_adapter(tiny):
    with pytest.raises(UserError, match="lora_target_modules: GPT2LMHeadModel has no module named c_atn"):
        tiny(lora_r=4, lora_target_modules="c_fc,c_atn")


def test_adapters_of_random_weights_stand_on_nothing(tiny):
    with pytest.raises(UserError, match="lora_save adapter: .*nowhere on disk"):
        tiny(lora_r=4, lora_save="adapter")


@pytest.mark.parametrize(("stored", "told"), [("float32", False), ("bfloat16", True)])
def test_a_small_change_outlives_its_merging(tiny, base, tmp_path, stored, told, capfd):
    """In bfloat16 a weight has steps of a 256th of itself, and adapters at a usual learning rate change less."""
    trainer = tiny(algorithm="rloo", bf16=True, sft_model_path=str(base), torch_dtype=stored, lora_r=2)
    layer = trainer.actor.module.transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=1e-4)
    change = layer.get_delta_weight("default").float()
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].float()
    off = (saved - layer.base_layer.weight.float() - change).norm() / change.norm()
    assert (off > 0.1) == told
    assert (
        "of what the adapters change: to keep what was trained set lora_save adapter" in "".join(capfd.readouterr())
    ) == told
