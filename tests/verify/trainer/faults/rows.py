"""The matrix: what happens to a run, and what has to come of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lib.trainer import TINY

# Whatever a run carries from step to step takes part: optimizers, schedules, the KL weight, running statistics and the
# average of the weights. Six responses to four prompts: step 2 ends where a pass over the data does, the others do not.
SETTINGS = TINY | {
    "batch_size": 6,
    "per_device_train_batch_size": 1,
    "num_mini_batches": 3,
    "num_ppo_epochs": 2,
    "total_steps": 3,
    "save_steps": 1,
    "save_total_limit": 3,
    "kl_target": 0.5,
    "kl_horizon": 50,
    "score_scaling": "running",
    "ema_decay": 0.9,
    "local_rollout_forward_batch_size": 2,
}


@dataclass(frozen=True)
class Row:
    name: str
    event: str
    wanted: str
    check: Callable[[Path], str]  # in an empty folder; says what was seen, and fails where that is not what is wanted
    slow: bool


ROWS: dict[str, Row] = {}


def row(event: str, wanted: str, *, slow: bool = False) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    def register(check: Callable[[Path], str]) -> Callable[[Path], str]:
        ROWS[check.__name__] = Row(check.__name__, event, wanted, check, slow)
        return check

    return register
