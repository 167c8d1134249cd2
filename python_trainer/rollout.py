"""Prompts in, sampled and scored responses out.

The noise of sampling is drawn for the global batch and each rank uses its rows of it, so the responses depend
neither on the number of ranks nor on what a resumed run has drawn before.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ppo_kernels import kl_rewards, moments, token_logprobs

from . import distributed
from .config import SharedError
from .data import Experience, Generate, Policy, Prompt, Rollout, left_pad, only_drawn
from .distributed import weights_of
from .ppo_config import PPOConfig

RewardFn = Callable[[Rollout], torch.Tensor]  # [B] the score of each response

RATIO_TOLERANCE = 1e-5  # of log-probabilities before the first update
# How far log-probabilities at generation may be from those at scoring, on average over the tokens of a rollout. A few
# tokens with keys and values from a cache, in another order of addition, are off by more.
GENERATION_TOLERANCE = {"exact": 1e-4, "rounded": 0.1}


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    generator: "Generator",
    *,
    response_length: int,
    score: Callable[[Rollout], torch.Tensor],
    seed: int,
) -> tuple[Rollout, torch.Tensor, torch.Tensor]:
    """Responses to this rank's share of `prompts`, the global batch, and their log-probabilities [B, T], twice.

    The first are computed anew by `score`, of the weights that are trained, and compared with the second, those that
    the generator drew by: it has been handed a copy of the weights, or another engine has.
    """
    ids, attention = left_pad([prompt.ids for prompt in prompts], tokenizer.pad_token_id)
    noise = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), response_length, generator=noise, dtype=torch.float64)
    mine = shard(len(prompts))
    ids, attention, uniforms = (x[mine].to(distributed.device()) for x in (ids, attention, uniforms))
    with generator.serving(policy, tokenizer) as generate:
        responses, drawn_at = generate(ids, attention, uniforms)
    stops = stopped(responses, tokenizer, policy.stop_strings) if policy.stop_strings else None
    rollout = replace(Rollout.of(ids, attention, responses, policy.end_ids, stops), prompts=prompts[mine])
    longest = int(distributed.gather_rows(rollout.mask.sum(dim=1)).max())
    rollout, drawn_at = rollout.cut(longest), drawn_at[:, :longest]  # nothing is computed of padding behind all of them
    logprobs = score(rollout)
    refuse_other_weights(policy, rollout, drawn_at, logprobs)
    return rollout, logprobs, torch.where(rollout.mask, drawn_at, 0.0).to(logprobs)


def refuse_other_weights(policy: Policy, rollout: Rollout, drawn_at: torch.Tensor, logprobs: torch.Tensor) -> None:
    """A rollout must come from the weights that are trained; called on every rank."""
    gaps = torch.where(rollout.mask, drawn_at - logprobs, 0.0).abs().sum()
    total, tokens = distributed.gather_rows(torch.stack([gaps, rollout.mask.sum().to(gaps)])[None]).sum(dim=0).tolist()
    exact = distributed.device().type == "cpu" and policy.module.dtype == torch.float32
    bound = GENERATION_TOLERANCE["exact" if exact else "rounded"]
    if not total / tokens <= bound:  # NaN fails too
        raise SharedError(
            "responses were not drawn from the weights that are trained: log-probabilities at generation and at "
            f"scoring differ by {total / tokens:.2g} per token ({bound:g} is allowed for rounding). To find the cause, "
            "set generation_engine hf, another attn_implementation or deepspeed file, or leave lora_r out"
        )


def stopped(responses: torch.Tensor, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> torch.Tensor:
    """[B, T] bool: the tokens with which one of the texts is complete."""
    width = _window(strings)
    windows = [[ids[max(0, end - width) : end] for end in range(1, len(ids) + 1)] for ids in responses.tolist()]
    found = [[_holds(window, tokenizer, strings) for window in row] for row in windows]
    return torch.tensor(found, device=responses.device)


def _window(strings: Sequence[str]) -> int:
    """Tokens that can hold the longest text, if each has a byte at least."""
    return max(len(text.encode()) for text in strings) + 1


def _holds(ids: list[int], tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> bool:
    text = tokenizer.decode(ids)
    return any(one in text for one in strings)


def shard(rows: int) -> slice:
    """This rank's rows of a global batch."""
    size = rows // distributed.world_size()
    return slice(distributed.rank() * size, (distributed.rank() + 1) * size)


class Generator(Protocol):
    """Serves a policy as it is now. Log-probabilities are not its business: the trainer computes them itself."""

    def serving(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase
    ) -> contextlib.AbstractContextManager[Generate]:
        """Inside, the function draws responses; what lies after the end of one means nothing."""
        ...


