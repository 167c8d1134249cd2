"""Scores from a person's own Python, and the reward model's loss."""

import json
import math
from dataclasses import replace

import pytest
import torch

from python_trainer.config import RewardConfig, UserError
from python_trainer.data import Pair, Prompt, Rollout, left_pad
from python_trainer.reward_functions import FunctionReward
from python_trainer.rewards import ModelReward, exact_match
from python_trainer.sft import PairTokens, pair_loss
from python_trainer.tasks.files import Files
from tests.lib.text_models import tokenizer_of
from tests.lib.trainer import ROWS


@pytest.fixture
def tokenizer(tiny):
    return tiny().tokenizer


def rollout() -> Rollout:
    responses = torch.tensor([[3, 3, 1, 0, 0], [2, 2, 2, 2, 4], [1, 0, 0, 0, 0]])  # b b, a a a a c, nothing
    drawn = Rollout.of(*left_pad([[2], [3, 4], [5]], 0), responses, 1)
    return replace(drawn, prompts=[Prompt(row["prompt"], {"wanted": row["wanted"]}) for row in ROWS])


def test_a_function_gets_prompts_completions_and_fields(folder, tokenizer):
    reward = FunctionReward([f"{folder}/mine.py:most_wanted"], [1.0], tokenizer)
    assert reward(rollout()).tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:too_few", "gave 1 scores for 3 responses"),
        ("mine.py:words", "must give numbers"),
        ("mine.py:nothing", "cannot load reward_function"),
        ("yours.py:most_wanted", "cannot load reward_function"),
        ("mine.py", "must be file.py:name"),
    ],
)
def test_a_function_that_cannot_serve_is_named(folder, tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        FunctionReward([f"{folder}/{name}"], [1.0], tokenizer)(rollout())


def test_the_verifier_compares_with_the_answer():
    verdicts = exact_match([""] * 3, ["Four", "5 ", "six"], answer=["four", 5, "seven"])
    assert verdicts == [True, True, False]
    chats = [[{"role": "assistant", "content": text}] for text in ("Four", "six")]
    assert exact_match([[], []], chats, answer=["four", "seven"]) == [True, False]


def test_what_a_template_has_against_a_response_is_an_error_of_all_ranks():
    """One rank may have that response alone."""
    tokenizer = tokenizer_of(chat=True, template="{{ raise_exception('no') }}")
    reward = ModelReward.__new__(ModelReward)
    reward.reads_ids, reward.tokenizer, reward.policy_tokenizer = False, tokenizer, tokenizer
    drawn = replace(rollout(), prompts=[Prompt([{"role": "user", "content": "a"}])] * 3)
    with pytest.raises(UserError, match="does not take this conversation .no.") as caught:
        reward._scores(drawn)
    assert caught.value.everywhere


def test_columns_must_be_the_same_in_all_rows(folder):
    """Of rows for a function; the same prompt may stand there with several answers."""
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "wanted": "b"}\n{"prompt": "b"}\n')
    with pytest.raises(
        UserError, match="row 2: a reward function gets the same columns of all rows: 'b' has none, and"
    ):
        Files(str(folder), for_function=True).prompts()
    assert len(Files(str(folder)).prompts()[0]) == 1
    rows = [{"prompt": prompt, "wanted": wanted} for prompt in "ab" for wanted in "cd"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = Files(str(folder), for_function=True).prompts()
    assert [[len({prompt.content for prompt in side}), len(side)] for side in sides] == [[1, 2], [1, 2]]


class Judge:
    """Values are the token ids, so that losses can be written down."""

    def __call__(self, input_ids, attention_mask):
        return input_ids.double()


PAIRS = [PairTokens([2, 3, 4, 1], [2, 4, 1], 0.5), PairTokens([6, 1], [3, 1], 0.0)]  # a b c over a c, e over b


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_the_loss_compares_scores_at_the_end(center):
    config = RewardConfig(max_length=8, center_rewards_coefficient=center)
    eos = 1  # every text ends with it, so both scores are its id
    expected = minus_log_sigmoid(eos - eos - 0.5) + minus_log_sigmoid(0) + center * 2 * (eos + eos) ** 2
    assert pair_loss(Judge(), PAIRS, 0, config).item() == pytest.approx(expected)


def test_the_token_mean_starts_at_the_first_difference():
    """a b c <eos> beside a c <eos> <pad>: places 1 to 3; e <eos> beside b <eos>: both places."""
    config = RewardConfig(max_length=8, reward_loss="token_mean")
    first = [minus_log_sigmoid(gap - 0.5) for gap in (3 - 4, 4 - 1, 1 - 0)]
    second = [minus_log_sigmoid(gap) for gap in (6 - 3, 1 - 1)]
    expected = sum(first) / 3 + sum(second) / 2
    assert pair_loss(Judge(), PAIRS, 0, config).item() == pytest.approx(expected)


def test_margins_of_a_file(tmp_path):
    rows = [{"chosen": "a", "rejected": "b", "margin": 0.5}, {"chosen": "c", "rejected": "d"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, heldout = Files(str(tmp_path)).pairs()
    assert sorted(train + heldout) == [Pair("a", "b", 0.5), Pair("c", "d", 0.0)]
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b", "margin": "much"}\n' * 2)
    with pytest.raises(UserError, match="margin must be a finite number"):
        Files(str(tmp_path)).pairs()
