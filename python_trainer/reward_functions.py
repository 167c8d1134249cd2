"""Rewards from a person's own Python, called as TRL's trainers call it."""

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from . import distributed
from .config import UserError
from .data import Content, Prompt, Rollout, readable

Function = Callable[..., Any]
ARGUMENTS = ("prompts", "completions", "completion_ids")
Scores = list[float | None]
# How a person's own code can end, also by `sys.exit()` and in a task that somebody cancels.
FAILURES = (Exception, SystemExit, asyncio.CancelledError)


def _folder() -> str | None:
    """The one that paths start from; None once somebody has removed it."""
    try:
        return os.getcwd()
    except OSError:
        return None


# What such code sets for a whole process, often where it is imported: how to ask for it, and how to set it.
OF_THE_PROCESS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (_folder, os.chdir),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    # None: a device that is set, be it the usual one, slows every call of torch.
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
)


class Surroundings:
    """What a person's code sets for the process holds for that code alone, from one call to the next.

    Without it `torch.set_grad_enabled(False)` in a module of rewards would end the training, and after `os.chdir` the
    model would be saved elsewhere.
    """

    def __init__(self) -> None:
        self.theirs: dict[int, Any] = {}  # by the number in OF_THE_PROCESS: what they changed

    @contextlib.contextmanager
    def theirs_inside(self) -> Iterator[None]:
        ours = [ask() for ask, _ in OF_THE_PROCESS]
        entered = [self.theirs.get(number, own) for number, own in enumerate(ours)]
        _set_all(entered)
        try:
            yield
        finally:
            left = [ask() for ask, _ in OF_THE_PROCESS]
            self.theirs |= {number: new for number, new in enumerate(left) if new != entered[number]}
            _set_all(ours)


def _set_all(values: Sequence[Any]) -> None:
    for (ask, change), value in zip(OF_THE_PROCESS, values, strict=True):
        if value is not None and ask() != value:
            change(value)


