"""A model's folder is data: no Python in it runs, and nothing asks whether it may."""

import ast
import io
import json
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import python_trainer
from python_trainer import models
from python_trainer.config import UserError
from python_trainer.ppo_config import PPOConfig
from python_trainer.tasks.exact import Exact
from tests.lib.trainer import ROOT, TINY, TINY_MODEL

CODE = """
import pathlib
pathlib.Path({canary!r}).write_text("ran")
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config): model_type = "{kind}"
class Model(GPT2LMHeadModel): pass
class Scalar(GPT2ForSequenceClassification): pass
class Tokenizer(PreTrainedTokenizerFast): pass
def generate(model, *arguments, **options): return None
"""
MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForSequenceClassification": "evil.Scalar",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


@pytest.fixture
def config():
    return PPOConfig(**TINY)


@pytest.fixture(params=["gpt2", "evil"])
def folder(tmp_path, monkeypatch, config, request):
    """A model of a known or of its own architecture, with Python in its folder, before a person who says yes to all."""
    place, kind = tmp_path / "model", request.param
    settings = AutoConfig.for_model(**TINY_MODEL, vocab_size=7, num_labels=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(place)
    Exact(config).tokenizer().save_pretrained(place)
    code = CODE.format(canary=str(tmp_path / "canary"), kind=kind)
    (place / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (place / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((place / name).read_text())
        content |= {"auto_map": MAP} | ({"model_type": kind} if name == "config.json" else {})
        content |= {"tokenizer_class": "Tokenizer"} if kind == "evil" and name != "config.json" else {}
        (place / name).write_text(json.dumps(content))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return place


@pytest.mark.parametrize("what", ["policy", "reward model", "tokenizer"])
def test_python_in_a_models_folder_does_not_run(folder, tmp_path, config, what, capsys):
    tokenizer = Exact(config).tokenizer()
    load = {
        "policy": lambda: models.load_policy(folder, config, tokenizer),
        "reward model": lambda: models.load_scalar(folder, "reward_model_path", config),
        "tokenizer": lambda: models.load_tokenizer(folder),
    }[what]
    try:
        load()
    except UserError as error:
        assert str(folder) in str(error)  # noqa: PT017
    assert not (tmp_path / "canary").exists()
    assert sys.stdin.tell() == 0
    assert "[y/N]" not in capsys.readouterr().out


NAMED = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel@main:attention"},
    {"attn_implementation": {"": "eager", "text_config": "evil/kernel"}},
    {"text_config": {"attn_implementation": "paged|evil/kernel"}},
    {"experts_implementation": "evil/kernel"},
]


def test_no_compiled_code_is_fetched_that_a_models_folder_names(tmp_path, config):
    """transformers takes a name with an owner for a kernel of the Hub."""
    tokenizer = Exact(config).tokenizer()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_MODEL, vocab_size=7)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for named in NAMED:
        (tmp_path / "config.json").write_text(json.dumps(content | named))
        for load in (
            lambda: models.load_policy(tmp_path, config, tokenizer),
            lambda: models.load_scalar(tmp_path, "reward_model_path", config),
        ):
            with pytest.raises(UserError, match="has .*_implementation '.*evil/kernel.* code from elsewhere"):
                load()


def test_an_architecture_given_as_settings_brings_no_code(folder, tmp_path):
    given = TINY_MODEL | {"auto_map": MAP, "_name_or_path": str(folder)}
    config = PPOConfig(**TINY | {"model_config": json.dumps(given)})
    policy = models.load_policy(None, config, Exact(config).tokenizer())
    models.ScalarModel.on(policy, zero_head=True)
    assert not (tmp_path / "canary").exists()


def calls() -> list[tuple[str, ast.Call]]:
    found = []
    for path in (ROOT / python_trainer.__name__).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("from_pretrained", "from_config", "LLM"):
                    found.append((f"{path.name}:{node.lineno}", node))
    return found


def test_every_loading_call_of_the_trainer_says_so():
    """vLLM's too, which is not installed everywhere."""
    assert len(calls()) >= 4
    for place, call in calls():
        given = {word.arg: word.value for word in call.keywords}
        assert isinstance(given.get("trust_remote_code"), ast.Constant), place
        assert given["trust_remote_code"].value is False, place
