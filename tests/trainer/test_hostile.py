"""A few hostile files of each kind; ``make verify PART=hostile ARGS=5000`` makes as many as are asked for."""

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
