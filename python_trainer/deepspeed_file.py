"""What a person's DeepSpeed file may say. It configures ZeRO; what the settings decide must not differ in it.

`auto`, which transformers fills in, is what the settings say or DeepSpeed's own default. Nothing is ignored: a section
is taken over, agrees with the settings, or is refused by name.
"""

import json
import os
from typing import Any

from .config import RunConfig, UserError, resolve

TAKEN_OVER = {  # by DeepSpeed, as they stand
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
    *("communication_data_type", "seq_parallel_communication_data_type", "disable_allgather", "data_types"),
    *("prescale_gradients", "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet"),
}
OPTIMIZER = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
KINDS = ("Adam", "AdamW")
PRECISIONS = ("bf16", "fp16")
AUTO = "auto"


def deepspeed_file(config: RunConfig) -> dict[str, Any]:
    """The shipped or the person's file, without what the settings decide; refuses what differs from them."""
    name = f"deepspeed: {config.deepspeed}"
    try:
        content = json.loads(resolve(config.deepspeed).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} must be a mapping")
    _check_precision(name, content, config)
    _check_optimizer(name, content.pop("optimizer", AUTO), config)
    _check_schedule(name, content.pop("scheduler", AUTO))
    _check_sizes(name, content, config)
    if unknown := [key for key in content if key not in TAKEN_OVER | {*PRECISIONS}]:
        raise UserError(
            f"{name}: {unknown[0]} is nothing that this trainer hands to DeepSpeed; take it out of the file"
        )
    content = without_auto(content)
    _check_zero(name, content)
    return content


def without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_auto(inner) for key, inner in value.items() if inner != AUTO}
    return value


def _check_precision(name: str, content: dict[str, Any], config: RunConfig) -> None:
    for kind in PRECISIONS:
        section = content.setdefault(kind, {})
        if not isinstance(section, dict):
            raise UserError(f"{name}: {kind} must be a mapping, not {section!r}")
        enabled, wanted = section.pop("enabled", AUTO), getattr(config, kind)
        if enabled != AUTO and enabled is not wanted:
            raise UserError(
                f"{name} has {kind}.enabled {json.dumps(enabled)} and the settings have {kind} {wanted}; set {kind} "
                "there (all models have to know) and take it out of the file"
            )
    if content["fp16"].get("auto_cast") not in (None, False):
        raise UserError(f"{name}: fp16.auto_cast is not supported; take it out of the file")


def _check_optimizer(name: str, section: Any, config: RunConfig) -> None:
    if section == AUTO:
        return
    kind, params = (section.get("type"), section.get("params", {})) if isinstance(section, dict) else (section, None)
    if kind not in KINDS or not isinstance(params, dict):
        raise UserError(
            f"{name}: optimizer {kind} is not AdamW, which is what this trainer has; take it out of the file"
        )
    settings = {key: getattr(config, setting, AUTO) for key, setting in OPTIMIZER.items()}
    settings["betas"] = [getattr(config, "adam_beta1", AUTO), getattr(config, "adam_beta2", AUTO)]
    settings |= {"adam_w_mode": True, "torch_adam": True, "fused": False, "amsgrad": False, "bias_correction": True}
    for key, value in params.items():
        wanted = settings.get(key)
        if value != AUTO and wanted != AUTO and value != wanted and not _all_auto(value):
            instead = OPTIMIZER.get(key, "adam_beta1 and adam_beta2" if key == "betas" else None)
            what = "this trainer has no such option" if wanted is None else f"the settings have {wanted}"
            todo = f"set {instead} there" if instead else "leave it out"
            raise UserError(
                f"{name} has optimizer {key} {json.dumps(value)} and {what}; {todo}, or write auto in the file"
            )


def _check_schedule(name: str, section: Any) -> None:
    params = section.get("params", {}) if isinstance(section, dict) else section
    if not _all_auto(params):
        raise UserError(
            f"{name} has a scheduler of its own; set lr_scheduler_type and warmup_steps, and take it out of the file"
        )


def _all_auto(value: Any) -> bool:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(one == AUTO for one in inner)


def _check_sizes(name: str, content: dict[str, Any], config: RunConfig) -> None:
    """Batches, accumulation and clipping are the settings': in the file they may say the same."""
    ranks, batch = int(os.environ.get("WORLD_SIZE", "1")), getattr(config, "batch_size", None)
    micro, norm = getattr(config, "per_device_train_batch_size", None), getattr(config, "max_grad_norm", None)
    allowed: dict[str, tuple[Any, ...]] = {"gradient_clipping": (norm,), "train_micro_batch_size_per_gpu": (micro,)}
    if batch is not None and micro is not None:
        update = batch // getattr(config, "num_mini_batches", 1)
        allowed |= {
            "train_batch_size": (batch, update),
            "gradient_accumulation_steps": (1, max(update // (micro * ranks), 1)),
        }
    names = {"gradient_clipping": "max_grad_norm", "train_micro_batch_size_per_gpu": "per_device_train_batch_size"}
    for key in (
        "gradient_clipping",
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_accumulation_steps",
    ):
        value = content.pop(key, AUTO)
        if value == AUTO or micro is None or value in allowed[key]:
            continue
        raise UserError(
            f"{name} has {key} {json.dumps(value)} and the settings make it {allowed[key][-1]}; set "
            f"{names.get(key, 'batch_size and per_device_train_batch_size')}, and take it out of the file"
        )


def _check_zero(name: str, content: dict[str, Any]) -> None:
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(
            f"{name}: zero_optimization must be a mapping with a stage of 0, 1, 2 or 3, not {str(zero)[:60]}"
        )
    for section, least in (("offload_optimizer", 1), ("offload_param", 3)):
        given = zero.get(section, {})
        if not isinstance(given, dict):
            raise UserError(f"{name}: {section} must be a mapping, not {given!r}")
        if given.get("device", "none") not in ("none", None) and zero.get("stage", 0) < least:
            raise UserError(f"{name}: {section} needs ZeRO stage {least} or above; set it, or take {section} out")
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        content.setdefault("zero_force_ds_cpu_optimizer", False)  # AdamW is torch's, which a host can run as well
