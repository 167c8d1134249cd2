"""DeepSpeed files as people have them: filled in, honoured or refused by name, never ignored."""

import json

import pytest

from python_trainer.config import EvalConfig, SftConfig, UserError
from python_trainer.deepspeed_engine import deepspeed_config
from python_trainer.deepspeed_file import deepspeed_file
from python_trainer.ppo_config import PPOConfig
from python_trainer.settings import load

AUTO = {  # what transformers' documentation shows
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 2e8},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
}


@pytest.fixture
def file(tmp_path):
    def write(content: object) -> str:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_auto_is_what_the_settings_say(file):
    config = PPOConfig(deepspeed=file(AUTO), bf16=True, max_grad_norm=0.5, per_device_train_batch_size=4)
    assert deepspeed_config(config) == {
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1},
        "steps_per_print": 2000,
    }


SAME = [
    {"optimizer": {"type": "AdamW", "params": {"lr": 3e-6, "betas": [0.9, 0.95], "eps": 1e-5, "torch_adam": True}}},
    {"optimizer": {"type": "Adam", "params": {"betas": ["auto", "auto"]}}, "scheduler": {"type": "WarmupLR"}},
    {"gradient_clipping": 1, "train_batch_size": 64, "train_micro_batch_size_per_gpu": 64},
    {"train_batch_size": 16, "gradient_accumulation_steps": 1, "bf16": {"enabled": False}, "fp16": {}},
    "\ufeff{}",
]


@pytest.mark.parametrize("content", SAME)
def test_what_agrees_with_the_settings_may_stand_there(file, content):
    load("train", None, [f"--deepspeed={file(content)}", "--num_mini_batches=4"], PPOConfig)


DIFFERENT = [
    ({"optimizer": {"type": "AdamW", "params": {"lr": 5.0}}}, "optimizer lr 5.0 .* have 3e-06; set learning_rate"),
    ({"optimizer": {"params": {"lr": "auto"}}}, "optimizer None is not AdamW"),
    ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer Lamb is not AdamW"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "set adam_beta1 and adam_beta2"),
    ({"optimizer": {"type": "AdamW", "params": {"freeze_step": 4}}}, "this trainer has no such option; leave it out"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0}}}, "set lr_scheduler_type and warmup_steps"),
    ({"bf16": {"enabled": True}}, "bf16.enabled true and the settings have bf16 False"),
    ({"fp16": {"enabled": True}}, "fp16.enabled true and the settings have fp16 False"),
    ({"bf16": 1}, "bf16 must be a mapping"),
    ({"train_batch_size": 32}, "train_batch_size 32 and the settings make it 64"),
    ({"train_micro_batch_size_per_gpu": 1}, "settings make it 64; set per_device_train_batch_size"),
    ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps 8 and the settings make it 1"),
    ({"gradient_clipping": 0.3}, "gradient_clipping 0.3 and the settings make it 1.0; set max_grad_norm"),
    ({"amp": {"enabled": True}}, "amp is nothing that this trainer hands to DeepSpeed"),
    ({"zero_optimisation": {"stage": 3}}, "zero_optimisation is nothing that this trainer hands"),
    ({"zero_optimization": {"stage": "3"}}, "with a stage of 0, 1, 2 or 3"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer needs ZeRO stage 1"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs ZeRO stage 3"),
    ("stage: 1", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "must be a mapping"),
]


@pytest.mark.parametrize(("content", "message"), DIFFERENT)
def test_what_differs_from_the_settings_is_refused(file, content, message):
    with pytest.raises(UserError, match=f"deepspeed: .*ds.json.*{message}"):
        load("train", None, [f"--deepspeed={file(content)}"], PPOConfig)


def test_a_command_without_an_optimizer_minds_none(file):
    content = {"optimizer": {"type": "AdamW", "params": {"lr": 5.0}}, "train_batch_size": 7, "gradient_clipping": 0.3}
    load("eval", None, [f"--deepspeed={file(content)}"], EvalConfig)
    with pytest.raises(UserError, match="set learning_rate"):
        deepspeed_file(SftConfig(deepspeed=file(content)))


def test_what_deepspeed_itself_refuses_is_one_line(file, tiny):
    with pytest.raises(UserError, match=r"DeepSpeed does not take .*ds.json: .*reduce_bucket_sise"):
        tiny(deepspeed=file({"zero_optimization": {"stage": 1, "reduce_bucket_sise": 1}}))


def test_the_optimizer_can_live_in_host_memory(file, tiny):
    """By torch's AdamW, which runs there as well: DeepSpeed asks for its own, and would have to compile it."""
    zero = {"stage": 2, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}}
    offloaded = tiny(deepspeed=file({"zero_optimization": zero}))
    plain = tiny(deepspeed="ds_zero2.json")
    for trainer in (offloaded, plain):
        trainer.train_step()
    for one, other in zip(offloaded.actor.module.parameters(), plain.actor.module.parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-6
