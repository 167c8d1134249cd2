"""A few hostile files of each kind; ``make verify PART=hostile ARGS=5000`` makes as many as are asked for."""

import pytest

from python_trainer.config import UserError
from python_trainer.ppo_config import PPOConfig
from python_trainer.tasks.files import Files
from tests.lib import hostile


def test_hostile_files_are_read_or_refused_in_one_sentence(tiny, tmp_path):
    trainer = tiny(ema_decay=0.9)
    trainer.train_step()
    (tmp_path / "files").mkdir()
    readers = hostile.readers(trainer, tmp_path / "files")
    found = {kind: [end for end, _ in hostile.failures(kind, reader, 8)] for kind, reader in readers.items()}
    assert not {kind: ends for kind, ends in found.items() if ends}


def test_a_reader_that_fails_is_found(tmp_path):
    """Otherwise the table could show nothing."""

    def read() -> None:
        raise KeyError("x")

    assert hostile.attempt(read) == "KeyError: 'x'"
    assert hostile.attempt(lambda: None) is None


def test_a_number_beyond_all_others_is_no_margin(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b", "margin": 1' + "0" * 400 + "}\n")
    with pytest.raises(UserError, match="margin must be a finite number"):
        Files(str(tmp_path)).pairs()


@pytest.mark.parametrize("settings", [{"seed": 1 << 32}, {"output_dir": "a\0b"}, {"reward_weights": "1"}])
def test_settings_that_cannot_be_are_a_persons_to_change(settings):
    """Also where they come from Python and not from a file."""
    with pytest.raises(UserError):
        PPOConfig(**settings)
