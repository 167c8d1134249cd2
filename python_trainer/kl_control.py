"""The weight of the KL penalty, fixed or steered towards a target."""

from .config import PPOConfig


class KlControl:
    r"""Proportional control in log space (Ziegler et al., 2019).

    coef grows by the factor ``1 + clip(KL / kl_target - 1, -0.2, 0.2) · episodes / kl_horizon`` after each rollout,
    KL in nats per response. Without kl_target it stays what it is.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.coef = config.kl_coef
        self.target = config.kl_target
        self.horizon = config.kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon
