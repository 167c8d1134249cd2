"""Reward functions as people write them, and what is said of those that cannot serve."""

import asyncio
import copy
import gc
import os
import signal
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from python_trainer import distributed
from python_trainer.config import UserError
from python_trainer.data import Prompt, Rollout, left_pad
from python_trainer.ppo_config import PPOConfig
from python_trainer.reward_functions import FunctionReward, load
from tests.lib.trainer import TINY

MINE = """
import asyncio
import sys
import dataclasses
import multiprocessing
import neighbour
from typing import Optional

SEEN = {}

@dataclasses.dataclass
class Verdict:
    score: "Optional[float]" = None

def trl(prompts, completions, completion_ids, answer, **kwargs):
    SEEN.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer, more=kwargs)
    return [float(len(ids)) for ids in completion_ids]

def few(completions):
    return [len(text) for text in completions]

def mine_alone(answer, completions, prompts=None):
    return [1.0 if wanted == "b" else None for wanted in answer]

def nothing(completions, **kwargs):
    return [None] * len(completions)

async def slowly(completions, **kwargs):
    SEEN.setdefault("loops", set()).add(id(asyncio.get_running_loop()))
    SEEN["waiting"] = SEEN.get("waiting", 0) + 1
    await asyncio.sleep(0.01)
    return [SEEN["waiting"]] * len(completions)

def dataclass(completions, **_):
    return [Verdict(score=neighbour.half(text)).score for text in completions]

def later(completions, **_):
    import neighbour_of_neighbour
    return [neighbour_of_neighbour.ONE] * len(completions)

def length(text):
    return len(text)

def pooled(completions, **_):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(length, completions)

class Judge:
    def __call__(self, completions, **_):
        return torch.ones(len(completions))

import torch
judge = Judge()
number = 3

def one_number(completions, **_):
    return 1.0

def text(completions, **_):
    return ["1.0"] * len(completions)

def unordered(completions, **_):
    return {3.0, 2.0, 1.0}

def mapping(completions, **_):
    return {0: 1.0, 1: 1.0, 2: 1.0}

def huge(completions, **_):
    return [10**400] * len(completions)

def raising(completions, **_):
    return [{}["gone"]]

async def raising_later(completions, **_):
    raise KeyError("later")

def leaving(completions, **_):
    sys.exit(3)

async def leaving_later(completions, **_):
    await asyncio.sleep(0)
    sys.exit(3)

def cancelled(completions, **_):
    raise asyncio.CancelledError

def yielding(completions, **_):
    yield 1.0
    raise KeyError("in the middle")

def changing(prompts, completions, completion_ids, answer):
    for rows in (prompts, completions):
        for row in rows:
            row.append({"role": "user", "content": "and now?"})
            row[0]["content"] = "changed"
    for row in completion_ids + answer:
        row.clear()
    return [1.0] * len(prompts)

def wants_more(completions, trainer_state):
    return []
"""
ROWS = [("a ", "b"), ("b  c", "c"), ("d", "e")]  # blanks as the tokenizer does not keep them


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["<pad>", "<eos>", *"abcde"])}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def make(tmp_path, tokenizer):
    """``make("few", "slowly")`` is the reward of these functions of a file."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("def half(text): return len(text) / 2\n")
    (tmp_path / "neighbour_of_neighbour.py").write_text("ONE = 1\n")
    before = set(sys.modules)

    def build(*names, weights=None, columns=("answer",)):
        places = [f"{tmp_path}/mine.py:{name}" for name in names]
        return FunctionReward(places, weights or [1.0] * len(places), tokenizer, columns)

    yield build
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


def rollout(*, chat: bool = False) -> Rollout:
    responses = torch.tensor([[3, 3, 1, 0, 0], [2, 2, 2, 2, 4], [1, 0, 0, 0, 0]])  # b b, a a a a c, nothing
    drawn = Rollout.of(*left_pad([[2], [3, 4], [5]], 0), responses, 1)
    contents = [[{"role": "user", "content": text}] if chat else text for text, _ in ROWS]
    return replace(drawn, prompts=[Prompt(c, {"answer": a}) for c, (_, a) in zip(contents, ROWS, strict=True)])


def seen(reward: FunctionReward) -> dict:
    return reward.functions[0].__globals__["SEEN"]


def test_what_a_function_is_called_with(make):
    reward = make("trl")
    assert reward(rollout()).tolist() == [3.0, 5.0, 1.0]
    assert seen(reward) == {
        "prompts": ["a ", "b  c", "d"],
        "completions": ["b b", "a a a a c", ""],
        "completion_ids": [[3, 3, 1], [2, 2, 2, 2, 4], [1]],
        "answer": ["b", "c", "e"],
        "more": {},
    }
    reward(rollout(chat=True))
    assert seen(reward)["prompts"][1] == [{"role": "user", "content": "b  c"}]
    assert seen(reward)["completions"][1] == [{"role": "assistant", "content": "a a a a c"}]


def test_several_functions_add_up_and_may_pass(make):
    reward = make("few", "mine_alone", weights=[0.5, 4.0])
    assert reward(rollout()).tolist() == [0.5 * 3 + 4, 0.5 * 9, 0.0]
    assert reward.parts["few"].tolist() == [3, 9, 0]
    assert reward.parts["mine_alone"].isnan().tolist() == [False, True, True]
    with pytest.raises(UserError, match="gave None for the response to 'b  c': a response needs a number"):
        make("mine_alone", "nothing")(rollout())


def test_async_functions_wait_together_on_one_loop(make):
    reward = make("slowly", "few", "slowly")
    assert (reward(rollout()) - torch.tensor([3.0, 9.0, 0.0])).tolist() == [4.0] * 3  # both had begun
    reward(rollout())
    assert len(seen(reward)["loops"]) == 1


@pytest.mark.parametrize(
    ("name", "scores"),
    [("dataclass", [1.5, 4.5, 0]), ("later", [1, 1, 1]), ("pooled", [3, 9, 0]), ("judge", [1, 1, 1])],
)
def test_what_a_module_may_hold(make, name, scores):
    with distributed.stop_requests():  # a pool ends its processes by the signal that asks us to stop
        signal.alarm(30)
        try:
            assert make(name)(rollout()).tolist() == scores
        finally:
            signal.alarm(0)


@pytest.mark.parametrize("names", [("slowly", "leaving"), ("slowly", "leaving_later"), ("slowly", "raising_later")])
def test_what_waits_beside_a_failing_function_is_closed(make, monkeypatch, names):
    loops, new = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(new()) or loops[-1])
    reward = make(*names)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="ended in"):
            reward(rollout())
        gc.collect()
    assert not [str(one.message) for one in said if "never awaited" in str(one.message)]
    for loop in loops:
        assert not asyncio.all_tasks(loop)
        loop.close()


def test_functions_cannot_change_what_they_get(make):
    drawn = rollout(chat=True)
    drawn = replace(drawn, prompts=[replace(prompt, columns={"answer": ["b"]}) for prompt in drawn.prompts])
    before = copy.deepcopy(drawn.prompts)
    reward = make("changing", "trl")
    for _ in range(2):
        reward(drawn)
        assert drawn.prompts == before
        (_, told) = reward.functions
        told = told.__globals__["SEEN"]
        assert told["prompts"] == [prompt.content for prompt in before]
        assert told["answer"] == [["b"]] * 3
        assert told["completions"][1] == [{"role": "assistant", "content": "a a a a c"}]
        assert told["completion_ids"][0] == [3, 3, 1]


SETS = """
import os, sys, torch
def everything(folder):
    os.chdir(folder)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
