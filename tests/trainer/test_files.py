"""What a run did not make is neither deleted nor written to, whatever its name, and stops no run."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from python_trainer import atomic, checkpoint, files
from python_trainer.config import UserError
from python_trainer.models import undamaged
from python_trainer.ppo_config import PPOConfig
from tests.lib.trainer import TINY, as_nobody


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
        target = checkpoint.free_place(checkpoints, f"step-00000{number}")
        assert target.parent == train / "checkpoints-2"
        commit(target)
    assert (checkpoints / "step-000003").read_text() == "notes"
    assert (checkpoints / "step-000004").is_symlink()
    assert (checkpoints / "step-000005" / "data").read_text() == "precious"
    assert untouched(place)
    assert checkpoint.find("latest", checkpoints) == train / "checkpoints-2" / "step-000005"
    assert checkpoint.belongs(train / "checkpoints-2" / "step-000005", checkpoints)
    start(train, done=3)
    assert names(train / "checkpoints-2") == [checkpoint.PLACE, "step-000003"]
    start(train, overwrite=True)
    assert not (train / "checkpoints-2").exists()


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
    assert checkpoint.free_place(checkpoints, "step-000003") == train / "checkpoints-2" / "step-000003"


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
    assert (train / "model.kept-1").exists()
    assert names(train / "model.kept-1") == ["manifest.json", "notes.txt"]
    assert (train / "checkpoints" / "step-000002.kept-1" / "more").is_symlink()
    assert untouched(place)
    assert not (train / "checkpoints" / "step-000001").exists()


def test_a_manifest_names_nothing_outside(train, tmp_path):
    """What it lists is neither read nor deleted elsewhere, and no link is followed to it."""
    place, step = outside(tmp_path), train / "checkpoints" / "step-000002"
    (step / "inner").symlink_to(place)
    text = (step / atomic.MANIFEST).read_text()
    for name in (
        "../../../../outside/step-000009/data",
        str(place / ".tmp-precious" / "data"),
        "inner/../weights",
        "./weights",
        "weights/",
        "manifest.json",
        "\\u0000",
        "\\ud800",
        "a" * 300,
        "",
        ".",
    ):
        (step / atomic.MANIFEST).write_text(text.replace('"weights"', f'"{name}"'))
        with pytest.raises(UserError, match=r"manifest.json is damaged: it lists .* no file of this folder"):
            atomic.verify(step)
        start(train, done=1)
        assert names(step) == ["inner", atomic.MANIFEST, "weights"]
    (place / "weights").write_text((step / "weights").read_text())
    (step / atomic.MANIFEST).write_text(text.replace('"weights"', '"inner/weights"'))
    with pytest.raises(UserError, match="inner/weights is missing"):
        atomic.verify(step)
    start(train, done=1)
    assert untouched(place)
    assert (place / "weights").exists()


def test_a_listed_file_that_is_a_link_is_none(train):
    step = train / "checkpoints" / "step-000002"
    (step / "weights").rename(step / "kept")
    (step / "weights").symlink_to(step / "kept")
    with pytest.raises(UserError, match="weights is missing"):
        atomic.verify(step)


@pytest.mark.parametrize(
    "content",
    ["{}", "not JSON", '{"files": {}}', '{"files": ["weights"]}', '{"files": {"weights": {"bytes": 23, "sha256": 1}}}'],
)
def test_a_folder_with_another_manifest_stays(train, content, capfd):
    step = train / "checkpoints" / "step-000002"
    (step / atomic.MANIFEST).write_text(content)
    start(train, done=1)
    assert names(step) == [atomic.MANIFEST, "weights"]
    assert f"{step} (a folder)" in capfd.readouterr().err
    assert checkpoint.free_place(train / "checkpoints", "step-000002").parent == train / "checkpoints-2"


def test_a_model_folder_with_a_manifest_of_somebody_stays(train):
    model = train / "model"
    (model / "data.bin").write_text("precious")
    (model / atomic.MANIFEST).write_text('{"files": ["data.bin"]}')
    start(train, overwrite=True)
    assert (model / "data.bin").exists()
    commit(model)
    assert (train / "model.kept-1" / "data.bin").read_text() == "precious"
    assert (model / "weights").read_text() == "x"


def test_a_listed_file_of_another_size_stays(train):
    (train / "model" / "weights").write_text("mine, and longer than what the run wrote")
    start(train, overwrite=True)
    assert (train / "model.kept-1").exists()
    assert names(train / "model.kept-1") == [atomic.MANIFEST, "weights"]


def test_a_link_to_a_folder_of_a_run_is_none(train, tmp_path):
    commit(tmp_path / "elsewhere")
    (train / "ema").symlink_to(tmp_path / "elsewhere")
    start(train, overwrite=True)
    assert (train / "ema").is_symlink()


@pytest.mark.parametrize("copy", ["checkpoints-20261128", "checkpoints-2", "checkpoints-3"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_backup_of_the_checkpoints_stays(train, copy, overwrite):
    """Whether it is one of `checkpoints` or of a folder beside it; neither do its steps count."""
    checkpoints, place = train / "checkpoints", outside(train.parent)
    (checkpoints / "step-000003").symlink_to(place)
    source = checkpoints
    if copy == "checkpoints-3":
        commit(checkpoint.free_place(checkpoints, "step-000003"))
        source = train / "checkpoints-2"
    shutil.copytree(source, train / copy, symlinks=True)
    if copy != "checkpoints-3":
        commit(train / copy / "step-000009")
    before = sorted(train.glob(f"{copy}/**/*"))
    newest = "step-000003" if copy == "checkpoints-3" else "step-000002"
    assert before
    assert checkpoint.find("latest", checkpoints).name == newest
    assert not checkpoint.belongs(train / copy / newest, checkpoints)
    config = PPOConfig(**TINY | {"output_dir": str(train.parent), "save_total_limit": 1})
    checkpoint.save(checkpoints, 4, {}, config, {})
    start(train, overwrite=overwrite, done=1)
    assert sorted(train.glob(f"{copy}/**/*")) == before
    target = checkpoint.free_place(checkpoints, "step-000003")
    assert target.parent != train / copy


def test_a_copy_under_another_number_is_no_checkpoint(train, capfd):
    config, checkpoints = PPOConfig(**TINY | {"output_dir": str(train.parent)}), train / "checkpoints"
    checkpoint.save(checkpoints, 4, {}, config, {})
    shutil.copytree(checkpoints / "step-000004", checkpoints / "step-200004")
    assert checkpoint.find("latest", checkpoints).name == "step-000004"
    start(train, done=4)
    assert str(checkpoints / "step-200004") in capfd.readouterr().err
    start(train, overwrite=True)
    assert names(checkpoints) == ["step-200004"]
    assert checkpoint.free_place(checkpoints, "step-200004").parent == train / "checkpoints-2"


def test_an_earlier_run_is_refused_whatever_is_left_of_it(train, tmp_path):
    """A record that was moved and linked is one too."""
    (train / "metrics.jsonl").rename(tmp_path / "record")
    (train / "metrics.jsonl").symlink_to(tmp_path / "record")
    refused(train)
    (train / "model").rename(tmp_path / "model")
    shutil.move(train / "checkpoints", tmp_path / "checkpoints")
    refused(train)
    (train / "metrics.jsonl").unlink()
    start(train, done=0)
    for name in ("model", "checkpoints"):
        shutil.move(tmp_path / name, train / name)
        refused(train)
        shutil.move(train / name, tmp_path / name)
    (train / "checkpoints").symlink_to(tmp_path / "checkpoints")
    refused(train)


def refused(train: Path) -> None:
    with pytest.raises(UserError, match="holds an earlier run"):
        start(train, done=0)


@pytest.mark.parametrize("name", [atomic.MANIFEST, checkpoint.STATE])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(train, name):
    step = train / "checkpoints" / "step-000002"
    (step / name).unlink(missing_ok=True)
    os.mkfifo(step / name)
    start(train, done=1)
    with pytest.raises(UserError, match="is not complete"):
        atomic.verify(step if step.exists() else step.with_name("step-000002.kept-1") / "none")
    os.mkfifo(train / "pipe")
    undamaged(train)


@pytest.fixture
def open_folder():
    """One that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_strays_that_cannot_be_read_block_no_start_and_end_no_run(open_folder):
    train = open_folder / "train"

    def work() -> list[str]:
        for name in ("checkpoints/step-000001", "checkpoints/step-000002"):
            commit(train / name)
        for stray in (train / ".tmp-model-01234567", train / "checkpoints" / "step-000003"):
            stray.mkdir()
            (stray / "data").write_text("")
            stray.chmod(0)
        config = PPOConfig(**TINY | {"output_dir": str(open_folder), "save_total_limit": 1})
        try:
            start(train)
            checkpoint.save(train / "checkpoints", 4, {}, config, {})
            return [path.name for path in checkpoint._steps(train / "checkpoints")]
        finally:
            for stray in (train / ".tmp-model-01234567", train / "checkpoints" / "step-000003"):
                stray.chmod(0o700)

    assert as_nobody(work) == "['step-000004']"


