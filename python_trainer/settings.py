"""Settings of a command: defaults, then a preset, then a YAML file, then the command line.

In the file, a mapping named after a command (`sft:`, `reward:`, `train:`, `eval:`) holds for that command only; every
other key holds for all of them.
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from . import files
from .config import CONFIGS, RENAMED, EvalConfig, RewardConfig, RunConfig, SftConfig, UserError, by_new_names, resolve
from .deepspeed_file import deepspeed_file
from .ppo_config import CompareConfig, FrontierConfig, PPOConfig

LISTS = {  # or with commas
    *("reward_function", "reward_weights", "lora_target_modules"),
    *("algorithms", "kl_coefs", "seeds", "learning_rates", "mini_batches", "runs"),
}
LARGEST_FILE = 100_000  # values in a file of settings
OF_OTHER_TRAINERS = {  # words that people bring, and what is here in their place
    "top_p": "responses are drawn from the whole distribution, so that sampling and scoring agree; leave it out",
    "num_train_epochs": "set total_steps (or max_steps); num_ppo_epochs are passes over one rollout",
    "gradient_accumulation_steps": "set batch_size and, for memory, per_device_train_batch_size: what lies between "
    "is accumulated",
    "max_new_tokens": "the most tokens of a response are response_length",
    "beta": "the weight of the KL penalty is kl_coef",
    "epsilon": "the clip range is cliprange (and cliprange_high)",
    "num_iterations": "passes over one rollout are num_ppo_epochs",
    "lr": "it is learning_rate",
    "use_vllm": "set generation_engine vllm",
    "reward_funcs": "functions are reward_function, a reward model is reward_model_path",
    "model_name_or_path": "the policy's start is sft_model_path (train) or model_path (sft, reward, eval)",
    "dataset_name": "data are a folder, data_path",
    "per_device_batch_size": "samples per micro-batch are per_device_train_batch_size, per step batch_size",
    "gae_lambda": "it is lam",
    "clip_epsilon": "the clip range is cliprange",
    "resume": "set resume_from_checkpoint",
    "learning_rate_scheduler": "it is lr_scheduler_type",
    "max_length": "prompts have at most max_prompt_length tokens, responses response_length",
    "max_steps": "steps are total_steps",
    "total_steps": "steps are max_steps",
    "total_episodes": "set total_steps: each has batch_size responses",
    "warmup_ratio": "set warmup_steps",
    "logging_steps": "every step is printed and recorded; leave it out",
    "num_sample_generations": "responses are recorded every log_completions_steps",
    "save_strategy": "set save_steps",
    "eval_strategy": "set eval_steps",
    "n_samples_per_prompt": "responses per prompt are num_generations",
    "advantage_estimator": "it is algorithm",
    "critic_model_path": "it is value_model_path",
    "zero_stage": "set deepspeed to ds_zero0.json, ds_zero1.json, ds_zero2.json or ds_zero3.json",
    "wandb": "set report_to wandb",
    "dtype": "float32 is trained in unless bf16 is set; stored weights have torch_dtype",
}
for _other, _name in (
    ("top_k min_p typical_p do_sample num_beams", "top_p"),
    ("epochs num_epochs n_epochs", "num_train_epochs"),
    ("gradient_accumulation accumulation_steps", "gradient_accumulation_steps"),
    ("max_completion_length max_response_length max_tokens max_gen_len", "max_new_tokens"),
    ("init_kl_coef kl_penalty kl_beta kl_coefficient", "beta"),
    ("eps_clip clip_eps", "epsilon"),
    ("ppo_epochs mu noptepochs", "num_iterations"),
    ("model model_name pretrain", "model_name_or_path"),
    ("dataset dataset_path train_file", "dataset_name"),
    ("mini_batch_size train_batch_size per_device_eval_batch_size", "per_device_batch_size"),
    ("rollout_batch_size micro_train_batch_size micro_rollout_batch_size", "per_device_batch_size"),
    ("actor_learning_rate actor_lr policy_lr", "lr"),
    ("generate_max_len", "max_new_tokens"),
    ("kl_loss_coef kl_ctl", "beta"),
    ("clip_ratio clip_ratio_low clip_ratio_high", "epsilon"),
    ("max_epochs", "num_iterations"),
    ("reward_fn custom_reward_function", "reward_funcs"),
    ("rollout_n group_size num_responses", "n_samples_per_prompt"),
    ("evaluation_strategy eval_every", "eval_strategy"),
    ("save_every save_freq", "save_strategy"),
    ("resume_from", "resume"),
    ("fp32 precision mixed_precision", "dtype"),
    ("use_wandb wandb_project", "wandb"),
):
    OF_OTHER_TRAINERS |= dict.fromkeys(_other.split(), OF_OTHER_TRAINERS[_name])

PRESETS = Path(__file__).parent / "presets"
FROM_A_FILE = (
    "FILE is YAML with settings by these names, those of one command under its name if you like; a file of "
    f"{CONFIGS.name}/ by its name alone. The command line stands above it."
)

COMMANDS: dict[str, type[RunConfig]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "train": PPOConfig,
    "eval": EvalConfig,
    "frontier": FrontierConfig,
    "compare": CompareConfig,
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """A setting under one name with its value once: two spellings of each, and long choices, do not fit 80 columns."""

    def _value(self, action: argparse.Action) -> str:
        return self._format_args(action, self._get_default_metavar_for_optional(action))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        name, value = action.option_strings[0], self._value(action)
        return f"{name} {value if len(value) <= 40 else action.dest.upper()}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text if len(self._value(action)) <= 40 or not action.choices else f"{text} {self._one_of(action)}"

    def _one_of(self, action: argparse.Action) -> str:
        return "One of " + ", ".join(map(str, action.choices or ())) + "."


class _Parser(HfArgumentParser):
    """Errors are one line; argparse alone would print the usage of fifty options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


