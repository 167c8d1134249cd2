"""The fixtures of the trainer's tests."""

from tests.lib.trainer import ratings, tiny

__all__ = ["ratings", "tiny"]