class FunctionReward:
    """Calls ``function(prompts=[...], completions=[...], completion_ids=[...], column=[...])`` once a rollout.

    Each function names the arguments that it wants, or takes all by ``**kwargs``. It gives one number or bool per
    response, or None where it has nothing to say; it may be ``async``, and several run at the same time then. Of
    several the numbers add up, each times its weight. Prompts are what stands in the data; where they are chat messages
    a completion is a list of one message.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        tokenizer: PreTrainedTokenizerBase,
        columns: Collection[str] | None = None,
    ) -> None:
        """`columns`: those that the data have; None where that is not known yet."""
        self.names, self.weights, self.tokenizer = list(names), list(weights), tokenizer
        modules: dict[str, ModuleType] = {}
        self.surroundings = Surroundings()
        with self.surroundings.theirs_inside():
            self.functions = [load(name, modules) for name in names]
        self.parts: dict[str, torch.Tensor] = {}  # of the last rollout, what each gave: NaN stands for None
        self._loop: asyncio.AbstractEventLoop | None = None
        if columns is not None:
            for name, function in zip(self.names, self.functions, strict=True):
                _refuse_missing_arguments(name, function, columns)

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        given = self._arguments(rollout)
        with distributed.raise_on_all_ranks(UserError):
            with self.surroundings.theirs_inside():
                found = self._call_all(given)
            prompts: Sequence[Content] = given["prompts"]
            for row, scores in enumerate(zip(*found, strict=True)):
                if all(score is None for score in scores):
                    raise UserError(
                        f"{', '.join(self.names)} gave None for the response to {readable(prompts[row])[:60]!r}: a "
                        "response needs a number from one of them"
                    )
        device = rollout.sequences.device
        rows = [torch.tensor([math.nan if x is None else x for x in scores], device=device) for scores in found]
        self.parts = dict(zip(_shortest(self.names), rows, strict=True))
        missing = torch.tensor([[score is None for score in scores] for scores in found], device=device)
        weights = torch.tensor(self.weights, device=device)
        return torch.where(missing, 0.0, torch.stack(rows) * weights[:, None]).sum(dim=0)

    def _arguments(self, rollout: Rollout) -> dict[str, list[Any]]:
        completions: list[Content] = list(rollout.texts(self.tokenizer))
        for row, prompt in enumerate(rollout.prompts):
            if not isinstance(prompt.content, str):
                completions[row] = [{"role": "assistant", "content": completions[row]}]
        prompts = [prompt.content for prompt in rollout.prompts]
        columns = {name: [prompt.columns[name] for prompt in rollout.prompts] for name in rollout.prompts[0].columns}
        return columns | {"prompts": prompts, "completions": completions, "completion_ids": rollout.answers()}

    def _call_all(self, given: Mapping[str, list[Any]]) -> list[Scores]:
        """What each function gave; the async ones wait together."""
        results: list[Any] = []
        try:
            for name, function in zip(self.names, self.functions, strict=True):
                results.append(_guarded(name, functools.partial(function, **_wanted(function, given))))
            waiting = [at for at, result in enumerate(results) if inspect.isawaitable(result)]
            if waiting:
                names = ", ".join(self.names[at] for at in waiting)
                found = _guarded(names, functools.partial(self._awaited, [results[at] for at in waiting]))
                for at, result in zip(waiting, found, strict=True):
                    results[at] = result
        finally:
            for result in filter(inspect.iscoroutine, results):  # one that nobody came to await
                result.close()
        count = len(given["prompts"])
        return [_numbers(name, result, count) for name, result in zip(self.names, results, strict=True)]

    def _awaited(self, waiting: Sequence[Awaitable[Any]]) -> list[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()  # one for all rollouts: clients of services are bound to theirs
        loop = self._loop

        async def together() -> list[Any]:
            return await asyncio.gather(*waiting)

        try:
            return loop.run_until_complete(together())
        except FAILURES:
            left = asyncio.all_tasks(loop)  # the others must not be in the way of what comes after
            for task in left:
                task.cancel()
            with contextlib.suppress(*FAILURES):
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            raise


def load(name: str, modules: dict[str, ModuleType] | None = None) -> Function:
    """``file.py:function`` or ``package.module:function``; `modules` are those that were loaded with it."""
    place, _, function = name.strip().rpartition(":")
    if not place or not function:
        raise UserError(f"reward_function {name!r} must be file.py:name or package.module:name")
    loaded = {} if modules is None else modules
    try:
        if place not in loaded:
            loaded[place] = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(loaded[place], function)
    except FAILURES as error:  # it is a person's code that runs here
        raise UserError(f"cannot load reward_function {name!r}: {_said(error)}") from error
    if not callable(found) or isinstance(found, type):
        what = "a class; name a function, or an object that can be called" if isinstance(found, type) else "no function"
        raise UserError(f"cannot load reward_function {name!r}: it is {what}")
    return found


def _from_file(path: Path) -> ModuleType:
    """As Python runs a script: what lies beside it can be imported, also later and by processes that it starts."""
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = path.stem
    known = sys.modules.get(name)
    try:
        taken = getattr(known, "__file__", "") != str(path) if known else importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        taken = True
    if taken:  # an installed package of the same name stays what it is for everybody else
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # last, so that nothing else is found there first
    return module


def _parameters(function: Function) -> tuple[list[inspect.Parameter], bool]:
    """Those with names, and whether it takes any others."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return [], True
    named = [one for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return named, any(one.kind is one.VAR_KEYWORD for one in found)


def _wanted(function: Function, given: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Copies, row by row: a function may change what it gets, and what it got is sampled from again."""
    named, others = _parameters(function)
    chosen = given.keys() if others else [one.name for one in named if one.name in given]
    return {name: [copy.deepcopy(part) for part in given[name]] for name in chosen}


def _shortest(names: Sequence[str]) -> list[str]:
    """The functions' bare names, and the full ones of those that have a bare name in common."""
    bare = [name.rpartition(":")[2] for name in names]
    return [short if bare.count(short) == 1 else name for short, name in zip(bare, names, strict=True)]


def _refuse_missing_arguments(name: str, function: Function, columns: Collection[str]) -> None:
    there = {*ARGUMENTS, *columns}
    missing = [one.name for one in _parameters(function)[0] if one.default is one.empty and one.name not in there]
    if missing:
        raise UserError(
            f"{name} wants {missing[0]!r}, and there is {', '.join(sorted(there))}: add that column to the data, give "
            "the argument a default, or name it as the data do (column_mapping)"
        )


def refuse_columns(place: str, prompts: Sequence[Prompt]) -> None:
    """Columns of the data at `place` that a function cannot be called with."""
    first = prompts[0].columns if prompts else {}
    for number, prompt in enumerate(prompts, 1):
        if prompt.columns.keys() != first.keys():
            raise UserError(
                f"{place}, row {number}: a reward function gets the same columns of all rows: "
                f"{readable(prompt.content)[:60]!r} has {', '.join(prompt.columns) or 'none'}, and the first row "
                f"{', '.join(first) or 'none'}"
            )
    taken = first.keys() & ARGUMENTS
    if taken:
        name = min(taken)
        raise UserError(
            f"{place}: a column has the name of an argument of reward functions, {name}: give it another "
            f'(column_mapping {{"my_{name}": "{name}"}})'
        )


def _guarded(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except FAILURES as error:  # it is a person's code that runs here
        raise UserError(f"{name} ended in {_said(error)}") from error


def _said(error: BaseException) -> str:
    """In one line, with the place in the person's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    ours = str(Path(__file__).parent)
    place = next((frame for frame in reversed(frames) if not frame.filename.startswith(ours)), None)
    where = f" ({place.filename}, line {place.lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def _numbers(name: str, result: Any, count: int) -> Scores:
    if isinstance(result, torch.Tensor):
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping | set | frozenset) or not hasattr(result, "__iter__"):
        raise UserError(f"{name} must give a list with a number for each response, and gave {str(result)[:60]!r}")
    scores = _guarded(name, lambda: list(result))  # a generator does its work only now
    if len(scores) != count:
        raise UserError(f"{name} gave {len(scores)} scores for {count} responses")
    found: Scores = []
    for score in scores:
        try:
            if isinstance(score, str | bytes):
                raise TypeError(f"{score!r} is text")
            found.append(None if score is None else float(score))
        except FAILURES as error:  # TypeError, ValueError, OverflowError, and what a type of theirs may raise
            raise UserError(f"{name} must give numbers: {error}") from error
    return found
