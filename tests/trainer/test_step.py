"""What one step must be: on-policy at its start, blind to padding and to how the batch is cut."""

import json

import pytest
import torch

from python_trainer import distributed
from python_trainer.data import Rollout, left_pad
from python_trainer.deepspeed_engine import Trainable
from python_trainer.logging import Log, plot
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import InverseCdf, check_ratio, score_responses, score_tokens
from tests.lib.trainer import TINY


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for m in trainer.trained.values() for p in m.module.parameters()])


def test_first_update_is_on_policy(tiny):
    """One epoch in one minibatch: every ratio of the step is that of the sampling policy."""
    row = tiny().train_step()
    assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert row["val/ratio_var"] == pytest.approx(0, abs=1e-10)
    assert row["policy/clipfrac_avg"] == 0
    assert row["policy/approxkl_avg"] == pytest.approx(0, abs=1e-10)
    assert row["objective/kl"] == 0
    assert row["loss/policy_avg"] == pytest.approx(0, abs=1e-6)  # minus the mean of whitened advantages


def test_a_policy_that_changed_before_its_first_update_is_noticed(tiny):
    trainer = tiny()
    experience = trainer.collect_experience()
    with torch.no_grad():
        next(trainer.actor.module.parameters()).mul_(1.1)
    with pytest.raises(RuntimeError, match="log-ratio is off"):
        trainer.update(experience)


def test_rounding_off_the_cpu_is_no_reason_to_stop(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    check_ratio(2e-5, 1, PPOConfig())
    assert "warning: before the first update of step 1 the log-ratio is off by 2e-05" in capsys.readouterr().out


@pytest.mark.parametrize("micro", [2, 16])
def test_step_does_not_depend_on_the_micro_batch(tiny, micro):
    one, other = tiny(num_mini_batches=2), tiny(num_mini_batches=2, per_device_train_batch_size=micro)
    for _ in range(2):
        rows = one.train_step(), other.train_step()
        assert rows[0]["val/ratio_var"] > 1e-6
        assert rows[0]["val/ratio_var"] == pytest.approx(rows[1]["val/ratio_var"], rel=1e-3)
    torch.testing.assert_close(weights(one), weights(other), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"entropy_coef": 0.01},
        {"algorithm": "rloo"},
        {"algorithm": "grpo", "mask_zero_variance_groups": True, "temperature": 0.8},
    ],
)
def test_the_pass_of_the_only_update_scores_the_responses(tiny, settings):
    """The policy is not asked twice for what its weights say of a rollout; in two micro-batches it has to be."""
    one, other = tiny(per_device_train_batch_size=16, **settings), tiny(per_device_train_batch_size=8, **settings)
    passes: list[list[bool]] = [[], []]
    for trainer, seen in zip((one, other), passes, strict=True):

        def watch(module, arguments, options, out, seen=seen):
            if not options["use_cache"]:
                seen.append(out.logits.requires_grad)

        trainer.actor.module.register_forward_hook(watch, with_kwargs=True)
    for _ in range(2):
        mine, its = one.train_step(), other.train_step()
        for row in (mine, its):
            row.pop("time/rollout"), row.pop("time/update")
        assert mine == pytest.approx(its, abs=1e-5, nan_ok=True)
    torch.testing.assert_close(weights(one), weights(other), atol=1e-6, rtol=0)
    assert passes == [[True] * 2, [False, True, True] * 2]


def test_same_step_with_reference_ops_and_with_the_chosen_ones(tiny):
    plain, fused = tiny(ops_impl="torch"), tiny(ops_impl="auto")
    for _ in range(3):
        rows = plain.train_step(), fused.train_step()
        for name in ("loss/policy_avg", "loss/value_avg", "objective/kl", "policy/entropy_avg"):
            assert rows[0][name] == pytest.approx(rows[1][name], abs=2e-6), name
    torch.testing.assert_close(weights(plain), weights(fused), atol=2e-6, rtol=0)


def test_left_padding_changes_no_score(tiny):
    trainer = tiny()
    prompts = [[2, 3, 4], [5]]
    responses = torch.tensor([[2, 3, 1, 0, 0], [3, 2, 4, 5, 6]])
    together = Rollout.of(*left_pad(prompts, 0), responses, 1)
    padded = score_tokens(trainer.reference, together)
    for row, prompt in enumerate(prompts):
        alone = Rollout.of(*left_pad([prompt], 0), responses[row : row + 1], 1)
        torch.testing.assert_close(padded[row : row + 1], score_tokens(trainer.reference, alone), atol=1e-6, rtol=0)
    assert padded[0, 3:].eq(0).all()
    assert padded[0, 2] != 0  # the end token is inside the mask


