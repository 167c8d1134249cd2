"""Rollouts come from the weights that are trained, whoever holds a copy of them; one that does not is refused."""

import contextlib
import copy

import pytest
import torch

from python_trainer.config import UserError
from python_trainer.data import Policy
from python_trainer.distributed import gathered_params, merged_weights
from python_trainer.models import save_model
from python_trainer.rollout import HfGenerator, _unpartitioned
from tests.verify.trainer.test_vllm import VLLM, vllm, wide

__all__ = ["vllm"]

TIED = {"layers": "c_attn", "embedding": "wte,c_fc", "head": "lm_head,c_attn"}  # gpt2's head and embedding are one


@pytest.mark.parametrize("targets", TIED)
def test_a_copy_generates_from_the_weights_that_are_trained(tiny, targets, tmp_path):
    """At ZeRO 3; the steps are those of ZeRO 0, where the model generates itself, and what is saved is that model."""
    settings = {"algorithm": "rloo", "learning_rate": 3e-2, "lora_r": 4, "lora_target_modules": TIED[targets]}
    here, there = (tiny(deepspeed=f"ds_zero{stage}.json", **settings) for stage in (0, 3))
    for _ in range(3):
        rows = here.train_step(), there.train_step()
        for name in ("objective/kl", "objective/scores", "policy/entropy_avg"):
            assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4), name
        with _unpartitioned(there.actor) as module, gathered_params(there.actor.module.parameters()):
            expected, copied = merged_weights(there.actor.module), module.state_dict()
            assert copied.keys() == expected.keys()
            assert all(copied[name].equal(weight) for name, weight in expected.items())
    assert abs(rows[0]["objective/kl"]) > 0.01
    save_model(here.actor.model, here.tokenizer, tmp_path / "model")
    again = tiny(sft_model_path=str(tmp_path / "model"), algorithm="rloo")
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        logits = [policy.model(input_ids=ids).logits for policy in (here.actor, again.actor)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


class Stale:
    """Generates from the weights that the policy had when this was made."""

    def __init__(self, policy: Policy) -> None:
        self.policy = Policy(copy.deepcopy(policy.module), policy.temperature, policy.impl)

    @contextlib.contextmanager
    def serving(self, policy, tokenizer):
        with HfGenerator(64).serving(self.policy, tokenizer) as generate:
            yield generate


def test_responses_of_other_weights_are_refused(tiny):
    """Also in an evaluation, and in the last of several rollouts: the check stays on."""
    trainer = tiny(learning_rate=1e-3)
    trainer.generator = Stale(trainer.actor)
    trainer.train_step()  # the weights are still those
    before = [weight.clone() for weight in trainer.actor.module.parameters()]
    for call in (trainer.train_step, lambda: trainer.evaluate(trainer.actor)):
        with pytest.raises(
            UserError, match="not drawn from the weights that are trained: .*per token.*generation_engine"
        ):
            call()
    assert all(one.equal(other) for one, other in zip(before, trainer.actor.module.parameters(), strict=True))
    trainer.evaluate(trainer.reference)  # whose weights those are


@pytest.mark.parametrize("vllm", [1, 2], indirect=True)
def test_an_engine_that_did_not_take_the_weights_is_noticed(tiny, vllm, monkeypatch):
    trainer = tiny(model_config=wide("gpt2"), **VLLM)
    trainer.train_step()
    monkeypatch.setattr(vllm, "keeps", True)
    with pytest.raises(UserError, match="not drawn from the weights that are trained"):
        trainer.train_step()


@pytest.mark.parametrize("vllm", [1], indirect=True)
def test_vllm_gets_tied_weights_that_an_adapter_parted(tiny, vllm):
    settings = {"lora_r": 4, "lora_target_modules": "wte", "deepspeed": "ds_zero3.json"}
    trainer = tiny(model_config=wide("gpt2"), **VLLM | settings)
    rows = [trainer.train_step() for _ in range(2)]
    assert abs(rows[1]["objective/kl"]) > 0.01
