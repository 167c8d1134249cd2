"""Actor, reference, critic and reward model: loading, value head, LoRA, moving average."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import distributed, zero_state
from .atomic import MANIFEST, refuse_unlisted
from .config import OptimizerConfig, PPOConfig, RunConfig, UserError
from .data import Task
from .deepspeed_engine import (
    Policy,
    Trainable,
    all_finite,
    checkpoint_activations,
    frozen,
    gathered_params,
    merged_weights,
    weights_here,
)

READ_BY_TRANSFORMERS = re.compile(
    r".*\.(json|safetensors|bin|jinja|model)|(vocab|merges)\.txt|additional_chat_templates"
)
PADDED = " (four lines in the README, under Trainer, save a model with one)"


class ScalarModel(torch.nn.Module):
    """One number per position: a reward model reads it at the last token, a critic everywhere."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not hasattr(model, "score"):
            raise UserError(f"{type(model).__name__} has no `score` head and cannot serve as reward or value model")
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return self.model.score(hidden).squeeze(-1).float()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        checkpoint_activations(self.model)

    @classmethod
    def on(cls, policy: PreTrainedModel, *, zero_head: bool) -> "ScalarModel":
        """The policy's body under a new head; a zero head makes a critic's first guess 0 everywhere."""
        config = AutoConfig.for_model(**policy.config.to_dict() | {"num_labels": 1})
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        model.base_model.load_state_dict(policy.base_model.state_dict())
        torch.nn.init.normal_(model.score.weight, std=0.0 if zero_head else (config.hidden_size + 1) ** -0.5)
        return cls(without_dropout(model))


@dataclass
class Models:
    """The models of a run."""

    actor: Policy
    reference: Policy
    critic: Trainable | None

    @property
    def trained(self) -> dict[str, Trainable]:
        assert isinstance(self.actor.model, Trainable)
        return {"actor": self.actor.model} | ({"critic": self.critic} if self.critic else {})


def build_models(
    config: PPOConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_critic: bool,
    reward_model_path: Path | None,
) -> Models:
    """All models of a run; the reference is a copy of the policy before its first update."""
    per_step = config.num_ppo_epochs * config.num_mini_batches
    reference: Any = load_policy(stage_model(config, "sft", config.sft_model_path), config, tokenizer)
    reference.load_state_dict(policy.state_dict())
    reference = frozen(reference, config)  # split at once, where models are: the next one needs the host's memory
    critic = None
    if needs_critic:
        rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
        body = adapted(_critic(config, policy, reward_model_path), config, config.critic_lora_r)
        critic = Trainable(body, config, rate, config.total_steps * per_step)
    updates = (config.total_steps - config.critic_warmup_steps) * per_step
    actor = Trainable(adapted(policy, config, config.lora_r), config, config.learning_rate, max(updates, 1))
    return Models(
        Policy(actor, config.temperature, config.ops_impl),
        Policy(reference, config.temperature, config.ops_impl),
        critic,
    )


