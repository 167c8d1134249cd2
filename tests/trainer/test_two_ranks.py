"""Two ranks at ZeRO 3: the step of one, and a bad weight of one rank is one of both."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from python_trainer.models import save_model
from tests.lib.trainer import TINY, python

STEP = """
import sys, torch
from python_trainer import distributed
from python_trainer.config import UserError
from python_trainer.ppo_config import PPOConfig
from python_trainer.models import save_model
from python_trainer.ppo import Trainer

torch.use_deterministic_algorithms(True)  # memory that nobody fills is NaN then
trainer = Trainer(PPOConfig(**%r))
trainer.train_step()
save_model(trainer.actor.model, trainer.tokenizer, __import__("pathlib").Path(sys.argv[1]))
if distributed.rank() == 1:
    with torch.no_grad():
        list(trainer.actor.module.parameters())[0].ds_tensor[0] = float("nan")
try:
    trainer.trained["actor"].refuse_non_finite_weights("actor")
    print("missed", flush=True)
except UserError:
    print("refused", flush=True)
distributed.stop()
"""


def test_a_step_of_two_ranks_is_that_of_one(tiny, tmp_path):
    """The width is odd, so that parts of some weights are padded."""
    model = json.dumps({"model_type": "gpt2", "n_positions": 15, "n_embd": 15, "n_layer": 1, "n_head": 3})
    settings = {"model_config": model, "deepspeed": "ds_zero3.json"}
    alone = tiny(**settings)
    alone.train_step()
    save_model(alone.actor.model, alone.tokenizer, tmp_path / "one")
    script = tmp_path / "step.py"
    script.write_text(STEP % (TINY | settings | {"output_dir": str(tmp_path / "two_run")}))
    launcher = Path(sys.executable).parent / "torchrun"
    done = python(str(launcher), "--nproc_per_node=2", "--standalone", str(script), str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("refused") == 2, done.stdout
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=0)