def state():
    return os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(), str(torch.get_default_device())
SEEN = []
{at_import}everything({folder!r})
def score(completions, **_):
    SEEN.append(state())
    everything({folder!r})
    sys.exit() if len(SEEN) == 3 else None
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize("at_import", [True, False])
def test_what_a_function_sets_for_the_process_is_for_itself(make, tmp_path, at_import):
    """Where the model is saved, whether there are gradients, and as what numbers are read."""
    (tmp_path / "sets.py").write_text(SETS.format(at_import="" if at_import else "# ", folder=str(tmp_path)))
    tokenizer, before = make("few").tokenizer, (os.getcwd(), True, torch.float32, "cpu")
    reward = FunctionReward([f"{tmp_path}/sets.py:score"], [1.0], tokenizer)
    state = reward.functions[0].__globals__["state"]
    assert state() == before
    for _ in range(2):
        assert reward(rollout()).device.type == "cpu"
        assert state() == before
    with pytest.raises(UserError, match="SystemExit"):
        reward(rollout())
    assert state() == before
    theirs = (str(tmp_path), False, torch.float64, "meta")
    assert seen(reward) == [theirs if at_import else before, theirs, theirs]


def test_functions_of_one_name_are_told_apart(make, tmp_path):
    (tmp_path / "other.py").write_text("def few(completions): return [9.0] * len(completions)\n")
    reward = make("few", "judge")
    names = [f"{tmp_path}/{name}" for name in ("mine.py:few", "other.py:few", "mine.py:judge")]
    reward = FunctionReward(names, [1.0] * 3, reward.tokenizer, ("answer",))
    reward(rollout())
    assert list(reward.parts) == [*names[:2], "judge"]
    assert [part[0].item() for part in reward.parts.values()] == [3.0, 9.0, 1.0]


