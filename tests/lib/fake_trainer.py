"""A trainer that is written here, its adapter's targets, and what stands where."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest

from ppo_kernels import whiten
from ppo_kernels.integrations import Adapter, NotCoveredError, Target

UTILS = """
REGISTRY = {}

def double(x, times=2, *, mode="plain"):
    return ("theirs", x, times, mode)

def wrapper(x, times=2, *, mode="plain"):
    return double(x, times, mode=mode)

wrapper.__wrapped__ = double  # as functools.wraps leaves it
double.mark = 1
REGISTRY["double"] = double
REGISTRY["wrapped"] = wrapper
REGISTRY["other"] = len

class Loss:
    def __init__(self, clip=0.2):
        self.clip = clip

    def forward(self, x):
        return ("theirs", self.clip, x)

class Base:
    @classmethod
    def apply(cls, *arguments):
        return ("theirs", cls.__name__, arguments)

class Function(Base):
    @staticmethod
    def forward(ctx, x, scale=FACTOR if False else 1.0):
        return x

def untouched(x):
    return ("theirs", x)
"""
USER = """
from fake_trainer.utils import double as my_double, Loss

def call(x):
    return my_double(x)
"""

UTILS_MODULE = "fake_trainer.utils"
SIGNATURE = "(x, times=2, *, mode='plain')"


def double(x, times=2, *, mode="plain"):
    if times == 3:
        raise NotCoveredError("three times")
    if times == 4:
        return whiten(x)
    if times == 5:
        raise RuntimeError("out of memory")
    if times == 6:
        return x + None
    if times == 7:
        return whiten(x, none_of_its_options=1)
    if times == 8:
        raise ValueError("not enough values to unpack")
    return ("ours", x, times, mode)


def forward(self, x):
    return ("ours", self.clip, x)


def apply(x, scale=1.0):
    return ("ours", x, scale)


def targets(**changes):
    signatures = {"double": SIGNATURE, "Loss": "(self, clip=0.2)"} | changes
    return [
        Target(
            UTILS_MODULE,
            "double",
            signatures["double"],
            double,
            "doubles",
            ("REGISTRY[double]", "REGISTRY[wrapped]", "REGISTRY[other]"),
        ),
        Target(
            UTILS_MODULE,
            "Loss.forward",
            "(self, x)",
            forward,
            "loss",
            reads={"Loss.__init__": signatures["Loss"]},
        ),
        Target(UTILS_MODULE, "Function.apply", None, apply, "f", reads={"Function.forward": "(ctx, x, scale=S)"}),
    ]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    package = tmp_path / "fake_trainer"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text(UTILS)
    (package / "user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    forget()


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_trainer"]:
        del sys.modules[name]


@pytest.fixture
def adapter(trainer):
    one = Adapter("fake", "fake_trainer", ("1.0",), targets())
    yield one
    one.revert()


def load(*names):
    return [importlib.import_module(f"fake_trainer.{name}") for name in names]


def states(report):
    return {row.target: row.state for row in report}


def everything(utils, user):
    """The places where the targets are bound, as they are."""
    return (
        utils.double,
        utils.REGISTRY["double"],
        utils.REGISTRY["wrapped"],
        user.my_double,
        inspect.getattr_static(utils.Loss, "forward"),
        inspect.getattr_static(utils.Function, "apply"),
        vars(utils.Function).get("apply"),
        utils.REGISTRY["other"],
        utils.untouched,
    )


def assert_ours(utils, user):
    assert utils.double(1, mode="m") == ("ours", 1, 2, "m")
    assert utils.REGISTRY["double"] is utils.REGISTRY["wrapped"] is utils.double
    assert utils.REGISTRY["double"](1) == user.call(1) == ("ours", 1, 2, "plain")
    assert utils.Loss(0.3).forward(1) == ("ours", 0.3, 1)
    assert utils.Function.apply(1, 2.0) == utils.Function().apply(1, 2.0) == ("ours", 1, 2.0)
    assert utils.Base.apply(1) == ("theirs", "Base", (1,))
    assert utils.untouched(1) == ("theirs", 1)
    assert utils.REGISTRY["other"] is len
