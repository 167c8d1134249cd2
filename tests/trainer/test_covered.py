"""The cheapest of `make verify`: a kill at every step of replacing a model, and vLLM's part in a fake of it."""

import os
import signal

import pytest

from python_trainer import atomic, checkpoint
from python_trainer.rollout import HfGenerator
from tests.lib.trainer import drawn, wide
from tests.verify.trainer.test_vllm import VLLM, vllm

__all__ = ["vllm"]


def replaced(train, content: str, killed_at: int | None = None) -> int:
    """Write a model, in a fork that dies before one of its calls; how it ended."""
    child = os.fork()
    if child == 0:
        left = [killed_at]

        def watched(plain):
            def call(*arguments, **options):
                left[0] = None if left[0] is None else left[0] - 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*arguments, **options)

            return call

        try:
            for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
                setattr(os, name, watched(getattr(os, name)))
            with atomic.atomic_dir(train / "model") as place:
                (place / "weights").write_text(content)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_run_that_is_killed_while_it_replaces_a_model_leaves_one(tmp_path):
    train, found = tmp_path / "train", set()
    assert replaced(train, "0") == 0
    for at in range(1, 100):
        ended = replaced(train, str(at), at)
        with checkpoint.lock_run_dir(train, overwrite=False, done=1):
            atomic.verify(train / "model")
        assert sorted(path.name for path in train.iterdir()) == [".lock", "model"], f"killed at call {at}"
        found.add((train / "model" / "weights").read_text() == str(at))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert ended == 0
    assert at > 10
    assert found == {False, True}


@pytest.mark.parametrize("vllm", [1], indirect=True)
def test_vllm_draws_the_tokens_of_transformers(tiny, vllm):
    trainer = tiny(model_config=wide("gpt2"), **VLLM)
    for _ in range(2):
        assert drawn(trainer.generator, trainer).equal(drawn(HfGenerator(64), trainer))
        trainer.train_step()
