"""What a run did not make is neither deleted nor written to, whatever its name, and stops no run."""

import importlib
import os
import shutil
from pathlib import Path

import pytest
import yaml

from python_trainer import atomic, checkpoint, files
from python_trainer.config import PPOConfig, UserError
from python_trainer.logging import Log
from python_trainer.settings import save
from tests.lib.trainer import TINY


@pytest.fixture
def train(tmp_path):
    """The folder of a run with two checkpoints and a model, each of one file."""
    folder = tmp_path / "run" / "train"
    for name in ("checkpoints/step-000001", "checkpoints/step-000002", "model"):
        commit(folder / name, name)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def commit(folder: Path, content: str = "x") -> None:
    with atomic.atomic_dir(folder) as place:
        (place / "weights").write_text(content)


def start(train: Path, *, overwrite: bool = False, done: int = 2) -> None:
    with checkpoint.lock_run_dir(train, overwrite=overwrite, done=0 if overwrite else done):
        pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def outside(tmp_path: Path) -> Path:
    """A folder of somebody else's, in which everything is named like a run's."""
    place = tmp_path / "outside"
    for name in (".tmp-precious", ".tmp-model-01234567", "step-000009"):
        (place / name).mkdir(parents=True)
        (place / name / "data").write_text("precious")
    return place


def untouched(place: Path) -> bool:
    return [path.read_text() for path in sorted(place.rglob("data"))] == ["precious"] * 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_temporary_folders_of_others_stay(train, tmp_path, overwrite, capfd):
    place = outside(tmp_path)
    for parent in (train, train / "checkpoints", train / "notes"):
        shutil.copytree(place, parent, dirs_exist_ok=True)
    (train / "data").symlink_to(place)
    (train / "checkpoints" / ".tmp-link").symlink_to(place)
    (train / ".tmp-notes").write_text("mine")
    start(train, overwrite=overwrite)
    assert all(untouched(folder) for folder in (place, train / "notes", train / "checkpoints"))
    assert (train / ".tmp-model-01234567" / "data").read_text() == "precious"
    assert (train / ".tmp-notes").read_text() == "mine"
    assert (train / "checkpoints" / ".tmp-link").is_symlink()
    (line,) = capfd.readouterr().err.splitlines()
    assert str(train / ".tmp-notes") in line
    assert str(train / "checkpoints" / ".tmp-precious") in line


def test_temporary_folders_of_a_run_go(train):
    for parent, name in ((train, "model"), (train / "checkpoints", "step-000003")):
        atomic.begin(parent / f".tmp-{name}-01234567")
        (parent / f".tmp-{name}-01234567" / "new" / "half").write_text("x")
    (train / ".tmp-ema-01234567").mkdir()  # of a run that ended before its first file
    start(train)
    assert not list(train.rglob(".tmp-*"))


@pytest.mark.parametrize("named", ["step-000001-backup", "step-000001 (copy)", "step-1", "step-latest", "step-"])
def test_copies_named_like_checkpoints_are_none(train, named, capfd):
    checkpoints = train / "checkpoints"
    shutil.copytree(checkpoints / "step-000001", checkpoints / named)
    start(train)
    assert str(checkpoints / named) in capfd.readouterr().err
    assert checkpoint.find("latest", checkpoints).name == "step-000002"
    start(train, overwrite=True)
    assert names(checkpoints) == [named]


