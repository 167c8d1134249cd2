"""A task small enough to enumerate, so that the optimum is a number and not an opinion.

Four prompts, responses of up to five tokens that may end early. Every response is scored by the trained and
by the reference policy, which gives E[r], KL and J = E[r] - kl_coef·KL exactly, next to the best J there is,
J* = kl_coef · log Σ_y π_ref(y) exp(r(y) / kl_coef). Reward alone proves nothing: a flipped KL sign raises it.
"""

import itertools
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import distributed
from ..config import RunConfig, UserError
from ..data import Prompt, Rollout, Scorer, Task, left_pad

RESPONSE_LENGTH = 5
PAD, EOS, *CONTENT = "<pad>", "<eos>", "a", "b", "c", "d", "e"
OBJECTIVE = {  # another value would move the optimum away from J*
    "response_length": RESPONSE_LENGTH,
    "missing_eos_penalty": None,
    "score_clip": None,
    "score_scaling": "none",
    "reward_function": None,
    "gamma": 1.0,
}
PROMPTS = ["a", "b a", "c", "d b"]  # two lengths, so that left padding and position ids take part


class Exact(Task):
    """Repeat the prompt's first letter, but not twice in a row."""

    verifiable = True
    holds_out = False

    def __init__(self, config: RunConfig) -> None:
        for name, needed in OBJECTIVE.items():
            value = getattr(config, name, needed)
            if value != needed:
                raise UserError(f"task exact knows the optimum for {name} {needed} alone, not for {value}")
        if getattr(config, "kl_coef", 1.0) <= 0:
            raise UserError("task exact needs a positive kl_coef: without a KL penalty there is no finite optimum")
        estimator, place = getattr(config, "kl_estimator", None), getattr(config, "kl_in", None)
        if estimator not in (None, "k1") and place != "loss":
            raise UserError(f"task exact knows the optimum for kl_estimator k1 alone, not for {estimator}")
        self.shift = getattr(config, "score_shift", 0.0)
        vocabulary = {word: index for index, word in enumerate([PAD, EOS, *CONTENT])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        return [Prompt(text) for text in PROMPTS], [Prompt(text) for text in PROMPTS]

    def score(self, rollout: Rollout) -> torch.Tensor:
        """Share of places that hold the wanted letter, plus half the share of neighbours that differ."""
        first = rollout.attention_mask.int().argmax(dim=1)
        wanted = rollout.sequences.gather(1, first[:, None])
        written = rollout.mask & (rollout.responses != self._tokenizer.eos_token_id)
        hits = ((rollout.responses == wanted) & written).sum(dim=1) / RESPONSE_LENGTH
        changes = (rollout.responses[:, 1:] != rollout.responses[:, :-1]) & written[:, 1:] & written[:, :-1]
        scores = hits + 0.5 * changes.sum(dim=1) / (RESPONSE_LENGTH - 1)
        number = wanted.squeeze(1) - len((PAD, EOS))  # the prompts' first letters are a, b, c, d
        return scores + self.shift * number

    @torch.no_grad()
    def exact(self, policy: Scorer, reference: Scorer, kl_coef: float) -> dict[str, float]:
        totals = torch.zeros(4, dtype=torch.float64)
        for prompt in PROMPTS:
            rollout = self._all_responses(prompt)
            logp = _sequence_logprobs(policy, rollout)
            ref = _sequence_logprobs(reference, rollout)
            reward = self.score(rollout).double().cpu()
            best = kl_coef * torch.logsumexp(ref + reward / kl_coef, dim=0)
            probability = logp.exp()
            totals += torch.stack(
                [
                    (probability * reward).sum(),
                    (probability * (logp - ref)).sum(),
                    (ref.exp() * reward).sum(),
                    best,
                ]
            )
        reward, kl, at_reference, optimum = (totals / len(PROMPTS)).tolist()
        objective = reward - kl_coef * kl
        return {
            "exact/reward": reward,
            "exact/kl": kl,
            "exact/objective": objective,
            "exact/optimum": optimum,
            "exact/score": (objective - at_reference) / (optimum - at_reference),
        }

    @torch.no_grad()
    def best(self, reference: Scorer, kl_coefs: Sequence[float]) -> list[tuple[float, float, float]]:
        """The policy proportional to π_ref · exp(r / kl_coef), prompt by prompt."""
        totals = torch.zeros(len(kl_coefs), 2, dtype=torch.float64)
        for prompt in PROMPTS:
            rollout = self._all_responses(prompt)
            ref, reward = _sequence_logprobs(reference, rollout), self.score(rollout).double().cpu()
            for index, coef in enumerate(kl_coefs):
                logp = (ref + reward / coef).log_softmax(dim=0)
                kl, mean = (logp.exp() * (logp - ref)).sum(), (logp.exp() * reward).sum()
                totals[index] += torch.stack([kl, mean])
        means = (totals / len(PROMPTS)).tolist()
        return [(coef, kl, reward) for coef, (kl, reward) in zip(kl_coefs, means, strict=True)]

    def _all_responses(self, prompt: str) -> Rollout:
        eos = self._tokenizer.eos_token_id
        others = [token for token in range(len(self._tokenizer)) if token != eos]
        responses = [
            [*content, eos] for n in range(RESPONSE_LENGTH) for content in itertools.product(others, repeat=n)
        ] + [list(content) for content in itertools.product(others, repeat=RESPONSE_LENGTH)]
        ids, attention = left_pad([self._tokenizer(prompt)["input_ids"]], self._tokenizer.pad_token_id)
        padded = torch.tensor([row + [0] * (RESPONSE_LENGTH - len(row)) for row in responses])
        device, count = distributed.device(), len(padded)
        return Rollout.of(
            ids.expand(count, -1).to(device), attention.expand(count, -1).to(device), padded.to(device), eos
        )


def make(config: RunConfig) -> Task:
    return Exact(config)


def _sequence_logprobs(policy: Scorer, rollout: Rollout) -> torch.Tensor:
    parts = [policy(rollout[rows]).sum(dim=1) for rows in torch.arange(len(rollout)).split(2048)]
    return torch.cat(parts).double().cpu()
