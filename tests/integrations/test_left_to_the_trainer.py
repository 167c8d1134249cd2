"""Calls that go to the trainer's own function, and functions that are not replaced."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from ppo_kernels.integrations import Adapter, AdapterError, NotCoveredError, Target, _shared
from tests.lib.fake_trainer import SIGNATURE, UTILS, UTILS_MODULE, double, forget, load, states, targets


def test_what_is_not_covered_goes_to_theirs_and_is_counted_with_the_reason(adapter, caplog):
    (utils,) = load("utils")
    adapter.apply()
    caplog.set_level(logging.INFO, "ppo_kernels")
    assert utils.double(1, times=3) == ("theirs", 1, 3, "plain")
    assert utils.double(1, 3) == ("theirs", 1, 3, "plain")
    assert utils.double(1, 4) == ("theirs", 1, 4, "plain")
    assert utils.double(1, 2) == ("ours", 1, 2, "plain")
    refused = "whiten: x must be a torch.Tensor, got int"
    assert adapter.status() == {"double": {"served": 1, "not covered": {"three times": 2, refused: 1}}}
    said = [record.getMessage() for record in caplog.records]
    assert sum("three times" in message and "fake.double" in message for message in said) == 1
    with pytest.raises(RuntimeError, match="out of memory"):
        utils.double(1, 5)
    with pytest.raises(TypeError, match="double"):
        utils.double(1, wrong=1)
    adapter.reset_status()
    assert adapter.status() == {}


@pytest.mark.parametrize(
    ("times", "kind", "said"),
    [(6, TypeError, "NoneType"), (7, TypeError, "none_of_its_options"), (8, ValueError, "not enough values")],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fault_of_ours_is_not_hidden_behind_theirs(adapter, times, kind, said, compiled, monkeypatch):
    (utils,) = load("utils")
    adapter.apply()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)  # the code of a graph, without one
    with pytest.raises(kind, match=said) as fault:
        utils.double(1, times)
    notes = getattr(fault.value, "__notes__", [])
    assert compiled or any("fake.double" in note and "PPO_KERNELS_PATCH=none" in note for note in notes)
    assert adapter.status() == {}, "it is neither served nor left to the trainer"
    assert utils.double(torch.ones(1), 3)[0] == utils.double(1, 4)[0] == "theirs"


def test_reasons_do_not_grow_without_end(adapter, monkeypatch):
    (utils,) = load("utils")
    adapter.apply()
    for i in range(60):
        with pytest.raises(TypeError):
            utils.double(1, **{f"wrong{i}": 1})
    reasons = adapter.status()["double"]["not covered"]
    assert sum(reasons.values()) == 60
    assert len(reasons) <= 21


def test_a_mask_of_weights_is_left_to_the_trainer():
    like = torch.zeros(2, 3)
    assert _shared.whole(torch.tensor([[1.0, 0.0, 1.0]] * 2), like) is not None
    with pytest.raises(NotCoveredError, match="a mask of weights"):
        _shared.whole(torch.full((2, 3), 0.25), like)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"double": "(x, times=2)"}, "double"),
        ({"double": "(x, times=1, *, mode='plain')"}, "double"),
        ({"double": "(x, times, *, mode='plain')"}, "double"),
        ({"double": "(y, times=2, *, mode='plain')"}, "double"),
        ({"double": "(x, times=2, mode='plain')"}, "double"),
        ({"double": "(x, times=2, *, mode='plain', more=1)"}, "double"),
        ({"Loss": "(self, clip=0.2, dual=None)"}, "Loss.__init__"),
    ],
)
def test_another_signature_is_refused_by_name(trainer, loaded, changes, named, caplog):
    if loaded:
        load("utils")
    wrong = "double" if named == "double" else "Loss.forward"
    expected = changes.get("double") or changes["Loss"]
    adapter = Adapter("fake", "fake_trainer", ("1.0",), targets(**changes))
    with pytest.raises(AdapterError) as refused:
        adapter.apply()
    for part in (f"fake_trainer.utils.{named}", expected, SIGNATURE if named == "double" else "(self, clip=0.2)"):
        assert part in str(refused.value)
    (utils,) = load("utils")
    assert utils.double(1)[0] == utils.Loss().forward(1)[0] == utils.Function.apply(1)[0] == "theirs"
    report = adapter.apply(strict=False)
    assert {name for name, state in states(report).items() if state == "signature differs"} == {wrong}
    assert any(wrong in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert (utils.double(1)[0] == "theirs") == (wrong == "double")
    assert utils.Function.apply(1)[0] == "ours"
    adapter.revert()


@pytest.mark.parametrize("loaded", [False, True])
def test_what_the_module_imports_is_compared_too(trainer, loaded):
    (trainer / "helpers.py").write_text("def helped(x, y=1):\n    return x\n")
    (trainer / "utils.py").write_text("from fake_trainer.helpers import helped as helper\n" + UTILS)
    if loaded:
        load("utils")
    for signature, state in (("(x, y=1)", "replaced" if loaded else "waiting"), ("(x)", "signature differs")):
        target = Target(UTILS_MODULE, "double", SIGNATURE, double, "", reads={"helper": signature})
        adapter = Adapter("fake", "fake_trainer", ("1.0",), [target])
        assert states(adapter.apply(strict=False)) == {"double": state}
        adapter.revert()


def test_what_is_not_there_is_absent(trainer, monkeypatch):
    more = [
        Target(UTILS_MODULE, "gone", "(x)", double, ""),
        Target("fake_trainer.none", "f", "(x)", double, ""),
    ]
    adapter = Adapter("fake", "fake_trainer", ("1.0",), targets() + more)
    for _ in range(2):
        assert [state for state in states(adapter.apply(strict=False)).values() if state == "absent"] == ["absent"] * 2
        load("utils")
    adapter.revert()
    monkeypatch.setattr(sys, "path", [])
    forget()
    with pytest.raises(AdapterError, match="no package fake_trainer here"):
        adapter.apply(strict=False)


def test_a_signature_that_differs_only_when_loaded_leaves_the_import_alone(trainer, caplog):
    """The source has the function, and what runs at import puts another in its place."""
    (trainer / "utils.py").write_text(UTILS + "\nglobals()['double'] = lambda z: ('theirs', z)\n")
    adapter = Adapter("fake", "fake_trainer", ("1.0",), targets())
    adapter.apply()
    (utils,) = load("utils")
    assert utils.double(1) == ("theirs", 1)
    assert utils.Loss().forward(1)[0] == "ours"
    assert states(adapter.report())["double"] == "signature differs"
    adapter.revert()
