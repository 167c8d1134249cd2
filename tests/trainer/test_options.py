"""Every option changes what it should."""

import json

import pytest
import torch

from python_trainer.algorithms import KlControl
from python_trainer.config import RewardConfig, SftConfig, UserError
from python_trainer.data import Example
from python_trainer.deepspeed_engine import step_together
from python_trainer.ppo_config import PPOConfig
from python_trainer.rewards import ScoreShaping
from python_trainer.settings import PRESETS, load, load_preset
from python_trainer.texts import text_logprobs
from tests.lib.trainer import TINY

from .test_step import weights


def of(trainer, name) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainer.trained[name].module.parameters()])


def test_adaptive_kl_follows_the_formula(tiny):
    control = KlControl(PPOConfig(**TINY, kl_coef=0.2, kl_target=6.0, kl_horizon=100))
    for kl, factor in ((60.0, 1.2), (0.0, 0.8), (6.6, 1.1)):
        before = control.coef
        control.update(kl, episodes=100)
        assert control.coef == pytest.approx(before * factor)
    trainer = tiny(kl_target=6.0, kl_horizon=16, kl_coef=0.1)
    first, second = trainer.train_step(), trainer.train_step()
    assert first["objective/kl_coef"] == 0.1
    assert second["objective/kl_coef"] == pytest.approx(0.08)  # no KL at all in the first rollout
    steady = tiny(kl_coef=0.1)
    assert [steady.train_step()["objective/kl_coef"] for _ in range(2)] == [0.1, 0.1]


def shaping(**settings):
    return ScoreShaping(PPOConfig(**TINY | {"task": "files"}, **settings))


def test_scores_are_scaled_and_clipped():
    scores = torch.tensor([1.0, 3.0, 5.0, 7.0])
    later = torch.tensor([9.0, -50.0])
    plain, ref, running = shaping(), shaping(score_scaling="ref"), shaping(score_scaling="running", score_clip=5.0)
    for each in (plain, ref, running):
        each.observe(scores)
        each.observe(later)
    assert plain.scaled(later).equal(later)
    torch.testing.assert_close(ref.scaled(scores), (scores - scores.mean()) / scores.std())
    deviation = torch.cat([scores, later]).std()
    torch.testing.assert_close(running.scaled(scores), scores / deviation)
    assert shaping(score_clip=5.0).scaled(later).tolist() == [5.0, -5.0]
    again = shaping(score_scaling="running", score_clip=5.0)
    again.restore(running.state())
    assert again.scaled(scores).equal(running.scaled(scores))


@pytest.mark.parametrize("scaling", ["ref", "running"])
def test_scores_that_are_all_alike_are_left_as_they_are(scaling):
    """An easy first rollout, say; what scales is the first spread there is."""
    each, alike, spread = shaping(score_scaling=scaling), torch.full((4,), 0.1), torch.tensor([1.0, 3.0, 5.0, 7.0])
    for _ in range(3):
        each.observe(alike)
        assert each.scaled(alike).equal(alike)
    each.observe(spread)
    seen = spread if scaling == "ref" else torch.cat([alike, alike, alike, spread])
    shift = spread.mean() if scaling == "ref" else 0.0
    torch.testing.assert_close(each.scaled(spread), (spread - shift) / seen.std())


def test_missing_end():
    scores, ended = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert shaping(missing_eos_penalty=1.0).penalised(scores, ended).tolist() == [2.0, 2.0]
    replaced = shaping(missing_eos_penalty=1.0, missing_eos_mode="replace").penalised(scores, ended)
    assert replaced.tolist() == [2.0, -1.0]


def test_whitened_rewards_have_unit_variance(tiny):
    trainer = tiny(whiten_rewards=True, whiten_advantages=False, lam=1.0)
    experience = trainer.collect_experience()  # on the reference, whose KL is 0, with a critic that says 0
    lengths = experience.mask.sum(dim=1).tolist()
    rewards = [[0.0] * (n - 1) + [score] for n, score in zip(lengths, experience.scores.tolist(), strict=True)]
    flat = torch.tensor([x for row in rewards for x in row], dtype=torch.float64)
    scaled = (flat - flat.mean()) / flat.std() + flat.mean()
    expected = [part.sum().item() for part in scaled.split(lengths)]
    assert experience.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert (scaled - flat).abs().max() > 0.1


