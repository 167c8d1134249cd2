"""A run goes on with another ZeRO stage or another number of ranks: what is read back is what was held, to the bit."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from python_trainer import checkpoint, deepspeed_engine, distributed, zero_state
from python_trainer.config import UserError
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from tests.lib.trainer import ROOT, TINY, metric_rows

from .test_distributed import TORCHRUN

RUN = TINY | {"batch_size": 8, "num_mini_batches": 2, "save_steps": 1, "save_total_limit": 3, "ema_decay": 0.9}
CPU = {"device": "cpu"}
ALL_SPLIT = {"stage": 3, "stage3_param_persistence_threshold": 0}
LAYOUTS = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "1 of bfloat16": {"stage": 1},  # an optimizer of DeepSpeed's own, where gradients add up in float32
    "2": {"stage": 2},
    "2 offloaded": {"stage": 2, "offload_optimizer": CPU},
    "3 whole": {"stage": 3},  # parameters as small as these persist
    "3": {"stage": 3, "stage3_param_persistence_threshold": 100, "sub_group_size": 500},
    "3 offloaded": ALL_SPLIT | {"offload_optimizer": CPU, "offload_param": CPU},
}
EXACT = [  # each layout is written once and read once, in either precision
    *(("0", "2"), ("2", "3"), ("3", "1"), ("1", "2 offloaded"), ("2 offloaded", "3 whole")),
    *(("3 whole", "1 of bfloat16"), ("1 of bfloat16", "3 offloaded"), ("3 offloaded", "0")),
]

TWO_RANKS = """
import json, sys
from pathlib import Path
from python_trainer import distributed
from python_trainer.ppo_config import PPOConfig
from python_trainer.ppo import Trainer

for settings, source, target in json.loads(sys.argv[1]):
    trainer = Trainer(PPOConfig(**settings))
    trainer.load_checkpoint(Path(source))
    trainer.save_checkpoint(Path(target))
    row = trainer.train_step()
    if distributed.is_main():
        print("row", json.dumps(row))
    trainer.save_checkpoint(Path(target))
distributed.stop()
"""


@pytest.fixture(scope="session")
def layout(tmp_path_factory):
    """A DeepSpeed file for each."""
    folder = tmp_path_factory.mktemp("layouts")

    def write(name: str) -> str:
        zero = LAYOUTS[name] | {"overlap_comm": False, "reduce_bucket_size": 1000}
        path = folder / f"{name}.json"
        content = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        if name == "1 of bfloat16":
            content["data_types"] = {"grad_accum_dtype": "fp32"}
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture(scope="session")
def ran(layout, tmp_path_factory):
    """A run of three steps in a layout, with a checkpoint after each."""
    runs: dict[tuple[str, bool], Path] = {}

    def run(name: str, bf16: bool) -> Path:
        if (name, bf16) not in runs:
            folder = tmp_path_factory.mktemp("ran")
            Trainer(PPOConfig(**RUN | {"output_dir": str(folder), "deepspeed": layout(name), "bf16": bf16})).train()
            runs[name, bf16] = folder
        return runs[name, bf16]

    return run


def put_together(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, flat."""
    slices: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("*.safetensors"):
        for key, values in load_file(path).items():
            start, _, name = key.partition(":")
            slices.setdefault(f"{path.name.partition('-rank')[0]}/{name}", []).append((int(start), values))
    found = {}
    for name, parts in slices.items():
        parts.sort(key=lambda part: part[0])
        found[name] = torch.cat([values for _, values in parts])
        ends = [start + len(values) for start, values in parts]
        assert [start for start, _ in parts] == [0, *ends[:-1]], name
    return found


def same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same, whatever the number of files."""
    was, now = put_together(one), put_together(other)
    assert was.keys() == now.keys()
    assert all(was[name].dtype == now[name].dtype and was[name].equal(now[name]) for name in was)
    was, now = (json.loads((folder / checkpoint.STATE).read_text()) for folder in (one, other))
    assert was["memory"] == now["memory"]
    for name in was["models"]:
        assert was["models"][name] | {"loss_scale": None} == now["models"][name] | {"loss_scale": None}


def of_deepspeed(model: deepspeed_engine.Trainable) -> dict[str, torch.Tensor]:
    """What its own functions say that the trained parameters of a model are; without ZeRO they say nothing."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = model.engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in model.module.named_parameters():
        if model.engine.zero_optimization():
            found[f"weight/{name}"] = safe_get_full_fp32_param(parameter).flatten()
            for kind in zero_state.MOMENTS:
                found[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).flatten()
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("before", "after"), EXACT)
def test_what_is_read_is_what_was_held(ran, layout, tiny, tmp_path, monkeypatch, before, after, bf16):
    source = ran(before, bf16) / "train" / "checkpoints" / "step-000002"
    monkeypatch.setattr(checkpoint, "_refuse_changes", lambda *_: None)
    trainer = tiny(**RUN | {"seed": 7, "bf16": bf16, "deepspeed": layout(after)})  # nothing is right by chance
    memory = json.loads((source / checkpoint.STATE).read_text())["memory"]
    trainer.same = {name: memory[name] for name in trainer.same}  # another seed has another reference, too
    trainer.load_checkpoint(source)
    trainer.save_checkpoint(tmp_path / "again")
    same(source, tmp_path / "again" / "step-000002")
    held = put_together(source)
    for name, model in trainer.trained.items():
        assert all(values.equal(held[f"{name}/{key}"]) for key, values in of_deepspeed(model).items())
        with distributed.gathered_params(model.module.parameters()):
            for key, parameter in model.module.named_parameters():
                assert parameter.flatten().equal(held[f"{name}/weight/{key}"].to(parameter.dtype)), key


