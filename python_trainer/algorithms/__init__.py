"""One algorithm per file: what it needs, how it credits tokens, and its loss."""

from ..config import PPOConfig
from .ppo import PPO


def load_algorithm(config: PPOConfig) -> PPO:
    return {"ppo": PPO}[config.algorithm](config)
