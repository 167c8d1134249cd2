"""Puts replacements in place of a trainer's functions, counts their calls, and takes them away again."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch

import ppo_kernels
from ppo_kernels.integrations import _hook, _source
from ppo_kernels.integrations._target import MISSING, AdapterError, NotCoveredError, Problem, Target, lookup, problem

logger = logging.getLogger("ppo_kernels")

WITHOUT = "ppo_kernels.integrations.revert(), or PPO_KERNELS_PATCH=none in the environment, puts the trainer's own back"
REASONS = 20  # that are told apart for each target: they may name shapes


class Row(NamedTuple):
    """What became of a target."""

    trainer: str
    target: str
    state: str  #: replaced, waiting (until its module is loaded), absent, signature differs, left out
    detail: str = ""


Report = list[Row]


class Calls:
    """How many calls of a target our op served, and why others went to the trainer's own function."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = True  # False after a revert
        self.served = 0
        self.not_covered: Counter[str] = Counter()

    def serve(self) -> None:
        with self.lock:
            self.served += 1

    def leave(self, name: str, reason: str) -> None:
        with self.lock:
            new = reason not in self.not_covered
            if new and len(self.not_covered) >= REASONS:
                reason, new = "other reasons", False
            self.not_covered[reason] += 1
        if new:
            logger.info("%s: left to the trainer's own function: %s", name, reason)

    def as_dict(self) -> dict[str, Any]:
        with self.lock:
            return {"served": self.served, "not covered": dict(self.not_covered)}


def is_refusal(error: Exception, function: Callable) -> bool:
    """Whether the function, or one of our ops, has said by its name that it does not take these arguments."""
    by = str(error).partition(":")[0]
    return isinstance(error, NotCoveredError) or by == function.__name__ or by in ppo_kernels.__all__


def has_begun(error: Exception) -> bool:
    """Whether it comes from inside the function that was called, whose parameters took the arguments."""
    return error.__traceback__ is None or error.__traceback__.tb_next is not None


def wrapped(name: str, original: Callable, replacement: Callable, calls: Calls) -> Callable:
    """The replacement under the original's name. What it does not cover, or our ops refuse, goes to the original; a
    fault of ours does not.

    A graph that torch.compile makes contains the replacement, and its calls are not counted here.
    """

    @functools.wraps(original, updated=())
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            try:
                return replacement(*arguments, **options)
            except (NotCoveredError, TypeError, ValueError) as error:
                if not is_refusal(error, replacement):
                    raise
                return original(*arguments, **options)
        if not calls.active:  # somebody holds us since before a revert
            return original(*arguments, **options)
        try:
            result = replacement(*arguments, **options)
        except (NotCoveredError, TypeError, ValueError) as error:
            if has_begun(error) and not is_refusal(error, replacement):
                error.add_note(f"In what ppo_kernels puts in place of {name}; {WITHOUT}.")
                raise
            reason = str(error) or type(error).__name__
        else:
            calls.serve()
            return result
        calls.leave(name, reason)  # outside the handler: what the original raises has no context of ours
        return original(*arguments, **options)

    marks = getattr(original, "__dict__", {})
    if "_torchdynamo_orig_callable" not in marks:  # with Dynamo's marks, a compilation of ours would be one of theirs
        call.__dict__.update({key: value for key, value in marks.items() if key != "__wrapped__"})
    return call


@dataclass
class Installed:
    """A target that has been replaced: what was where."""

    target: Target
    value: Any  #: the function that stood there
    replacement: Any
    #: Owners and names, with what stood there; a search finds the names that other modules bind.
    places: list[tuple[Any, str, Any]] = field(default_factory=list)


def loaded_modules() -> Iterator[dict[str, Any]]:
    for name, module in list(sys.modules.items()):
        if name.startswith("ppo_kernels."):
            continue
        try:
            names = vars(module)
        except TypeError:
            continue
        if isinstance(names, dict):
            yield names


