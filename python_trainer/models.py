"""Models: loading, random weights, heads, tokenizers; any causal language model of transformers."""

import json
import sys
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

from .checkpoint import MANIFEST, verify
from .config import RunConfig, UserError

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

    @classmethod
    def on(cls, policy: PreTrainedModel, *, zero_head: bool) -> "ScalarModel":
        """The policy's body under a new head; a zero head makes a critic's first guess 0 everywhere."""
        config = AutoConfig.for_model(**policy.config.to_dict() | {"num_labels": 1})
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        model.base_model.load_state_dict(policy.base_model.state_dict())
        torch.nn.init.normal_(model.score.weight, std=0.0 if zero_head else (config.hidden_size + 1) ** -0.5)
        return cls(without_dropout(model))


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


def _from_pretrained(kind: Any, path: str | Path, **extra: Any) -> Any:
    if kind is not AutoTokenizer:
        extra["dtype"] = torch.float32
    try:
        return kind.from_pretrained(str(path), trust_remote_code=False, **extra)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a model from {path}: {reason}") from error
