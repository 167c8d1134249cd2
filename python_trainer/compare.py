"""Trained policies beside each other: on the same held-out prompts, with the same random numbers.

`eval` puts one beside its reference, `compare` plays each against each other, as figure 5 of the P3O article
(arXiv 2310.00212) does: by the reward that they were trained on, and by a judge that had no part in it.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import distributed, files
from .config import EvalConfig, SamplingConfig, UserError
from .data import Policy, Prompt, load_task
from .deepspeed_engine import frozen, init_distributed
from .evaluate import Evaluation, Evaluator, choose_generator, evaluation_prompts, mean_and_error
from .logging import as_json, write_table
from .models import load_policy, load_reward_model, load_tokenizer, stage_model, stop_strings, undamaged
from .ppo_config import CompareConfig
from .reward_functions import FunctionReward
from .rewards import load_reward_fn, refuse_non_finite_scores
from .settings import make_folder, save
from .tokens import SEQUENCES, context_of, encode_prompts, refuse_short_context, vocabulary_of

REWARD, GOLD = "reward", "gold"  # who decides: what was trained on; the task's independent score


class Win(NamedTuple):
    policy: str
    against: str
    by: str  # who decides
    win_rate: float  # the share of prompts; a tie is half of one
    se: float
    prompts: int


class Figures(NamedTuple):
    """What a policy reached by itself: means with standard errors."""

    policy: str
    reward: float
    reward_se: float
    gold: float | None
    gold_se: float | None
    kl: float  # nats per response
    kl_se: float
    response_length: float


class Comparison(NamedTuple):
    policies: list[Figures]
    wins: list[Win]


@dataclass
class Drawn:
    """One policy's responses to all prompts, and who gave them which scores."""

    texts: list[str]
    kl: torch.Tensor
    length: torch.Tensor
    scores: dict[str, torch.Tensor]

    def at(self, row: int) -> dict[str, Any]:
        scores = {judge: values[row].item() for judge, values in self.scores.items()}
        return {"completion": self.texts[row], "kl": self.kl[row].item(), **scores}


def beside_reference(config: EvalConfig) -> tuple[Evaluation, Evaluation]:
    """The reference and a trained policy; the figures are kept."""
    init_distributed(config.seed, config.ddp_timeout)
    trained = stage_model(config, "train", config.model_path)
    if trained is None:
        raise UserError("no policy to evaluate: give model_path, or run the train command first")
    folder = _result_folder(config, "eval")
    generator = choose_generator(config)
    task = load_task(config)
    heldout = task.prompts()[1]
    evaluation_prompts(heldout, config)  # before the models load
    tokenizer = load_tokenizer(trained)
    source = stage_model(config, "sft", config.sft_model_path)
    reference, policy = (_policy(load_policy(path, config, tokenizer), config, tokenizer) for path in (source, trained))
    prompts = encode_prompts(heldout, tokenizer, config, context_of(policy.module))
    wanted = task.verifiable or config.reward_function is not None
    reward_fn = None
    if wanted:
        reward_fn = load_reward_fn(config, task, tokenizer, prompts, vocabulary_of(tokenizer), load_reward_model)
    evaluator = Evaluator(prompts, reference, task, tokenizer, generator, reward_fn, config)
    before, after = evaluator.evaluate(reference), evaluator.evaluate(policy)
    if distributed.is_main():
        save(config, folder)
        figures = {"reference": before.metrics, "policy": after.metrics}
        files.write(folder / "metrics.json", as_json(figures, indent=2) + "\n")
    return before, after


def head_to_head(config: CompareConfig) -> Comparison:
    """Every policy against every other one; tables, a picture and all responses are kept."""
    places = {name: policy_at(place) for name, place in config.entries().items()}
    if len(places) < 2:
        raise UserError(f"compare needs two runs or more, not {len(places)}: compare RUN RUN ...")
    init_distributed(config.seed, config.ddp_timeout)
    folder = _result_folder(config, "compare")
    prompts, drawn = _drawn(config, places)
    judges = [name for name in (REWARD, GOLD, config.judge) if name in next(iter(drawn.values())).scores]
    wins = [
        Win(one, other, judge, *win_rate(drawn[one], drawn[other], judge), prompts=len(prompts))
        for judge in judges
        for one, other in permutations(drawn, 2)
    ]
    policies = [_summary(name, each) for name, each in drawn.items()]
    if distributed.is_main():
        save(config, folder)
        write_table(folder / "wins.csv", wins)
        write_table(folder / "policies.csv", policies)
        rows = [
            {"prompt": prompt.content, "responses": {name: each.at(row) for name, each in drawn.items()}}
            for row, prompt in enumerate(prompts)
        ]
        files.write(folder / "responses.jsonl", "".join(as_json(row) + "\n" for row in rows))
        draw(policies, wins, folder / "compare.png")
    return Comparison(policies, wins)


def policy_at(place: Path) -> Path:
    """The model of a run, or of one of its commands, or the one that `place` itself is."""
    for folder in (place / "train" / "model", place / "model", place):
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return undamaged(folder)
    what = "there is no such folder" if not place.is_dir() else "it holds no trained policy"
    raise UserError(f"cannot compare {place}: {what}; name the output_dir of a train command, or a model's folder")


