"""The four models, and the DeepSpeed engines that train two of them."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from . import launch
from .checkpoint import MANIFEST, verify
from .config import OptimizerConfig, RunConfig, UserError, resolve


class Policy:
    """A language model with the one temperature at which it is both sampled and scored."""

    def __init__(self, model: "PreTrainedModel | Trainable", temperature: float, impl: str) -> None:
        self.model = model
        self.temperature = temperature
        self.impl = impl

    @property
    def module(self) -> PreTrainedModel:
        return getattr(self.model, "module", self.model)  # inside an engine, trained or frozen


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

    @classmethod
    def on(cls, policy: PreTrainedModel, *, zero_head: bool) -> "ScalarModel":
        """The policy's body under a new head; a zero head makes a critic's first guess 0 everywhere."""
        config = AutoConfig.for_model(**policy.config.to_dict() | {"num_labels": 1})
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(policy.base_model.state_dict())
        torch.nn.init.normal_(model.score.weight, std=0.0 if zero_head else (config.hidden_size + 1) ** -0.5)
        return cls(without_dropout(model))


class Trainable:
    """A DeepSpeed engine whose gradients add up plainly until `step`, which is never a non-finite one."""

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, learning_rate: float, updates: int) -> None:
        import deepspeed

        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        optimizer.register_step_pre_hook(self._drop_non_finite)
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, updates)
        with launch.quiet():
            self.engine = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(config)
            )[0]
        self.skipped = 0
        self._dropped = False

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    @property
    def module(self) -> Any:
        return self.engine.module

    @property
    def learning_rate(self) -> float:
        return self.engine.get_lr()[0]

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        self._dropped = False
        self.engine.step()
        self.skipped += self._dropped or not self.engine.was_step_applied()

    def _drop_non_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed checks gradients in some modes only; here, after reduction, one rule holds for all."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.ones((), device=launch.device())
        if grads:
            finite = torch.nn.utils.get_total_norm(grads).isfinite().to(finite)
        if launch.world_size() > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            self._dropped = True
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW leaves a parameter without gradient, and its moments, alone


def deepspeed_config(config: OptimizerConfig) -> dict[str, Any]:
    """The shipped or the user's file, plus what the loop's arithmetic depends on."""
    return json.loads(resolve(config.deepspeed).read_text()) | {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.bf16},
        "steps_per_print": None,
    }


def frozen(model: torch.nn.Module, config: RunConfig) -> Any:
    """A model without gradients; partitioned over the ranks if the trained ones are (ZeRO 3), else plain."""
    import deepspeed

    model.eval().requires_grad_(False)
    settings = json.loads(resolve(config.deepspeed).read_text())
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    if settings.get("zero_optimization", {}).get("stage", 0) < 3:
        return model.to(launch.device(), dtype)
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.bf16},
        "steps_per_print": None,
    }
    with launch.quiet():
        return deepspeed.initialize(model=model, config=settings)[0]


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
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    else:
        raise UserError("no model to start from: give a path or model_config")
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
    if (path / MANIFEST).exists():
        verify(path)
    return path


def load_scalar(path: str | Path) -> ScalarModel:
    return ScalarModel(without_dropout(_from_pretrained(AutoModelForSequenceClassification, path)))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    return checked(_from_pretrained(AutoTokenizer, path))


def checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With pad equal to end, the end token is masked like padding and the model never learns to stop."""
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError("the tokenizer needs both a pad and an end token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"pad and end token are both {tokenizer.eos_token!r}; give the tokenizer its own pad token")
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


@contextlib.contextmanager
def whole(module: torch.nn.Module) -> Iterator[None]:
    """Inside, every parameter is whole on every rank, whatever the ZeRO stage."""
    import deepspeed

    partitioned = [p for p in module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def save_model(model: "torch.nn.Module | Trainable", tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """In the transformers format; called on every rank."""
    module: Any = model.module if isinstance(model, Trainable) else model
    with whole(module):
        if launch.is_main():
            (module.model if isinstance(module, ScalarModel) else module).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _from_pretrained(kind: Any, path: str | Path) -> Any:
    extra = {} if kind is AutoTokenizer else {"dtype": torch.float32}
    try:
        return kind.from_pretrained(str(path), **extra)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a model from {path}: {reason}") from error
