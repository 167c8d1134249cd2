"""Triton's interpreter without the work that it repeats.

At every call of a device function it wraps all of ``triton.language`` anew, which is more than half of its time. Here
the modules that a function sees are wrapped at its first call and stay so. What is computed, and how, remains the
interpreter's own.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace


@functools.cache  # once in a process
def wrap_once() -> None:
    """Make the interpreter wrap the modules that a function sees at its first call alone."""
    from triton.runtime import interpreter

    wrap = interpreter._patch_lang

    @functools.cache
    def wrap_for(function):
        wrap(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = wrap_for