def test_critic_warm_up_trains_the_critic_alone(tiny):
    trainer = tiny(critic_warmup_steps=1)
    policy, critic = of(trainer, "actor"), of(trainer, "critic")
    trainer.train_step()
    assert of(trainer, "actor").equal(policy)
    assert not of(trainer, "critic").equal(critic)
    trainer.train_step()
    assert not of(trainer, "actor").equal(policy)


def test_target_kl_ends_the_passes(tiny):
    updates = {}
    for target in (1e-6, None):
        trainer = tiny(target_kl=target, num_ppo_epochs=4)
        trainer.train_step()
        updates[target] = trainer.trained["actor"].engine.global_steps
    assert updates == {1e-6: 2, None: 4}  # the second pass is the first to see a changed policy


def test_value_loss_weight(tiny):
    still, moving = tiny(vf_coef=0.0), tiny(vf_coef=1.0)
    before = of(still, "critic")
    for trainer in (still, moving):
        trainer.train_step()
    assert of(still, "critic").equal(before)
    assert not of(moving, "critic").equal(before)


TEXTS = ["a b c d e", "a b c d", "a b c d e", "b c d e"] * 4


def test_pretraining_gradient_is_ptx_coef_times_the_mean_loss(tiny, monkeypatch):
    from python_trainer.tasks.exact import Exact

    monkeypatch.setattr(Exact, "texts", lambda _: ([Example(text) for text in TEXTS], []), raising=False)
    trainer = tiny(ptx_coef=27.8, per_device_train_batch_size=4)
    trainer.ptx.backward(trainer.actor, 0, 16)
    gradient = torch.cat([p.grad.flatten() for p in trainer.actor.module.parameters()])
    same = trainer.reference.module.requires_grad_()
    rows = trainer.ptx.rows  # 16 texts: one pass over all of them
    loss = -text_logprobs(same, rows, 0, "torch").sum() / sum(len(row.ids) - 1 for row in rows)
    expected = torch.autograd.grad(27.8 * loss, list(same.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected]), atol=1e-5, rtol=1e-4)


def test_moving_average(tiny, tmp_path):
    trainer = tiny(ema_decay=0.9, save_steps=2, total_steps=2)
    expected = of(trainer, "actor")
    for _ in range(2):  # one update each
        trainer.train_step()
        expected = 0.9 * expected + 0.1 * of(trainer, "actor")
    average = torch.cat([x.flatten().double() for x in trainer.ema.average.values()])
    torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-5)
    own = of(trainer, "actor")
    with trainer.ema.in_place_of(trainer.actor.module):
        torch.testing.assert_close(of(trainer, "actor"), expected, atol=1e-6, rtol=1e-5)
    assert of(trainer, "actor").equal(own)


def test_gradient_checkpointing_computes_layers_twice_and_the_same_step(tiny):
    calls, after = {}, {}
    for flag in (False, True):
        trainer = tiny(gradient_checkpointing=flag)
        experience = trainer.collect_experience()
        count = []
        bodies = (trainer.actor.module, trainer.trained["critic"].module.model)
        for body in bodies:
            body.base_model.h[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer.update(experience)
        calls[flag], after[flag] = len(count), weights(trainer)
    assert calls[True] == 2 * calls[False] > 0
    torch.testing.assert_close(after[True], after[False], atol=1e-7, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_one_bad_gradient_stops_both_models(tiny, name, stage):
    trainer = tiny(deepspeed=f"ds_zero{stage}.json")
    held = [getattr(p, "ds_tensor", p) for model in trainer.trained.values() for p in model.module.parameters()]
    before = [p.detach().clone() for p in held]
    ids = torch.tensor([[2, 3]])
    for each, model in trainer.trained.items():
        for bad in (1.0, float("inf"), 1.0) if each == name else (1.0,):  # not the last micro-batch alone
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            model.backward((output if each == "critic" else output.logits).sum() * bad)
    step_together(list(trainer.trained.values()))
    assert [model.skipped for model in trainer.trained.values()] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))
    for each, model in trainer.trained.items():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        model.backward((output if each == "critic" else output.logits).sum())
    step_together(list(trainer.trained.values()))
    assert [model.skipped for model in trainer.trained.values()] == [1, 1]


