"""Nothing that is not finite is kept, and what does nothing is counted."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from python_trainer import checkpoint
from python_trainer import sft as sft_module
from python_trainer.config import SftConfig, UserError
from python_trainer.deepspeed_engine import all_finite, init_distributed, step_together, weights_here
from python_trainer.models import save_model
from python_trainer.sft import sft
from tests.lib.trainer import TINY


def parts(trainer) -> list[torch.Tensor]:
    return [getattr(p, "ds_tensor", p) for model in trainer.trained.values() for p in model.module.parameters()]


def backward(trainer, name: str, factor: float) -> None:
    model, ids = trainer.trained[name], torch.tensor([[2, 3]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.backward((output if name == "critic" else output.logits).sum() * factor)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("half", [False, True])
def test_an_update_is_skipped_and_counted_or_moves_the_weights(tiny, stage, half):
    """Every gradient is finite, and their squares are not: clipping by such a norm leaves nothing of them.

    At stage 3 the norm is found in float64, and the update is a good one.
    """
    trainer = tiny(deepspeed=f"ds_zero{stage}.json", bf16=half)
    actor, start = trainer.trained["actor"], [part.detach().clone() for part in parts(trainer)]
    for count in (1, 2):
        backward(trainer, "actor", 1e30)
        assert actor.healthy
        step_together([actor])
        assert actor.skipped == (0 if stage == 3 else count)
        assert math.isfinite(actor.gradient_norm) == (stage == 3)
    assert moved(trainer, start) == (stage == 3)
    backward(trainer, "actor", 1.0)
    step_together([actor])
    assert actor.skipped == (0 if stage == 3 else 2)
    assert moved(trainer, start)


def moved(trainer, start: list[torch.Tensor]) -> bool:
    return not all(torch.equal(old, new) for old, new in zip(start, parts(trainer), strict=True))


def test_updates_by_such_norms_end_the_run(tiny, tmp_path):
    trainer = tiny(total_steps=9, max_skipped_steps=2, save_steps=5)
    trainer.config.entropy_coef = 1e37
    with pytest.raises(UserError, match=r"2 updates had a non-finite .*norm.*step 2"):
        trainer.train()
    assert not (tmp_path / "run" / "train" / "model").exists()


@pytest.mark.parametrize("settings", [{"deepspeed": f"ds_zero{stage}.json"} for stage in (0, 3)])
@pytest.mark.parametrize("save_steps", [0, 1])
def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, settings, save_steps):
    """An epsilon that is 0 in float32 divides 0 by 0: no gradient is at fault."""
    with pytest.raises(UserError, match=r"weights of the (actor|critic) are not finite.*adam_epsilon"):
        tiny(**settings, total_steps=1, adam_epsilon=1e-300, save_steps=save_steps, kl_coef=0.1).train()
    train = tmp_path / "run" / "train"
    assert not (train / "model").exists()
    assert not list(train.glob("checkpoints/step-*"))


def test_one_bad_weight_of_any_model_is_noticed(tiny):
    for name in ("actor", "critic"):
        for bad in (float("nan"), float("-inf")):
            trainer = tiny()
            with torch.no_grad():
                list(trainer.trained[name].module.parameters())[-1].view(-1)[-1] = bad
            with pytest.raises(UserError, match=f"weights of the {name} are not finite"):
                trainer.trained[name].refuse_non_finite_weights(name)
            for model in trainer.trained.keys() - {name}:
                trainer.trained[model].refuse_non_finite_weights(model)


def test_imitation_saves_no_such_model_either(tmp_path, ratings):
    small = {"model_config": TINY["model_config"].replace('"n_positions": 16', '"n_positions": 48'), "batch_size": 16}
    config = SftConfig(
        task="reviews",
        data_path=str(ratings),
        output_dir=str(tmp_path),
        max_steps=1,
        adam_epsilon=1e-300,
        disable_tqdm=True,
        **small,
    )
    with pytest.raises(UserError, match="weights of the model are not finite"):
        sft(config)
    assert not (tmp_path / "sft" / "model").exists()


@pytest.mark.filterwarnings("error:No artists")
def test_a_perplexity_beyond_all_numbers_loses_no_model(tmp_path, ratings, monkeypatch):
    plain = sft_module.text_logprobs
    monkeypatch.setattr(
        sft_module, "text_logprobs", lambda *given: plain(*given) * (1 if torch.is_grad_enabled() else 1e4)
    )
    model = TINY["model_config"].replace('"n_positions": 16', '"n_positions": 48')
    common = {"task": "reviews", "data_path": str(ratings), "output_dir": str(tmp_path), "disable_tqdm": True}
    assert sft(SftConfig(**common, model_config=model, batch_size=16, max_steps=1)) == {"eval/perplexity": math.inf}
    assert (tmp_path / "sft" / "model").is_dir()
    assert '"eval/perplexity": null' in (tmp_path / "sft" / "metrics.jsonl").read_text()


def test_the_average_is_checked_too(tiny, tmp_path):
    trainer = tiny(ema_decay=0.9, total_steps=1, save_steps=1)
    next(iter(trainer.ema.average.values())).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="the ema's weights or moments are not finite"):
        trainer.save_checkpoint(trainer.folder / "checkpoints")
    trainer.config.save_steps = 0
    with pytest.raises(UserError, match="weights are not finite, and no model is saved in .*train"):
        trainer.train()
    assert not (tmp_path / "run" / "train" / "ema").exists()
    assert not list((tmp_path / "run" / "train").glob("checkpoints/*"))


@pytest.mark.parametrize("owner", ["actor", "actor's moments", "ema"])
def test_a_checkpoint_with_such_weights_is_refused(tiny, tmp_path, monkeypatch, owner):
    """And with such moments of the optimizer: the next update would spoil the weights, or never move them."""
    trainer = tiny(ema_decay=0.9, total_steps=1, save_steps=1)
    trainer.train_step()
    values = trainer._average()[0].values if owner == "ema" else next(trainer.actor.module.parameters())
    if owner == "actor's moments":
        values = next(iter(trainer.trained["actor"].engine.basic_optimizer.state.values()))["exp_avg_sq"]
    with torch.no_grad():
        values.view(-1)[-1] = float("inf")
    name = owner.partition("'")[0]
    with pytest.raises(UserError, match=f"the {name}'s weights or moments are not finite: nothing is saved"):
        trainer.save_checkpoint(trainer.folder / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "all_finite", lambda _: True)
        trainer.save_checkpoint(trainer.folder / "checkpoints")
    with pytest.raises(UserError, match=f"step-000001 holds weights or moments of the {name} that are not finite"):
        tiny(ema_decay=0.9, total_steps=1, resume_from_checkpoint="latest")
    assert not (tmp_path / "run" / "train" / "model").exists()


def test_weights_that_a_half_precision_does_not_hold_are_not_saved_in_it(tiny, tmp_path):
    """They are trained in float32, and would become infinite in the file."""
    trainer = tiny(torch_dtype="float16", total_steps=1, save_steps=0)
    with torch.no_grad():
        trainer.actor.module.transformer.wpe.weight[-1, -1] = 1e5  # of a position that no text has
    with pytest.raises(UserError, match="transformer.wpe.weight has grown beyond torch.float16.* torch_dtype"):
        trainer.train()
    assert not (tmp_path / "run" / "train" / "model").exists()


def test_a_model_that_starts_so_is_refused(tiny, tmp_path):
    trainer = tiny()
    save_model(trainer.actor.module, trainer.tokenizer, tmp_path / "start")
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["transformer.wpe.weight"][-1, -1] = float("nan")
    save_file(weights, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="start: the weights transformer.wpe.weight are not finite"):
        tiny(sft_model_path=str(tmp_path / "start"))


def test_the_padding_of_a_part_may_be_anything():
    """At ZeRO 3 the parts are equal, and what the last has too much is never filled."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_numel = 0, 3
    parameter.ds_process_group = None
    parameter.ds_tensor = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    module = torch.nn.Module()
    module.weight = parameter
    init_distributed(0, 60)
    assert all_finite(weights_here(module))
    parameter.ds_tensor[1] = float("nan")
    assert not all_finite(weights_here(module))