def test_strays_where_a_checkpoint_belongs_stay(train, tmp_path):
    """A file, a link and a folder without manifest: the checkpoint goes beside `checkpoints`, and is found there."""
    checkpoints, place = train / "checkpoints", outside(tmp_path)
    (checkpoints / "step-000003").write_text("notes")
    (checkpoints / "step-000004").symlink_to(place / "step-000009")
    shutil.copytree(place / "step-000009", checkpoints / "step-000005")
    for number in (3, 4, 5):
        target = checkpoint._free_place(checkpoints, f"step-00000{number}")
        assert target.parent == train / "checkpoints-2"
        commit(target)
    assert (checkpoints / "step-000003").read_text() == "notes"
    assert (checkpoints / "step-000004").is_symlink()
    assert (checkpoints / "step-000005" / "data").read_text() == "precious"
    assert untouched(place)
    assert checkpoint.find("latest", checkpoints) == train / "checkpoints-2" / "step-000005"
    assert checkpoint.belongs(train / "checkpoints-2" / "step-000005", checkpoints)
    start(train, done=3)
    assert names(train / "checkpoints-2") == ["step-000003"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoints_behind_a_link_are_read_and_stay(train, tmp_path, overwrite):
    checkpoints, elsewhere = train / "checkpoints", tmp_path / "elsewhere"
    checkpoints.rename(elsewhere)
    checkpoints.symlink_to(elsewhere)
    for _ in range(3):
        assert checkpoint.find("latest", checkpoints).name == "step-000002"
        assert checkpoint.belongs(checkpoints / "step-000002", checkpoints)
        start(train, overwrite=overwrite, done=1)
        assert names(elsewhere) == ["step-000001", "step-000002"]
    assert checkpoints.is_symlink()
    assert checkpoint._free_place(checkpoints, "step-000003") == train / "checkpoints-2" / "step-000003"


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_stands_where_the_model_belongs_is_renamed(train, tmp_path, kind, capfd):
    model, place = train / "model", outside(tmp_path)
    shutil.rmtree(model)
    if kind == "link":
        model.symlink_to(place)
    elif kind == "file":
        model.write_text("precious")
    else:
        shutil.copytree(place, model)
    for number in range(2):
        start(train, overwrite=number == 0)
        commit(model, f"of run {number}")
        assert (model / "weights").read_text() == f"of run {number}"
    kept = train / "model.kept-1"
    assert kept.is_symlink() if kind == "link" else kept.exists()
    assert kept.read_text() == "precious" if kind == "file" else untouched(kept)
    assert untouched(place)
    assert "model.kept-1" in capfd.readouterr().err


def test_a_file_added_to_a_folder_of_the_run_outlives_it(train, tmp_path):
    place = outside(tmp_path)
    (train / "model" / "notes.txt").write_text("mine")
    (train / "checkpoints" / "step-000002" / "more").symlink_to(place)
    start(train, overwrite=True)
    assert names(train / "model.kept-1") == ["manifest.json", "notes.txt"]
    assert (train / "checkpoints" / "step-000002.kept-1" / "more").is_symlink()
    assert untouched(place)
    assert not (train / "checkpoints" / "step-000001").exists()


def test_a_manifest_names_nothing_outside(train, tmp_path):
    """What it lists is deleted inside its folder alone, and through no link."""
    place, step = outside(tmp_path), train / "checkpoints" / "step-000002"
    (step / "inner").symlink_to(place)
    text = (step / atomic.MANIFEST).read_text()
    for name in (
        "../../../../outside/step-000009/data",
        str(place / ".tmp-precious" / "data"),
        "inner/step-000009/data",
    ):
        (step / atomic.MANIFEST).write_text(text.replace('"weights"', f'"{name}"'))
        start(train, done=1)
        assert untouched(place)
        (train / "checkpoints" / "step-000002.kept-1").rename(step)


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"files": {}}'])
def test_a_folder_with_a_damaged_manifest_is_kept(train, content):
    step = train / "checkpoints" / "step-000002"
    (step / atomic.MANIFEST).write_text(content)
    start(train, done=1)
    assert names(train / "checkpoints") == ["step-000001", "step-000002.kept-1"]


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
    with checkpoint.lock_run_dir(train, overwrite=False):
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
    place = outside(tmp_path)
    (tmp_path / "train").symlink_to(place)
    with pytest.raises(UserError, match="train is a link.*output_dir"):
        start(tmp_path / "train")
    assert untouched(place)
    assert not (place / ".lock").exists()


def test_the_guard_of_a_build_behind_a_link_stays(tmp_path, monkeypatch):
    from python_trainer import deepspeed_engine

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
