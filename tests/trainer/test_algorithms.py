"""What each algorithm makes of a rollout, beside float64 loops that share no code with it."""

import math

import pytest
import torch

from python_trainer.config import UserError

from .test_step import weights

GROUPED = ("p3o", "rloo", "grpo", "dr_grpo", "reinforce++_baseline", "online_dpo")
KL_COEF = 0.3


@pytest.fixture
def rolled_out(tiny):
    """A trainer whose policy has left its reference, and its next rollout."""

    def make(algorithm, **settings):
        # The reference gets other weights: on-policy KL would be 0 and hide every sign.
        trainer = tiny(algorithm=algorithm, kl_coef=KL_COEF, **settings)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.reference.module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            if trainer.critic is not None:
                torch.nn.init.normal_(trainer.critic.module.model.score.weight)
        return trainer, trainer.collect_experience()

    return make


def lists(experience, name):
    return [
        row[mask].double().tolist() for row, mask in zip(getattr(experience, name), experience.mask.bool(), strict=True)
    ]


def padded(rows, like):
    out = torch.zeros_like(like, dtype=torch.float64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return out


def token_rewards(experience):
    rewards = []
    for logp, ref, score in zip(
        lists(experience, "logprobs"), lists(experience, "ref_logprobs"), experience.scores.tolist(), strict=True
    ):
        row = [-KL_COEF * (a - b) for a, b in zip(logp, ref, strict=True)]
        row[-1] += score
        rewards.append(row)
    return rewards


def whitened(rows):
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    return [[(x - mean) / deviation for x in row] for row in rows]


def gae_loops(rewards, values, lam):
    advantages, returns = [], []
    for row, value in zip(rewards, values, strict=True):
        out, running = [0.0] * len(row), 0.0
        for t in reversed(range(len(row))):
            following = value[t + 1] if t + 1 < len(row) else 0.0
            running = row[t] + following - value[t] + lam * running
            out[t] = running
        advantages.append(out)
        returns.append([a + v for a, v in zip(out, value, strict=True)])
    return advantages, returns


def test_values_stand_before_their_tokens(rolled_out):
    """The value at t has read the prompt and the tokens before t, no more: a longer reading changes none."""
    trainer, experience = rolled_out("ppo")
    rollout, critic = experience.rollout, trainer.critic
    with torch.no_grad():
        everywhere = critic(
            input_ids=rollout.sequences,
            attention_mask=rollout.attention_mask.long(),
            position_ids=rollout.position_ids,
        )
    for t in range(rollout.mask.shape[1]):
        torch.testing.assert_close(experience.values[:, t], everywhere[:, rollout.prompt_width - 1 + t])


def test_ppo(rolled_out):
    _, experience = rolled_out("ppo", lam=0.9)
    advantages, returns = gae_loops(token_rewards(experience), lists(experience, "values"), 0.9)
    torch.testing.assert_close(experience.returns.double(), padded(returns, experience.returns), atol=1e-5, rtol=1e-5)
    expected = padded(whitened(advantages), experience.returns)
    torch.testing.assert_close(experience.advantages.double(), expected, atol=1e-5, rtol=1e-5)


def test_ppo_without_whitening(rolled_out):
    _, experience = rolled_out("ppo", whiten_advantages=False)
    advantages, _ = gae_loops(token_rewards(experience), lists(experience, "values"), 0.95)
    expected = padded(advantages, experience.returns)
    torch.testing.assert_close(experience.advantages.double(), expected, atol=1e-5, rtol=1e-5)


def test_reinforce_pp(rolled_out):
    _, experience = rolled_out("reinforce++")
    to_go = [[sum(row[t:]) for t in range(len(row))] for row in token_rewards(experience)]
    expected = padded(whitened(to_go), experience.advantages)
    torch.testing.assert_close(experience.advantages.double(), expected, atol=1e-5, rtol=1e-5)


def test_reinforce_pp_baseline(rolled_out):
    _, experience = rolled_out("reinforce++_baseline", num_generations=4)
    means = experience.scores.double().view(-1, 4).mean(dim=1).repeat_interleave(4)
    rewards = token_rewards(experience)
    for row, mean in zip(rewards, means.tolist(), strict=True):
        row[-1] -= mean
    to_go = [[sum(row[t:]) for t in range(len(row))] for row in rewards]
    expected = padded(whitened(to_go), experience.advantages)
    torch.testing.assert_close(experience.advantages.double(), expected, atol=1e-5, rtol=1e-5)


def in_groups(numbers, size):
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]


