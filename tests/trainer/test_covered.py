"""The cheapest of `make verify`: a kill at every point of writing a model, and vLLM's part in a fake of it."""

import pytest

from python_trainer.rollout import HfGenerator
from tests.lib.trainer import TINY
from tests.verify.trainer.faults import saving
from tests.verify.trainer.test_vllm import VLLM, drawn, vllm, wide

__all__ = ["vllm"]


def test_a_run_that_is_killed_while_it_replaces_a_model_leaves_one(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SETTINGS", TINY)
    saving.killed_while_replacing_a_model(tmp_path)


@pytest.mark.parametrize("vllm", [1], indirect=True)
def test_vllm_draws_the_tokens_of_transformers(tiny, vllm):
    trainer = tiny(model_config=wide("gpt2"), **VLLM)
    for _ in range(2):
        assert drawn(trainer.generator, trainer).equal(drawn(HfGenerator(64), trainer))
        trainer.train_step()
