"""One process or two, by any launcher: the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from python_trainer.config import SftConfig
from python_trainer.data import Example
from python_trainer.sft import sft
from python_trainer.tasks.exact import Exact
from tests.lib.trainer import ROOT, TINY, as_options, command, free_port, metric_rows

BIN = Path(sys.executable).parent
TORCHRUN = (str(BIN / "torchrun"), "--nproc_per_node=2", "--standalone")  # at a port that is free

ONE_RANK_FAILS = """
import os
import torch
from python_trainer import atomic, checkpoint, distributed
from python_trainer.config import SftConfig, UserError
from python_trainer.data import Example
from python_trainer.ppo_config import PPOConfig
from python_trainer.deepspeed_engine import step_together
from python_trainer.ppo import Trainer
from python_trainer.sft import sft
from python_trainer.tasks.exact import Exact

Exact.texts = lambda self: %r

trainer = Trainer(PPOConfig(**%r))
plain = trainer.reward_fn
if distributed.rank() == 1:
    trainer.reward_fn = lambda rollout: plain(rollout) * float("nan")
try:
    trainer.train_step()
except UserError as error:
    print(f"rank {distributed.rank()}: {error}", flush=True)
trainer.reward_fn = plain
experience = trainer.collect_experience()
if distributed.rank() == 1:
    with torch.no_grad():
        next(trainer.actor.module.parameters()).mul_(1.1)
try:
    trainer.update(experience)
except RuntimeError as error:
    print(f"rank {distributed.rank()}: {error}", flush=True)

trainer = Trainer(PPOConfig(**%r))
models = trainer.trained
before = [p.detach().clone() for model in models.values() for p in model.module.parameters()]
ids = torch.tensor([[2, 3]])
models["actor"].backward(models["actor"](input_ids=ids).logits.sum())
bad = float("inf") if distributed.rank() == 1 else 1.0
models["critic"].backward(models["critic"](input_ids=ids).sum() * bad)
step_together(list(models.values()))
after = [p for model in models.values() for p in model.module.parameters()]
same = all(torch.equal(a, b) for a, b in zip(before, after))
skipped = [model.skipped for model in models.values()]
print(f"rank {distributed.rank()}: skipped {skipped}, unchanged {same}", flush=True)

sft(SftConfig(**%r))

folder, plain, read = trainer.folder / "checkpoints", atomic._sha256, []
atomic._sha256 = lambda path: read.append(path.name) or plain(path)
for work in (lambda: checkpoint.save(folder, 1, models, trainer.config, {}), lambda: atomic.verify(written)):
    work()
    written = folder / "step-000001"
    shares = distributed.gather_objects(read[:])
    whole = sorted(path.name for path in written.iterdir() if path.name != atomic.MANIFEST)
    print(f"rank {distributed.rank()}: shares {sorted(sum(shares, [])) == whole and all(shares)}", flush=True)
    read.clear()

try:
    with atomic.atomic_dir(folder / "half"):
        if distributed.rank() == 1:
            raise ValueError("alone")
except (RuntimeError, ValueError) as error:
    places = [*folder.glob(".tmp-half-*")]
    print(f"rank {distributed.rank()}: {type(error).__name__}, place there {bool(places)}", flush=True)
os._exit(0)
"""


def launched(by: str) -> tuple[str, ...]:
    """What stands before the name of a module that two ranks are to run."""
    if by == "torchrun":
        return *TORCHRUN, "-m"
    return str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "--module"


@pytest.mark.parametrize(
    ("launcher", "stage", "algorithm"), [("torchrun", 0, "p3o"), ("deepspeed", 2, "ppo"), ("torchrun", 3, "ppo")]
)
def test_two_processes_make_the_step_of_one(tiny, tmp_path, launcher, stage, algorithm):
    """Two micro-batches in one process, or one in each of two: three updates, the same weights."""
    settings = TINY | {"deepspeed": f"ds_zero{stage}.json", "algorithm": algorithm}
    tiny(**settings).train()
    two = tmp_path / "two"
    result = command("train", *as_options(settings | {"output_dir": two}), launcher=launched(launcher))
    assert result.returncode == 0, result.stderr[-2000:]
    here, there = (load_file(run / "train" / "model" / "model.safetensors") for run in (tmp_path / "run", two))
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], atol=1e-6, rtol=0)
    one, other = (metric_rows(run)[1]["actor/grad_norm"] for run in (tmp_path / "run", two))
    assert one == pytest.approx(other, rel=1e-4)
    assert one > 0


def test_plain_python(tmp_path):
    result = command("train", *as_options(TINY | {"output_dir": tmp_path, "total_steps": 1}))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "objective/kl" in result.stdout


def test_what_one_rank_finds_stops_all(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    texts = [Example(text) for text in ("a b c d e", "a", "b b", "c d d")], [Example("a b")]
    # Two passes: the forward pass of the only update would be that which scored the responses.
    settings = TINY | {"output_dir": str(tmp_path / "run"), "num_ppo_epochs": 2}
    imitation = {name: TINY[name] for name in ("task", "model_config", "disable_tqdm")} | {"batch_size": 4}
    imitation |= {"max_steps": 1, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "run")}
    script.write_text(ONE_RANK_FAILS % (texts, settings, settings, imitation))
    result = subprocess.run(
        [*TORCHRUN, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(2):
        assert f"rank {rank}: the score of 8 of 16 responses is not finite" in result.stdout
        assert f"rank {rank}: before the first update of step 1 the log-ratio is off" in result.stdout
        assert f"rank {rank}: skipped [1, 1], unchanged True" in result.stdout
        assert result.stdout.count(f"rank {rank}: shares True") == 2
    monkeypatch.setattr(Exact, "texts", lambda _: texts)
    sft(SftConfig(**imitation | {"output_dir": str(tmp_path / "alone")}))
    records = [(tmp_path / run / "sft" / "metrics.jsonl").read_text().splitlines()[0] for run in ("run", "alone")]
    together, alone = (json.loads(record)["loss"] for record in records)
    assert together == pytest.approx(alone, rel=1e-6)
    assert "rank 1: ValueError, place there True" in result.stdout  # the first may still be at work there
    assert "rank 0: RuntimeError, place there False" in result.stdout
