"""Actor, reference, critic and reward model: loading, value head, LoRA, moving average."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
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

from . import distributed, files, zero_state
from .atomic import MANIFEST, verify
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
from .tokens import reads_ids_of, vocabulary_of

SEQUENCES = (
    "prompts with their responses",
    "max_prompt_length or response_length",
)  # and what shortens them


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
    per_step, tokens = config.num_ppo_epochs * config.num_mini_batches, vocabulary_of(tokenizer)
    reference: Any = load_policy(stage_model(config, "sft", config.sft_model_path), config, tokenizer)
    reference.load_state_dict(policy.state_dict())
    reference = frozen(reference, config)  # split at once, where models are: the next one needs the host's memory
    critic = None
    if needs_critic:
        rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
        body = adapted(_critic(config, policy, tokenizer, reward_model_path), config, config.critic_lora_r)
        critic = Trainable(body, config, rate, config.total_steps * per_step)
    updates = (config.total_steps - config.critic_warmup_steps) * per_step
    actor = Trainable(adapted(policy, config, config.lora_r), config, config.learning_rate, max(updates, 1))
    return Models(
        Policy(actor, config.temperature, config.ops_impl, tokens),
        Policy(reference, config.temperature, config.ops_impl, tokens),
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
            "vocab_size": vocabulary_of(tokenizer),
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # Not where it ends a text, too: embeddings of the padding token get no gradient.
            "pad_token_id": None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id,
        } | json.loads(config.model_config)
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), trust_remote_code=False)
    else:
        raise UserError("no model to start from: give a path or model_config")
    refuse_missing_embeddings(model, (tokenizer.pad_token_id, tokenizer.eos_token_id), "pad or end token")
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
        verify(path)
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
    tokenizer = checked(_from_pretrained(AutoTokenizer, path))
    if _is_empty(tokenizer, Path(path)):
        raise UserError(f"{path} has no tokenizer: save the one there that its model was trained with")
    return tokenizer


def tokenizer_beside(path: str | Path, policy: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """That of a reward model or a critic; the policy's where it brings none."""
    if Path(path).is_dir() and not any(Path(path).glob("*token*")):
        files.say_once(f"{path} has no tokenizer: it is taken to read the tokens of the policy's")
        return policy
    return load_tokenizer(path)


def _is_empty(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """transformers makes a tokenizer without words of a folder that has none."""
    names = type(tokenizer).vocab_files_names.values()
    return folder.is_dir() and bool(names) and not any((folder / name).exists() for name in names)


def checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that can end a text and fill a batch; padding may be the end token, as lengths never come from ids."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token: set its eos_token to the one that ends a text, and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
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
    config = model.config.get_text_config()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
    return next((length for length in lengths if length), sys.maxsize)


def refuse_short_context(model: PreTrainedModel, tokens: int, what: str, setting: str) -> None:
    context = context_of(model)
    if tokens > context:
        raise UserError(f"{what} have up to {tokens} tokens, and {_name(model)} reads {context}: lower {setting}")


def refuse_missing_embeddings(model: PreTrainedModel, ids: Iterable[int], what: str) -> None:
    """A token without an embedding would be read from beyond the table."""
    rows, largest = len(model.get_input_embeddings().weight), max(ids)
    if largest >= rows:
        raise UserError(
            f"{what} have the id {largest}, and {_name(model)} has embeddings of {rows} tokens, fewer than its "
            "tokenizer: call its resize_token_embeddings(len(tokenizer)) and save it, or take what was added to the "
            "tokenizer out again"
        )


def vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a policy may draw: those that are tokens, of a model that may have more or fewer."""
    return min(vocabulary_of(tokenizer), len(model.get_input_embeddings().weight))


def _name(model: PreTrainedModel) -> str:
    return getattr(model, "name_or_path", "") or f"the {model.config.model_type} of model_config"


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


def _critic(
    config: PPOConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reward_model_path: Path | None
) -> ScalarModel:
    path, key = config.value_model_path, "value_model_path"
    if path is None and config.value_model_init == "reward":
        path, key = str(reward_model_path), "value_model_init"
    if path is None:
        return ScalarModel.on(policy, zero_head=True)
    model = load_scalar(path, key)
    if not reads_ids_of(tokenizer_beside(path, tokenizer), tokenizer, []):
        raise UserError(
            f"{key}: {path} has another tokenizer than the policy, whose ids a critic reads: set value_model_init "
            "policy, or value_model_path to a model with the policy's tokenizer"
        )
    refuse_missing_embeddings(model.model, [vocabulary(policy, tokenizer) - 1], "responses")
    return model


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
