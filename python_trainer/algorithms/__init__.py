"""One algorithm per file: what it needs, how it credits responses, and its loss."""

from ..config import PPOConfig, UserError
from ..kl_control import KlControl
from .base import Algorithm
from .grpo import GRPO, DrGRPO
from .online_dpo import OnlineDPO
from .p3o import P3O
from .ppo import PPO
from .reinforce_pp import ReinforcePP, ReinforcePPBaseline
from .rloo import RLOO

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "p3o": P3O,
    "rloo": RLOO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "reinforce++": ReinforcePP,
    "reinforce++_baseline": ReinforcePPBaseline,
    "online_dpo": OnlineDPO,
}


def load_algorithm(config: PPOConfig, kl: KlControl) -> Algorithm:
    try:
        return ALGORITHMS[config.algorithm](config, kl)
    except ValueError as error:
        raise UserError(str(error)) from error
