"""A few families of the zoo, the others are in tests/verify: learned positions, rotary ones, windows, noisy experts."""

import pytest

from tests.lib.zoo import padding_gap, saved_gap, two_steps

FAMILIES = {"gpt2": "ppo", "opt": "rloo", "qwen2, sliding": "ppo", "mixtral, jitter": "rloo", "gemma2": "rloo"}


@pytest.mark.parametrize(("name", "algorithm"), FAMILIES.items())
def test_two_steps(tiny, tmp_path, name, algorithm):
    trainer = two_steps(tiny, name, algorithm)
    assert padding_gap(trainer) < 1e-5
    assert saved_gap(trainer, tmp_path / "saved") < 1e-5
