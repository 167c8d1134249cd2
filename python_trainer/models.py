"""Actor, reference, critic and reward model: where they come from, value head, LoRA, moving average."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import distributed, files, zero_state
from .config import OptimizerConfig, RunConfig, SamplingConfig, UserError
from .data import Policy, Task
from .deepspeed_engine import (
    Trainable,
    all_finite,
    checkpoint_activations,
    frozen,
    weights_here,
)
from .distributed import gathered_params, merged_weights
from .fused_head import fused_head
from .ppo_config import CompareConfig, PPOConfig
from .pretrained import (
    Origin,
    add_adapters,
    end_tokens,
    has_adapters,
    load_model,
    load_tokenizer_files,
    refuse_unfit,
    save_adapter,
    save_whole,
    undamaged,
)
from .tokens import (
    SEQUENCES,
    reads_ids_of,
    refuse_missing_embeddings,
    refuse_short_context,
    vocabulary,
    vocabulary_of,
)

MOST_LOST = 0.1  # of what adapters change, in the rounding of a model that is saved with them


class ScalarModel(torch.nn.Module):
    """One number per position: a reward model reads it at the last token, a critic everywhere."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not hasattr(model, "score"):
            raise UserError(
                f"{type(model).__name__} has no `score` head and cannot serve as reward or value model: give a "
                "decoder for sequence classification, or call this one in a reward_function"
            )
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
        kind = policy.config.model_type
        texts = config.get_text_config()
        if not zero_head and texts.pad_token_id in end_tokens(policy.generation_config):
            # transformers scores at the last token that is no padding: of the saved model at the one before the end.
            texts.pad_token_id = None
        if type(policy.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"transformers has no model of type {kind} that gives one number per token: take an algorithm without "
                "a critic (rloo, for example), and a reward_function or a reward_model_path of another type"
            )
        try:
            model = AutoModelForSequenceClassification.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=policy.config._attn_implementation,
                trust_remote_code=False,
            )
            model.base_model.load_state_dict(merged_weights(policy.base_model))
        except RuntimeError as error:
            name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(policy.config)].__name__
            raise UserError(f"a {name} has another body than a {type(policy).__name__}: {error}") from error
        scalar = cls(model)
        torch.nn.init.normal_(model.score.weight, std=0.0 if zero_head else (model.score.in_features + 1) ** -0.5)
        model.origin = Origin(policy.origin.dtype, policy.origin.dtypes, None, policy.origin.base)
        return scalar


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
    longest: int,
    reward_model_path: Path | None,
) -> Models:
    """All models of a run; the reference is a copy of the policy before its first update.

    `longest`: most tokens of a prompt with its response.
    """
    per_step, tokens = config.num_ppo_epochs * config.num_mini_batches, vocabulary_of(tokenizer)
    reference: Any = load_policy(stage_model(config, "sft", config.sft_model_path), config, tokenizer)
    strings = stop_strings(config, policy)
    reference = frozen(reference, config)  # split at once, where models are: the next one needs the host's memory
    critic = None
    if needs_critic:
        rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
        body = _critic(config, policy, tokenizer, reward_model_path)
        refuse_short_context(body.model, longest, *SEQUENCES)
        body = adapted(body, config, config.critic_lora_r, kept=False)
        critic = Trainable(body, config, rate, config.total_steps * per_step)
    updates = (config.total_steps - config.critic_warmup_steps) * per_step
    actor = Trainable(adapted(policy, config, config.lora_r), config, config.learning_rate, max(updates, 1))
    sampled = (config.temperature, config.ops_impl, strings, tokens)
    models = Models(Policy(actor, *sampled), Policy(reference, *sampled), critic)
    rows = max(config.per_device_train_batch_size, config.local_rollout_forward_batch_size)
    for policy in (models.actor, models.reference):
        policy.head = fused_head(policy.module, config.fused_head, rows * config.response_length)
    return models


