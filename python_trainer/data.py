"""What a task provides, tokenisation, and tasks made of JSON-lines files."""

import importlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from .config import RunConfig, UserError
from .distributed import seed_of

T = TypeVar("T")
# (prompts [B, P] padded on the left, their mask [B, P], uniform numbers [B, T]) -> tokens [B, T], and their
# log-probabilities [B, T] as the generator saw them
Generate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Pair(NamedTuple):
    chosen: str
    rejected: str
    margin: float = 0.0  # by how much the chosen text should score higher


@dataclass
class Rollout:
    """B prompts of padded width P and their responses of width T."""

    sequences: torch.Tensor  # [B, P + T] ids: prompt padded on the left, response on the right
    attention_mask: torch.Tensor  # [B, P + T] bool
    mask: torch.Tensor  # [B, T] bool: the sampled tokens, the end token among them
    ended: torch.Tensor  # [B] bool: responses that came to an end of their own

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
        return Rollout(self.sequences[rows], self.attention_mask[rows], self.mask[rows], self.ended[rows])

    @property
    def prompt_width(self) -> int:
        return self.sequences.shape[1] - self.mask.shape[1]

    @property
    def responses(self) -> torch.Tensor:
        return self.sequences[:, self.prompt_width :]

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions count from the first real token: a padded prompt is scored as the bare one would be."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


Scorer = Callable[[Rollout], torch.Tensor]  # [B, T] log-probabilities of the sampled tokens; masked ones are 0


class Task:
    """Texts, pairs and prompts, each as (training, held-out); a task overrides what it has."""

    verifiable = False  # True: `score` is the reward and no reward model is needed
    holds_out = True  # False: evaluated on the training prompts, where those are all there are

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a model that starts from random weights."""
        raise UserError("this task brings no tokenizer: give the path of a model that has one")

    def texts(self) -> tuple[list[str], list[str]]:
        raise UserError("this task has no texts for sft")

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """Pairs of a chosen and a rejected text."""
        raise UserError("this task has no preference pairs for reward")

    def prompts(self) -> tuple[list[str], list[str]]:
        raise UserError("this task has no prompts for train")

    def columns(self) -> dict[str, dict[str, Any]]:
        """What a reward function is told about each prompt beside its text."""
        return {}

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


class Files(Task):
    """texts.jsonl {"text"}, pairs.jsonl {"chosen", "rejected", "margin"?}, prompts.jsonl {"prompt", ...}."""

    def __init__(self, folder: str, heldout: float = 0.1) -> None:
        self.folder = Path(folder)
        self.heldout = heldout

    def texts(self) -> tuple[list[str], list[str]]:
        return self._split("texts.jsonl", [row["text"] for row in self._read("texts.jsonl", "text")])

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        rows = [
            Pair(row["chosen"], row["rejected"], _number(row.get("margin", 0.0), self.folder / "pairs.jsonl"))
            for row in self._read("pairs.jsonl", "chosen", "rejected")
        ]
        return self._split("pairs.jsonl", rows)

    def prompts(self) -> tuple[list[str], list[str]]:
        return self._split("prompts.jsonl", [row["prompt"] for row in self._read("prompts.jsonl", "prompt")])

    def columns(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        path = self.folder / "prompts.jsonl"
        for row in self._read("prompts.jsonl", "prompt"):
            prompt = row.pop("prompt")
            first = next(iter(found.values()), row)
            if row.keys() != first.keys():
                raise UserError(f"{path}: all rows need the same fields, but {prompt[:60]!r} has {sorted(row)}")
            if found.setdefault(prompt, row) != row:
                raise UserError(f"{path}: prompt {prompt[:60]!r} stands there twice with unlike fields")
        return found

    def _split(self, name: str, rows: list[T]) -> tuple[list[T], list[T]]:
        if len(rows) < 2:
            raise UserError(f"{self.folder / name} holds {len(rows)} rows; two are needed, as one is held out")
        random.Random(0).shuffle(rows)  # files are often sorted; one split for all stages and seeds  # noqa: S311
        cut = max(1, round(len(rows) * self.heldout))
        return rows[cut:], rows[:cut]

    def _read(self, name: str, *keys: str) -> Iterator[dict[str, Any]]:
        """The objects of the lines, in which the keys hold text."""
        path = self.folder / name
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from error
        for number, line in enumerate(content.split("\n"), 1):  # JSON may hold what splitlines calls a line's end
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                values = [record[key] for key in keys]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                wanted = ", ".join(keys)
                raise UserError(f"{path}, line {number}: expected a JSON object with {wanted}") from error
            for key, value in zip(keys, values, strict=True):
                if not isinstance(value, str):
                    raise UserError(f"{path}, line {number}: {key} must be text, not {value!r}")
            yield record


def _number(value: Any, path: Path) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: margin must be a finite number, not {value!r}")
    return float(value)


def load_task(config: RunConfig) -> Task:
    """The task of that name: a file of tasks/, or the files of `data_path`."""
    if config.task != "files":
        return importlib.import_module(f".tasks.{config.task}", __package__).make(config)
    if config.data_path is None:
        raise UserError("task files needs data_path, the folder of texts.jsonl, pairs.jsonl and prompts.jsonl")
    return Files(config.data_path)


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, response_length: int, context: int
) -> list[list[int]]:
    """Token ids, refusing what the model cannot hold: a silently cut prompt asks another question."""
    if not prompts:
        raise UserError("the prompt set is empty")
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise UserError(f"prompt {text!r} has no tokens")
        if len(ids) + response_length > context:
            raise UserError(
                f"prompt of {len(ids)} tokens and response_length {response_length} exceed the model's "
                f"context of {context} tokens: {text[:60]!r}"
            )
    return encoded


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids with the end token; a text cut at max_length has none, since it does not end there."""
    if not texts:
        raise UserError("the text set is empty")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return [row[:max_length] for row in ids]


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, P] and their mask, from true lengths."""
    width = max(len(row) for row in prompts)
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in prompts])
    lengths = torch.tensor([len(row) for row in prompts])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def only_drawn(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, V] that leave one token possible, the drawn one: 0 there, -inf elsewhere; its log-probability [B].

    It is the token at which the CDF of softmax(logits / temperature) passes the row's uniform number [B, 1];
    temperature is a number or [B, 1].
    """
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    cdf = probabilities.double().cumsum(dim=-1)
    token = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    drawn = torch.full_like(logits, float("-inf")).scatter(1, token, 0.0)
    return drawn, probabilities.gather(1, token).squeeze(1).log()
