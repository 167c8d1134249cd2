"""Prompts in, sampled responses out.

The noise of sampling is drawn for the global batch and each rank uses its rows of it, so the responses depend
neither on the number of ranks nor on what a resumed run has drawn before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from . import launch
from .engines import Policy
from .generation import Generator


@dataclass
class Rollout:
    """B prompts of padded width P and their responses of width T."""

    sequences: torch.Tensor  # [B, P + T] ids: prompt padded on the left, response on the right
    attention_mask: torch.Tensor  # [B, P + T] bool
    mask: torch.Tensor  # [B, T] bool: the sampled tokens, the end token among them

    @classmethod
    def of(cls, prompts: torch.Tensor, prompt_mask: torch.Tensor, responses: torch.Tensor, eos: int) -> "Rollout":
        """Lengths come from the first end token, never from comparing with the pad id."""
        ended = (responses == eos).cumsum(dim=1)
        mask = (ended - (responses == eos).long()) == 0
        sequences = torch.cat([prompts, responses], dim=1)
        return cls(sequences, torch.cat([prompt_mask, mask], dim=1), mask)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: torch.Tensor | slice) -> "Rollout":
        return Rollout(self.sequences[rows], self.attention_mask[rows], self.mask[rows])

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

    def ended(self, eos: int) -> torch.Tensor:
        """[B] bool: responses that came to their end token."""
        return ((self.responses == eos) & self.mask).any(dim=1)


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, P] and their mask, from true lengths."""
    width = max(len(row) for row in prompts)
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in prompts])
    lengths = torch.tensor([len(row) for row in prompts])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    generator: Generator,
    *,
    response_length: int,
    seed: int,
) -> Rollout:
    """Responses to this rank's share of `prompts`, the global batch."""
    ids, attention = left_pad(prompts, tokenizer.pad_token_id)
    noise = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), response_length, generator=noise, dtype=torch.float64)
    mine = shard(len(prompts))
    ids, attention, uniforms = (x[mine].to(launch.device()) for x in (ids, attention, uniforms))
    with generator.serving(policy, tokenizer) as generate:
        responses = generate(ids, attention, uniforms)
    return Rollout.of(ids, attention, responses, tokenizer.eos_token_id)


def shard(rows: int) -> slice:
    """This rank's rows of a global batch."""
    size = rows // launch.world_size()
    return slice(launch.rank() * size, (launch.rank() + 1) * size)