def starting_point(config: PPOConfig, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy before training, and its tokenizer."""
    start = stage_model(config, "sft", config.sft_model_path)
    tokenizer = checked(task.tokenizer()) if start is None else load_tokenizer(start)
    return load_policy(start, config, tokenizer, continue_rank=config.lora_r), tokenizer


def load_policy(
    path: str | Path | None,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    continue_rank: int | None = None,
) -> PreTrainedModel:
    """From a saved model, or random weights of the configured architecture.

    Of an adapter both: its base with the adapter merged in, or with `continue_rank` to be trained further.
    """
    if path is not None:
        model = load_model(AutoModelForCausalLM, path, config, continue_rank=continue_rank)
    elif config.model_config is not None:
        architecture = {
            "vocab_size": vocabulary_of(tokenizer),
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # Not where it ends a text, too: embeddings of the padding token get no gradient.
            "pad_token_id": None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id,
        } | json.loads(config.model_config)
        torch.manual_seed(config.seed)
        attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
        try:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**architecture), dtype=torch.float32, trust_remote_code=False, **attention
            )
        except Exception as error:  # settings of somebody's architecture fail in its own code
            raise UserError(f"model_config: {' '.join(str(error).split())}") from error
        model.origin = Origin(getattr(torch, config.torch_dtype or "float32"))
    else:
        raise UserError("no model to start from: give a path or model_config")
    source = path or "model_config"
    refuse_missing_embeddings(model, (tokenizer.pad_token_id, tokenizer.eos_token_id), "pad or end token")
    _refuse_non_finite(model, source)
    refuse_unfit(model, source)
    _generate_plainly(model, tokenizer)
    return model


def _generate_plainly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Responses end at every end token of the source and of the tokenizer, and are drawn from the whole softmax.

    The other generation settings of the source (top_p, a repetition penalty, ...) rest until the model is saved, since
    scoring would have to know of them; its end tokens then are those at which responses ended here.
    """
    ends = list(dict.fromkeys([*end_tokens(model.origin.generation_config), tokenizer.eos_token_id]))
    ids = {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    if (kept := model.origin.generation_config) is not None:
        kept.eos_token_id = ids["eos_token_id"]
        kept.pad_token_id = ids["pad_token_id"] if kept.pad_token_id is None else kept.pad_token_id


def stop_strings(config: SamplingConfig, policy: PreTrainedModel) -> tuple[str, ...]:
    """Text that ends a response: what the settings say, and the generation settings of the source."""
    of_source = getattr(policy.origin.generation_config, "stop_strings", None) or []
    own = of_source if isinstance(of_source, list) else [of_source]
    if not all(isinstance(one, str) and one for one in own):
        raise UserError(f"stop_strings of the model's generation_config.json must be texts, not {of_source}")
    return tuple(dict.fromkeys([*config.stops(), *own]))


def stage_model(config: RunConfig, stage: str, given: str | None) -> Path | None:
    """The model a person named, or else the one an earlier command of this run left."""
    path = Path(config.output_dir) / stage / "model" if given is None else Path(given)
    if given is None and not path.exists():
        return None
    return undamaged(path)


def load_scalar(path: str | Path, key: str, config: RunConfig) -> ScalarModel:
    """A model with a trained head of one number; `key` is the setting to name where it is none."""
    needed = "a model for sequence classification with num_labels 1 is needed, as the reward command saves it"
    try:
        model = load_model(AutoModelForSequenceClassification, path, config)
    except UserError as error:
        raise UserError(f"{key}: {error}; {needed}") from error
    if model.config.num_labels != 1:
        raise UserError(f"{key}: {path} gives {model.config.num_labels} numbers; {needed}")
    _refuse_non_finite(model, path)
    return ScalarModel(model)


def load_reward_model(
    config: PPOConfig | CompareConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ScalarModel, PreTrainedTokenizerBase]:
    """That of the settings, and the tokenizer that it reads by."""
    path = reward_model_path(config)
    return load_scalar(path, "reward_model_path", config), tokenizer_beside(path, tokenizer)


def reward_model_path(config: PPOConfig | CompareConfig) -> Path:
    path = stage_model(config, "reward", config.reward_model_path)
    if path is None:
        raise UserError("no reward model: give reward_model_path or reward_function, or run the reward command first")
    return path


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    return checked(load_tokenizer_files(path))


def tokenizer_beside(path: str | Path, policy: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """That of a reward model or a critic; the policy's where it brings none."""
    if Path(path).is_dir() and not any(Path(path).glob("*token*")):
        files.say_once(f"{path} has no tokenizer: it is taken to read the tokens of the policy's")
        return policy
    return load_tokenizer(path)


def checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that can end a text and fill a batch; padding may be the end token, as lengths never come from ids."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token: set its eos_token to the one that ends a text, and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapted(model: Any, config: OptimizerConfig, rank: int | None, *, kept: bool = True) -> Any:
    """The model with frozen weights and trained adapters inside it; a score head stays trained. rank None: as it is.

    `kept`: it is what the command saves.
    """
    if rank is None:
        return model
    body = model.model if isinstance(model, ScalarModel) else model
    if kept and config.lora_save == "adapter" and body.origin.base is None:
        raise UserError(
            "lora_save adapter: the adapter would stand on a model that is nowhere on disk (random weights, or another "
            "adapter that is merged): set lora_save merged, or save that model first and start from it"
        )
    if not has_adapters(body):
        add_adapters(body, config, rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("score.weight"))
    return model


def save_model(
    model: torch.nn.Module | Trainable, tokenizer: PreTrainedTokenizerBase, folder: Path, form: str = "merged"
) -> None:
    """In the formats of transformers and peft; called on every rank. `form`: that of lora_save."""
    module: Any = model.module if isinstance(model, Trainable) else model
    if not all_finite(weights_here(module)):
        raise UserError(f"weights are not finite, and no model is saved in {folder.parent.parent}")
    with gathered_params(module.parameters()), distributed.raise_on_all_ranks(UserError):
        if distributed.is_main():
            body = module.model if isinstance(module, ScalarModel) else module
            if form == "adapter" and has_adapters(body):
                save_adapter(body, getattr(getattr(body, "score", None), "weight", None), folder)
            else:
                merged = merged_weights(body)
                _tell_rounded_adapters(body, merged)
                save_whole(body, merged, folder)
            tokenizer.save_pretrained(folder)
            for path in folder.glob("*.safetensors"):  # closed to all but their owner, unlike the others
                path.chmod((folder / "tokenizer_config.json").stat().st_mode)


def _tell_rounded_adapters(body: Any, merged: dict[str, torch.Tensor]) -> None:
    """A change below the steps of a half precision is no more than noise in a saved model."""
    change, lost, dtype = 0.0, 0.0, body.origin.dtype
    for name, layer in body.named_modules():
        if hasattr(layer, "get_delta_weight"):
            change += layer.get_delta_weight("default").float().norm().item() ** 2
            lost += (merged[f"{name}.weight"] - merged[f"{name}.weight"].to(dtype)).norm().item() ** 2
    if change and lost > MOST_LOST**2 * change:
        share = f"{(lost / change) ** 0.5:.0%} of what the adapters change"
        todo = "to keep what was trained set lora_save adapter, or torch_dtype float32"
        files.say_once(f"the model is saved in {str(dtype).removeprefix('torch.')}, whose rounding is {share}: {todo}")


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
        path, key = str(reward_model_path), "reward_model_path"
    if path is None:
        return ScalarModel.on(policy, zero_head=True)
    model = load_scalar(undamaged(Path(path)), key, config)
    if not reads_ids_of(tokenizer_beside(path, tokenizer), tokenizer, []):
        raise UserError(
            f"{key}: {path} has another tokenizer than the policy, whose ids a critic reads: set value_model_init "
            "policy, or value_model_path to a model with the policy's tokenizer"
        )
    refuse_missing_embeddings(model.model, [vocabulary(policy, tokenizer) - 1], "responses")
    return model


def _refuse_non_finite(model: torch.nn.Module, source: object) -> None:
    bad = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{source}: the weights {bad} are not finite, so there is nothing to start from")


def _trained(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def _trained_shards(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, distributed.local_shard(weight)) for name, weight in _trained(module)]
