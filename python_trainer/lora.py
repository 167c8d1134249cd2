"""Low-rank adapters (Hu et al., 2021) through peft: few trained weights, saved merged into the whole model."""

from typing import Any

import torch

from .config import OptimizerConfig, UserError


def adapted(model: Any, config: OptimizerConfig, rank: int | None) -> Any:
    """The model with frozen weights and trained adapters inside it; a score head stays trained. rank None: as it is."""
    if rank is None:
        return model
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install peft") from error
    from .models import ScalarModel

    targets = config.lora_target_modules.split(",") if config.lora_target_modules else None
    body = model.model if isinstance(model, ScalarModel) else model
    if targets is None:
        targets = _usual_targets(body)
    settings = LoraConfig(r=rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=targets)
    try:
        inject_adapter_in_model(settings, body)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("score.weight"))
    return model


def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters, each of them added to the weight it adapts."""
    weights = {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weights[f"{name}.weight"] = merged_weight(layer, "weight")
    return weights


def merged_weight(layer: Any, name: str) -> torch.Tensor:
    """One parameter of a layer, its adapter added."""
    weight = getattr(getattr(layer, "base_layer", layer), name).detach()
    if name == "weight" and hasattr(layer, "get_delta_weight"):
        return weight + layer.get_delta_weight("default")
    return weight


def _usual_targets(model: Any) -> list[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = model.config.model_type
    if kind not in KNOWN:
        raise UserError(f"give lora_target_modules: peft knows none for {kind}")
    return list(KNOWN[kind])
