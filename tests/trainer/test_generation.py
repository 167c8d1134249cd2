"""What draws the responses, and how it is chosen."""

import json
import sys

import pytest
import torch

from python_trainer import evaluate
from python_trainer.config import PPOConfig, UserError
from python_trainer.rollout import HfGenerator
from tests.lib.trainer import TINY

HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}  # of width 32: vLLM's least on a CPU
ROTARY = HEADS | {"head_dim": 32, "intermediate_size": 96, "num_key_value_heads": 1, "max_position_embeddings": 32}
WIDE = {
    "gpt2": {"model_type": "gpt2", "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2},
    "llama": ROTARY | {"model_type": "llama"},
    "llama, tied": ROTARY | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": ROTARY | {"model_type": "qwen2", "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": ROTARY | {"model_type": "qwen3"},
}
SHARP = {"initializer_range": 0.3}  # far from uniform: what a weight does can be seen


def wide(kind: str) -> str:
    return json.dumps(WIDE[kind] | SHARP)


def drawn(generator, trainer, rows: int = 40, length: int = 12) -> torch.Tensor:
    """Responses to prompts of one to eight letters, padded on the left."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 7, (rows, 8), generator=draw)
    attention = torch.arange(8) >= torch.randint(0, 8, (rows, 1), generator=draw)
    ids[~attention] = trainer.tokenizer.pad_token_id
    uniforms = torch.rand(rows, length, generator=draw, dtype=torch.float64)
    with torch.no_grad(), generator.serving(trainer.actor, trainer.tokenizer) as generate:
        return generate(ids, attention, uniforms)[0]


def test_tokens_do_not_depend_on_how_many_rows_go_together(tiny):
    trainer = tiny(model_config=wide("gpt2"))
    assert drawn(HfGenerator(64), trainer).equal(drawn(HfGenerator(3), trainer))


DRAWS = "test_vllm_draws_the_tokens_of_transformers[{}-{}]"
MERGED = "test_vllm_gets_whole_weights_with_adapters_merged[{}-{}]"
STEPS = "test_steps_with_vllm_are_those_with_transformers[{}]"
ITSELF = {kind: [DRAWS.format("{}", kind)] for kind in WIDE} | {"bfloat16": [MERGED.format("{}", "bfloat16")]}
ITSELF["gpt2"] += [MERGED.format("{}", "zero 3"), MERGED.format("{}", "lora"), STEPS]


def test_without_vllm_the_error_says_what_to_install(tiny, monkeypatch):
    evaluate._vllm.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "python_trainer.vllm", raising=False)
    with pytest.raises(UserError, match="generation_engine vllm needs vLLM: pip install 'vllm"):
        tiny(generation_engine="vllm")
    assert PPOConfig(**TINY).generation_engine == "hf"


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_of_memory_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="vllm_gpu_memory_utilization must be above 0 and at most 1"):
        PPOConfig(**TINY, vllm_gpu_memory_utilization=share)