C = TypeVar("C", bound=RunConfig)
NOT_OF_A_RUN = {"output_dir", "overwrite_output_dir", "disable_tqdm"}
OF_THE_REFERENCE = {"seed", "model_config", "temperature"}
ALIKE = (  # in runs that are compared, unless they are given: what is asked, how it is answered, who scores it
    *("task", "data_path", "eval_data_path", "column_mapping", "apply_chat_template"),
    *("max_prompt_length", "overlong_prompts", "response_length", "temperature", "stop_strings"),
    *("reward_function", "reward_weights", "reward_model_path", "score_shift", "sft_model_path"),
)


def load(command: str, path: str | None, overrides: Sequence[str], kind: type[C]) -> C:
    """The configuration of `command`: defaults, then its preset, then the file, then the command line.

    `eval` and `compare` are about runs: the settings they were trained with stand above those the file has for all
    commands, and the ones that make their reference what it is cannot be changed.
    """
    common, own = _read(path, command)
    if command == "frontier":  # its runs are those of train
        own = _read(path, "train")[1] | own
    if path is not None:
        everywhere = {field.name for cls in COMMANDS.values() for field in dataclasses.fields(cls)}
        _refuse_unknown(list(common), everywhere | set(COMMANDS), path)
    known = {field.name for field in dataclasses.fields(kind)}
    from_file = {key: value for key, value in common.items() if key in known}
    _refuse_unknown([*own, *(a[2:].split("=")[0] for a in overrides if a.startswith("--"))], known | {"help"}, path)
    config = _parse(command, kind, from_file | own, overrides)
    if config.preset is not None:
        from_file = load_preset(config.preset).get("train" if command == "frontier" else command, {}) | from_file
        config = _parse(command, kind, from_file | own, overrides)
    if isinstance(config, CompareConfig):
        of_run = _of_compared_runs(config, {*own, *(a[2:].split("=")[0] for a in overrides)})
    elif command == "eval":
        of_run = _recorded(Path(config.output_dir))
    else:
        return config
    of_run = {key: value for key, value in of_run.items() if key in known - NOT_OF_A_RUN}
    config = _parse(command, kind, from_file | of_run | own, overrides)
    for key in OF_THE_REFERENCE & of_run.keys():
        if getattr(config, key) != of_run[key]:
            raise UserError(f"{key} {getattr(config, key)} is not that of the run, {of_run[key]} (see its config.yaml)")
    return config


def _recorded(run: Path) -> dict[str, Any]:
    """The settings that a policy was trained with; none where `run` is no folder of a train command."""
    file = run / "train" / "config.yaml"
    return _read(str(file), "")[0] if file.is_file() else {}


