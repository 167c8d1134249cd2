"""What can be set: one dataclass per command, filled from a YAML file and then from the command line.

Field names are those TRL and transformers users know. In the file, a mapping named after a command
(`sft:`, `reward:`, `train:`, `eval:`) holds for that command only; every other key holds for all of them.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser
from transformers.hf_argparser import HfArg

CONFIGS = Path(__file__).parent / "configs"


Test = Callable[[float], bool]
RANGES: dict[str, tuple[Test, str]] = {}
for _names, _test, _allowed in (
    ("batch_size per_device_train_batch_size num_mini_batches num_ppo_epochs", lambda x: x >= 1, "at least 1"),
    ("max_steps total_steps save_total_limit max_skipped_steps ddp_timeout", lambda x: x >= 1, "at least 1"),
    ("response_length local_rollout_forward_batch_size", lambda x: x >= 1, "at least 1"),
    ("eval_prompts eval_pairs", lambda x: x >= 1, "at least 1"),
    ("max_length", lambda x: x >= 2, "at least 2"),
    ("seed warmup_steps eval_steps save_steps", lambda x: x >= 0, "at least 0"),
    ("weight_decay max_grad_norm cliprange cliprange_value", lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    ("missing_eos_penalty kl_coef", math.isfinite, "finite"),
    ("learning_rate critic_learning_rate adam_epsilon score_clip", lambda x: 0 < x < math.inf, "positive and finite"),
    ("adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ("gamma lam", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("temperature", lambda x: 0 < x < math.inf, "positive and finite: responses are always sampled"),
):
    RANGES |= dict.fromkeys(_names.split(), (_test, _allowed))


class UserError(Exception):
    """Something the person who started the run can put right; shown as one line, without a traceback."""


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
        help="For task files: a folder with texts.jsonl, pairs.jsonl and prompts.jsonl. Of each, a tenth is held out, "
        "drawn by a fixed seed: the same rows at every stage. "
        "For task reviews: the ratings file, instead of the copy fetched with pip.",
    )
    model_config: str | None = HfArg(
        default=None, help="Architecture of a model that starts from random weights (a mapping, or JSON)."
    )
    ops_impl: Literal["auto", "torch", "cpu", "triton", "cuda"] = HfArg(
        default="auto", help="The `impl` of every ppo_kernels op."
    )
    bf16: bool = HfArg(default=False, help="Train in bfloat16 with float32 optimizer state.")
    deepspeed: str = HfArg(default="ds_zero0.json", help="DeepSpeed configuration: a path, or a name in configs/.")
    disable_tqdm: bool = HfArg(default=False, help="No progress bar; the lines of text stay.")
    ddp_timeout: int = HfArg(default=600, help="Seconds after which a rank that hears nothing from the others stops.")

    def __post_init__(self) -> None:
        for name, (test, allowed) in RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not test(value):
                raise ValueError(f"{name} must be {allowed}, not {value}")
        if self.model_config is not None:
            architecture = _json("model_config", self.model_config)
            self.model_config = json.dumps(architecture)  # one spelling, so that two runs can be compared
            kind = architecture.get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"model_config needs a model_type that transformers knows, not {kind!r}")
        settings = _json(f"the file of deepspeed, {self.deepspeed},", resolve(self.deepspeed).read_text())
        if (settings.get("fp16") or {}).get("enabled"):
            raise ValueError(f"deepspeed: {self.deepspeed} enables fp16; train in bf16 (bf16: true) or in float32")
        folder = Path(self.output_dir).absolute()
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise ValueError(f"output_dir {self.output_dir} cannot be written: {there} is no writable folder")


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
    max_skipped_steps: int = HfArg(default=3, help="Stop once this many updates had a non-finite loss or gradient.")
    batch_size: int = HfArg(default=64, help="Samples per step over all ranks.")
    per_device_train_batch_size: int = HfArg(
        default=64, help="Samples per micro-batch. Memory and speed only: the step does not depend on it."
    )


@dataclass
class SftConfig(OptimizerConfig):
    """Supervised fine-tuning on texts."""

    model_path: str | None = HfArg(default=None, help="Model to start from; without it, model_config is initialised.")
    max_length: int = HfArg(default=32, help="Texts are cut to this many tokens, end token included.")
    max_steps: int = HfArg(default=500, help="Optimizer steps.")


@dataclass
class RewardConfig(SftConfig):
    """Reward model on preference pairs; model_path defaults to the result of sft."""

    eval_pairs: int = HfArg(default=2000, help="Held-out pairs on which accuracy is measured.")


@dataclass
class SamplingConfig(RunConfig):
    """How responses are drawn and scored."""

    response_length: int = HfArg(default=53, help="Most tokens in a response.")
    temperature: float = HfArg(default=1.0, help="Temperature of sampling and of scoring alike.")
    local_rollout_forward_batch_size: int = HfArg(default=64, help="Rows per forward pass without gradient.")
    eval_prompts: int = HfArg(default=500, help="Held-out prompts used for evaluation.")
    kl_coef: float = HfArg(default=0.05, help="Weight of the KL penalty against the reference, inside the reward.")
    sft_model_path: str | None = HfArg(
        default=None,
        help="Reference policy, and the policy's start. Default: the result of sft, or model_config.",
    )


@dataclass
class EvalConfig(SamplingConfig):
    """Gold score and KL of a trained policy. What is not given is as it was in the run under output_dir."""

    model_path: str | None = HfArg(default=None, help="Policy to evaluate. Default: the result of train.")


@dataclass
class PPOConfig(SamplingConfig, OptimizerConfig):
    """The reinforcement-learning stage."""

    algorithm: Literal["ppo"] = HfArg(default="ppo", help="Which file of algorithms/ gives the loss.")
    reward_model_path: str | None = HfArg(default=None, help="Reward model. Default: the result of reward.")
    value_model_init: Literal["reward", "policy"] = HfArg(
        default="policy", help="Critic from the reward model, or from the policy's body with a zero head."
    )
    critic_learning_rate: float | None = HfArg(default=None, help="Default: learning_rate.")
    total_steps: int = HfArg(default=100, help="PPO steps (rollout and updates).")
    num_ppo_epochs: int = HfArg(default=4, help="Passes over each rollout.")
    num_mini_batches: int = HfArg(default=1, help="Optimizer steps per pass.")
    kl_estimator: Literal["k1", "k3"] = HfArg(default="k1", help="Estimator of that penalty; k1 is the exact one.")
    score_clip: float | None = HfArg(default=None, help="Bound on the score's magnitude.")
    missing_eos_penalty: float | None = HfArg(default=None, help="Subtracted from the score of an unfinished response.")
    cliprange: float = HfArg(default=0.2, help="Clip range of the policy ratio.")
    cliprange_value: float = HfArg(default=0.2, help="Clip range of the value.")
    gamma: float = HfArg(default=1.0, help="Discount.")
    lam: float = HfArg(default=0.95, help="GAE lambda.")
    whiten_rewards: bool = HfArg(default=False, help="Scale rewards to unit variance, keeping their mean.")
    eval_steps: int = HfArg(default=0, help="Evaluate every so many steps; 0 means before and after only.")
    save_steps: int = HfArg(default=0, help="Checkpoint every so many steps; 0 means none but the final model.")
    save_total_limit: int = HfArg(default=2, help="Committed checkpoints to keep.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="A checkpoint's path, or `latest`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_mini_batches:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of num_mini_batches {self.num_mini_batches}"
            )


COMMANDS: dict[str, type[RunConfig]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "train": PPOConfig,
    "eval": EvalConfig,
}


class _Parser(HfArgumentParser):
    """Errors are one line; argparse alone would print the usage of fifty options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


