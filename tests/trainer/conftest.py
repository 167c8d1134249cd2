"""The fixtures of the trainer's tests."""

from tests.lib.trainer import folder, ratings, tiny

__all__ = ["folder", "ratings", "tiny"]
