"""What draws the responses, and how it is chosen."""

import sys

import pytest

from python_trainer import evaluate
from python_trainer.config import UserError
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import HfGenerator
from tests.lib.trainer import TINY, drawn, wide


def test_tokens_do_not_depend_on_how_many_rows_go_together(tiny):
    trainer = tiny(model_config=wide("gpt2"))
    assert drawn(HfGenerator(64), trainer).equal(drawn(HfGenerator(3), trainer))


def test_without_vllm_the_error_says_what_to_install(tiny, monkeypatch):
    evaluate._vllm.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "python_trainer.vllm", raising=False)
    with pytest.raises(UserError, match="generation_engine vllm needs vLLM: pip install 'vllm"):
        tiny(generation_engine="vllm")
    assert PPOConfig(**TINY).generation_engine == "hf"


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_of_memory_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="vllm_gpu_memory_utilization must be above 0 and at most 1"):
        PPOConfig(**TINY, vllm_gpu_memory_utilization=share)