def test_fp16_is_refused_without_cuda():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        PPOConfig(fp16=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets(name):
    config = load("train", None, [f"--preset={name}"], PPOConfig)
    assert {key: getattr(config, key) for key in load_preset(name)["train"]} == load_preset(name)["train"]
    assert load("train", None, [f"--preset={name}", "--kl_coef=0.7"], PPOConfig).kl_coef == 0.7


def test_presets_are_the_published_recipes(tmp_path):
    ds_chat = load("train", None, ["--preset=ds_chat"], PPOConfig)
    assert (ds_chat.kl_coef, ds_chat.cliprange, ds_chat.cliprange_value, ds_chat.score_clip) == (0.1, 0.2, 0.2, 5.0)
    assert (ds_chat.gamma, ds_chat.lam, ds_chat.num_ppo_epochs, ds_chat.whiten_advantages) == (1.0, 0.95, 1, False)
    assert load("reward", None, ["--preset=ds_chat"], RewardConfig).reward_loss == "token_mean"
    instruct = load("train", None, ["--preset=instruct_gpt"], PPOConfig)
    assert (instruct.kl_coef, instruct.ptx_coef, instruct.ema_decay) == (0.02, 27.8, 0.992)
    trl = load("train", None, ["--preset=trl"], PPOConfig)
    assert (trl.kl_coef, trl.vf_coef, trl.num_ppo_epochs, trl.learning_rate) == (0.05, 0.1, 4, 3e-6)
    p3o = load("train", None, ["--preset=p3o"], PPOConfig)
    assert (p3o.algorithm, p3o.p3o_variant, p3o.weight_clip, p3o.num_generations) == ("p3o", "joint", 10.0, 2)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"preset": "ds_chat", "train": {"lam": 0.5}}))
    assert load("train", str(file), [], PPOConfig).lam == 0.5


def test_lora_trains_adapters_and_saves_a_whole_model(tiny, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft")
    trainer = tiny(lora_r=4, critic_lora_r=2, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.actor.module.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.actor.module.named_parameters() if not p.equal(before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    critic = trainer.trained["critic"].module
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert any(name.endswith("score.weight") for name in trained)
    assert all("lora_" in name or name.endswith("score.weight") for name in trained)
    again = tiny(sft_model_path=str(tmp_path / "run" / "train" / "model"), output_dir=str(tmp_path / "again"))
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(again.actor.module(ids).logits, trainer.actor.module(ids).logits)


def test_lora_names_an_unknown_module(tiny):
    pytest.importorskip("peft", reason="LoRA needs peft")
    with pytest.raises(UserError, match="lora_target_modules.*nowhere"):
        tiny(lora_r=4, lora_target_modules="nowhere")


def test_settings_of_adapters_without_adapters_are_refused():
    for settings in ({"lora_target_modules": "wte"}, {"lora_alpha": 32}, {"lora_save": "adapter"}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} .* is for LoRA adapters, and none are trained: set lora_r"):
            PPOConfig(**TINY | settings)
        with pytest.raises(ValueError, match="set lora_r, or leave"):
            SftConfig(**settings)
    PPOConfig(**TINY, critic_lora_r=2, lora_alpha=32, lora_target_modules="wte")
    with pytest.raises(ValueError, match="lora_save adapter is for LoRA adapters"):
        PPOConfig(**TINY, critic_lora_r=2, lora_save="adapter")
