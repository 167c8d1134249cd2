"""The fixtures of the trainer's tests."""

from tests.lib.trainer import evaluation_of_prompts_alone, folder, ratings, tiny

__all__ = ["evaluation_of_prompts_alone", "folder", "ratings", "tiny"]
