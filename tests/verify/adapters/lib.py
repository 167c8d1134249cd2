"""The trainers' own modules, from their packages, and one call of them with and without our functions in place."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_kernels import integrations
from tests.lib.checkout import ROOT

FOLDERS = [ROOT / "build" / name for name in ("trainers", "peers", "adapters")]
for folder in map(str, FOLDERS):
    if folder not in sys.path:
        sys.path.append(folder)  # last: what the environment brings comes first

#: What the packages import and the functions under test do not use: engines, web servers, games.
STAND_INS = ("aiohttp", "fastapi", "flash_attn", "skyrl_gym", "uvicorn", "vllm")


class _StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        stands_in = name.partition(".")[0] in STAND_INS and not name.startswith("flash_attn.ops")
        return ModuleSpec(name, self, is_package=True) if stands_in else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """While a trainer is imported: what it uses later has to say that these are not there."""
    import typing_extensions

    finder, own = _Finder(), typing.TypedDict
    if sys.version_info < (3, 12):
        typing.TypedDict = typing_extensions.TypedDict  # type: ignore[assignment]  # pydantic takes no other there
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        typing.TypedDict = own  # type: ignore[assignment]
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.partition(".")[0] in STAND_INS]:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]


def load(trainer: str, *modules: str) -> list[types.ModuleType]:
    """Modules of a trainer as it ships them, or a skip that says why they are not here.

    verl's finds this package's plugin where the package is installed; what it put in place is taken out again.
    """
    adapter = integrations.adapter(trainer)
    try:
        found = version(adapter.distribution)
    except PackageNotFoundError:
        pytest.skip(f"{trainer} is not in build/peers or build/trainers (bench/peers.txt)", allow_module_level=True)
    assert found in adapter.tested, f"{trainer} {found} is here, and its adapter was tested with {adapter.tested}"
    try:
        with _stand_ins():
            loaded = [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == adapter.package:
            raise
        pytest.skip(f"{trainer} needs {error.name} (tests/verify/adapters/packages.txt)", allow_module_level=True)
    adapter.revert()
    return loaded


def both(trainer: str, call: Callable[[], Any], served: dict[str, int]) -> tuple[Any, Any]:
    """What a call gives with the adapter and without. ``served`` is how often our function serves each target."""
    adapter = integrations.adapter(trainer)
    assert {row.state for row in adapter.report()} == {"left out"}
    adapter.reset_status()
    theirs = call()
    assert adapter.status() == {}, "theirs is not theirs"
    adapter.apply()
    adapter.reset_status()
    try:
        ours = call()
        counts = adapter.status()
    finally:
        adapter.revert()
        adapter.reset_status()
    assert counts == {name: {"served": n, "not covered": {}} for name, n in served.items()}, counts
    return ours, theirs


def close(ours: Any, theirs: Any, *, rtol: float = 2e-6, atol: float = 2e-6) -> None:
    """Equal up to the rounding of float32 sums, whatever holds the tensors and numbers."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            close(ours[name], theirs[name], rtol=rtol, atol=atol)
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, rtol=rtol, atol=atol)
    elif isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rtol, abs=atol)
    else:
        assert ours == theirs


B, T = 6, 13
MASKS = ("prefix", "interior", "whole")


def make_mask(kind: str) -> Tensor:
    """Valid tokens: the first of each row, with holes, or all. But for the last kind, one row has a single token."""
    g = torch.Generator().manual_seed(1)
    if kind == "whole":
        return torch.ones(B, T, dtype=torch.int64)
    lengths = torch.randint(2, T + 1, (B, 1), generator=g)
    lengths[0], lengths[1] = 1, T
    mask = torch.arange(T) < lengths
    if kind == "interior":
        mask = mask & (torch.rand(B, T, generator=g) < 0.7)
        mask[:, 0] = True
    return mask.long()


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def grad(loss: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, leaf)
    return found
