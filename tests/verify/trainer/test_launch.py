"""Starting up after somebody was killed."""

import os
import subprocess
import sys

from python_trainer.cache import cache_folder

START = """
from python_trainer import deepspeed_engine, distributed
deepspeed_engine.init_distributed(0, 60)
print('started', distributed.world_size())
"""


def start() -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH_EXTENSIONS_DIR", "RANK", "WORLD_SIZE")}
    return subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=240)


def test_a_build_guard_left_by_a_killed_process_blocks_nobody():
    assert start().returncode == 0  # compiles the op where nobody has yet
    libraries = list((cache_folder() / "torch_extensions").rglob("*.so"))
    assert libraries
    guards = [library.parent / "lock" for library in libraries]
    for guard in guards:
        guard.touch()
    again = start()
    left = [guard.exists() for guard in guards]
    for guard in guards:  # those of other environments
        guard.unlink(missing_ok=True)
    assert again.stdout == "started 1\n", again.stderr
    assert not all(left)
