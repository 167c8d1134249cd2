"""What can be set: one dataclass per command. Field names are those TRL and transformers users know."""

import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING
from transformers.hf_argparser import HfArg

CONFIGS = Path(__file__).parent / "configs"
REPORTS = ("tensorboard", "wandb")
RENAMED = {"cliprange_ratio": "weight_clip"}  # settings, by the names that earlier versions wrote down
ADDED: dict[str, Any] = {
    "apply_chat_template": False,
    "overlong_prompts": "error",
    "mask_truncated_completions": False,
    "mask_zero_variance_groups": False,
}  # settings that they did not know, as they were
PATHS = ("output_dir", "deepspeed", "resume_from_checkpoint")  # and what ends in _path

Test = Callable[[float], bool]
RANGES: dict[str, tuple[Test, str]] = {}
for _names, _test, _allowed in (
    (
        "batch_size per_device_train_batch_size num_mini_batches num_ppo_epochs num_generations",
        lambda x: x >= 1,
        "at least 1",
    ),
    ("max_steps total_steps save_total_limit max_skipped_steps", lambda x: x >= 1, "at least 1"),
    ("ddp_timeout", lambda x: 1 <= x < 1 << 31, "at least 1 and below 2**31"),
    (
        "response_length local_rollout_forward_batch_size ptx_max_length max_prompt_length logging_steps",
        lambda x: x >= 1,
        "at least 1",
    ),
    ("num_train_epochs", lambda x: 0 < x < math.inf, "positive and finite"),
    ("eval_prompts eval_pairs kl_horizon lora_r critic_lora_r early_stopping_patience", lambda x: x >= 1, "at least 1"),
    ("max_length", lambda x: x >= 2, "at least 2"),
    ("warmup_steps eval_steps save_steps critic_warmup_steps log_completions_steps", lambda x: x >= 0, "at least 0"),
    ("seed", lambda x: 0 <= x < 1 << 32, "at least 0 and below 2**32"),
    (
        "weight_decay max_grad_norm cliprange cliprange_value vf_coef kl_coef cliprange_high ptx_coef"
        " center_rewards_coefficient rollout_correction_low rollout_correction_high",
        lambda x: 0 <= x < math.inf,
        "at least 0 and finite",
    ),
    ("missing_eos_penalty entropy_coef score_shift", math.isfinite, "finite"),
    ("learning_rate critic_learning_rate adam_epsilon score_clip", lambda x: 0 < x < math.inf, "positive and finite"),
    ("kl_target target_kl lora_alpha", lambda x: 0 < x < math.inf, "positive and finite"),
    ("dual_clip weight_clip", lambda x: 1 < x < math.inf, "above 1 and finite"),
    ("adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ("ema_decay", lambda x: 0 < x < 1, "above 0 and below 1"),
    ("gamma lam", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("vllm_gpu_memory_utilization", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("temperature", lambda x: 0 < x < math.inf, "positive and finite: responses are always sampled"),
):
    RANGES |= dict.fromkeys(_names.split(), (_test, _allowed))


class UserError(Exception):
    """Something the person who started the run can put right; shown as one line, without a traceback."""

    everywhere = False  # True: every rank raises it at the same place, so that they can still do something together


class SharedError(UserError):
    """Of something that every rank sees alike."""

    everywhere = True


class SettingError(UserError, ValueError):
    """A setting, or settings together, that cannot be."""


def by_new_names(settings: dict[str, Any]) -> dict[str, Any]:
    return ADDED | {RENAMED.get(name, name): value for name, value in settings.items()}


@dataclass
class RunConfig:
    """What every command needs to know."""

    output_dir: str = HfArg(default="runs/default", help="Folder of the run; each command writes its own subfolder.")
    overwrite_output_dir: bool = HfArg(default=False, help="Replace the results of an earlier run of this command.")
    seed: int = HfArg(default=0, help="Seed of initial weights, data order and sampling.")
    task: Literal["reviews", "exact", "files"] = HfArg(
        default="files", help="Where texts, pairs and prompts come from."
    )
    data_path: str | None = HfArg(
        default=None,
        help="For task files: a folder with texts, pairs and prompts, each a .jsonl, .json, .csv or .parquet or a "
        "folder of that name; or one data set: a file, what `datasets` saved, or train and test files as on the Hub. "
        "Where no part is named test or validation about a tenth is held out, by a hash: the same at every stage. "
        "For task reviews: the ratings file, instead of the copy fetched with pip.",
    )
    eval_data_path: str | None = HfArg(
        default=None, help="For task files: what is held out, instead of a part of data_path; read as that is."
    )
    column_mapping: str | None = HfArg(
        default=None,
        help="For task files: names of your columns (a mapping, or JSON), such as {prompt: question}. Ours are prompt; "
        "text, messages, or prompt and completion; chosen, rejected, and prompt and margin if you like.",
    )
    apply_chat_template: bool = HfArg(
        default=False,
        help="For task files: plain prompts become a user's message and plain answers an assistant's. What is messages "
        "in the data goes through the tokenizer's chat template either way.",
    )
    model_config: str | None = HfArg(
        default=None, help="Architecture of a model that starts from random weights (a mapping, or JSON)."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        HfArg(default=None, help="How transformers computes attention. Default: its own choice for the model.")
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = HfArg(
        default=None,
        help="Precision in which the policy's weights are read and, at the end, saved. Default: as they are stored. "
        "Training is in float32, or as bf16 and fp16 say, either way.",
    )
    ops_impl: Literal["auto", "torch", "cpu", "triton", "cuda"] = HfArg(
        default="auto", help="The `impl` of every ppo_kernels op."
    )
    bf16: bool = HfArg(default=False, help="Train in bfloat16 with float32 optimizer state.")
    fp16: bool = HfArg(default=False, help="Train in float16 with a dynamic loss scale; CUDA only.")
    preset: Literal["ds_chat", "instruct_gpt", "trl", "p3o", "gspo", "dapo", "cispo"] | None = HfArg(
        default=None, help="Settings of a known recipe (presets/); the file and the command line stand above them."
    )
    deepspeed: str = HfArg(default="ds_zero0.json", help="DeepSpeed configuration: a path, or a name in configs/.")
    disable_tqdm: bool = HfArg(default=False, help="No progress bar; the lines of text stay.")
    ddp_timeout: int = HfArg(default=600, help="Seconds after which a rank that hears nothing from the others stops.")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str) and not _is_text(value):
                raise SettingError(f"{name} holds a character that no text and no file's name has: {value[:60]!a}")
            if isinstance(value, int) and abs(value) >= 1 << 53:
                raise SettingError(f"{name} must be below 2**53, not a number of {len(str(abs(value)))} digits")
            if isinstance(value, str) and (name in PATHS or name.endswith("_path")):
                _refuse_unreachable(name, value)
        for name, (test, allowed) in RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not test(value):
                raise SettingError(f"{name} must be {allowed}, not {value}")
        report_packages(getattr(self, "report_to", "none"))
        if self.model_config is not None:
            architecture = _json("model_config", self.model_config)
            self.model_config = json.dumps(architecture)  # one spelling, so that two runs can be compared
            kind = architecture.get("model_type")
            if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
                raise SettingError(f"model_config needs a model_type that transformers knows, not {kind!r}")
        if self.column_mapping is not None:
            names = _json("column_mapping", self.column_mapping)
            if not all(isinstance(name, str) for name in names.values()) or len({*names.values()}) < len(names):
                raise SettingError(f"column_mapping must give each of our names a column of its own, not {names}")
            self.column_mapping = json.dumps(names)
        if self.fp16 and not torch.cuda.is_available():
            raise SettingError("fp16 needs a CUDA device; train in bf16 (bf16: true) or in float32")
        if self.fp16 and self.bf16:
            raise SettingError("fp16 and bf16 exclude each other")
        folder = Path(self.output_dir).absolute()
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise SettingError(f"output_dir {self.output_dir} cannot be written: {there} is no writable folder")


@dataclass
class OptimizerConfig(RunConfig):
    """AdamW and its schedule."""

    learning_rate: float = HfArg(default=3e-6, help="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = HfArg(default="linear", help="Schedule by its transformers name.")
    warmup_steps: int = HfArg(default=0, help="Optimizer steps of linear warm-up.")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW beta1.")
    adam_beta2: float = HfArg(default=0.95, help="AdamW beta2.")
    adam_epsilon: float = HfArg(default=1e-5, help="AdamW epsilon; 1e-5 tames the first PPO updates.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradient norm to clip at; 0 switches clipping off.")
    max_skipped_steps: int = HfArg(
        default=3, help="Stop once this many updates had a loss, gradient or gradient norm that is not finite."
    )
    batch_size: int = HfArg(default=64, help="Samples per step over all ranks.")
    per_device_train_batch_size: int = HfArg(
        default=64, help="Samples per micro-batch. Memory and speed only: the step does not depend on it."
    )
    report_to: Literal["none", "tensorboard", "wandb", "all"] = HfArg(
        default="none", help="Curves for TensorBoard or wandb, beside metrics.jsonl; all: those of them installed."
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="Keep no activations inside the layers, compute them again in the backward pass."
    )
    lora_r: int | None = HfArg(
        default=None,
        help="Train LoRA adapters of this rank (needs peft). If the model to start from is such an adapter, it is "
        "trained further, with its own lora_alpha and modules; without lora_r it is merged, and all are trained.",
    )
    lora_alpha: int = HfArg(default=16, help="New adapters are scaled by lora_alpha / rank.")
    lora_target_modules: str | None = HfArg(
        default=None,
        help="Modules that get new adapters, separated by commas, or all-linear. Default: peft's for the model.",
    )
    lora_save: Literal["merged", "adapter"] = HfArg(
        default="merged", help="Save a whole model with the adapters merged in, or the adapters alone, for peft."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {name: getattr(self, name) for name in ("lora_r", "critic_lora_r") if hasattr(self, name)}
        for name in ("lora_alpha", "lora_target_modules", "lora_save"):
            its = ["lora_r"] if name == "lora_save" else list(ranks)  # a critic is not saved as an adapter
            if getattr(self, name) != getattr(OptimizerConfig, name) and all(ranks[one] is None for one in its):
                raise SettingError(
                    f"{name} {getattr(self, name)} is for LoRA adapters, and none are trained: set {' or '.join(its)}, "
                    f"or leave {name} out"
                )


@dataclass
class TextConfig(OptimizerConfig):
    """Learning from texts or from pairs of them."""

    model_path: str | None = HfArg(default=None, help="Model to start from; without it, model_config is initialised.")
    max_length: int = HfArg(default=1024, help="Texts are cut to this many tokens, end token included.")
    max_steps: int = HfArg(default=500, help="Optimizer steps.")
    num_train_epochs: float | None = HfArg(default=None, help="Passes over the data, instead of max_steps.")
    eval_steps: int = HfArg(default=0, help="Evaluate on held-out rows every so many steps; 0 means at the end only.")
    logging_steps: int = HfArg(default=50, help="Print a line every so many steps; metrics.jsonl has all of them.")


@dataclass
class SftConfig(TextConfig):
    """Supervised fine-tuning on texts."""

    completion_only_loss: bool = HfArg(
        default=True,
        help="Learn from completions alone, and of chats from the assistant's turns, not from what comes before them. "
        "Of plain texts without a prompt all is learned.",
    )


@dataclass
class RewardConfig(TextConfig):
    """Reward model on preference pairs; model_path defaults to the result of sft."""

    reward_loss: Literal["end_token", "token_mean"] = HfArg(
        default="end_token",
        help="Compare the scores at the last tokens, or (DeepSpeed-Chat) the mean over all tokens after the first "
        "difference, up to the end of the longer text.",
    )
    center_rewards_coefficient: float = HfArg(
        default=0.0, help="Weight of the squared sum of a pair's scores, which keeps scores around 0; 0.01 is usual."
    )
    eval_pairs: int = HfArg(default=2000, help="Held-out pairs on which accuracy is measured.")


@dataclass
class SamplingConfig(RunConfig):
    """How responses are drawn and scored."""

    response_length: int = HfArg(default=256, help="Most tokens in a response.")
    temperature: float = HfArg(default=1.0, help="Temperature of sampling and of scoring alike.")
    local_rollout_forward_batch_size: int = HfArg(default=64, help="Rows per forward pass without gradient.")
    generation_engine: Literal["hf", "vllm"] = HfArg(
        default="hf",
        help="What draws the responses: transformers' generate, or vLLM in the same process (vllm>=0.32), which gets "
        "the weights of now before each rollout. Log-probabilities are the trainer's own either way.",
    )
    vllm_gpu_memory_utilization: float = HfArg(
        default=0.3,
        help="For generation_engine vllm: share of each device's memory that vLLM may take for its copy of the weights "
        "and its cache of keys and values. The rest is the trainer's. On a CPU: share that the whole process may take.",
    )
    max_prompt_length: int | None = HfArg(
        default=None, help="Most tokens in a prompt. Default: what the model's context leaves beside response_length."
    )
    overlong_prompts: Literal["error", "filter", "truncate"] = HfArg(
        default="error",
        help="Prompts with more tokens: stop, leave them out, or keep their end (of a chat the last turns).",
    )
    stop_strings: str | None = HfArg(
        default=None,
        help="Text that ends a response, or a JSON list of such texts, beside the end tokens and stop_strings of the "
        "model's generation_config.json.",
    )
    eval_prompts: int = HfArg(default=500, help="Held-out prompts used for evaluation.")
    kl_coef: float = HfArg(default=0.05, help="Weight of the KL penalty against the reference; beta of online_dpo.")
    reward_function: str | None = HfArg(
        default=None,
        help="Reward from Python instead of a model: `file.py:name` or `package.module:name`, or several with commas; "
        "called with prompts, completions, completion_ids and the data's other columns (reward_functions.py).",
    )
    reward_weights: str | None = HfArg(
        default=None, help="What the numbers of several reward functions count, with commas. Default: 1 each."
    )
    score_shift: float = HfArg(
        default=0.0, help="For task exact: added to each score times the prompt's number, which moves no optimum."
    )
    sft_model_path: str | None = HfArg(
        default=None,
        help="Reference policy, and the policy's start. Default: the result of sft, or model_config.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stops()
        self.reward_functions()

    def reward_functions(self) -> tuple[list[str], list[float]]:
        """Names and weights of those that reward_function lists."""
        names = [name.strip() for name in (self.reward_function or "").split(",") if name.strip()]
        given = self.reward_weights.split(",") if self.reward_weights else ["1"] * len(names)
        try:
            weights = [float(weight) for weight in given]
        except ValueError as error:
            raise SettingError(f"reward_weights must be numbers with commas, not {self.reward_weights!r}") from error
        if len(weights) != len(names) or not all(map(math.isfinite, weights)):
            raise SettingError(
                f"reward_weights {self.reward_weights} must be a finite number for each of the {len(names)} functions "
                "of reward_function"
            )
        return names, weights

    def stops(self) -> list[str]:
        """The texts of stop_strings."""
        given: Any = self.stop_strings
        if given is None:
            return []
        if given.lstrip().startswith("["):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise SettingError(f"stop_strings is no JSON list: {error}") from error
        found = given if isinstance(given, list) else [given]
        if not all(isinstance(one, str) and one for one in found):
            raise SettingError(f"stop_strings must be texts that are not empty, not {self.stop_strings}")
        return found


@dataclass
class EvalConfig(SamplingConfig):
    """Gold score and KL of a trained policy. What is not given is as it was in the run under output_dir."""

    model_path: str | None = HfArg(default=None, help="Policy to evaluate. Default: the result of train.")


def installed_reports() -> list[str]:
    return [name for name in REPORTS if importlib.util.find_spec(name) is not None]


def report_packages(report_to: str) -> list[str]:
    """The packages that `report_to` names: `none`, one of them, or `all` that are installed."""
    if report_to == "none":
        return []
    if report_to == "all":
        return installed_reports()
    if report_to not in installed_reports():
        raise SettingError(f"report_to {report_to}: the package is not installed; pip install {report_to}")
    return [report_to]


def resolve(path: str) -> Path:
    """A file as given, or else the one of that name shipped in configs/."""
    for candidate in (path, str(CONFIGS / path)):
        if os.path.isfile(candidate):
            return Path(candidate)
    shipped = ", ".join(sorted(p.name for p in CONFIGS.iterdir()))
    raise UserError(f"no such file: {path[:200]} (shipped configurations: {shipped})")


def _refuse_unreachable(name: str, path: str) -> None:
    """Raise where nothing can be: a name too long, a circle of links, a closed folder."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise SettingError(f"{name} leads nowhere: {error.strerror}: {path[:60]!r}") from None


def _is_text(value: str) -> bool:
    """Whether it can be written in UTF-8, and handed to the operating system."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingError(f"{name} must be a mapping")
    return content
