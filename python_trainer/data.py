"""What a task provides, and the batches that are made of it. Token ids: tokens.py; files of data: tasks/files.py."""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import RunConfig, UserError
from .distributed import seed_of

Message = dict[str, Any]  # of a chat: role, content and whatever else its template knows
Content = str | list[Message]  # plain text, or chat messages
# (prompts [B, P] padded on the left, their mask [B, P], uniform numbers [B, T]) -> tokens [B, T], and their
# log-probabilities [B, T] as the generator saw them
Generate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Policy:
    """A language model, maybe inside an engine: at which temperature it is sampled and scored, and where it ends."""

    def __init__(
        self,
        model: Any,
        temperature: float,
        impl: str,
        stop_strings: Sequence[str] = (),
        vocabulary: int | None = None,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.impl = impl
        self.stop_strings = stop_strings  # beside end_ids
        self.vocabulary = vocabulary  # the tokenizer's ids: a model may have more, which are never drawn
        self.head: Any = None  # a FusedHead scores without logits
        self.copy: PreTrainedModel | None = None  # what generates where the model itself is partitioned

    @property
    def module(self) -> PreTrainedModel:
        return getattr(self.model, "module", self.model)  # inside an engine, trained or frozen

    @property
    def end_ids(self) -> list[int]:
        """Every token that ends a response."""
        ends = self.module.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends)


@dataclass(frozen=True)
class Prompt:
    content: Content
    columns: Mapping[str, Any] = field(default_factory=dict)  # what a reward function is told about it
    ids: tuple[int, ...] = ()  # once it is encoded


class Example(NamedTuple):
    text: Content
    prompt: Content = ""  # what comes before the text


class Pair(NamedTuple):
    chosen: Content
    rejected: Content
    margin: float = 0.0  # by how much the chosen text should score higher
    prompt: Content = ""  # what comes before either


@dataclass
class Rollout:
    """B prompts of padded width P and their responses of width T."""

    sequences: torch.Tensor  # [B, P + T] ids: prompt padded on the left, response on the right
    attention_mask: torch.Tensor  # [B, P + T] bool
    mask: torch.Tensor  # [B, T] bool: the sampled tokens, the end token among them
    ended: torch.Tensor  # [B] bool: responses that came to an end of their own
    prompts: Sequence[Prompt] = ()  # B of them; none where only ids matter

    @classmethod
    def of(
        cls,
        prompts: torch.Tensor,
        prompt_mask: torch.Tensor,
        responses: torch.Tensor,
        ends: int | Sequence[int],
        stops: torch.Tensor | None = None,
    ) -> "Rollout":
        """Lengths come from the first end token, or token of `stops` [B, T], never from comparing with the pad id."""
        end = torch.isin(responses, torch.tensor(ends, device=responses.device))
        end = end if stops is None else end | stops
        mask = end.cumsum(dim=1) - end.long() == 0
        sequences = torch.cat([prompts, responses], dim=1)
        return cls(sequences, torch.cat([prompt_mask, mask], dim=1), mask, (end & mask).any(dim=1))

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: torch.Tensor | slice) -> "Rollout":
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        prompts = [self.prompts[row] for row in chosen] if self.prompts else ()
        return Rollout(self.sequences[rows], self.attention_mask[rows], self.mask[rows], self.ended[rows], prompts)

    def cut(self, width: int) -> "Rollout":
        """The same with responses of at most that width."""
        end = self.prompt_width + width
        return Rollout(
            self.sequences[:, :end], self.attention_mask[:, :end], self.mask[:, :width], self.ended, self.prompts
        )

    @property
    def prompt_width(self) -> int:
        return self.sequences.shape[1] - self.mask.shape[1]

    @property
    def responses(self) -> torch.Tensor:
        return self.sequences[:, self.prompt_width :]

    def answers(self) -> list[list[int]]:
        """The ids of each response, its end token among them."""
        return [ids[mask].tolist() for ids, mask in zip(self.responses, self.mask, strict=True)]

    def texts(self, tokenizer: PreTrainedTokenizerBase, *, with_prompts: bool = False) -> list[str]:
        """Each response as a person reads it, or each prompt with its response."""
        ids, mask = (self.sequences, self.attention_mask) if with_prompts else (self.responses, self.mask)
        return [tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)]

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions count from the first real token: a padded prompt is scored as the bare one would be."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


@dataclass
class Experience:
    """Rows of the global batch, the same on every rank."""

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    ended: torch.Tensor
    logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor  # by which the responses were drawn: another engine's where one draws
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    raw_scores: torch.Tensor  # as a person reads them
    scores: torch.Tensor  # scaled and clipped, as the algorithm learns from them
    kl: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor  # of the tokens in the policy's loss

    def __getitem__(self, rows: torch.Tensor) -> "Experience":
        return Experience(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        logprobs: torch.Tensor,
        rollout_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        values: torch.Tensor,
        raw_scores: torch.Tensor,
        scores: torch.Tensor,
    ) -> "Experience":
        """What is known of a rollout before the algorithm says what KL, advantages and returns it has."""
        return cls(
            rollout.sequences,
            rollout.attention_mask,
            rollout.mask,
            rollout.ended,
            logprobs,
            rollout_logprobs,
            ref_logprobs,
            values,
            raw_scores,
            scores,
            kl=torch.zeros_like(raw_scores),
            advantages=torch.zeros_like(values),
            returns=torch.zeros_like(values),
            weights=torch.ones_like(values),
        )

    @property
    def rollout(self) -> Rollout:
        return Rollout(self.sequences, self.attention_mask, self.mask, self.ended)


