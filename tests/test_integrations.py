"""The core of the adapters, on a trainer that is written here: what is replaced, when and where, and what is not."""

from __future__ import annotations

import importlib
import inspect
import logging
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from ppo_kernels import integrations
from ppo_kernels.integrations import Adapter, AdapterError, NotCoveredError, Target, _shared
from ppo_kernels.integrations.__main__ import main
from ppo_kernels.integrations._target import difference, of_object, of_text, text
from tests.lib.checkout import ROOT, environment

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
REGISTRIES = ("REGISTRY[double]", "REGISTRY[wrapped]", "REGISTRY[other]")


def double(x, times=2, *, mode="plain"):
    if times == 3:
        raise NotCoveredError("three times")
    if times == 4:
        raise ValueError("four times")
    if times == 5:
        raise RuntimeError("a fault of ours")
    return ("ours", x, times, mode)


def forward(self, x):
    return ("ours", self.clip, x)


def apply(x, scale=1.0):
    return ("ours", x, scale)


SIGNATURE = "(x, times=2, *, mode='plain')"


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


def test_what_is_not_covered_goes_to_theirs_and_is_counted_with_the_reason(adapter, caplog):
    (utils,) = load("utils")
    adapter.apply()
    caplog.set_level(logging.INFO, "ppo_kernels")
    assert utils.double(1, times=3) == ("theirs", 1, 3, "plain")
    assert utils.double(1, 3) == ("theirs", 1, 3, "plain")
    assert utils.double(1, 4) == ("theirs", 1, 4, "plain")
    assert utils.double(1, 2) == ("ours", 1, 2, "plain")
    assert adapter.status() == {"double": {"served": 1, "not covered": {"three times": 2, "four times": 1}}}
    said = [record.getMessage() for record in caplog.records]
    assert sum("three times" in message and "fake.double" in message for message in said) == 1
    with pytest.raises(RuntimeError, match="a fault of ours"):
        utils.double(1, 5)
    with pytest.raises(TypeError, match="double"):
        utils.double(1, wrong=1)
    adapter.reset_status()
    assert adapter.status() == {}


def test_reasons_do_not_grow_without_end(adapter, monkeypatch):
    (utils,) = load("utils")
    adapter.apply()
    for i in range(60):
        with pytest.raises(TypeError):
            utils.double(1, **{f"wrong{i}": 1})
    reasons = adapter.status()["double"]["not covered"]
    assert sum(reasons.values()) == 60
    assert len(reasons) <= 21


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
    adapter.revert()


@pytest.mark.parametrize("name", integrations.TRAINERS)
def test_replacements_take_what_their_targets_take(name):
    for target in integrations.adapter(name).targets:
        own = of_object(target.replacement)
        expected = target.signature
        if expected is None:  # an autograd Function's apply takes what its forward takes behind ctx
            (forward,) = target.reads.values()
            expected = forward.replace("(ctx, ", "(")
        assert difference(target.attribute, expected, own) is None, target.attribute


@pytest.mark.parametrize("name", integrations.TRAINERS)
def test_the_docs_name_every_target(name):
    page = (ROOT / "docs" / "adapters.md").read_text()
    adapter = integrations.adapter(name)
    missing = [target.attribute for target in adapter.targets if f"`{target.attribute}`" not in page]
    assert not missing
    assert all(version.partition(",")[0] in page for version in adapter.tested)


def test_signatures_as_text():
    for signature in ("()", "(a, b=1, *c, d, e=2, **f)", "(a, *, b=None)", SIGNATURE):
        assert text(of_text(signature)) == signature
    assert difference("f", "(a, b=NAME)", of_text("(a, b=(1, 2))")) is None, (
        "a constant's name says nothing of its value"
    )
    assert difference("f", "(a, b=NAME)", of_text("(a, b)")) is not None


