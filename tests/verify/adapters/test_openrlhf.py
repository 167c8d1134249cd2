"""OpenRLHF's own functions, and the code of its experience maker, actor and critic around them, with ours and without.

Ray, vLLM and flash-attn take no part: the classes are made here and their methods are called as its workers call them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ppo_kernels import integrations
from tests.verify.adapters.lib import MASKS, B, T, both, close, draw, grad, load, make_mask

utils, losses, maker, ray_actor, ray_critic, actors, experiences = load(
    "openrlhf",
    "openrlhf.models.utils",
    "openrlhf.models.loss",
    "openrlhf.trainer.ppo_utils.experience_maker",
    "openrlhf.trainer.ray.ppo_actor",
    "openrlhf.trainer.ray.ppo_critic",
    "openrlhf.models.actor",
    "openrlhf.trainer.ppo_utils.experience",
)
V = 97
SETTINGS = {
    "ppo": {},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo, corrected": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "clip": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "mask": {"is_correction_level": "token"},
    "mask rows": {"is_correction_level": "seq", "is_correction_threshold": (0.8, 1.6)},
}
COUNTS = ({}, {"dp_size": 4, "batch_num_tokens": torch.tensor(50.0), "global_batch_size": torch.tensor(7.0)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(dtype, temperature):
    labels = torch.randint(0, V, (4, 10), generator=torch.Generator().manual_seed(0))
    logits, weights = draw(4, 10, V, scale=3.0).to(dtype), draw(4, 10, seed=1)
    widen = iter((True, False))

    def call():
        leaf = logits.clone().requires_grad_()
        given = (leaf.float() if next(widen) else leaf) * 1  # theirs divides in place
        logprobs = utils.log_probs_from_logits(given, labels, temperature)
        return logprobs, grad((logprobs * weights).sum(), leaf)

    ours, theirs = both("openrlhf", call, {"log_probs_from_logits": 1})
    close(ours[0], theirs[0], atol=5e-6)
    close(ours[1], theirs[1], rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=5e-6)


def test_entropy():
    logits, weights = draw(4, 10, V, scale=3.0), draw(4, 10, seed=1)

    def call():
        leaf = logits.clone().requires_grad_()
        entropy = utils.compute_entropy(leaf)
        return entropy, grad((entropy * weights).sum(), leaf)

    close(*both("openrlhf", call, {"compute_entropy": 1}), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_kl_of_a_rollout(estimator, far):
    call = lambda: utils.compute_approx_kl(draw(B, T), draw(B, T, seed=1) * far, kl_estimator=estimator)  # noqa: E731
    close(*both("openrlhf", call, {"compute_approx_kl": 1}), rtol=1e-5, atol=1e-5)


def advantage_settings(estimator):
    advantage = SimpleNamespace(estimator=estimator, gamma=0.98, lambd=0.9, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=2),
        reward=SimpleNamespace(clip_range=(-1.0, 1.0), overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("estimator", ["gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"])
def test_advantages_as_the_experience_maker_computes_them(estimator, kind):
    mask = make_mask(kind).bool()

    def call():
        made = object.__new__(maker.RemoteExperienceMaker)
        made.strategy = advantage_settings(estimator)
        made.advantage_estimator = estimator
        made.kl_ctl = SimpleNamespace(value=0.1)
        batch = []
        for half in (slice(0, 4), slice(4, B)):  # micro-batches
            n = half.stop - half.start
            batch.append(
                experiences.Experience(
                    index=list(range(half.start, half.stop)),
                    rewards=draw(B, seed=1)[half],
                    action_mask=mask[half],
                    values=draw(B, T, seed=2)[half],
                    kl=draw(B, T, seed=3)[half],
                    response_length=torch.full((n,), T),
                )
            )
        made.compute_advantages_and_returns(batch)
        return [(one.advantages * one.action_mask, one.returns * one.action_mask, one.info) for one in batch]

    name = "get_advantages_and_returns" if estimator == "gae" else "get_cumulative_returns"
    close(*both("openrlhf", call, {f"RemoteExperienceMaker.{name}": 2}), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", [*MASKS, None])
@pytest.mark.parametrize("counts", [0, 1])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("settings", SETTINGS)
def test_policy_loss(kind, counts, token_level, dual_clip, settings):
    if kind is None and (counts or not token_level or "gspo" in settings):
        pytest.skip("theirs needs a mask there")
    mask = None if kind is None else make_mask(kind).bool()
    function = losses.PolicyLoss(0.1, 0.3, dual_clip, token_level, **SETTINGS[settings])

    def call():
        leaf = (draw(B, T) + draw(B, T, seed=1, scale=0.7)).requires_grad_()
        rollout = draw(B, T, seed=5)
        found = function(leaf, draw(B, T), draw(B, T, seed=2), mask, rollout, **COUNTS[counts])
        return [None if x is None else x.detach() for x in found], grad(found[0], leaf)

    ours, theirs = both("openrlhf", call, {"PolicyLoss.forward": 1})
    assert theirs[0][1] > 0
    if "clip" in settings or "mask" in settings:
        assert 0.0 < theirs[0][4] < 1.0, "some are out of bounds"
    close(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", [*MASKS, None])
@pytest.mark.parametrize("counts", [0, 1])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip", [0.3, None])
def test_value_loss(kind, counts, token_level, clip):
    if kind is None and (counts or not token_level):
        pytest.skip("theirs needs a mask there")
    mask = None if kind is None else make_mask(kind).bool()
    function = losses.ValueLoss(clip, token_level)

    def call():
        leaf = draw(B, T).requires_grad_()
        loss = function(leaf, draw(B, T, seed=1), draw(B, T, seed=2), action_mask=mask, **COUNTS[counts])
        return loss.detach(), grad(loss, leaf)

    close(*both("openrlhf", call, {"ValueLoss.forward": 1}), rtol=1e-5, atol=5e-6)


class Strategy:
    """What DeepSpeed does for its actors, without DeepSpeed."""

    ring_attn_group = None

    def backward(self, loss, model, optimizer):
        optimizer.zero_grad()
        loss.backward()

    def get_grad_norm(self, model):
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def optimizer_step(self, optimizer, model, scheduler, name):
        optimizer.step()


def tiny_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=V, **rates))


def rollout(kind):
    prompt = 5
    mask = make_mask(kind).bool()
    tokens = torch.randint(0, V, (B, prompt + T), generator=torch.Generator().manual_seed(1))
    return experiences.Experience(
        sequences=tokens,
        attention_mask=torch.cat([torch.ones(B, prompt, dtype=torch.int64), make_mask("whole")], 1),
        action_mask=mask,
        action_log_probs=draw(B, T) * 0.1 - 4.5,
        base_action_log_probs=draw(B, T, seed=1) * 0.1 - 4.5,
        values=draw(B, T, seed=2),
        returns=draw(B, T, seed=3),
        advantages=draw(B, T, seed=4),
        rewards=draw(B, seed=5),
    )


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("use_kl_loss", [False, True])
def test_actor_steps_as_its_worker_takes_them(kind, use_kl_loss):
    args = SimpleNamespace(
        actor=SimpleNamespace(entropy_coef=0.01, aux_loss_coef=0.0),
        algo=SimpleNamespace(
            kl=SimpleNamespace(use_loss=use_kl_loss, init_coef=0.1, estimator="k3", unbiased_gradient=True)
        ),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )

    def call():
        actor = actors.Actor(tiny_model(), temperature=0.7)
        actor.packing_samples = False
        worker = object.__new__(ray_actor.ActorPPOTrainer)
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.1)
        worker.__dict__.update(
            args=args,
            strategy=Strategy(),
            actor=actor,
            ema_model=None,
            actor_optim=optimizer,
            actor_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            actor_loss_fn=losses.PolicyLoss(0.2, 0.28, 3.0),
            aux_loss=False,
            replay_buffer=None,
        )
        return [worker.training_step(rollout(kind), 0.1, step)["metrics"] for step in range(3)]

    adapter = integrations.adapter("openrlhf")
    theirs = call()
    adapter.apply()
    adapter.reset_status()
    try:
        ours, status = call(), adapter.status()
    finally:
        adapter.revert()
    close(ours, theirs, rtol=1e-4, atol=1e-5)
    served = {name: counts["served"] for name, counts in status.items()}
    kl = {"compute_approx_kl": 0} if use_kl_loss else {}
    assert served == {"log_probs_from_logits": 3, "compute_entropy": 3, "PolicyLoss.forward": 3, **kl}
    if use_kl_loss:  # theirs: it is differentiated
        assert status["compute_approx_kl"]["not covered"] == {"the call is differentiated": 3}


def test_critic_steps_as_its_worker_takes_them():
    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model().transformer
            self.head = torch.nn.Linear(32, 1)

        def forward(self, sequences, action_mask, attention_mask, **_):
            hidden = self.model(sequences, attention_mask=attention_mask).last_hidden_state
            return self.head(hidden)[:, -T - 1 : -1, 0], None

    args = SimpleNamespace(actor=SimpleNamespace(aux_loss_coef=0.0), train=SimpleNamespace(dynamic_batch_enable=False))

    def call():
        critic = Critic()
        worker = object.__new__(ray_critic.CriticPPOTrainer)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        worker.__dict__.update(
            args=args,
            strategy=Strategy(),
            critic=critic,
            critic_optim=optimizer,
            critic_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            critic_loss_fn=losses.ValueLoss(0.2),
            aux_loss=False,
            replay_buffer=None,
        )
        return [worker.training_step(rollout("interior"), step) for step in range(3)]

    close(*both("openrlhf", call, {"ValueLoss.forward": 3}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gating", ["tv", "binary_kl"])
def test_what_is_not_covered_is_left_to_openrlhf(gating):
    bounds = {"is_correction_level": "token", "is_correction_threshold": (0.0, 0.1)}
    function = losses.PolicyLoss(**bounds, is_correction_gating=gating)
    leaf, mask = draw(B, T).requires_grad_(), make_mask("prefix")
    arguments = (leaf, draw(B, T, seed=1), draw(B, T, seed=2), mask, draw(B, T, seed=3))
    theirs = function(*arguments)
    adapter = integrations.adapter("openrlhf")
    adapter.apply()
    adapter.reset_status()
    ours = function(*arguments)
    status = adapter.status()
    adapter.revert()
    assert status == {"PolicyLoss.forward": {"served": 0, "not covered": {f"is_correction_gating={gating!r}": 1}}}
    close(ours[0], theirs[0], rtol=0, atol=0)