Scorer = Callable[[Rollout], torch.Tensor]  # [B, T] log-probabilities of the sampled tokens; masked ones are 0


class Task:
    """Texts, pairs and prompts, each as (training, held-out); a task overrides what it has."""

    verifiable = False  # True: `score` is the reward and no reward model is needed
    holds_out = True  # False: evaluated on the training prompts, where those are all there are

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a model that starts from random weights."""
        raise UserError("no model to start from: give the path of one with its tokenizer, or run the sft command first")

    def texts(self) -> tuple[list[Example], list[Example]]:
        raise UserError("this task has no texts for sft")

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """Pairs of a chosen and a rejected text."""
        raise UserError("this task has no preference pairs for reward")

    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        raise UserError("this task has no prompts for train")

    def score(self, rollout: Rollout) -> torch.Tensor:
        """[B] the reward of a verifiable task."""
        raise NotImplementedError

    def gold(self, texts: Sequence[str]) -> list[float] | None:
        """An independent score, used in evaluation only; None where there is none."""
        return None

    def exact(self, policy: Scorer, reference: Scorer, kl_coef: float) -> dict[str, float]:
        """Figures known by enumeration, where the task is small enough."""
        return {}

    def best(self, reference: Scorer, kl_coefs: Sequence[float]) -> list[tuple[float, float, float]]:
        """(kl_coef, KL, reward) of the best policy for each weight of the penalty, where the task can enumerate it."""
        return []


def load_task(config: RunConfig) -> Task:
    """The task of that name, from its file in tasks/."""
    if config.task != "files":
        for name in ("eval_data_path", "column_mapping", "apply_chat_template"):
            if getattr(config, name):
                raise UserError(f"{name} is for task files; task {config.task} has data of its own")
    return importlib.import_module(f".tasks.{config.task}", __package__).make(config)


def readable(content: Content) -> str:
    """As a person reads it."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in content)


def fingerprint(*sets: Sequence[Any]) -> str:
    """Of rows of data, in their order."""
    seen = hashlib.sha256()
    for rows in sets:
        seen.update(f"{len(rows)} rows".encode())
        for row in rows:
            seen.update(repr(row).encode("utf-8", "backslashreplace"))
    return seen.hexdigest()


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, P] and their mask, from true lengths."""
    width = max(len(row) for row in prompts)
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in prompts])
    lengths = torch.tensor([len(row) for row in prompts])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad: int | bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, L] and the mask of their true lengths; a pad id inside a row stays an ordinary token."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None, :] < lengths[:, None]


def shuffled_positions(count: int, seed: int, start: int, size: int) -> list[int]:
    """Positions start … start+size of an endless stream that reshuffles `count` items at every pass.

    A function of the seed and of the position alone: resuming needs no iterator state, and every rank sees
    the same global batch.
    """
    positions: list[int] = []
    for index in range(start, start + size):
        epoch, offset = divmod(index, count)
        if offset == 0 or not positions:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch))).tolist()
        positions.append(order[offset])
    return positions


def _where_cdf_passes(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[B, 1] columns: first the block of columns that the uniform number [B, 1] falls into, then one of them.

    One cumulative sum in float64 over a vocabulary of 50 000 takes six times as long.
    """
    width = probabilities.shape[1]
    size = min(256, width)
    whole = width - width % size
    sums = probabilities[:, :whole].unflatten(1, (-1, size)).sum(dim=-1)
    sums = torch.cat([sums, probabilities[:, whole:].sum(dim=-1, keepdim=True)], dim=1).double()
    ends = sums.cumsum(dim=-1)
    block, target = _passed(ends, uniforms)
    rest = (target - (ends - sums).gather(1, block)) / sums.gather(1, block)
    columns = block * size + torch.arange(size, device=block.device)
    inside = probabilities.gather(1, columns.clamp(max=width - 1)).double() * (columns < width)
    at, _ = _passed(inside.cumsum(dim=-1), rest.clamp(0, 1))
    return columns.gather(1, at).clamp(max=width - 1)


def _passed(cdf: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where it passes that share of its end, never a column without a share of its own; and at which value."""
    end = cdf[:, -1:]
    target = torch.minimum(uniforms * end, end.nextafter(torch.zeros_like(end)))
    return torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1), target


def only_drawn(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float | torch.Tensor, vocabulary: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, V] that leave one token possible, the drawn one: 0 there, -inf elsewhere; its log-probability [B].

    It is the token at which the CDF of softmax(logits / temperature) passes the row's uniform number [B, 1];
    temperature is a number or [B, 1]. Ids from `vocabulary` on are no tokens.
    """
    logits_of_tokens = logits[:, :vocabulary].float()
    if not isinstance(temperature, float) or temperature != 1:
        logits_of_tokens = logits_of_tokens / temperature
    probabilities = logits_of_tokens.softmax(dim=-1)
    token = _where_cdf_passes(probabilities, uniforms)
    drawn = torch.full_like(logits, float("-inf")).scatter(1, token, 0.0)
    return drawn, probabilities.gather(1, token).squeeze(1).log()
