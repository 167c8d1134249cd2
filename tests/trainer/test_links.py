"""Files of a run are not written through what stands in their place."""

import importlib
import os
from pathlib import Path

import pytest
import yaml

from python_trainer import checkpoint, deepspeed_engine, files, frontier, logging
from python_trainer.compare import beside_reference
from python_trainer.config import EvalConfig, UserError
from python_trainer.logging import Log
from python_trainer.ppo_config import FrontierConfig, PPOConfig
from python_trainer.settings import save
from tests.lib.trainer import TINY


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl"])
def test_files_of_a_run_are_not_written_through_what_stands_there(tmp_path, kind, name):
    train, victim = tmp_path / "train", tmp_path / "victim"
    train.mkdir()
    victim.write_text("precious")
    if kind == "pipe":
        os.mkfifo(train / name)
    elif kind == "folder":
        (train / name).mkdir()
    else:
        (train / name).symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    config = PPOConfig(**TINY | {"output_dir": str(tmp_path)})
    with checkpoint.lock_run_dir(train, overwrite=True):
        save(config, train)
        log = Log(train, config, 1)
        log.record(0, {"x": 1.0})
        log.close()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert yaml.safe_load((train / "config.yaml").read_text())["output_dir"] == str(tmp_path)
    assert (train / "metrics.jsonl").read_text() == '{"step": 0, "x": 1.0}\n'
    assert os.path.lexists(train / f"{name}.kept-1")
    assert not (train / ".lock").is_symlink()


def test_a_lock_file_keeps_its_content(tmp_path):
    """It may be another name of a file that is somebody's."""
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", tmp_path / ".lock")
    with files.locked(tmp_path / ".lock", wait=False) as first, files.locked(tmp_path / ".lock", wait=False) as second:
        assert (first, second) == (True, False)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_of_results_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "train").symlink_to(tmp_path / "outside")
    with (
        pytest.raises(UserError, match="train is a link.*output_dir"),
        checkpoint.lock_run_dir(tmp_path / "train", overwrite=True),
    ):
        pass
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["curves.png", "metrics.json", "frontier.csv", "frontier.png"])
def test_results_are_not_written_through_what_stands_there(tmp_path, kind, name):
    victim = stray(tmp_path, name, kind)
    if name == "curves.png":
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "objective/scores": 1.0}\n')
        logging.plot(tmp_path)
    elif name == "metrics.json":
        files.write(tmp_path / name, "{}")
    else:
        logging.write_table(tmp_path / "frontier.csv", [frontier.Point("ppo", 0.1, 1, 0.5, 0.5, None)])
        frontier.draw(tmp_path / "frontier.csv", tmp_path / "frontier.png")
    assert victim.read_text() == "precious"
    assert files.is_plain(tmp_path / name)
    assert os.path.lexists(tmp_path / f"{name}.kept-1")


def stray(folder: Path, name: str, kind: str) -> Path:
    """A link to a file, or a pipe; returns the file."""
    victim = folder / "victim"
    victim.write_text("precious")
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(victim)
    return victim


@pytest.mark.parametrize("name", ["frontier", "frontier/ppo-0.1"])
def test_a_frontier_behind_a_link_is_refused_before_its_first_run(tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "outside")
    study = FrontierConfig(**TINY | {"output_dir": str(tmp_path)}, algorithms="ppo", kl_coefs="0.1")
    trained = []
    with pytest.raises(UserError, match=f"{name} is a link"):
        frontier.frontier(study, trained.append)
    assert not trained
    assert not list((tmp_path / "outside").iterdir())


def test_an_evaluation_behind_a_link_is_refused_before_anything_loads(tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "train" / "model").mkdir(parents=True)
    (tmp_path / "eval").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="eval is a link"):
        beside_reference(EvalConfig(output_dir=str(tmp_path)))
    assert not list((tmp_path / "outside").iterdir())


def test_the_guard_of_a_build_behind_a_link_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what the function sets is taken back
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    deepspeed_engine._compile_cpu_communication()
    (folder,) = (tmp_path / "cache" / "torch_extensions").iterdir()
    for place in (tmp_path / "outside", folder / "op"):
        place.mkdir()
        (place / "lock").write_text("")
    (folder / "linked").symlink_to(tmp_path / "outside")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    deepspeed_engine._compile_cpu_communication()
    assert (tmp_path / "outside" / "lock").exists()
    assert not (folder / "op" / "lock").exists()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_lock_of_a_build_is_not_taken_through_what_stands_there(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    deepspeed_engine._compile_cpu_communication()
    (folder,) = (tmp_path / "cache" / "torch_extensions").iterdir()
    (folder / ".building").unlink()
    victim = stray(folder, ".building", kind)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    deepspeed_engine._compile_cpu_communication()
    assert victim.read_text() == "precious"
    assert files.is_plain(folder / ".building")
