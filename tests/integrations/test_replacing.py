"""When and where the functions of a trainer are replaced, and theirs put back."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pickle
import runpy
import sys
import threading

import pytest
import torch

from ppo_kernels.integrations import Adapter, Target
from tests.lib.fake_trainer import USER, UTILS, UTILS_MODULE, assert_ours, everything, load, states


def test_loaded_modules_get_ours_wherever_the_name_is_bound_and_theirs_back(adapter):
    utils, user = load("utils", "user")
    before = everything(utils, user)
    loss = utils.Loss()
    report = adapter.apply()
    assert set(states(report).values()) == {"replaced"}
    assert_ours(utils, user)
    assert loss.forward(1) == ("ours", 0.2, 1), "what was made before"
    assert utils.double.__name__ == "double"
    assert utils.double.mark == 1
    assert utils.double.__module__ == "fake_trainer.utils"
    assert pickle.loads(pickle.dumps(utils.double)) is utils.double, "a registry of Ray sends it by name"
    user.since = utils.double
    adapter.revert()
    assert all(a is b for a, b in zip(everything(utils, user), before, strict=True))
    assert user.since is utils.double, "what was bound since"
    assert set(states(adapter.report()).values()) == {"left out"}
    assert user.call(1) == ("theirs", 1, 2, "plain")


def test_modules_that_are_loaded_later_get_ours(adapter, trainer):
    assert set(states(adapter.apply()).values()) == {"waiting"}
    assert "fake_trainer" not in sys.modules, "apply imports nothing of the trainer"
    utils, user = load("utils", "user")
    assert set(states(adapter.report()).values()) == {"replaced"}
    assert_ours(utils, user)
    assert inspect.getsource(utils.untouched) in UTILS, "its loader is its own"
    importlib.reload(utils)
    assert utils.double(1)[0] == "ours", "a second execution defines theirs again"
    adapter.revert()
    assert utils.double(1) == ("theirs", 1, 2, "plain")
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("ppo_kernels")]
    importlib.reload(utils)
    assert utils.double(1)[0] == "theirs"


def test_the_source_of_a_module_that_is_waited_for_can_be_read_and_run(adapter, trainer):
    """By what runs a module as a script, or reads a package's code and data without importing it."""
    adapter.apply()
    loader = importlib.util.find_spec(UTILS_MODULE).loader
    offered = ("get_code", "get_source", "get_filename", "get_data", "is_package")
    assert all(hasattr(loader, name) for name in offered)
    assert runpy.run_module(UTILS_MODULE, run_name="__main__")["double"](1)[0] == "theirs"
    assert loader.get_source(UTILS_MODULE) == UTILS
    assert loader.get_filename(UTILS_MODULE) == str(trainer / "utils.py")
    assert loader.get_data(str(trainer / "user.py")) == USER.encode()
    assert not loader.is_package(UTILS_MODULE)
    assert not hasattr(loader, "no_method_of_a_loader")
    assert copy.copy(loader).get_source(UTILS_MODULE) == UTILS
    (utils,) = load("utils")
    assert utils.double(1)[0] == "ours"


def test_applied_twice_is_applied_once(adapter):
    utils, user = load("utils", "user")
    before = everything(utils, user)
    adapter.apply()
    first = everything(utils, user)
    adapter.apply()
    assert all(a is b for a, b in zip(everything(utils, user), first, strict=True))
    utils.double(1)
    assert adapter.status()["double"] == {"served": 1, "not covered": {}}
    adapter.revert()
    adapter.revert()
    assert all(a is b for a, b in zip(everything(utils, user), before, strict=True))


def test_only_names_targets(adapter):
    (utils,) = load("utils")
    report = adapter.apply(only=["Loss.forward"])
    assert states(report) == {"double": "left out", "Loss.forward": "replaced", "Function.apply": "left out"}
    assert utils.double(1)[0] == "theirs"
    with pytest.raises(ValueError, match=r"no target twice; they are Function.apply, Loss.forward, double"):
        adapter.apply(only=["twice"])


def test_what_another_put_over_ours_stays(adapter):
    (utils,) = load("utils")
    adapter.apply()
    ours, utils.Loss.forward = utils.Loss.forward, lambda self, x: ("another's", x)
    utils.REGISTRY["double"] = len
    adapter.revert()
    assert utils.Loss().forward(1) == ("another's", 1)
    assert utils.REGISTRY["double"] is len
    assert ours(utils.Loss(), 1)[0] == "theirs"


def test_what_took_ours_goes_to_the_trainers_after_a_revert(adapter, trainer):
    utils = importlib.import_module(UTILS_MODULE)
    adapter.apply()
    held = {"double": utils.double}
    assert held["double"](1)[0] == "ours"
    adapter.revert()
    assert held["double"](1)[0] == "theirs"
    adapter.apply()
    assert utils.double(1)[0] == "ours"


def test_a_module_that_is_loaded_again_is_reverted_everywhere(adapter, trainer):
    utils, user = importlib.import_module(UTILS_MODULE), importlib.import_module("fake_trainer.user")
    adapter.apply()
    importlib.reload(utils)
    assert utils.double(1)[0] == user.call(1)[0] == "ours"
    adapter.revert()
    assert utils.double(1)[0] == user.call(1)[0] == "theirs"


def test_threads_share_the_counts_and_the_replacement(adapter):
    (utils,) = load("utils")
    theirs = utils.double
    results: list = []
    turns = threading.Barrier(8)

    def work():
        turns.wait()
        for _ in range(50):
            adapter.apply()
            results.append(utils.double(1)[0])
            adapter.report()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["ours"] * 400
    assert adapter.status()["double"]["served"] == 400
    adapter.revert()
    assert utils.double is theirs


def test_a_compiled_graph_contains_ours(trainer):
    text = """
import torch

@torch.compile(backend="eager")
def entropy_from_logits(logits):
    return logits.sum(-1)
"""
    (trainer / "utils.py").write_text(text)
    verl = importlib.import_module("ppo_kernels.integrations.verl").ADAPTER
    real = next(target for target in verl.targets if target.attribute == "entropy_from_logits")
    target = Target(UTILS_MODULE, real.attribute, real.signature, real.replacement, "")
    adapter = Adapter("fake", "fake_trainer", ("1.0",), [target])
    adapter.apply()
    (utils,) = load("utils")
    logits = torch.randn(3, 7)
    compiled = torch.compile(utils.entropy_from_logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(compiled(torch.ones(3, 7, dtype=torch.int64)), torch.full((3,), 7)), "ours refuses, theirs sums"
    adapter.revert()