def _of_compared_runs(config: CompareConfig, given: set[str]) -> dict[str, Any]:
    """The settings of the first of the runs, with the models that lie there; the others must be like it."""
    found = []
    for name, place in config.entries().items():
        if settings := _recorded(place):
            settings = by_new_names(settings)
            for stage, key in (("sft", "sft_model_path"), ("reward", "reward_model_path")):
                own = place / stage / "model"
                if settings.get(key) is None and own.exists():
                    settings[key] = str(own)
            found.append((name, settings))
    if not found:
        return {}
    (first_name, first), *others = found
    # Where the policies began with random weights, the reference is what the seed made.
    made = ("seed", "model_config") if first.get("sft_model_path") is None else ()
    for name, settings in others:
        for key in (*ALIKE, *made):
            if settings.get(key) != first.get(key) and key not in given:
                raise UserError(
                    f"cannot compare {name} with {first_name}: they were trained with {key} {settings.get(key)} and "
                    f"{first.get(key)}; set {key} to what both are to be compared with, or compare them apart"
                )
    kept = {*ALIKE, *made, "attn_implementation", "ops_impl", "bf16", "fp16", "deepspeed", "eval_prompts"}
    return {key: value for key, value in first.items() if key in kept and key not in given}


def save(config: RunConfig, folder: Path) -> None:
    """Write the settings beside the results they gave."""
    make_folder(folder)
    files.write(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def make_folder(folder: Path) -> None:
    """A folder to write results in, which is no link."""
    if os.path.lexists(folder) and not files.is_folder(folder):
        raise UserError(
            f"{folder} is {files.kind(folder)}, through which nothing is written: set output_dir to where the results "
            "should go, or move it away"
        )
    folder.mkdir(parents=True, exist_ok=True)


def load_preset(name: str) -> dict[str, dict[str, Any]]:
    """The settings of a known recipe, by command."""
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())


def _parse(command: str, kind: type[C], settings: dict[str, Any], overrides: Sequence[str]) -> C:
    called = f"python -m python_trainer {command}" + " RUN ..." * (command == "compare")
    usage = f"{called} [--config FILE] [--KEY VALUE]..."  # not each by its name: there are a hundred
    parser = _Parser(kind, allow_abbrev=False, usage=usage, epilog=FROM_A_FILE, formatter_class=_Help)
    try:
        arguments = [*_as_arguments(settings), *overrides]
        (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        raise UserError(str(error)) from error
    deepspeed_file(config)  # what cannot be is said before anything loads
    return config


def _read(path: str | None, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if path is None:
        return {}, {}
    content = read_yaml(path, resolve(path)) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of settings")
    sections = {name: content.get(name) or {} for name in COMMANDS if name in content}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{name} in {path} must be a mapping of settings, not {section!r}")
    for key in (*content, *(key for section in sections.values() for key in section)):
        if not isinstance(key, str):
            raise UserError(
                f"{path}: a setting's name must be text, not {key!r}; YAML reads yes, no, on and off as bool"
            )
    return {key: value for key, value in content.items() if key not in sections}, sections.get(command, {})


def read_yaml(path: str, file: Path) -> Any:
    """Aliases are allowed, but not a few lines that stand for millions."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and _size(root, {}) > LARGEST_FILE:
            raise UserError(f"{path} holds more than {LARGEST_FILE} values, its aliases written out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, no date, a number beyond bounds
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to hold settings") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """How many values it stands for; infinitely many where it holds itself."""
    if node not in known:
        known[node] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known[node] = 1 + sum(_size(part, known) for part in inner)
    return known[node]


def _as_arguments(settings: dict[str, Any]) -> list[str]:
    """File settings take the path of command-line ones, so that types are checked in one place."""
    arguments = []
    for key, value in settings.items():
        if value is None:
            continue
        if isinstance(value, dict):
            try:
                value = json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"{key} cannot be written as JSON: {error}") from error
        elif key in LISTS and isinstance(value, list):
            value = ",".join(map(str, value))
        elif not isinstance(value, str | int | float | datetime.date):
            raise UserError(f"{key} must be one value, not {str(value)[:60]}")
        arguments.append(f"--{key}={value}")
    return arguments


def _refuse_unknown(keys: Sequence[str], known: set[str], path: str | None) -> None:
    for key in keys:
        if RENAMED.get(key) in known:
            raise UserError(f"setting {key!r} has a new name: {RENAMED[key]!r}")
        if key not in known:
            where = f" in {path} or on the command line" if path else ""
            raise UserError(f"unknown setting {key!r}{where}{_hint(key, known)}")


def _hint(key: str, known: set[str]) -> str:
    """What it is called here, or what there is instead; nothing where nothing is near."""
    if key in OF_OTHER_TRAINERS:
        return f": {OF_OTHER_TRAINERS[key]}"
    nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
    return f"; did you mean {nearest[0]!r}?" if nearest else "; --help lists those there are"