def test_rloo(rolled_out):
    _, experience = rolled_out("rloo", num_generations=4)
    shaped = [sum(row) for row in token_rewards(experience)]
    expected = []
    for group in in_groups(shaped, 4):
        expected += [own - (sum(group) - own) / 3 for own in group]
    for row, mask, wanted in zip(experience.advantages, experience.mask.bool(), expected, strict=True):
        assert row[mask].tolist() == pytest.approx([wanted] * int(mask.sum()), abs=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_grpo(rolled_out, name):
    _, experience = rolled_out(name, num_generations=4)
    for number, group in enumerate(in_groups(experience.scores.double().tolist(), 4)):
        mean = sum(group) / 4
        deviation = math.sqrt(sum((score - mean) ** 2 for score in group) / 3)
        for at, score in enumerate(group):
            wanted = (score - mean) / (deviation + 1e-4) if name == "grpo" else score - mean
            assert experience.advantages[4 * number + at, 0].item() == pytest.approx(wanted, abs=1e-5)


def loss_gradient(trainer, experience, rows=None):
    """d loss / d log-probabilities of a minibatch, a bit away from the policy that sampled it."""
    torch.manual_seed(2)
    moved = experience.logprobs + 0.3 * torch.randn_like(experience.logprobs) * experience.mask
    moved = moved.detach().requires_grad_()
    normalizer = trainer.algorithm.normalizer(experience.mask)
    loss, _ = trainer.algorithm.policy_loss(moved * experience.mask, experience, normalizer)
    (gradient,) = torch.autograd.grad(loss, moved)
    return moved.detach().double(), gradient.double()


def clip_factor(advantage, ratio, low=0.2, high=0.2):
    stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    return 0.0 if stopped else 1.0


def row_weights(experience, mode):
    lengths = experience.mask.sum(dim=1).tolist()
    rows = len(lengths)
    return {
        "token-mean": [1 / sum(lengths)] * rows,
        "seq-mean-token-mean": [1 / length / rows for length in lengths],
        "seq-mean-token-sum": [1 / rows] * rows,
        "seq-mean-token-sum-norm": [1 / 5 / rows] * rows,
    }[mode]


@pytest.mark.parametrize(
    ("name", "mode", "settings", "bounds"),
    [
        ("ppo", "token-mean", {}, (0.2, 0.2)),
        ("ppo", "token-mean", {"cliprange": 0.1, "cliprange_high": 0.28}, (0.1, 0.28)),
        ("ppo", "seq-mean-token-sum", {"loss_aggregation": "seq-mean-token-sum"}, (0.2, 0.2)),
        ("reinforce++", "token-mean", {}, (0.2, 0.2)),
        ("grpo", "seq-mean-token-mean", {}, (0.2, 0.2)),
        ("dr_grpo", "seq-mean-token-sum-norm", {}, (0.2, 0.2)),
    ],
)
def test_gradient_of_the_token_losses(rolled_out, name, mode, settings, bounds):
    trainer, experience = rolled_out(name, **settings)
    moved, gradient = loss_gradient(trainer, experience)
    expected = torch.zeros_like(gradient)
    for row, weight in enumerate(row_weights(experience, mode)):
        for t in range(int(experience.mask[row].sum())):
            advantage = experience.advantages[row, t].item()
            ratio = math.exp(moved[row, t] - experience.logprobs[row, t])
            slope = -advantage * ratio * clip_factor(advantage, ratio, *bounds)
            if "grpo" in name:  # KL_COEF · k3 in the loss
                slope += KL_COEF * (1 - math.exp(experience.ref_logprobs[row, t] - moved[row, t]))
            expected[row, t] = weight * slope
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_dual_clip_bounds_the_loss_of_bad_tokens(rolled_out):
    trainer, experience = rolled_out("ppo", dual_clip=1.1)
    _, bounded = loss_gradient(trainer, experience)
    _, free = loss_gradient(rolled_out("ppo", output_dir=trainer.config.output_dir)[0], experience)
    moved, _ = loss_gradient(trainer, experience)
    ratio = (moved - experience.logprobs).exp()
    beyond = (experience.advantages < 0) & (ratio > 1.1) & experience.mask
    assert beyond.any()
    assert bounded[beyond].eq(0).all()
    assert free[beyond].ne(0).all()
    torch.testing.assert_close(bounded[~beyond], free[~beyond])


def test_kl_in_the_loss_is_not_in_the_reward(rolled_out):
    trainer, experience = rolled_out("ppo", kl_in="loss", lam=1.0, whiten_advantages=False)
    expected = experience.scores[:, None].double() - experience.values.double()
    torch.testing.assert_close(experience.advantages.double(), expected * experience.mask, atol=1e-5, rtol=1e-5)
    _, with_penalty = loss_gradient(trainer, experience)
    trainer.kl.coef = 0.0
    moved, without = loss_gradient(trainer, experience)
    k2 = (moved - experience.ref_logprobs) * experience.mask / experience.mask.sum()
    torch.testing.assert_close(with_penalty - without, KL_COEF * k2, atol=1e-6, rtol=1e-4)


def test_gradient_of_rloo(rolled_out):
    trainer, experience = rolled_out("rloo")
    moved, gradient = loss_gradient(trainer, experience)
    log_ratio = ((moved - experience.logprobs) * experience.mask).sum(dim=1)
    for row, ratio in enumerate(log_ratio.exp().tolist()):
        advantage = experience.advantages[row, 0].item()
        wanted = -advantage * ratio * clip_factor(advantage, ratio) / len(log_ratio)
        expected = [wanted if valid else 0.0 for valid in experience.mask[row].tolist()]
        assert gradient[row].tolist() == pytest.approx(expected, abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("variant", ["joint", "separate"])
def test_gradient_of_p3o(rolled_out, variant):
    """The closed form of Wu et al. for each pair, with q at the current policy."""
    trainer, experience = rolled_out("p3o", p3o_variant=variant)
    moved, gradient = loss_gradient(trainer, experience)
    mask, scores = experience.mask, experience.scores.double().tolist()
    now = ((moved - experience.ref_logprobs) * mask).sum(dim=1).tolist()
    then = ((experience.logprobs - experience.ref_logprobs).double() * mask).sum(dim=1).tolist()
    pairs = len(scores) / 2
    for i in range(0, len(scores), 2):
        j = i + 1
        q = scores[i] - scores[j] - KL_COEF * (now[i] - now[j])
        ratio = [math.exp(now[k] - then[k]) for k in (i, j)]
        if variant == "joint":
            weight = min(max(ratio[0] * ratio[1], 0.1), 10)
            d, d_old = now[i] - now[j], then[i] - then[j]
            stopped = (q > 0 and d > d_old + 0.2) or (q < 0 and d < d_old - 0.2)
            wanted = [-q * weight * (not stopped) / 2 / pairs, q * weight * (not stopped) / 2 / pairs]
        else:
            bounded = [min(max(r, 0.1), 10) for r in ratio]
            wanted = [
                -q * bounded[1] * ratio[0] * clip_factor(q, ratio[0]) / 2 / pairs,
                q * bounded[0] * ratio[1] * clip_factor(-q, ratio[1]) / 2 / pairs,
            ]
        for row, slope in zip((i, j), wanted, strict=True):
            expected = [slope if valid else 0.0 for valid in mask[row].tolist()]
            assert gradient[row].tolist() == pytest.approx(expected, abs=1e-6, rel=1e-3)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_gradient_of_online_dpo(rolled_out, labels):
    trainer, experience = rolled_out("online_dpo", dpo_labels=labels)
    moved, gradient = loss_gradient(trainer, experience)
    now = ((moved - experience.ref_logprobs) * experience.mask).sum(dim=1).tolist()
    scores = experience.scores.double().tolist()
    for i in range(0, len(scores), 2):
        better = scores[i] - scores[i + 1]
        wins = 1 / (1 + math.exp(-better)) if labels == "soft" else (better > 0) + 0.5 * (better == 0)
        preferred = 1 / (1 + math.exp(-KL_COEF * (now[i] - now[i + 1])))
        slope = -KL_COEF * (wins - preferred) / (len(scores) / 2)
        for row, sign in ((i, 1), (i + 1, -1)):
            expected = [sign * slope if valid else 0.0 for valid in experience.mask[row].tolist()]
            assert gradient[row].tolist() == pytest.approx(expected, abs=1e-7, rel=1e-4)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_stay_together(tiny, name):
    """Whatever the micro-batch, a group is inside one, and the step and its statistics are the same."""
    settings = {"algorithm": name, "num_mini_batches": 2, "num_ppo_epochs": 2, "num_generations": 4}
    one, other = tiny(**settings), tiny(**settings, per_device_train_batch_size=4)
    first, second = one.train_step(), other.train_step()
    for figure in first.keys() - {"time/rollout", "time/update"}:
        assert first[figure] == pytest.approx(second[figure], rel=1e-3, abs=1e-7), figure
    torch.testing.assert_close(weights(one), weights(other), atol=1e-6, rtol=0)
    experience = one.collect_experience()
    width = experience.rollout.prompt_width
    prompts = experience.sequences[:, :width].view(-1, 4, width)
    assert prompts.eq(prompts[:, :1]).all()
    assert len({tuple(ids) for ids in prompts[:, 0].tolist()}) > 1
    assert any(not group[0].equal(group[1]) for group in experience.rollout.responses.reshape(len(prompts), 4, -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "p3o", "per_device_train_batch_size": 5}, "multiple of the 2 responses"),
        ({"algorithm": "rloo", "num_generations": 1}, "rloo needs num_generations of at least 2"),
        ({"algorithm": "grpo", "num_generations": 3}, "responses per prompt = 3"),
        ({"algorithm": "rloo", "critic_warmup_steps": 1}, "rloo has no use for critic_warmup_steps"),
        ({"algorithm": "reinforce++", "lam": 0.9}, r"reinforce\+\+ has no use for lam"),
        ({"algorithm": "rloo", "whiten_advantages": False}, "rloo has no use for whiten_advantages"),
        ({"algorithm": "grpo", "gamma": 0.9}, "grpo has no use for gamma"),
        ({"algorithm": "online_dpo", "cliprange": 0.1}, "online_dpo has no use for cliprange"),
        ({"algorithm": "online_dpo", "kl_coef": 0.0}, "online_dpo needs a kl_coef above 0"),
        ({"algorithm": "p3o", "score_clip": 5.0}, "p3o learns from differences of scores, which score_clip"),
        ({"algorithm": "p3o", "score_scaling": "ref"}, "p3o learns from differences of scores, which score_scaling"),
        ({"algorithm": "p3o", "dual_clip": 3.0}, "p3o has no use for dual_clip"),
        ({"algorithm": "rloo", "kl_in": "loss"}, "rloo has its KL penalty in the reward"),
        ({"algorithm": "ppo", "kl_in": "loss", "kl_estimator": "k1"}, "kl_in loss needs kl_estimator k2 or k3"),
        ({"algorithm": "ppo", "mask_zero_variance_groups": True}, "mask_zero_variance_groups needs num_generations"),
        ({"algorithm": "reinforce++", "mask_zero_variance_groups": True}, "needs num_generations of at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)