def exchange(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Bind the second of each pair wherever a loaded module binds the first."""
    new = {id(old): (old, value) for old, value in pairs}
    for names in loaded_modules():
        for name, value in list(names.items()):
            old, replacement = new.get(id(value), (MISSING, None))
            if old is value:
                names[name] = replacement


class Adapter:
    """The targets of one trainer."""

    def __init__(self, name: str, distribution: str, tested: tuple[str, ...], targets: Iterable[Target]) -> None:
        self.name, self.distribution, self.tested = name, distribution, tested
        self.targets = tuple(targets)
        self.package = self.targets[0].module.partition(".")[0]
        self._lock = threading.RLock()
        self._calls = {target.attribute: Calls() for target in self.targets}
        self._installed: dict[str, Installed] = {}
        self._wanted: dict[str, Target] = {}
        self._refused: dict[str, Row] = {}
        self._finder = _hook.Finder(self._loaded)

    def apply(self, *, strict: bool = True, only: Iterable[str] | None = None) -> Report:
        """Put our functions in place of the trainer's, at once where their modules are loaded, else when they are.

        Args:
            strict: raise AdapterError, and replace nothing, if a target is not there or takes other arguments than the
                ones the adapter was written for. False leaves such a target as it is, and the report says why.
            only: names of targets; by default all.

        Returns:
            One row for each target. A second call changes nothing that the first has done.
        """
        with self._lock:
            chosen = self._choose(only)
            if _source.package_folder(self.package) is None and self.package not in sys.modules:
                raise AdapterError(f"{self.name}: there is no package {self.package} here; install {self.distribution}")
            problems = {}
            for target in chosen:
                if target.attribute not in self._installed:
                    why = self._problem(target)
                    if why is not None:
                        problems[target.attribute] = why
            if problems and strict:
                first = next(iter(problems.values())).why
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                found = _source.version(self.distribution)
                raise AdapterError(
                    f"{self.name} {found}: {first}{more}; nothing was replaced (tested with {', '.join(self.tested)});"
                    " pass strict=False to replace what fits"
                )
            for target in chosen:
                why = problems.get(target.attribute)
                if why is None:
                    self._refused.pop(target.attribute, None)
                    self._wanted[target.attribute] = target
                else:
                    self._refuse(target, why)
            self._install([t for t in chosen if t.attribute in self._wanted and t.module in sys.modules])
            self._finder.wait_for(frozenset(target.module for target in self._wanted.values()))
            report = self.report()
        counts = Counter(row.state for row in report)
        logger.info("%s: %s", self.name, ", ".join(f"{n} {state}" for state, n in counts.items()))
        return report

    def revert(self) -> None:
        """Put the trainer's own functions back, also where our ones have been imported since."""
        with self._lock:
            self._finder.wait_for(frozenset())
            for installed in self._installed.values():
                self._calls[installed.target.attribute].active = False
                self._restore(installed)
            exchange((i.replacement, i.value) for i in self._installed.values() if "." not in i.target.attribute)
            self._installed.clear()
            self._wanted.clear()
            self._refused.clear()

    def report(self) -> Report:
        """What has become of each target."""
        with self._lock:
            rows = []
            for target in self.targets:
                name = target.attribute
                if name in self._installed:
                    rows.append(Row(self.name, name, "replaced", target.covers))
                elif name in self._refused:
                    rows.append(self._refused[name])
                elif name in self._wanted:
                    rows.append(Row(self.name, name, "waiting", f"until {target.module} is imported"))
                else:
                    rows.append(Row(self.name, name, "left out"))
            return rows

    def status(self) -> dict[str, dict[str, Any]]:
        """Calls of each target that has been called: ``{"served": 3, "not covered": {reason: 1}}``."""
        calls = {name: calls.as_dict() for name, calls in self._calls.items()}
        return {name: counts for name, counts in calls.items() if counts["served"] or counts["not covered"]}

    def reset_status(self) -> None:
        for name in self._calls:
            calls = self._calls[name]
            with calls.lock:
                calls.served = 0
                calls.not_covered.clear()

    def _choose(self, only: Iterable[str] | None) -> list[Target]:
        if only is None:
            return list(self.targets)
        names = {only} if isinstance(only, str) else set(only)
        known = {target.attribute for target in self.targets}
        if names - known:
            unknown = ", ".join(sorted(names - known))
            raise ValueError(f"{self.name}: there is no target {unknown}; they are {', '.join(sorted(known))}")
        return [target for target in self.targets if target.attribute in names]

    def _problem(self, target: Target) -> Problem | None:
        module = sys.modules.get(target.module)
        spec = getattr(module, "__spec__", None)
        if module is None or getattr(spec, "_initializing", False):  # half a module lacks what follows
            return _source.problem(target)
        return problem(target, module)

    def _refuse(self, target: Target, problem: Problem) -> None:
        self._refused[target.attribute] = Row(self.name, target.attribute, *problem)
        self._wanted.pop(target.attribute, None)
        logger.warning("%s: %s is not replaced: %s", self.name, target.attribute, problem.why)

    def _loaded(self, module: ModuleType) -> None:
        """A module that was waited for has just been executed. What goes wrong here must not end the import."""
        try:
            with self._lock:
                targets = [t for t in self._wanted.values() if t.module == module.__name__]
                for target in targets:
                    why = problem(target, module)
                    if why is not None:
                        self._refuse(target, why)
                self._install([t for t in targets if t.attribute in self._wanted])
                names = [t.attribute for t in targets if t.attribute in self._installed]
            if names:
                logger.info("%s: replaced %s in %s", self.name, ", ".join(names), module.__name__)
        except Exception:
            logger.exception("%s: nothing of %s was replaced", self.name, module.__name__)

    def _install(self, targets: list[Target]) -> None:
        pairs = []
        for target in targets:
            module = sys.modules[target.module]
            if getattr(module.__spec__, "_initializing", False) and lookup(module, target.attribute) is MISSING:
                continue  # its loader comes back
            path, _, name = target.attribute.rpartition(".")
            owner = lookup(module, path) if path else module
            now = self._installed.get(target.attribute)
            value = getattr(owner, name)
            if now is not None and value is now.replacement:
                continue
            original = vars(owner).get(name, MISSING)  # a staticmethod is one here, and an inherited method is missing
            replacement = wrapped(
                f"{self.name}.{target.attribute}", value, target.replacement, self._calls[target.attribute]
            )
            self._calls[target.attribute].active = True
            installed = Installed(target, value, replacement)
            kind = _binding(owner, name)
            setattr(owner, name, kind(replacement) if kind else replacement)
            installed.places.append((owner, name, original))
            for registry in target.registries:
                where, key = registry.rstrip("]").split("[")
                entries = lookup(module, where)
                entry = entries.get(key) if isinstance(entries, dict) else None
                if entry is not None and inspect.unwrap(entry) is inspect.unwrap(value):  # registries wrap theirs
                    entries[key] = replacement
                    installed.places.append((entries, key, entry))
            self._installed[target.attribute] = installed
            if not path:
                pairs.append((value, replacement))
            if not path and now is not None:  # the module was loaded again
                pairs.append((now.replacement, replacement))
        if pairs:
            exchange(pairs)

    def _restore(self, installed: Installed) -> None:
        """Where something else has been put over ours, that stays."""
        for owner, name, original in installed.places:
            if isinstance(owner, dict):
                if owner.get(name) is installed.replacement:
                    owner[name] = original
            elif getattr(owner, name, None) is installed.replacement:
                if original is MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)


def _binding(owner: Any, name: str) -> type | None:
    """staticmethod for what is called without an instance; the replacement has it bound already."""
    return staticmethod if isinstance(lookup(owner, name), (staticmethod, classmethod)) else None
