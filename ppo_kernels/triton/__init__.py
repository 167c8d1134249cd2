"""The Triton kernels, as ops ``ppo_kernels_triton::<op>`` with the schemas of ``ppo_kernels::<op>``.

The ops are opaque and never traced: torch.compile passes Python floats to a traced Triton launch as float64 and has
its own view of what it mutates. Triton itself is imported at the first launch.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import Counter
from collections.abc import Callable

import torch

from ppo_kernels._registered import arguments, checked, guard, require_overwritable

#: Whether kernels run in Triton's interpreter: on CPU tensors, slowly, for tests. Read when Triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "t", "true", "on")
INSTALLED = importlib.util.find_spec("triton") is not None
#: What Triton compiles for ("cuda" is also ROCm's name); the interpreter serves CPU tensors.
DEVICE_TYPES = ("cuda", "xpu", *(("cpu",) if INTERPRETED else ()))

_library = torch.library.Library("ppo_kernels_triton", "DEF")
_calls: Counter[str] = Counter()
_calls_lock = threading.Lock()


def register(schema: str, fake: Callable, find_launcher: Callable[[], Callable]) -> torch._ops.OpOverload:
    """Register the op with this schema. Its calls ask ``find_launcher``, which imports Triton, for what launches it."""
    name, overwrites = schema.partition("(")[0], "!" in schema
    names = [argument.split()[-1] for argument in arguments(schema)]

    def call(*args: object) -> object:
        with _calls_lock:
            _calls[name] += 1
        first = args[0]
        assert isinstance(first, torch.Tensor)
        if overwrites:
            require_overwritable(names, args)
        if first.device.type == "cpu":
            return find_launcher()(*args)
        with torch.accelerator.device_index(first.get_device()):
            return find_launcher()(*args)

    _library.define(schema)
    for device_type in DEVICE_TYPES:
        _library.impl(name, checked(schema, call), device_type.upper())
    guard(_library, schema)
    torch.library.register_fake(f"ppo_kernels_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.ppo_kernels_triton, name).default


def call_counts() -> dict[str, int]:
    """Calls of each registered op since the start."""
    with _calls_lock:
        return dict(_calls)