class HfGenerator:
    """transformers' `generate`, `rows` prompts at a time."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    @contextlib.contextmanager
    def serving(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Generate]:
        pad = tokenizer.pad_token_id

        def generate(
            ids: torch.Tensor, attention: torch.Tensor, uniforms: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            parts = zip(ids.split(self.rows), attention.split(self.rows), uniforms.split(self.rows), strict=True)
            responses, logprobs = zip(*(generate_part(*part) for part in parts), strict=True)
            return torch.cat(responses), torch.cat(logprobs)

        def generate_part(
            ids: torch.Tensor, attention: torch.Tensor, uniforms: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            length = uniforms.shape[1]
            draw = InverseCdf(uniforms, ids.shape[1], policy.temperature, policy.vocabulary)
            stop = StopStrings(tokenizer, policy.stop_strings, ids.shape[1])
            sequences = module.generate(
                ids,
                attention_mask=attention.long(),
                # Not greedy: InverseCdf draws the token. do_sample=True would also apply the top-k and top-p of the
                # model's own generation settings, which scoring does not know of.
                generation_config=GenerationConfig(
                    max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=policy.end_ids
                ),
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([stop] if policy.stop_strings else []),
            )
            responses = sequences[:, ids.shape[1] :]
            missing = length - responses.shape[1]  # generate stops early once every row has ended
            return torch.nn.functional.pad(responses, (0, missing), value=pad), draw.logprobs

        with _unpartitioned(policy) as module:
            checkpointing = [layer for layer in module.modules() if layer.training]
            module.eval()  # gradient checkpointing would forbid the cache
            try:
                yield generate
            finally:
                for layer in checkpointing:
                    layer.training = True


class InverseCdf(LogitsProcessor):
    """Samples from softmax(logits / temperature) with a given uniform number per row and token.

    It leaves the drawn token as the only possible one, so `generate` has nothing left to decide.
    """

    def __init__(
        self, uniforms: torch.Tensor, prompt_width: int, temperature: float, vocabulary: int | None = None
    ) -> None:
        self.uniforms = uniforms
        self.prompt_width = prompt_width
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.logprobs = torch.zeros(uniforms.shape, device=uniforms.device)  # of the drawn tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        uniforms = self.uniforms[:, step : step + 1]
        drawn, self.logprobs[:, step] = only_drawn(scores, uniforms, self.temperature, self.vocabulary)
        return drawn


class StopStrings(StoppingCriteria):
    """Ends rows as `stopped` will find them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        last = input_ids[:, self.prompt_width :][:, -_window(self.strings) :].tolist()  # earlier ones were looked at
        return torch.tensor([_holds(ids, self.tokenizer, self.strings) for ids in last], device=input_ids.device)


