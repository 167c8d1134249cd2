"""Fixtures of the op tests. A case whose implementation is missing fails: it must never look like a pass."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # The Triton kernels run in Triton's interpreter, which Triton asks for once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.lib import devices, tiers

VERIFY = Path(__file__).parent / "verify"
ALLOW_MISSING = "PPO_KERNELS_ALLOW_MISSING"


def pytest_addoption(parser):
    text = "combinations of parameters: enough (test, what `make test` runs), the others (rest), or the whole"
    parser.addoption("--tier", choices=tiers.TIERS, default="test", help=text)
    text = "only calls of several blocks at a time, as the marks several_blocks choose them"
    parser.addoption("--several-blocks", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    _choose_tier(config, items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _choose_tier(config, items):
    """What is asked for by name, and what lies in ``tests/verify``, is never left out."""
    tier = config.getoption("--tier")
    if config.getoption("--several-blocks"):
        left_out = {item for item in items if not _has_several_blocks(item)}
    elif tier == "whole":
        return
    else:
        named = [argument for argument in config.args if "::" in argument]
        ours = [item for item in items if VERIFY not in item.path.parents and not _is_named(item, named)]
        kept = tiers.of_make_test(ours)
        left_out = {item for item in ours if (item in kept) == (tier == "rest")}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _is_named(item, arguments):
    names = [argument.removeprefix(f"{item.config.rootpath}/") for argument in arguments]
    return any(item.nodeid == name or item.nodeid.startswith((f"{name}[", f"{name}::")) for name in names)


def _has_several_blocks(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    marks = item.iter_markers("several_blocks")
    return any(all(params[name] == value for name, value in mark.kwargs.items()) for mark in marks)


@pytest.fixture(autouse=True)
def _reproducible():
    """Fixed seeds, and memory that torch.empty hands out is NaN, so that an element nobody wrote shows."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture(scope="session")
def require_impl():
    """``require_impl(op, impl)`` fails if the implementation cannot serve CPU tensors here."""
    from ppo_kernels import backends

    devices.serve()

    def require(op: str, impl: str) -> str:
        have = backends.op(op).implementations("cpu")
        if impl not in have:
            why = f"{op}: no {impl!r} implementation here, only {have}; build the package"
            if os.environ.get(ALLOW_MISSING) == "1":
                pytest.skip(f"{why} ({ALLOW_MISSING}=1)")
            pytest.fail(f"{why}, or set {ALLOW_MISSING}=1")
        return impl

    return require


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """torch.distributed's default group, of this process alone: a trainer that ran here before has left one."""
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == 1
        yield
        return
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=devices.IMPLEMENTATIONS)
def impl(request, require_impl):
    """Each implementation of the module's op, named by its variable OP."""
    return require_impl(request.module.OP, request.param)