def test_the_command_reads_sources_and_says_what_changed(trainer, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "TRAINERS", ("fake",))
    monkeypatch.setattr(integrations, "adapter", lambda name: Adapter("fake", "fake_trainer", ("1.0",), targets()))
    old = trainer.parent
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "fake of no known version (tested with 1.0)" in out
    assert out.count(" fits ") == 3
    new = old / "newer" / "fake_trainer"
    new.mkdir(parents=True)
    (new / "__init__.py").write_text("")
    moved = UTILS.replace("def double(", "# moved\n\ndef double(").replace("self.clip, x)", "self.clip, -x)")
    (new / "utils.py").write_text(moved)
    assert main(["fake", "--path", str(new.parent)]) == 0
    capsys.readouterr()
    assert main(["fake", "--path", str(new.parent), "--since", str(old)]) == 1
    out = capsys.readouterr().out
    assert out.count("text differs") == 1
    assert "read Loss.forward again" in out
    (new / "utils.py").write_text(UTILS.replace("times=2", "times=3").replace("class Loss", "class Lost"))
    assert main(["fake", "--path", str(new.parent)]) == 1
    out = capsys.readouterr().out
    assert "signature differs" in out
    assert "has no Loss.forward" in out
    assert main(["--path", str(old / "empty")]) == 0
    assert "fake: not installed" in capsys.readouterr().out
    assert "fake_trainer" not in sys.modules
    assert main(["--import"]) == 0
    assert capsys.readouterr().out.count(" replaced ") == 3
    with pytest.raises(SystemExit):
        main(["trll"])


CHAT = """
import torch.nn.functional as F

def gather_log_probs(logits, labels):
    return F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
"""
SCRIPT = """
import sys
assert not {"trl", "verl", "openrlhf", "skyrl", "dschat", "ray", "transformers"} & set(sys.modules)
import torch
from dschat.rlhf.ppo_trainer import gather_log_probs
logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
gather_log_probs(logits, labels)
from ppo_kernels import integrations
print(sys.argv[1:], integrations.status())
"""


def test_the_environment_and_the_command_run_put_adapters_in_place(tmp_path):
    """DeepSpeed-Chat, which is a folder, with one function of this test."""
    for name, content in {"dschat/__init__": "", "dschat/rlhf/__init__": "", "dschat/rlhf/ppo_trainer": CHAT}.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = environment(PYTHONPATH=f"{ROOT}:{tmp_path}")
    served = "{'deepspeed_chat': {'gather_log_probs': {'served': 1, 'not covered': {}}}}"
    run = [sys.executable, "-m", "ppo_kernels.integrations", "run", "deepspeed_chat", "script.py", "--argument"]
    line = [sys.executable, "-c", "import ppo_kernels\n" + SCRIPT]
    for command, variables, want in (
        (run, {}, f"['--argument'] {served}"),
        (line, {"PPO_KERNELS_PATCH": "deepspeed_chat"}, f"[] {served}"),
    ):
        done = subprocess.run(command, cwd=tmp_path, env=env | variables, capture_output=True, text=True)
        assert done.stdout.strip() == want, done.stderr
        absent = "compute_rewards is not replaced: dschat.rlhf.ppo_trainer has no DeepSpeedPPOTrainer.compute_rewards"
        assert absent in done.stderr


def test_a_mask_of_weights_is_left_to_the_trainer():
    like = torch.zeros(2, 3)
    assert _shared.whole(torch.tensor([[1.0, 0.0, 1.0]] * 2), like) is not None
    with pytest.raises(NotCoveredError, match="a mask of weights"):
        _shared.whole(torch.full((2, 3), 0.25), like)


def test_the_environment_names_trainers(monkeypatch):
    for value, names in (("trl, verl", ("trl", "verl")), ("none", ()), ("", ())):
        monkeypatch.setenv("PPO_KERNELS_PATCH", value)
        assert integrations.named_by_environment() == names
    monkeypatch.setenv("PPO_KERNELS_PATCH", "trll")
    with pytest.raises(
        ValueError, match="PPO_KERNELS_PATCH=trll names trll; the trainers are deepspeed_chat, openrlhf"
    ):
        integrations.from_environment()
    with pytest.raises(ValueError, match="no adapter for 'trll'"):
        integrations.apply("trll")