def test_a_checkpoint_that_cannot_be_removed_stays_and_is_named_once(open_folder, capfd):
    train = open_folder / "train"

    def work() -> list[str]:
        step = train / "checkpoints" / "step-000001"
        commit(step)
        step.chmod(0o555)
        try:
            for _ in range(2):
                atomic.discard(step)
            start(train, overwrite=True)
            return names(train / "checkpoints")
        finally:
            step.chmod(0o755)

    assert as_nobody(work) == "['step-000001']"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "could not be removed" in line]
    assert "step-000001 could not be removed (Permission denied)" in line


def test_a_crash_at_the_end_of_a_removal_leaves_nothing(train):
    work = train / ".tmp-model-01234567"
    atomic.begin(work)
    (work / atomic.OLD).mkdir()
    start(train)
    assert not list(train.glob("*.kept-*"))
    assert not work.exists()


def test_what_the_disk_refuses_at_the_start_is_one_line(train, monkeypatch):
    def fails(*_, **__):
        raise PermissionError(13, "Permission denied", "somewhere")

    for place, name in ((files, "locked"), (checkpoint, "_sweep")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with pytest.raises(UserError, match="somewhere: Permission denied; .*output_dir"):
                start(train)


def test_a_stump_of_an_earlier_version_is_named_as_such(train, capfd):
    (train / ".tmp-old-model").mkdir()
    (train / ".tmp-old-model" / "weights").write_text("the only copy")
    start(train, overwrite=True)
    line = capfd.readouterr().err
    assert "earlier version: where model is missing beside it, rename it to model" in line
    assert (train / ".tmp-old-model" / "weights").exists()
