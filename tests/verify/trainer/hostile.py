"""python -m tests.verify.trainer.hostile [COUNT [SEED]]: so many hostile files of each kind, and what came of them."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from tests.lib import hostile
from tests.lib.trainer import TINY


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify.trainer.hostile", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--kinds", nargs="*", help="these alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trainer = Trainer(PPOConfig(**TINY | {"output_dir": f"{name}/run", "ema_decay": 0.9}))
        trainer.train_step()
        (place := Path(name) / "files").mkdir()
        failed = 0
        print("| file | tried | neither read nor refused in one sentence |\n|---|---:|---|", flush=True)
        for kind, reader in hostile.readers(trainer, place).items():
            if given.kinds and kind not in given.kinds:
                continue
            found = list(hostile.failures(kind, reader, given.count, given.seed))
            ends = sorted({end[:160] for end, _ in found})
            print(f"| {kind} | {given.count} | {len(found) or 'none'} {'; '.join(ends)} |", flush=True)
            failed += len(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
