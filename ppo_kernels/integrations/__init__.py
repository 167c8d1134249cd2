"""Drop-in adapters: these ops in place of other trainers' own functions, without an edit in the trainer.

``ppo_kernels.integrations.apply("trl")`` puts them there, and ``revert()`` takes them away. ``status()`` counts, for
each function, the calls that our op served, and those that it does not cover and that the trainer's own function
served, with the reason. ``python -m ppo_kernels.integrations`` says what fits the trainers that are installed. See
docs/adapters.md.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from ppo_kernels.integrations._adapter import Adapter, Report, Row
from ppo_kernels.integrations._target import AdapterError, NotCoveredError, Target

__all__ = [
    "TRAINERS",
    "Adapter",
    "AdapterError",
    "NotCoveredError",
    "Report",
    "Row",
    "Target",
    "adapter",
    "apply",
    "from_environment",
    "revert",
    "status",
]

#: Each is a module of this package.
TRAINERS = ("deepspeed_chat", "openrlhf", "skyrl", "trl", "verl")
VARIABLE = "PPO_KERNELS_PATCH"

logger = logging.getLogger("ppo_kernels")


def adapter(trainer: str) -> Adapter:
    """The adapter of a trainer. It imports nothing of the trainer."""
    if trainer not in TRAINERS:
        raise ValueError(f"there is no adapter for {trainer!r}; the trainers are {', '.join(TRAINERS)}")
    return importlib.import_module(f"{__name__}.{trainer}").ADAPTER


def apply(*trainers: str, strict: bool = True) -> Report:
    """``apply()`` of the adapters of these trainers. Without a name: of all whose package is installed here."""
    from ppo_kernels.integrations import _source

    chosen = [adapter(name) for name in trainers or TRAINERS]  # a wrong name ends the call before anything is done
    if not trainers:
        chosen = [one for one in chosen if _source.package_folder(one.package) is not None]
    return [row for one in chosen for row in one.apply(strict=strict)]


def revert(*trainers: str) -> None:
    """``revert()`` of the adapters of these trainers, by default of all."""
    for name in trainers or TRAINERS:
        adapter(name).revert()


def status() -> dict[str, dict[str, dict[str, Any]]]:
    """Calls per trainer and target so far, of what has been called:
    ``{"trl": {"selective_log_softmax": {"served": 3, "not covered": {}}}}``."""
    counts = {name: adapter(name).status() for name in TRAINERS}
    return {name: calls for name, calls in counts.items() if calls}


def from_environment() -> None:
    """Do what ``PPO_KERNELS_PATCH`` says: ``trl,openrlhf``, or ``none``. ``import ppo_kernels`` calls it.

    A name that is none raises. A trainer that is not installed, or a function with other arguments than the adapter's,
    is left alone with a warning.
    """
    for name in named_by_environment() or ():
        try:
            adapter(name).apply(strict=False)
        except AdapterError as error:
            logger.warning("%s=%s: %s", VARIABLE, os.environ[VARIABLE], error)


def named_by_environment() -> tuple[str, ...] | None:
    """The trainers that ``PPO_KERNELS_PATCH`` names; None if it is not set, and nothing if it is empty or "none"."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    names = () if names == ("none",) else names
    unknown = [name for name in names if name not in TRAINERS]
    if unknown:
        raise ValueError(
            f"{VARIABLE}={value} names {', '.join(unknown)}; the trainers are {', '.join(TRAINERS)}, or none alone"
        )
    return names