def starting_point(config: PPOConfig, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy before training, and its tokenizer."""
    start = stage_model(config, "sft", config.sft_model_path)
    tokenizer = checked(task.tokenizer()) if start is None else load_tokenizer(start)
    return load_policy(start, config, tokenizer), tokenizer


def load_policy(path: str | Path | None, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """From a saved model, or random weights of the configured architecture."""
    if path is not None:
        model = _from_pretrained(AutoModelForCausalLM, path)
    elif config.model_config is not None:
        architecture = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | json.loads(config.model_config)
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), trust_remote_code=False)
    else:
        raise UserError("no model to start from: give a path or model_config")
    _refuse_non_finite(model, path or f"model_config {config.model_config}")
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return without_dropout(model)


def stage_model(config: RunConfig, stage: str, given: str | None) -> Path | None:
    """The model a person named, or else the one an earlier command of this run left."""
    path = Path(config.output_dir) / stage / "model" if given is None else Path(given)
    if given is None and not path.exists():
        return None
    return undamaged(path)


def undamaged(path: Path) -> Path:
    """The same path, once its files are those of the manifest that our commands write beside a model."""
    if (path / MANIFEST).is_file():
        refuse_unlisted(path, lambda name: READ_BY_TRANSFORMERS.fullmatch(name) is not None)
    return path


def load_scalar(path: str | Path, key: str) -> ScalarModel:
    """A model with a trained head of one number; `key` is the setting to name where it is none."""
    model, report = _from_pretrained(AutoModelForSequenceClassification, path, output_loading_info=True)
    without = sorted(name for name in report["missing_keys"] if name.startswith("score."))
    if without or model.config.num_labels != 1:
        what = f"has no {without[0]}" if without else f"gives {model.config.num_labels} numbers"
        raise UserError(
            f"{key}: {path} {what}; a model for sequence classification with num_labels 1 is needed, as the reward "
            "command saves it"
        )
    _refuse_non_finite(model, path)
    return ScalarModel(without_dropout(model))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    return checked(_from_pretrained(AutoTokenizer, path))


def checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With pad equal to end, the end token is masked like padding and the model never learns to stop."""
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer needs both a pad and an end token{PADDED}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"pad and end token are both {tokenizer.eos_token!r}; give the tokenizer its own pad token{PADDED}"
        )
    return tokenizer


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout makes the ratio noise: old and new log-probabilities would come from different networks."""
    for holder in (model.config, *model.modules()):
        if isinstance(holder, torch.nn.Dropout):
            holder.p = 0.0
        for name, value in vars(holder).items():
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)
    return model


def context_of(model: PreTrainedModel) -> int:
    """The most tokens a model can read."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def adapted(model: Any, config: OptimizerConfig, rank: int | None) -> Any:
    """The model with frozen weights and trained adapters inside it; a score head stays trained. rank None: as it is."""
    if rank is None:
        return model
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install peft") from error
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


def save_model(model: torch.nn.Module | Trainable, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """In the transformers format; called on every rank."""
    module: Any = model.module if isinstance(model, Trainable) else model
    if not all_finite(weights_here(module)):
        raise UserError(f"weights are not finite, and no model is saved in {folder.parent.parent}")
    with gathered_params(module.parameters()):
        if distributed.is_main():
            body = module.model if isinstance(module, ScalarModel) else module
            body.save_pretrained(folder, state_dict=merged_weights(body))
            tokenizer.save_pretrained(folder)
            for path in folder.glob("*.safetensors"):  # closed to all but their owner, unlike the others
                path.chmod((folder / "config.json").stat().st_mode)


class MovingAverage:
    """In float32, of what this rank holds of each trained parameter; the others do not move."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: held.detach().float().clone() for name, held in _trained_shards(module)}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        for name, held in _trained_shards(module):
            self.average[name].lerp_(held.float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of(self, module: torch.nn.Module) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        own = {name: held.detach().clone() for name, held in _trained_shards(module)}
        try:
            self._write(module, self.average)
            yield
        finally:
            self._write(module, own)

    @torch.no_grad()
    def _write(self, module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        for name, held in _trained_shards(module):
            held.copy_(weights[name])

    def slices(self, module: torch.nn.Module) -> list[zero_state.Slice]:
        """To be saved, or filled."""
        return [zero_state.laid_out(name, weight, self.average[name]) for name, weight in _trained(module)]


def _critic(config: PPOConfig, policy: PreTrainedModel, reward_model_path: Path | None) -> ScalarModel:
    if config.value_model_path is not None:
        return load_scalar(config.value_model_path, "value_model_path")
    if config.value_model_init == "reward":
        assert reward_model_path is not None
        return load_scalar(reward_model_path, "reward_model_path")
    return ScalarModel.on(policy, zero_head=True)


def _from_pretrained(kind: Any, path: str | Path, **extra: Any) -> Any:
    if kind is not AutoTokenizer:
        extra["dtype"] = torch.float32
    try:
        return kind.from_pretrained(str(path), trust_remote_code=False, **extra)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a model from {path}: {reason}") from error


def _refuse_non_finite(model: torch.nn.Module, source: object) -> None:
    bad = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{source}: the weights {bad} are not finite, so there is nothing to start from")


def _usual_targets(model: Any) -> list[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = model.config.model_type
    if kind not in KNOWN:
        raise UserError(f"give lora_target_modules: peft knows none for {kind}")
    return list(KNOWN[kind])


def _trained(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def _trained_shards(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, distributed.local_shard(weight)) for name, weight in _trained(module)]