def test_a_response_is_judged_at_its_last_token():
    responses = torch.tensor([[2, 3, 1, 0, 0], [3, 2, 4, 5, 6], [1, 0, 0, 0, 0]])
    rollout = Rollout.of(*left_pad([[2, 3, 4], [5], [6, 7]], 0), responses, 1)

    def positions(input_ids, **_):
        return torch.arange(input_ids.shape[1]).expand(input_ids.shape)

    assert score_responses(positions, rollout).tolist() == [5, 7, 3]


def test_sampling_follows_the_softmax():
    logits = torch.tensor([1.0, -1.0, float("-inf"), 0.5])
    uniforms = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    for temperature in (0.5, 1.0):
        drawn = InverseCdf(uniforms, 3, temperature)(torch.zeros(20_000, 3), logits.expand(20_000, -1)).argmax(1)
        share = torch.bincount(drawn, minlength=4) / 20_000
        torch.testing.assert_close(share, (logits / temperature).softmax(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [255, 256, 257, 1000])
def test_every_token_of_a_large_vocabulary_is_drawn_by_its_probability(size):
    """They are found in blocks: the token is the one at which the CDF of the whole vocabulary passes the number."""
    logits = 5 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits[torch.arange(0, size, 7)] = float("-inf")
    logits[-1] = float("-inf")
    uniforms = torch.cat([(torch.arange(5000, dtype=torch.float64) + 0.5) / 5000, torch.tensor([0.0, 1 - 2**-53])])
    draw = InverseCdf(uniforms[:, None], 3, 1.0)
    drawn = draw(torch.zeros(len(uniforms), 3), logits.expand(len(uniforms), -1)).argmax(1)
    cdf = logits.softmax(0).double().cumsum(0)
    assert drawn[:-1].equal(torch.searchsorted(cdf, uniforms[:-1] * cdf[-1], right=True))
    assert draw.logprobs.isfinite().all()


def test_samples_are_those_of_the_scored_distribution(tiny):
    """Mean log-probability of samples equals minus the entropy, at a temperature that is not 1."""
    trainer = tiny(batch_size=2048, temperature=0.7, per_device_train_batch_size=2048)
    row = trainer.train_step()
    tokens = 2048 * row["val/response_length"]
    assert row["objective/entropy"] * 2048 / tokens == pytest.approx(row["policy/entropy_avg"], abs=0.03)


def test_missing_end_is_penalised(tiny):
    lenient, trainer = tiny(), tiny()
    trainer.config.missing_eos_penalty = 1.0  # the task, which knows the optimum without it, would refuse it
    plain, strict = lenient.collect_experience(), trainer.collect_experience()
    ended = plain.ended
    assert ended.any()
    assert not ended.all()
    torch.testing.assert_close(plain.scores - strict.scores, (~ended).float())


def test_non_finite_gradient_never_reaches_the_weights(tiny):
    trainer = tiny()
    before = weights(trainer)
    model: Trainable = trainer.trained["actor"]
    inputs = {"input_ids": torch.tensor([[2, 3]])}
    for bad in (float("nan"), float("inf")):
        model.backward(model(**inputs).logits.sum() * bad)
        model.step()
    assert model.skipped == 2
    assert torch.equal(weights(trainer), before)
    model.backward(model(**inputs).logits.sum())
    model.step()
    assert model.skipped == 2
    assert not torch.equal(weights(trainer), before)


def test_the_gradient_norm_is_clipped(tiny):
    """AdamW hides the gradient's scale, save for its epsilon: far below that, the step shrinks with it."""
    lengths = []
    for limit in (1.0, 1e-8):
        trainer = tiny(max_grad_norm=limit)
        before = weights(trainer)
        trainer.train_step()
        lengths.append((weights(trainer) - before).norm())
    assert 0 < lengths[1] < lengths[0] / 100


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_every_stage_logs_the_gradient_norm_before_clipping(tiny, limit):
    rows = [tiny(deepspeed=f"ds_zero{stage}.json", max_grad_norm=limit).train_step() for stage in range(4)]
    for name in ("actor/grad_norm", "critic/grad_norm"):
        norms = [row[name] for row in rows]
        assert norms[0] > 0.01
        assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def test_the_logged_rate_is_the_one_used(tiny):
    trainer = tiny(total_steps=4, num_mini_batches=2)
    assert [trainer.train_step()["lr"] for _ in range(3)] == pytest.approx([1e-3, 7.5e-4, 5e-4])


def test_the_record_holds_no_nan(tmp_path):
    log = Log(tmp_path, PPOConfig(**TINY), 2)
    log.record(0, {"eval/score": 0.5, "eval/score_se": float("nan"), "objective/scores": 1.0})
    log.record(1, {"eval/score": float("inf"), "objective/scores": float("nan")})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/score_se"] is None
    assert rows[1] == {"step": 1, "eval/score": None, "objective/scores": None}
    plot(tmp_path)
    assert (tmp_path / "curves.png").exists()
