"""Something to do with a module as soon as it is loaded, before anyone can import a name from it."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Loader(importlib.abc.Loader):
    """Another loader, and something to do behind it. What else that one offers (sources, code, data) is offered."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # what reads sources asks it
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self._loader, name)


class Finder(importlib.abc.MetaPathFinder):
    """Leaves the search to the finders behind it, and wraps the loader of the modules that are waited for."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self._then = then
        self.waiting: frozenset[str] = frozenset()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        if fullname not in self.waiting or self not in finders:
            return None
        for finder in finders[finders.index(self) + 1 :]:
            search = getattr(finder, "find_spec", None)
            if search is None:
                continue
            spec = search(fullname, path, target)
            if spec is None:
                continue
            if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = _Loader(spec.loader, self._then)
            return spec
        return None

    def wait_for(self, modules: frozenset[str]) -> None:
        """These modules and no others; none takes the finder out of the way."""
        self.waiting = modules
        if modules and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not modules and self in sys.meta_path:
            sys.meta_path.remove(self)
