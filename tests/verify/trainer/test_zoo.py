"""Every architecture of the zoo trains, or is refused by name."""

import json

import pytest
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

from python_trainer.config import UserError
from tests.lib.zoo import ZOO, architecture, padding_gap, saved_gap, two_steps

REFUSED = {
    "bert": "sees the tokens that it is to predict",
    "roberta": "sees the tokens that it is to predict",
    "xlnet": "sees the tokens that it is to predict",
    "rwkv": "gives other logits where a prompt is padded on the left",
    "recurrent_gemma": "gives other logits where a prompt is padded on the left",
}


def refusal(name: str, algorithm: str) -> str | None:
    config = AutoConfig.for_model(**json.loads(architecture(name)))
    if algorithm == "ppo" and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "gives one number per token: take an algorithm without a critic"
    return None


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
@pytest.mark.parametrize("name", ZOO)
def test_two_steps(tiny, tmp_path, name, algorithm):
    """The ratio of the first update and every rollout are checked by the trainer itself, on a CPU to rounding."""
    expected = REFUSED.get(name, refusal(name, algorithm))
    if expected is not None:
        with pytest.raises(UserError, match=expected):
            two_steps(tiny, name, algorithm)
        return
    trainer = two_steps(tiny, name, algorithm)
    assert padding_gap(trainer) < 1e-5
    assert saved_gap(trainer, tmp_path / "saved") < 1e-5


def test_the_zoo_is_large_enough():
    trained = [name for name in ZOO if name not in REFUSED]
    with_critic = [name for name in trained if refusal(name, "ppo") is None]
    assert len({name.split(",")[0] for name in trained}) >= 30
    assert len({name.split(",")[0] for name in with_critic}) >= 30
