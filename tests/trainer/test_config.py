"""Settings come from a file and from the command line, and a typo never passes."""

import pytest
import yaml

from python_trainer.config import PPOConfig, SftConfig, UserError, load

FILE = {"seed": 3, "model_config": {"model_type": "gpt2"}, "train": {"kl_coef": 0.2, "learning_rate": "1e-4"}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(FILE))
    return path


def test_command_line_wins_over_the_file(file):
    config = load("train", str(file), ["--kl_coef", "0.3", "--bf16"], PPOConfig)
    assert (config.seed, config.kl_coef, config.learning_rate, config.bf16) == (3, 0.3, 1e-4, True)
    assert config.model_config == '{"model_type": "gpt2"}'


def test_a_section_holds_for_its_command_only(file):
    assert load("sft", str(file), [], SftConfig).learning_rate == SftConfig.learning_rate


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"sed": 1}, [], "'sed'.*did you mean 'seed'"),
        ({"train": {"kl_coeff": 1}}, [], "'kl_coeff'.*did you mean 'kl_coef'"),
        ({}, ["--clip_range=0.1"], "'clip_range'.*did you mean 'cliprange'"),
        ({"train": {"cliprange": "wide"}}, [], "cliprange.*invalid float"),
        ({"task": "revews"}, [], "task.*invalid choice"),
        ({"train": {"batch_size": 10, "num_mini_batches": 4}}, [], "multiple of num_mini_batches"),
        ({"train": {"temperature": 0}}, [], "temperature must be positive"),
        ("just text", [], "mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, content, options, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        load("train", str(path), options, PPOConfig)


def test_missing_file_is_named():
    with pytest.raises(UserError, match=r"no such file: nowhere.yaml"):
        load("train", "nowhere.yaml", [], PPOConfig)


def test_every_setting_is_explained():
    import dataclasses

    for kind in (PPOConfig, SftConfig):
        assert all(field.metadata.get("help") for field in dataclasses.fields(kind))