def test_a_file_does_not_stand_in_for_a_package(tmp_path):
    """One that is called like a package that something else imports later."""
    (tmp_path / "colorsys.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    sys.modules.pop("colorsys", None)
    load(f"{tmp_path}/colorsys.py:f")
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_number", "must give a list with a number for each response, and gave '1.0'"),
        ("mapping", "must give a list"),
        ("text", "must give numbers: '1.0' is text"),
        ("unordered", "must give a list"),
        ("huge", "must give numbers: int too large"),
        ("raising", r"ended in KeyError: 'gone' .*mine.py, line \d+"),
        ("raising_later", r"ended in KeyError: 'later' .*mine.py, line \d+"),
        ("leaving", r"ended in SystemExit: 3 .*mine.py, line \d+"),
        ("leaving_later", r"ended in SystemExit: 3 .*mine.py, line \d+"),
        ("cancelled", r"ended in CancelledError: .*mine.py, line \d+"),
        ("yielding", r"ended in KeyError: 'in the middle' .*mine.py, line \d+"),
        ("wants_more", "wants 'trainer_state', and there is answer, completion_ids"),
        ("trl", None),
        ("number", "is no function"),
        ("Judge", "is a class; name a function"),
        ("absent", "AttributeError"),
    ],
)
def test_what_cannot_serve_is_one_line(make, name, message):
    columns = () if name == "trl" else ("answer",)
    with pytest.raises(UserError, match=message or "wants 'answer', and there is completion_ids, completions, prompts"):
        make(name, columns=columns)(rollout())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":f", "must be file.py:name"),
        ("mine.py:", "must be file.py:name"),
        ("mine", "must be file.py:name"),
        ("{folder}/inner.py:f", "there is no file"),
        ("{folder}/torn.py:f", "SyntaxError"),
        ("{folder}/leaving.py:f", "SystemExit: 3"),
        ("no.such.module:f", "ModuleNotFoundError"),
        ("..relative:f", "cannot load"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path, text, message):
    (tmp_path / "inner.py").mkdir()
    (tmp_path / "torn.py").write_text("def f(:\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match=message):
        load(text.format(folder=tmp_path))
    assert "torn" not in sys.modules


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,x", "1,nan"])
def test_weights_fit_the_functions(weights):
    with pytest.raises(ValueError, match="reward_weights"):
        PPOConfig(reward_function="a.py:f, b.py:g", reward_weights=weights)
    assert PPOConfig(reward_function="a.py:f, b.py:g").reward_functions() == (["a.py:f", "b.py:g"], [1.0, 1.0])


def test_a_model_beside_a_function_is_not_ignored(tiny, make, tmp_path):
    settings = {"task": "files", "data_path": str(tmp_path), "reward_function": f"{tmp_path}/mine.py:few"}
    with pytest.raises(UserError, match="reward_model_path and reward_function are both given"):
        from python_trainer.rewards import load_reward_fn

        load_reward_fn(PPOConfig(**TINY | settings, reward_model_path="x"), None, None, (), 0, None)


def test_a_group_is_scored_in_one_call(tiny):
    trainer = tiny(algorithm="rloo", num_generations=4, local_rollout_forward_batch_size=3)
    sizes = []
    plain = trainer.reward_fn
    trainer.reward_fn = lambda rollout: sizes.append(len(rollout)) or plain(rollout)
    trainer.train_step()
    assert sizes == [16]


def test_a_process_of_a_function_ends_as_it_is_asked_to():
    """Otherwise a pool waits for ever."""
    with distributed.stop_requests() as asked:
        for _ in range(50):  # Python's own handlers would forget a signal that comes while it forks
            child = os.fork()
            if child == 0:
                for _ in range(200):  # short ones: a signal that comes before a sleep does not end it
                    time.sleep(0.1)
                os._exit(3)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not asked()
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
