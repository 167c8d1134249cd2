"""What turns prompts into tokens, behind one small interface."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from . import launch, lora
from .config import SamplingConfig, UserError
from .engines import Policy, whole

# (prompts [B, P] padded on the left, their mask [B, P], uniform numbers [B, T]) -> tokens [B, T]
Generate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Generator(Protocol):
    """Serves a policy as it is now. Log-probabilities are not its business: the trainer computes them itself."""

    def serving(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase
    ) -> contextlib.AbstractContextManager[Generate]:
        """Inside, the function draws responses; what lies after an end token means nothing."""
        ...


def chosen(config: SamplingConfig) -> Generator:
    """That of `generation_engine`."""
    if config.generation_engine == "hf":
        return HfGenerator(config.local_rollout_forward_batch_size)
    return _vllm(config.vllm_gpu_memory_utilization)


@functools.cache  # its engines stay: one run after another in a process uses the same
def _vllm(memory_share: float) -> Generator:
    try:
        from .vllm_generation import VllmGenerator
    except ImportError as error:
        raise UserError(f"generation_engine vllm needs vLLM: pip install 'vllm>=0.32' ({error})") from error
    return VllmGenerator(memory_share)


class HfGenerator:
    """transformers' `generate`, `rows` prompts at a time."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    @contextlib.contextmanager
    def serving(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Generate]:
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id

        def generate(ids: torch.Tensor, attention: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
            parts = zip(ids.split(self.rows), attention.split(self.rows), uniforms.split(self.rows), strict=True)
            return torch.cat([generate_part(*part) for part in parts])

        def generate_part(ids: torch.Tensor, attention: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
            length = uniforms.shape[1]
            sequences = module.generate(
                ids,
                attention_mask=attention.long(),
                # Not greedy: InverseCdf draws the token. do_sample=True would also apply the top-k and top-p of the
                # model's own generation settings, which scoring does not know of.
                generation_config=GenerationConfig(
                    max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=eos
                ),
                logits_processor=LogitsProcessorList([InverseCdf(uniforms, ids.shape[1], policy.temperature)]),
            )
            responses = sequences[:, ids.shape[1] :]
            missing = length - responses.shape[1]  # generate stops early once every row has ended
            return torch.nn.functional.pad(responses, (0, missing), value=pad)

        with _unpartitioned(policy) as module:
            training = module.training
            module.eval()  # gradient checkpointing would forbid the cache
            try:
                yield generate
            finally:
                module.train(training)


class InverseCdf(LogitsProcessor):
    """Samples from softmax(logits / temperature) with a given uniform number per row and token.

    It leaves the drawn token as the only possible one, so `generate` has nothing left to decide.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_width: int, temperature: float) -> None:
        self.uniforms = uniforms
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        return only_drawn(scores, self.uniforms[:, step : step + 1], self.temperature)


def only_drawn(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Logits [B, V] that leave one token possible, the drawn one: 0 there, -inf elsewhere.

    It is the token at which the CDF of softmax(logits / temperature) passes the row's uniform number [B, 1];
    temperature is a number or [B, 1].
    """
    cdf = (logits.float() / temperature).softmax(dim=-1).double().cumsum(dim=-1)
    token = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    return torch.full_like(logits, float("-inf")).scatter(1, token, 0.0)


def weights_of(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of a model as it would be saved, adapters merged in.

    Each is whole until the next is asked for: who keeps one copies it.
    """
    for name, _ in module.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        place, _, leaf = plain.rpartition(".")
        layer = module.get_submodule(place)
        parts = layer.parameters() if hasattr(layer, "base_layer") else [getattr(layer, leaf)]
        with whole(parts):
            yield plain, lora.merged_weight(layer, leaf)


@contextlib.contextmanager
def _unpartitioned(policy: Policy) -> Iterator[Any]:
    """At ZeRO stage 3 a plain copy with the weights of now: else every token would gather every layer.

    The weights are gathered one by one and let go at the end: updates need their room.
    """
    module: Any = policy.module
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        yield module
        return
    if policy.copy is None:
        with launch.device():
            policy.copy = AutoModelForCausalLM.from_config(
                module.config, dtype=module.dtype, trust_remote_code=False
            ).requires_grad_(False)
        policy.copy.generation_config = module.generation_config
        for mine, its in zip(policy.copy.buffers(), module.buffers(), strict=True):
            mine.data = its
    try:
        copies = dict(policy.copy.named_parameters())
        for name, weight in weights_of(module):
            copies[name].data = weight.to(copies[name].dtype, copy=True)
        yield policy.copy
    finally:
        for parameter in policy.copy.parameters():
            parameter.data = parameter.data.new_empty(0)
