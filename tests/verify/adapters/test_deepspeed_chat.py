"""DeepSpeed-Chat's functions with ours in place and without: its own, where they are, and the same in our words.

It is on no package index. Its own: ``build/dschat`` with the folder ``dschat`` of DeepSpeedExamples.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from ppo_kernels import integrations
from tests.lib.checkout import ROOT
from tests.verify.adapters.lib import both, close, draw, grad

B, T, PROMPT = 5, 14, 6
CHAT = ROOT / "build" / "dschat"


def gather_log_probs(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)


class DeepSpeedPPOTrainer:
    def compute_rewards(self, prompts, log_probs, ref_log_probs, reward_score, action_mask):
        rewards = self.kl_ctl * (ref_log_probs - log_probs)
        first = prompts.shape[1] - 1
        for row, score in enumerate(reward_score.clamp(-self.clip_reward_value, self.clip_reward_value)):
            behind = first + int(action_mask[row, first:].sum())  # the token behind the answer, if there is one
            rewards[row, min(behind, rewards.shape[1] - 1)] += score
        return rewards

    def get_advantages_and_returns(self, values, rewards, start):
        values, rewards = values[:, start:], rewards[:, start:]
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        advantages = rewards + self.gamma * following - values
        for t in range(advantages.shape[1] - 2, -1, -1):
            advantages[:, t] += self.gamma * self.lam * advantages[:, t + 1]
        return advantages, advantages + values

    def actor_loss_fn(self, logprobs, old_logprobs, advantages, mask):
        ratio = ((logprobs - old_logprobs) * mask).exp()
        clipped = ratio.clamp(1 - self.cliprange, 1 + self.cliprange)
        return -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum() / mask.sum()

    def critic_loss_fn(self, values, old_values, returns, mask):
        clipped = values.clamp(old_values - self.cliprange_value, old_values + self.cliprange_value)
        worst = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        return 0.5 * (worst * mask).sum() / mask.sum()


@pytest.fixture(params=["in our words", "its own"])
def chat(request, monkeypatch):
    name = "dschat.rlhf.ppo_trainer"
    if request.param == "its own":
        if not CHAT.is_dir():
            pytest.skip(f"there is no {CHAT}")
        monkeypatch.syspath_prepend(str(CHAT))
        module = importlib.import_module(name)
    else:
        module = types.ModuleType(name)
        module.gather_log_probs = types.FunctionType(gather_log_probs.__code__, globals(), "gather_log_probs")
        methods = {name: method for name, method in vars(DeepSpeedPPOTrainer).items() if callable(method)}
        module.DeepSpeedPPOTrainer = type("DeepSpeedPPOTrainer", (), methods)
        monkeypatch.setitem(sys.modules, "dschat", types.ModuleType("dschat"))
        monkeypatch.setitem(sys.modules, name, module)
    yield module
    integrations.revert("deepspeed_chat")
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "dschat"]:
        sys.modules.pop(loaded)


def trainer(chat):
    made = object.__new__(chat.DeepSpeedPPOTrainer)
    numbers = {"kl_ctl": 0.1, "clip_reward_value": 1.0, "cliprange": 0.2, "cliprange_value": 0.3, "gamma": 0.98}
    made.__dict__.update(numbers, lam=0.9, compute_fp32_loss=False)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(chat, dtype):
    labels = torch.randint(0, 97, (4, 10), generator=torch.Generator().manual_seed(0))
    logits, weights = draw(4, 11, 97, scale=3.0).to(dtype), draw(4, 10, seed=1)
    widen = iter((True, False))

    def call():
        leaf = logits.clone().requires_grad_()
        logprobs = chat.gather_log_probs((leaf.float() if next(widen) else leaf)[:, :-1], labels)
        return logprobs, grad((logprobs * weights).sum(), leaf)

    ours, theirs = both("deepspeed_chat", call, {"gather_log_probs": 1})
    close(ours[0], theirs[0], atol=5e-6)
    close(ours[1], theirs[1], rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=5e-6)


@pytest.mark.parametrize("answers", [(3, 9, 1, 0, 5), (9,) * 5])
def test_an_update_as_it_computes_it(chat, answers):
    """Rewards, zeroes behind the end, advantages, and both losses, in the order of its train_rlhf."""
    start = PROMPT - 1
    ends = PROMPT + torch.tensor(answers)
    attention = (torch.arange(T + 1) < ends[:, None]).long()

    def call():
        made, action_mask = trainer(chat), attention[:, 1:]
        prompts, old, values = torch.zeros(B, PROMPT), draw(B, T), draw(B, T, seed=3)
        rewards = made.compute_rewards(prompts, old, draw(B, T, seed=1), draw(B, seed=2) * 2, action_mask)
        kept = rewards.clone()
        for i, end in enumerate(start + action_mask[:, start:].sum(1) + 1):
            rewards[i, end:] = values[i, end:] = 0  # it writes to them
        advantages, returns = made.get_advantages_and_returns(values, rewards, start)
        new, vpred = (draw(B, T - start, seed=s).requires_grad_() for s in (4, 5))
        mask = action_mask[:, start:]
        actor = made.actor_loss_fn(new, old[:, start:], advantages, mask)
        critic = made.critic_loss_fn(vpred, values[:, start:], returns, mask)
        return kept, advantages, returns, actor.detach(), critic.detach(), grad(actor, new), grad(critic, vpred)

    names = ("compute_rewards", "get_advantages_and_returns", "actor_loss_fn", "critic_loss_fn")
    served = {f"DeepSpeedPPOTrainer.{name}": 1 for name in names}
    close(*both("deepspeed_chat", call, served), rtol=1e-5, atol=5e-6)


def test_its_own_is_what_the_adapter_knows():
    if not CHAT.is_dir():
        pytest.skip(f"there is no {CHAT}")
    from ppo_kernels.integrations.__main__ import main

    assert main(["deepspeed_chat", "--path", str(CHAT)]) == 0
