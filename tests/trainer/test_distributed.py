"""One process or two, by any launcher: the same weights."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import TINY, as_options, command

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": (str(BIN / "torchrun"), "--nproc_per_node=2", "--master_port=29641", "-m"),
    "deepspeed": (str(BIN / "deepspeed"), "--num_gpus=2", "--master_port=29642", "--module"),
}


@pytest.mark.parametrize(("launcher", "stage"), [("torchrun", 0), ("deepspeed", 2), ("torchrun", 3)])
def test_two_processes_make_the_step_of_one(tiny, tmp_path, launcher, stage):
    """Two micro-batches in one process, or one in each of two: three updates, the same weights."""
    settings = TINY | {"deepspeed": f"ds_zero{stage}.json"}
    tiny(**settings).train()
    two = tmp_path / "two"
    result = command("train", *as_options(settings | {"output_dir": two}), launcher=LAUNCHERS[launcher])
    assert result.returncode == 0, result.stderr[-2000:]
    here, there = (load_file(run / "train" / "model" / "model.safetensors") for run in (tmp_path / "run", two))
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], atol=1e-6, rtol=0)


def test_plain_python(tmp_path):
    result = command("train", *as_options(TINY | {"output_dir": tmp_path, "total_steps": 1}))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "objective/kl" in result.stdout
