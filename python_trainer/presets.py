"""Recipes by name. Sizes (models, batches, lengths, steps) stay the user's; what is not listed is the default."""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # DeepSpeed-Chat step 3 as it ships (its script's learning rates; no whitening, one epoch), without its defects.
    "ds_chat": {
        "train": {
            "algorithm": "ppo",
            "kl_coef": 0.1,
            "score_clip": 5.0,
            "cliprange": 0.2,
            "cliprange_value": 0.2,
            "gamma": 1.0,
            "lam": 0.95,
            "vf_coef": 1.0,
            "num_ppo_epochs": 1,
            "whiten_advantages": False,
            "value_model_init": "reward",
            "learning_rate": 9.65e-6,
            "critic_learning_rate": 5e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 100,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-8,
        },
        "reward": {"reward_loss": "token_mean"},
    },
    # Ouyang et al., 2022, appendix C.
    "instruct_gpt": {
        "train": {
            "algorithm": "ppo",
            "kl_coef": 0.02,
            "cliprange": 0.2,
            "gamma": 1.0,
            "lam": 0.95,
            "num_ppo_epochs": 1,
            "num_mini_batches": 8,
            "temperature": 1.0,
            "value_model_init": "reward",
            "ptx_coef": 27.8,
            "ema_decay": 0.992,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 80,
        },
    },
    # TRL's PPOConfig, after the N implementation details of Huang et al., 2024.
    "trl": {
        "train": {
            "algorithm": "ppo",
            "kl_coef": 0.05,
            "cliprange": 0.2,
            "cliprange_value": 0.2,
            "vf_coef": 0.1,
            "gamma": 1.0,
            "lam": 0.95,
            "num_ppo_epochs": 4,
            "temperature": 0.7,
            "value_model_init": "reward",
            "learning_rate": 3e-6,
            "lr_scheduler_type": "linear",
        },
    },
    # Wu et al., 2023 (arXiv 2310.00212), with the settings of the first author's code for 1B models.
    "p3o": {
        "train": {
            "algorithm": "p3o",
            "p3o_variant": "joint",
            "num_generations": 2,
            "kl_coef": 0.05,
            "cliprange": 0.2,
            "weight_clip": 10.0,
            "num_ppo_epochs": 4,
            "temperature": 1.0,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "weight_decay": 1e-6,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-8,
        },
    },
}