def score_tokens(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """[B, T] log-probabilities of the sampled tokens at the sampling temperature."""
    return _scored(policy, rollout, entropy=False)


def score_tokens_and_entropy(
    policy: Policy, rollout: Rollout, *, differentiable: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the entropy of each token's distribution: as a metric, or with its gradient."""
    return _scored(policy, rollout, entropy=True if differentiable else "detached")


def score_values(critic: Any, rollout: Rollout) -> torch.Tensor:
    """[B, T] the critic's value before each response token."""
    return critic(**model_inputs(rollout))[:, rollout.prompt_width - 1 : -1]


def score_responses(reward_model: Any, rollout: Rollout) -> torch.Tensor:
    """[B] the reward model's number at the last token of prompt and response."""
    scores = reward_model(**model_inputs(rollout))
    last = rollout.prompt_width + rollout.mask.sum(dim=1, keepdim=True) - 1
    return scores.gather(1, last).squeeze(1)


def model_inputs(rollout: Rollout) -> dict[str, torch.Tensor]:
    return {
        "input_ids": rollout.sequences,
        "attention_mask": rollout.attention_mask.long(),
        "position_ids": rollout.position_ids,
    }


@torch.no_grad()
def by_rows(function: Callable[[Rollout], torch.Tensor], rollout: Rollout, rows: int) -> torch.Tensor:
    """`function` over a few rows at a time, for memory."""
    return torch.cat([function(rollout[i : i + rows]) for i in range(0, len(rollout), rows)])


def gathered(local: Experience) -> Experience:
    """The experience of all ranks: small next to logits, and every rank can then cut the same minibatches."""
    return Experience(*(distributed.gather_rows(getattr(local, field.name)) for field in fields(local)))


def minibatches(rows: int, group_size: int, count: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of each minibatch, in an order of the seed's; responses to one prompt stay together."""
    order = torch.randperm(rows // group_size, generator=torch.Generator().manual_seed(seed))
    for groups in order.chunk(count):
        yield (groups[:, None] * group_size + torch.arange(group_size)).flatten()


def check_ratio(drift: float, step: int, config: PPOConfig) -> None:
    """Before the first update the policy is the one that sampled; anything beyond rounding is a bug."""
    if drift <= RATIO_TOLERANCE:
        return
    text = f"before the first update of step {step} the log-ratio is off by {drift:.2g}, not 0"
    # On a GPU another batch shape may choose a kernel that adds up in another order.
    if distributed.device().type == "cpu" and not (config.bf16 or config.fp16):
        raise RuntimeError(text + ": sampling-time and training-time scoring disagree")
    if distributed.is_main():
        tqdm.write(f"warning: {text} (rounding, or sampling-time and training-time scoring disagree)")


def one_micro_batch(config: PPOConfig) -> bool:
    """Whether a rollout has one update, of one micro-batch on each rank. Its ratio is 1 by construction then.

    What `sample` compares the generator with is the forward pass of that update.
    """
    fits = config.batch_size <= config.per_device_train_batch_size * distributed.world_size()
    return fits and config.num_ppo_epochs * config.num_mini_batches == 1


def learned_from(experience: Experience, config: PPOConfig, group_size: int) -> Experience:
    """Without the tokens of responses that the settings leave out: those that are cut, and groups that score alike."""
    kept = torch.ones_like(experience.ended)
    if config.mask_truncated_completions:
        kept = kept & experience.ended
    if config.mask_zero_variance_groups:
        kept = kept & ~alike(experience.raw_scores, group_size).repeat_interleave(group_size)
    return restricted(experience, kept[:, None])


def restricted(experience: Experience, kept: torch.Tensor) -> Experience:
    """Without the tokens that are not kept."""
    of_tokens = ("logprobs", "rollout_logprobs", "ref_logprobs", "advantages")
    return replace(
        experience,
        mask=experience.mask & kept,
        **{name: torch.where(kept, getattr(experience, name), 0.0) for name in of_tokens},
    )


def alike(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """[B / group_size] bool: groups whose responses all score the same, of which nothing is to be learned."""
    groups = scores.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def summary(
    experience: Experience, learned: Experience, group_size: int, kl_coef: float, score_clip: float | None, impl: str
) -> dict[str, float]:
    """What a rollout was like, over the global batch; and what of it is learned from."""
    mask, scores = experience.mask, experience.raw_scores.double()
    log_ratio = experience.logprobs - experience.ref_logprobs
    k3 = kl_rewards(
        experience.logprobs,
        experience.ref_logprobs,
        experience.scores,
        mask,
        kl_estimator="k3",
        impl=impl,
    )[1]
    penalty = -kl_coef * experience.kl.double().mean()
    ended = experience.ended.double()
    figures = {
        "objective/kl": (log_ratio.double() * mask).sum(dim=1).mean(),
        "objective/kl_k3": k3.double().mean(),
        "objective/entropy": -(experience.logprobs.double() * mask).sum(dim=1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": scores.mean() + penalty,
        "val/response_length": mask.sum(dim=1).double().mean(),
        "val/num_eos_tokens": ended.sum(),
        "val/eos_rate": ended.mean(),
        "val/masked_responses": (~learned.mask.any(dim=1)).sum(),
    }
    if score_clip is not None:
        figures["objective/score_clipfrac"] = (experience.scores.abs() >= score_clip).double().mean()
    if group_size > 1:
        figures["val/frac_reward_zero_std"] = alike(experience.raw_scores, group_size).double().mean()
    if experience.returns.any():  # there is a critic
        error = moments(experience.returns - experience.values, mask, impl=impl)[2]
        spread = moments(experience.returns, mask, impl=impl)[2]
        figures["val/explained_variance"] = 1 - error / spread.clamp(min=1e-12)
    return {name: figure.item() for name, figure in figures.items()}


def _scored(policy: Policy, rollout: Rollout, entropy: bool | str) -> Any:
    """Row t predicts response token t: the last prompt position is in, the last response position out."""
    before = torch.arange(rollout.prompt_width - 1, rollout.sequences.shape[1] - 1, device=rollout.sequences.device)
    inputs = model_inputs(rollout) | {"use_cache": False, "logits_to_keep": before}
    options: dict[str, Any] = {"temperature": policy.temperature, "mask": rollout.mask, "entropy": entropy}
    options["impl"] = policy.impl
    if policy.head is not None:
        return policy.head.token_logprobs(policy.model, inputs, rollout.responses, policy.vocabulary, **options)
    logits = policy.model(**inputs).logits[..., : policy.vocabulary]
    return token_logprobs(logits, rollout.responses, **options)


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
        with distributed.device():
            policy.copy = AutoModelForCausalLM.from_config(
                module.config,
                dtype=module.dtype,
                attn_implementation=module.config._attn_implementation,
                trust_remote_code=False,
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
