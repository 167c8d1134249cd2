"""VllmGenerator meets a fake of vLLM, and vLLM where it is installed: it draws the tokens of transformers."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from python_trainer import evaluate
from python_trainer.config import UserError
from python_trainer.models import save_model
from python_trainer.rollout import HfGenerator
from tests.lib.trainer import ROOT, TINY, WIDE, as_options, command, drawn, wide

from . import fake_vllm
from .test_distributed import launched

VLLM = {"generation_engine": "vllm", "vllm_gpu_memory_utilization": 0.15, "learning_rate": 3e-2, "temperature": 0.8}


REAL = "PPO_KERNELS_TEST_VLLM"
SHARED = {
    "zero 3": {"deepspeed": "ds_zero3.json"},
    "lora": {"lora_r": 4},
    "bfloat16": {"lora_r": 4, "bf16": True, "deepspeed": "ds_zero2.json"},
}


@pytest.fixture(params=[1, 2])
def vllm(request, monkeypatch):
    """The fake with this model runner, whose settings a test may change; vLLM itself inside test_with_vllm_itself."""
    if REAL in os.environ:
        if request.param == 2:  # it looks for Triton's backend for CPUs; the interpreter does what that would
            backends = pytest.importorskip("triton.backends").backends
            backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
        yield None
        used = sys.modules["python_trainer.vllm"].RUNNER
        assert used == str(request.param - 1)
        return
    fake = fake_vllm.install(monkeypatch, request.param)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # so that what the import sets is taken back
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.delitem(sys.modules, "python_trainer.vllm", raising=False)
    evaluate._vllm.cache_clear()
    yield fake
    evaluate._vllm.cache_clear()
    sys.modules.pop("python_trainer.vllm", None)


@pytest.mark.parametrize("kind", WIDE)
def test_vllm_draws_the_tokens_of_transformers(tiny, vllm, kind):
    """With the weights of now, responses that end early and such that do not."""
    trainer = tiny(model_config=wide(kind), **VLLM)
    tokens = []
    for _ in range(3):
        tokens.append(drawn(trainer.generator, trainer))
        assert tokens[-1].equal(drawn(HfGenerator(64), trainer))
        trainer.train_step()
    ended = (tokens[0] == trainer.tokenizer.eos_token_id).any(dim=1)
    assert 0 < ended.sum() < len(ended)
    assert not tokens[0].equal(tokens[1])
    assert not tokens[1].equal(tokens[2])


@pytest.mark.parametrize("kind", SHARED)
def test_vllm_gets_whole_weights_with_adapters_merged(tiny, vllm, kind):
    settings = SHARED[kind]
    if "lora_r" in settings:
        pytest.importorskip("peft", reason="LoRA needs peft")
    trainer = tiny(model_config=wide("gpt2"), **VLLM | settings)
    before = drawn(trainer.generator, trainer)
    trainer.train_step()
    after = drawn(trainer.generator, trainer)
    assert not after.equal(before)
    same = (after == drawn(HfGenerator(64), trainer)).all(dim=1).float().mean()
    assert same == 1 if "bf16" not in settings else same > 0.8


def test_one_engine_serves_a_model_and_its_copy_on_disk(tiny, vllm, tmp_path):
    trainer = tiny(model_config=wide("gpt2"), **VLLM)
    before = drawn(trainer.generator, trainer)
    save_model(trainer.actor.model, trainer.tokenizer, tmp_path)
    trainer.train_step()
    trainer.actor.model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert drawn(trainer.generator, trainer).equal(before)


def test_steps_with_vllm_are_those_with_transformers(tiny, vllm):
    steps = []
    for name in ("hf", "vllm"):
        trainer = tiny(model_config=wide("gpt2"), **VLLM | {"generation_engine": name})
        rows = [trainer.train_step() for _ in range(3)]
        steps.append([{key: x for key, x in row.items() if not key.startswith("time/")} for row in rows])
    alike = {"ess": 1, "kl_k1": 0, "kl_k3": 0, "ratio_max": 1, "clipfrac": 0, "kept": 1}  # the two engines' policies
    for mine, its in zip(*steps, strict=True):
        mine |= {f"rollout/{name}": x for name, x in alike.items()}
        assert mine == pytest.approx(its, abs=1e-5, nan_ok=True)


DRAWS = "test_vllm_draws_the_tokens_of_transformers[{}-{}]"
MERGED = "test_vllm_gets_whole_weights_with_adapters_merged[{}-{}]"
STEPS = "test_steps_with_vllm_are_those_with_transformers[{}]"
ITSELF = {kind: [DRAWS.format("{}", kind)] for kind in WIDE} | {"bfloat16": [MERGED.format("{}", "bfloat16")]}
ITSELF["gpt2"] += [MERGED.format("{}", "zero 3"), MERGED.format("{}", "lora"), STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("kind", ITSELF)
def test_with_vllm_itself(kind, runner):
    """The tests above, a process for each architecture and precision."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    names = [f"{__file__}::{name.format(runner)}" for name in ITSELF[kind]]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *names],
        env=os.environ | {REAL: "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
def test_vllm_on_two_ranks(tiny, tmp_path):
    """Each has an engine, in the trainer's process group, and draws the responses to its own prompts."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = TINY | VLLM | {"model_config": wide("gpt2"), "learning_rate": 1e-3}
    tiny(**settings | {"generation_engine": "hf"}).train()
    two = tmp_path / "two"
    options = as_options(settings | {"output_dir": two, "deepspeed": "ds_zero3.json"})
    result = command("train", *options, launcher=launched("torchrun"))
    assert result.returncode == 0, result.stderr[-2000:]
    here, there = (load_file(run / "train" / "model" / "model.safetensors") for run in (tmp_path / "run", two))
    for name in here:
        torch.testing.assert_close(here[name], there[name], atol=1e-6, rtol=0)


def test_a_response_that_vllm_cut_short_is_no_response(tiny, vllm, monkeypatch):
    monkeypatch.setattr(vllm, "context", 9)
    trainer = tiny(model_config=wide("gpt2"), **VLLM)
    with pytest.raises(UserError, match="raise vllm_gpu_memory_utilization"):
        drawn(trainer.generator, trainer)


def test_a_weight_that_vllm_does_not_get_is_named(tiny, vllm, monkeypatch):
    monkeypatch.setattr(vllm, "forgets", "transformer.ln_f.bias")
    trainer = tiny(model_config=wide("gpt2"), **VLLM)
    with pytest.raises(UserError, match="no transformer.ln_f.bias; set generation_engine hf"):
        drawn(trainer.generator, trainer)


def test_vllm_serves_one_architecture(tiny, vllm):
    one, other = tiny(model_config=wide("gpt2"), **VLLM), tiny(model_config=wide("llama"), **VLLM)
    assert one.generator is other.generator
    drawn(one.generator, one)
    with pytest.raises(UserError, match="one architecture per run"):
        drawn(other.generator, other)
