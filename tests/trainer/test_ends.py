"""Where responses end, and what of its source a saved model keeps."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from python_trainer.config import RewardConfig
from python_trainer.data import Rollout, left_pad
from python_trainer.models import save_model
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import HfGenerator, StopStrings, stopped
from python_trainer.sft import reward
from tests.lib.trainer import TINY
from tests.verify.trainer.test_vllm import VLLM, drawn, vllm, wide

__all__ = ["vllm"]

SOURCE = {"eos_token_id": [1, 3], "temperature": 0.6, "top_p": 0.9, "top_k": 2, "do_sample": True, "pad_token_id": 0}
SOURCE |= {"repetition_penalty": 5.0, "suppress_tokens": [4], "max_new_tokens": 1}


@pytest.fixture
def source(tiny, tmp_path):
    """``source(**generation)`` is the folder of a bfloat16 model with dropout, a chat template and these settings."""

    def make(config=TINY["model_config"], **generation):
        trainer = tiny(model_config=config, algorithm="rloo")
        module, tokenizer = trainer.actor.module, trainer.tokenizer
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        save_model(module, tokenizer, tmp_path / "source")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
        model.config.attn_pdrop = 0.3
        model.save_pretrained(tmp_path / "source")
        (tmp_path / "source" / "manifest.json").unlink(missing_ok=True)
        (tmp_path / "source" / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path / "source"

    return make


def test_a_rollout_ends_at_every_end_token():
    responses = torch.tensor([[2, 3, 4, 5, 6], [2, 1, 3, 0, 0], [3, 3, 3, 3, 3], [2, 2, 2, 2, 2], [6, 6, 6, 6, 1]])
    rollout = Rollout.of(*left_pad([[2]] * 5, 0), responses, [1, 3])
    assert rollout.mask.sum(dim=1).tolist() == [2, 2, 1, 5, 5]
    assert rollout.ended.tolist() == [True, True, True, False, True]
    assert rollout[1:3].ended.tolist() == [True, True]


@pytest.mark.parametrize("vllm", [1], indirect=True)
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_responses_end_at_every_end_token_of_the_source(tiny, vllm, source, engine):
    """The tokenizer's, though the settings do not name it, too; and nothing else of these settings moves a draw."""
    path = str(source(wide("gpt2"), **SOURCE | {"eos_token_id": [3]}))
    settings = (VLLM if engine == "vllm" else {}) | {"temperature": 1.0}
    trainer = tiny(sft_model_path=path, batch_size=64, **settings)
    assert trainer.actor.end_ids == [3, 1]
    experience = trainer.collect_experience()
    responses = [row[mask].tolist() for row, mask in zip(experience.rollout.responses, experience.mask, strict=True)]
    lasts = {row[-1] for row, ended in zip(responses, experience.ended, strict=True) if ended}
    assert lasts == {1, 3}
    assert not any({1, 3} & set(row[:-1]) for row in responses)
    assert any(4 in row for row in responses)
    assert max(map(len, responses)) > 1
    assert trainer.train_step()["val/eos_rate"] == experience.ended.float().mean()


def test_the_generators_agree_on_several_ends(tiny, source):
    trainer = tiny(sft_model_path=str(source(**SOURCE)))
    assert drawn(HfGenerator(64), trainer, length=8).equal(drawn(HfGenerator(3), trainer, length=8))


@pytest.mark.parametrize("given", ["b c", '["b c", "e e"]'])
def test_responses_end_at_stop_strings(tiny, source, given):
    """Those of the settings and of the source; the text that ends a response belongs to it."""
    path = str(source(eos_token_id=1, stop_strings=["c d"]))
    trainer = tiny(sft_model_path=path, stop_strings=given, batch_size=64)
    experience = trainer.collect_experience()
    texts = [
        trainer.tokenizer.decode(row[mask])
        for row, mask in zip(experience.rollout.responses, experience.mask, strict=True)
    ]
    stops = ["b c", "c d"] + (["e e"] if "e e" in given else [])
    for text, ended in zip(texts, experience.ended.tolist(), strict=True):
        assert ended == text.endswith((*stops, "<eos>"))
        assert not any(stop in text[:-1] for stop in stops), text
    assert all(any(text.endswith(stop) for text in texts) for stop in stops)


def test_a_stop_string_may_end_inside_a_token_and_begin_in_another():
    read = []

    class Letters:
        def decode(self, ids):
            read.append(len(ids))
            return "".join({1: "ab", 2: "cd", 3: "x", 4: "é"}[token] for token in ids)

    responses = torch.tensor([[3, 1, 2, 3], [1, 3, 2, 1], [4, 4, 3, 3]])
    found = stopped(responses, Letters(), ["bc", "éx"])
    assert found.any(dim=1).tolist() == [True, False, True]
    assert found.int().argmax(dim=1).tolist() == [2, 0, 2]
    stop = StopStrings(Letters(), ["bc", "éx"], 1)
    for end in range(1, 5):
        read.clear()
        assert stop(torch.cat([responses[:, :1], responses[:, :end]], dim=1), None).equal(found[:, end - 1])
        assert read == [end] * 3  # the last tokens of each row, once


@pytest.mark.parametrize("given", ["", "[1]", '["a", ""]', '["a"'])
def test_stop_strings_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="stop_strings"):
        PPOConfig(**TINY, stop_strings=given)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_saved_model_loses_nothing_of_its_source(tiny, source, tmp_path, stage, rank):
    path = source(**SOURCE)
    trainer = tiny(sft_model_path=str(path), deepspeed=f"ds_zero{stage}.json", lora_r=rank, algorithm="rloo")
    trainer.train_step()
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "saved")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / "saved"))
    assert before["dtype"] == "bfloat16"
    assert before["attn_pdrop"] == 0.3
    assert before == after
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (path, tmp_path / "saved")]
    assert sizes[0] == sizes[1]
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in SOURCE} == SOURCE
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_text() == (path / name).read_text()
    before, after = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (path, tmp_path / "saved")
    )
    assert before.items() <= after.items()
    again = tiny(sft_model_path=str(tmp_path / "saved"), algorithm="rloo")
    assert again.actor.end_ids == [1, 3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    weights = zip(model.parameters(), again.actor.module.parameters(), strict=True)
    assert all(torch.equal(one.float(), other) for one, other in weights)


def test_settings_that_transformers_would_not_write_are_kept(tiny, source, tmp_path):
    """Such as a temperature beside do_sample False, as in Llama 2."""
    trainer = tiny(sft_model_path=str(source(temperature=0.9, top_p=0.6, do_sample=False)), algorithm="rloo")
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path / "saved")
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (kept.temperature, kept.top_p, kept.do_sample, kept.eos_token_id) == (0.9, 0.6, False, 1)


def test_a_reward_model_has_the_precision_of_its_policy(source, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": "a b", "rejected": "c d"}) + "\n")
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"chosen": "a c", "rejected": "c e"}) + "\n")
    common = {"task": "files", "data_path": str(tmp_path), "output_dir": str(tmp_path / "r"), "disable_tqdm": True}
    reward(RewardConfig(**common, model_path=str(source(**SOURCE)), max_steps=1, batch_size=2))
    config = json.loads((tmp_path / "r" / "reward" / "model" / "config.json").read_text())
    assert (config["dtype"], config["attn_pdrop"], config["pad_token_id"]) == ("bfloat16", 0.3, 0)