def alike(row: dict[str, float], wanted: dict[str, float], bf16: bool) -> None:
    tolerance = {"rel": 2e-2, "abs": 2e-3} if bf16 else {"rel": 1e-5, "abs": 1e-6}
    for name in ("loss/policy_avg", "loss/value_avg", "objective/kl", "objective/scores", "policy/approxkl_avg"):
        assert row[name] == pytest.approx(wanted[name], **tolerance), name


@pytest.mark.parametrize(
    ("before", "after", "bf16"), [("0", "2", False), ("2", "3", False), ("3", "0", False), ("2", "3", True)]
)
def test_the_run_goes_on_as_it_would_have(ran, layout, tiny, before, after, bf16):
    straight = ran(before, bf16)
    source = straight / "train" / "checkpoints" / "step-000002"
    trainer = tiny(**RUN | {"bf16": bf16, "deepspeed": layout(after), "resume_from_checkpoint": str(source)})
    alike(trainer.train_step(), metric_rows(straight)[3], bf16)


def test_from_one_rank_to_two_and_back(ran, layout, tiny, tmp_path):
    jobs, ways = [], [("0", "2", False), ("2", "3", True), ("3", "0", False)]
    for number, (before, after, bf16) in enumerate(ways):
        settings = RUN | {"bf16": bf16, "deepspeed": layout(after), "output_dir": str(tmp_path / "two")}
        source = ran(before, bf16) / "train" / "checkpoints" / "step-000002"
        jobs.append((settings, str(source), str(tmp_path / str(number))))
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    result = subprocess.run(
        [*TORCHRUN, str(script), json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line[4:]) for line in result.stdout.splitlines() if line.startswith("row ")]
    for (_, source, target), (before, _, bf16), row, back in zip(jobs, ways, rows, ("0", "1", "3"), strict=True):
        same(Path(source), Path(target) / "step-000002")
        alike(row, metric_rows(ran(before, bf16))[3], bf16)
        trainer = tiny(**RUN | {"bf16": bf16, "deepspeed": layout(back)})
        trainer.load_checkpoint(Path(target) / "step-000003")
        trainer.save_checkpoint(Path(target) / "again")
        same(Path(target) / "step-000003", Path(target) / "again" / "step-000003")


def test_frozen_weights_below_adapters(layout, tiny, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="LoRA needs peft")
    monkeypatch.setattr(checkpoint, "_refuse_changes", lambda *_: None)
    settings = RUN | {"lora_r": 2, "critic_lora_r": 2}
    kept: dict[str, str] = {}
    for number, name in enumerate(("0", "3", "2", "0")):
        trainer = tiny(**settings | {"seed": number, "deepspeed": layout(name)})
        if number:
            trainer.same = kept  # another seed has another reference, too
            trainer.load_checkpoint(tmp_path / str(number - 1) / "step-000001")
        else:
            kept = trainer.same
            trainer.train_step()
        trainer.save_checkpoint(tmp_path / str(number))
        same(tmp_path / "0" / "step-000001", tmp_path / str(number) / "step-000001")


def test_the_loss_scale_of_float16(layout, tiny, tmp_path, monkeypatch):
    """By force: float16 is for CUDA alone, but the state is what it is on any device."""
    deepspeed_engine.init_distributed(0, 60)
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(checkpoint, "_refuse_changes", lambda *_: None)
    config = PPOConfig(**RUN | {"output_dir": str(tmp_path)})
    config.fp16 = True
    wanted = {"cur_scale": 1024.0, "cur_iter": 17, "last_overflow_iter": 5}
    for number, name in enumerate(("0", "2", "3", "1", "0")):
        config.deepspeed = layout(name)
        trainer = Trainer(config)
        actor = trainer.trained["actor"]
        if number:
            trainer.load_checkpoint(tmp_path / str(number - 1) / "step-000001")
        else:
            norm = trainer.train_step()["actor/grad_norm"]
            assert norm == pytest.approx(
                tiny(**RUN).train_step()["actor/grad_norm"], rel=0.2
            )  # not that times the scale
            actor.skipped = 2
            for key, value in wanted.items():
                setattr(actor.engine.optimizer.loss_scale_config, key, value)
        trainer.save_checkpoint(tmp_path / str(number))
        same(tmp_path / "0" / "step-000001", tmp_path / str(number) / "step-000001")
        assert zero_state.describe(actor)["loss_scale"].items() >= wanted.items()
    assert (actor.engine.optimizer.loss_scale, actor.skipped) == (1024, 2)


def test_counts_of_updates_that_zero_cannot_keep_apart_are_refused(ran, layout, tiny):
    source = ran("0", False) / "train" / "checkpoints" / "step-000002"
    saved = checkpoint._content(source)["models"]["actor"]
    saved["updates"]["transformer.wpe.weight"] = 0
    zero_state.restore(tiny(**RUN).trained["actor"], source, os.listdir(source), "actor", saved)
    with pytest.raises(UserError, match="step-000002 some weights were updated more often.*stage 0"):
        zero_state.restore(
            tiny(**RUN | {"deepspeed": layout("2")}).trained["actor"], source, os.listdir(source), "actor", saved
        )