def win_rate(one: Drawn, other: Drawn, judge: str) -> tuple[float, float]:
    """The share of prompts on which the first one's response scores higher, with its standard error.

    Where the scores are equal half of a prompt is won, and where the responses are: scores of the same text may differ
    by rounding, as they were computed in batches with others.
    """
    mine, others = one.scores[judge], other.scores[judge]
    same = torch.tensor([text == their for text, their in zip(one.texts, other.texts, strict=True)])
    won = torch.where(same | (mine == others), 0.5, (mine > others).double())
    return mean_and_error(won)


def _drawn(config: CompareConfig, places: Mapping[str, Path]) -> tuple[Sequence[Prompt], dict[str, Drawn]]:
    """What each policy answers to the same prompts, one policy in memory at a time beside the reference."""
    generator, task = choose_generator(config), load_task(config)
    heldout = task.prompts()[1]
    evaluation_prompts(heldout, config)  # before the models load
    if config.sft_model_path is None and config.model_config is None:
        raise UserError("no reference for the KL: set sft_model_path to the model that the policies were trained from")
    tokenizer = _shared_tokenizer(places)
    source = None if config.sft_model_path is None else undamaged(Path(config.sft_model_path))
    reference = _policy(load_policy(source, config, tokenizer), config, tokenizer)
    prompts = encode_prompts(heldout, tokenizer, config, context_of(reference.module))
    longest = max(len(prompt.ids) for prompt in prompts) + config.response_length
    reward_fn = load_reward_fn(config, task, tokenizer, prompts, vocabulary_of(tokenizer), load_reward_model)
    judge = None if config.judge is None else FunctionReward([config.judge], [1.0], tokenizer, prompts[0].columns)
    evaluator = Evaluator(prompts, reference, task, tokenizer, generator, reward_fn, config)
    found = {}
    for name, path in places.items():
        model = load_policy(path, config, tokenizer)
        refuse_short_context(model, longest, *SEQUENCES)
        policy = _policy(model, config, tokenizer)
        local = evaluator.respond(policy)
        columns = {REWARD if key == "score" else key: values for key, values in local.columns.items()}
        if config.judge is not None and judge is not None:
            columns[config.judge] = judge(local.rollout)
        everywhere = {key: distributed.gather_rows(values.double()).cpu() for key, values in columns.items()}
        for key in everywhere.keys() - {"kl", "response_length"}:
            refuse_non_finite_scores(columns[key], local.rollout)
        texts = [text for part in distributed.gather_objects(local.texts) for text in part]
        found[name] = Drawn(texts, everywhere.pop("kl"), everywhere.pop("response_length"), everywhere)
    return evaluation_prompts(prompts, config), found


def _shared_tokenizer(places: Mapping[str, Path]) -> PreTrainedTokenizerBase:
    """Policies are compared by one reference's log-probabilities of their tokens."""
    (first, path), *others = places.items()
    tokenizer = load_tokenizer(path)
    for name, other in others:
        if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"cannot compare {name} with {first}: its tokenizer has other tokens; compare them apart")
    return tokenizer


def _summary(name: str, each: Drawn) -> Figures:
    reward, reward_se = mean_and_error(each.scores[REWARD])
    gold, gold_se = mean_and_error(each.scores[GOLD]) if GOLD in each.scores else (None, None)
    kl, kl_se = mean_and_error(each.kl)
    return Figures(name, reward, reward_se, gold, gold_se, kl, kl_se, each.length.mean().item())


def _policy(model: PreTrainedModel, config: SamplingConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    strings, tokens = stop_strings(config, model), vocabulary_of(tokenizer)
    return Policy(frozen(model, config), config.temperature, config.ops_impl, strings, tokens)


def _result_folder(config: SamplingConfig, command: str) -> Path:
    folder = Path(config.output_dir) / command
    with distributed.raise_on_all_ranks(UserError):
        if distributed.is_main():
            make_folder(folder)
    return folder


def draw(policies: Sequence[Figures], wins: Sequence[Win], picture: Path) -> None:
    """Reward over KL on the left; then, for each judge, how often the row's policy beats the column's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [each.policy for each in policies]
    judges = list(dict.fromkeys(win.by for win in wins))
    figure, axes = pyplot.subplots(
        1, 1 + len(judges), figsize=(4.6 * (1 + len(judges)), 4.2), layout="constrained", squeeze=False
    )
    first, *others = axes.flat
    for number, each in enumerate(policies):
        first.errorbar(each.kl, each.reward, each.reward_se, each.kl_se, "o", color=f"C{number}", label=each.policy)
    first.set_xlabel("KL to the reference [nats per response]")
    first.set_ylabel("mean reward")
    first.grid(alpha=0.3)
    first.legend()
    for axis, judge in zip(others, judges, strict=True):
        rates = {(win.policy, win.against): win for win in wins if win.by == judge}
        grid = [[rates[a, b].win_rate if a != b else 0.5 for b in names] for a in names]
        axis.imshow(grid, cmap="RdBu", vmin=0, vmax=1)
        for (a, b), win in rates.items():
            text = f"{win.win_rate:.1%}\n± {win.se:.1%}"
            axis.text(names.index(b), names.index(a), text, ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"wins of the row over the column, by {judge}", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    files.write(picture, content.getvalue())
    pyplot.close(figure)
