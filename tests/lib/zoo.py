"""Architectures of transformers with tiny random weights, far enough from uniform that a wrong token shows."""

import json

import torch

from python_trainer.data import Rollout, left_pad
from python_trainer.models import load_policy, save_model
from python_trainer.rollout import score_tokens

PLAIN = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
GROUPED = PLAIN | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 8}
OF_GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

ZOO: dict[str, dict] = {
    "gpt2": OF_GPT2,
    "gpt_bigcode": OF_GPT2,
    "gptj": OF_GPT2 | {"rotary_dim": 4},
    "codegen": OF_GPT2 | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    },
    "gpt_neox": PLAIN,
    "gpt_neox_japanese": {k: v for k, v in PLAIN.items() if k != "intermediate_size"}
    | {"intermediate_multiple_size": 2},
    "llama": GROUPED,
    "llama, tied": GROUPED | {"tie_word_embeddings": True},
    "mistral": GROUPED | {"sliding_window": 4},
    "ministral": WIDE_HEADS | {"sliding_window": 4},
    "qwen2": GROUPED,
    "qwen2, sliding": GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": WIDE_HEADS,
    "gemma": WIDE_HEADS,
    "gemma2": WIDE_HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": WIDE_HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "opt": PLAIN | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "opt, projected": PLAIN | {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32, "initializer_range": 0.2},
    "falcon": PLAIN | {"alibi": False},
    "falcon, alibi": PLAIN | {"alibi": True},
    "phi": PLAIN,
    "phi3": GROUPED,
    "phimoe": GROUPED | LOCAL_EXPERTS,
    "mixtral": GROUPED | LOCAL_EXPERTS,
    "mixtral, jitter": GROUPED | LOCAL_EXPERTS | {"router_jitter_noise": 0.1},
    "qwen2_moe": GROUPED | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": WIDE_HEADS | EXPERTS,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 4},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "cohere": GROUPED,
    "cohere2": WIDE_HEADS | {"sliding_window": 4},
    "granite": GROUPED,
    "granitemoe": GROUPED | LOCAL_EXPERTS,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "persimmon": PLAIN,
    "nemotron": GROUPED,
    "glm": WIDE_HEADS,
    "glm4": WIDE_HEADS,
    "helium": GROUPED | {"head_dim": 4},
    "exaone4": GROUPED | {"sliding_window": 4},
    "ernie4_5": WIDE_HEADS,
    "seed_oss": WIDE_HEADS,
    "arcee": GROUPED,
    "apertus": GROUPED,
    "diffllama": GROUPED,
    "gpt_oss": WIDE_HEADS | LOCAL_EXPERTS | {"sliding_window": 4},
    "deepseek_v3": PLAIN
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "llama4_text": WIDE_HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 32},
    "dbrx": {
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 16,
            "hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_jitter_eps": 0.1,
        },
        "initializer_range": 0.2,
    },
    "jetmoe": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    },
    "xglm": {
        "d_model": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 32,
        "init_std": 0.2,
    },
    "biogpt": PLAIN,
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 32},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2},
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "initializer_range": 0.2,
    },
    "falcon_mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2},
    "bamba": GROUPED | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "jamba": GROUPED
    | {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "lru_width": 16,
        "intermediate_size": 32,
        "attention_window_size": 8,
        "initializer_range": 0.2,
    },
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 32},
    "qwen3_next": WIDE_HEADS
    | EXPERTS
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 16,
    },
    "granitemoehybrid": GROUPED
    | LOCAL_EXPERTS
    | {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "shared_intermediate_size": 16,
    },
    "bert": PLAIN,
    "roberta": PLAIN,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 32},
}


def architecture(name: str) -> str:
    """The setting model_config."""
    return json.dumps({"model_type": name.split(",")[0]} | ZOO[name])


def two_steps(tiny, name: str, algorithm: str):
    """A trainer that made them: each compared its rollout's log-probabilities, and those of its first update."""
    trainer = tiny(model_config=architecture(name), algorithm=algorithm, learning_rate=1e-2)
    rows = [trainer.train_step() for _ in range(2)]
    assert abs(rows[0]["objective/kl"]) < 1e-6
    assert abs(rows[1]["objective/kl"]) > 1e-4
    assert all(row["val/skipped_updates"] == 0 for row in rows)
    return trainer


@torch.no_grad()
def padding_gap(trainer) -> float:
    """How far log-probabilities of prompts that are padded together are from those of each alone."""
    prompts = [[2, 3, 4, 5], [5], [6, 2]]
    responses = torch.tensor([[2, 3, 1, 0, 0], [3, 2, 4, 5, 6], [4, 4, 2, 3, 1]])
    together = score_tokens(trainer.actor, Rollout.of(*left_pad(prompts, 0), responses, 1))
    alone = [
        score_tokens(trainer.actor, Rollout.of(*left_pad([prompt], 0), responses[row : row + 1], 1))
        for row, prompt in enumerate(prompts)
    ]
    return (together - torch.cat(alone)).abs().max().item()


@torch.no_grad()
def saved_gap(trainer, folder) -> float:
    """How far the logits of a saved model that is loaded again are from those of the one in memory."""
    save_model(trainer.actor.model, trainer.tokenizer, folder)
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    logits = [
        model(input_ids=ids, use_cache=False).logits
        for model in (trainer.actor.module, load_policy(folder, trainer.config, trainer.tokenizer))
    ]
    return (logits[0] - logits[1]).abs().max().item()
