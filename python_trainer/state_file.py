"""What may stand in the state of a checkpoint, which anybody may have written."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import zero_state
from .config import UserError


def refuse_another_form(source: Path, content: dict[str, Any], models: Sequence[str]) -> None:
    """What is used of a file is of the type that is written there, and named by us, not by the file."""
    try:
        kinds = isinstance(content["config"], dict) and isinstance(content["memory"], dict)
        fits = kinds and _is_count(content["step"]) and all(_is_of_a_model(content["models"][name]) for name in models)
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{source} is not what a checkpoint of {' and '.join(models)} holds; resume from another")


def _is_of_a_model(saved: dict[str, Any]) -> bool:
    counts = [saved["schedule"]["last_epoch"], saved["skipped"], *saved["updates"].values()]
    counts += [saved["counters"][name] for name in zero_state.COUNTERS]
    return (
        isinstance(saved["shapes"], dict)
        and all(_is_count(value) for value in counts)
        and all(
            _is_number(value)
            for name, value in saved["loss_scale"].items()
            if name in zero_state.LOSS_SCALE and value is not None
        )
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def remembered_of(saved: Any, memory: Any, source: Path) -> Any:
    """Of what is remembered now what was saved; what an earlier version did not save is as it is."""
    if isinstance(memory, dict) and isinstance(saved, dict):
        return {key: remembered_of(saved[key], now, source) if key in saved else now for key, now in memory.items()}
    numbers = isinstance(memory, int | float) and _is_number(saved)
    if not numbers and not (isinstance(memory, str) and isinstance(saved, str)):
        raise UserError(f"{source} is not what a checkpoint holds: {str(saved)[:60]!r}; resume from another")
    return saved
