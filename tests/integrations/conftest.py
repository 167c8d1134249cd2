"""The fixtures of the adapters' tests."""

from tests.lib.fake_trainer import adapter, trainer

__all__ = ["adapter", "trainer"]