C = TypeVar("C", bound=RunConfig)
NOT_OF_A_RUN = {"output_dir", "overwrite_output_dir", "disable_tqdm"}
OF_THE_REFERENCE = {"seed", "model_config", "temperature"}


def load(command: str, path: str | None, overrides: Sequence[str], kind: type[C]) -> C:
    """The configuration of `command`: defaults, then the file, then the command line.

    `eval` is about a run: the settings it was trained with stand above those the file has for all commands, and the
    ones that make its reference what it is cannot be changed.
    """
    common, own = _read(path, command)
    if path is not None:
        everywhere = {field.name for cls in COMMANDS.values() for field in dataclasses.fields(cls)}
        _refuse_unknown(list(common), everywhere | set(COMMANDS), path)
    known = {field.name for field in dataclasses.fields(kind)}
    from_file = {key: value for key, value in common.items() if key in known}
    _refuse_unknown([*own, *(a[2:].split("=")[0] for a in overrides if a.startswith("--"))], known | {"help"}, path)
    config = _parse(command, kind, from_file | own, overrides)
    trained = Path(config.output_dir) / "train" / "config.yaml"
    if command != "eval" or not trained.is_file():
        return config
    of_run = {key: value for key, value in _read(str(trained), "")[0].items() if key in known - NOT_OF_A_RUN}
    config = _parse(command, kind, from_file | of_run | own, overrides)
    for key in OF_THE_REFERENCE & of_run.keys():
        if getattr(config, key) != of_run[key]:
            raise UserError(f"{key} {getattr(config, key)} is not that of the run, {of_run[key]} (see {trained})")
    return config


def resolve(path: str) -> Path:
    """A file as given, or else the one of that name shipped in configs/."""
    for candidate in (Path(path), CONFIGS / path):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.name for p in CONFIGS.iterdir()))
    raise UserError(f"no such file: {path} (shipped configurations: {shipped})")


def save(config: RunConfig, folder: Path) -> None:
    """Write the settings beside the results they gave."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _parse(command: str, kind: type[C], settings: dict[str, Any], overrides: Sequence[str]) -> C:
    parser = _Parser(kind, allow_abbrev=False, prog=f"python -m python_trainer {command}")
    try:
        arguments = [*_as_arguments(settings), *overrides]
        (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a mapping")
    return content


def _read(path: str | None, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if path is None:
        return {}, {}
    file = resolve(path)
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of settings")
    sections = {name: content.get(name) or {} for name in COMMANDS if name in content}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{name} in {path} must be a mapping of settings, not {section!r}")
    return {key: value for key, value in content.items() if key not in sections}, sections.get(command, {})


def _as_arguments(settings: dict[str, Any]) -> list[str]:
    """File settings take the path of command-line ones, so that types are checked in one place."""
    arguments = []
    for key, value in settings.items():
        if value is not None:
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def _refuse_unknown(keys: Sequence[str], known: set[str], path: str | None) -> None:
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            where = f" in {path} or on the command line" if path else ""
            raise UserError(f"unknown setting {key!r}{where}; did you mean {nearest[0]!r}?")
