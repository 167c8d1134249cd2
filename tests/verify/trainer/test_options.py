"""Options whose effect shows after some steps."""

import pytest
import torch
from safetensors.torch import load_file

from python_trainer.data import Example
from python_trainer.sft import text_logprobs
from python_trainer.tokens import Tokens


def test_entropy_bonus_keeps_the_policy_wide(tiny):
    rows = {}
    for bonus in (0.0, 0.5):
        trainer = tiny(entropy_coef=bonus, learning_rate=1e-2, num_ppo_epochs=4, total_steps=5)
        rows[bonus] = [trainer.train_step() for _ in range(5)][-1]
    assert rows[0.5]["policy/entropy_avg"] > rows[0.0]["policy/entropy_avg"] + 0.05


TEXTS = ["a b c d e", "a b c d", "a b c d e", "b c d e"] * 4


def test_pretraining_mix_keeps_texts_likely(tiny, monkeypatch):
    from python_trainer.tasks.exact import Exact

    monkeypatch.setattr(Exact, "texts", lambda _: ([Example(text) for text in TEXTS], []), raising=False)
    found, first = {}, {}
    for coef in (0.0, 1.0):
        trainer = tiny(ptx_coef=coef, learning_rate=1e-2, num_ppo_epochs=4)
        ids = [trainer.tokenizer(text)["input_ids"] for text in TEXTS[:4]]
        rows = [Tokens(row, [True] * len(row)) for row in ids]
        first[coef] = trainer.train_step()
        trainer.train_step(), trainer.train_step()
        with torch.no_grad():
            found[coef] = text_logprobs(trainer.trained["actor"], rows, 0, "auto").sum().item()
    assert found[1.0] > found[0.0] + 1
    assert 1 < first[1.0]["loss/ptx_avg"] < 3  # about log 7
    assert "loss/ptx_avg" not in first[0.0]


@pytest.mark.parametrize("stage", [0, 3])
def test_moving_average_is_saved_and_resumed(tiny, tmp_path, stage):
    settings = {
        "deepspeed": f"ds_zero{stage}.json",
        "ema_decay": 0.9,
        "save_steps": 1,
        "kl_target": 1.0,
        "score_scaling": "none",
    }
    tiny(**settings, total_steps=2).train()
    saved = load_file(tmp_path / "run" / "train" / "ema" / "model.safetensors")
    final = load_file(tmp_path / "run" / "train" / "model" / "model.safetensors")
    assert any(not saved[name].equal(final[name]) for name in saved)
    first = str(tmp_path / "run" / "train" / "checkpoints" / "step-000001")
    resumed = tiny(**settings, total_steps=2, resume_from_checkpoint=first)
    assert resumed.kl.coef != resumed.config.kl_coef
    resumed.train()
    again = load_file(tmp_path / "run" / "train" / "ema" / "model.safetensors")
    assert all(saved[name].equal(again[name]) for name in saved)
