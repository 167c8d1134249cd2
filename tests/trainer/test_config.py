"""Settings come from a file and from the command line, and a typo never passes."""

import dataclasses
import json
import re

import pytest
import yaml

from python_trainer import __main__ as command_line
from python_trainer.__main__ import main
from python_trainer.config import CONFIGS, EvalConfig, SftConfig, UserError
from python_trainer.ppo_config import PPOConfig
from python_trainer.settings import COMMANDS, load, save

ARCHITECTURE = '{"model_type": "gpt2", "n_layer": 1}'
FILE = {"seed": 3, "model_config": {"model_type": "gpt2"}, "train": {"kl_coef": 0.2, "learning_rate": "1e-4"}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(FILE))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_setting_once_in_80_columns(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert not end.value.code
    assert said.startswith(f"usage: python -m python_trainer {command} ")
    assert max(map(len, said.splitlines())) <= 80
    for field in dataclasses.fields(COMMANDS[command]):
        assert len(re.findall(rf"^  --{field.name}\b", said, re.M)) == 1


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
        ({}, ["--actor_learning_rate=1"], "'actor_learning_rate'.*: it is learning_rate"),  # not critic_learning_rate
        ({}, ["--max_length=9"], "'max_length'.*: prompts have at most max_prompt_length tokens"),  # not ptx_max_length
        ({}, ["--num_sample_generations=9"], "'num_sample_generations'.*: responses are recorded every"),
        ({"train": {"cliprange": "wide"}}, [], "cliprange.*invalid float"),
        ({"task": "revews"}, [], "task.*invalid choice"),
        ({"train": {"batch_size": 10, "num_mini_batches": 4}}, [], "multiple of num_mini_batches"),
        ({"train": {"temperature": 0}}, [], "temperature must be positive"),
        ({"train": {"num_mini_batches": 0}}, [], "num_mini_batches must be at least 1, not 0"),
        ({"seed": -1}, [], "seed must be at least 0 and below .*, not -1"),
        ({"seed": 1 << 32}, [], "seed must be at least 0 and below .*, not 4294967296"),
        ({}, ["--total_steps=1" + "0" * 60], "total_steps must be below .*, not a number of 61 digits"),
        ({"output_dir": "a\0b"}, [], "output_dir holds a character that no text and no file's name has"),
        ({}, ["--data_path=a\udc80"], "data_path holds a character"),
        ({"output_dir": ["a", "b"]}, [], "output_dir must be one value, not"),
        ({"model_config": {"model_type": ["gpt2"]}}, [], "model_config needs a model_type"),
        ({}, ["--model_config=" + "[" * 100_000], "model_config is not JSON"),
        ({}, ["--num_train_epochs=1"], "'num_train_epochs'.*: set total_steps"),
        ({"train": {"gradient_accumulation_steps": 1}}, [], "what lies between is accumulated"),
        ({}, ["--max_new_tokens=9"], "most tokens of a response are response_length"),
        ({}, ["--top_k=9"], "responses are drawn from the whole distribution"),
        ({}, ["--wibble=9"], "unknown setting 'wibble'.*; --help lists those there are"),
        ({"train": {"kl_coef": "nan"}}, [], "kl_coef must be at least 0 and finite, not nan"),
        (
            {"train": {"critic_warmup_steps": 9, "total_steps": 9}},
            [],
            "critic_warmup_steps 9 must be below total_steps",
        ),
        ({"train": {"kl_coef": -0.1}}, [], "kl_coef must be at least 0 and finite, not -0.1"),
        ({"train": {"kl_coef": 0, "kl_target": 6}}, [], "kl_target needs a kl_coef above 0"),
        ({"train": {"kl_target": 6, "kl_horizon": 12}}, [], "kl_horizon 12 must be above a fifth of batch_size 64"),
        ({"train": {"lam": 1.5}}, [], "lam must be from 0 to 1, not 1.5"),
        ({"train": {"critic_learning_rate": 0}}, [], "critic_learning_rate must be positive and finite, not 0.0"),
        ({"train": {"lr_scheduler_type": "lineer"}}, [], "lr_scheduler_type.*invalid choice.*cosine"),
        ({"ops_impl": "cudda"}, [], "ops_impl.*invalid choice.*triton"),
        ({}, ["--model_config=gpt2"], "model_config is not JSON"),
        ({"model_config": {"model_type": "gpt9"}}, [], "model_config needs a model_type .* not 'gpt9'"),
        ({"train": 5}, [], "train in .*run.yaml must be a mapping of settings, not 5"),
        ({"output_dir": __file__}, [], "output_dir .*test_config.py cannot be written"),
        ("just text", [], "mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, content, options, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        load("train", str(path), options, PPOConfig)


TWELVE = "abcdefghijkl"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip(TWELVE, TWELVE[1:], strict=False)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n"
    for before, name in zip(TWELVE, TWELVE[1:], strict=False)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes: 1", "a setting's name must be text, not True"),
        ("train: {1: 2}", "a setting's name must be text, not 1"),
        ("seed: " + "[" * 3000, "nested too deeply"),
        ("seed: " + "{a: " * 3000, "nested too deeply"),
        pytest.param(BOMB, "more than 100000 values", id="bomb"),
        (MERGED, "more than 100000 values"),
        ("seed: &a [*a]", "more than 100000 values"),
        ("seed: " + "9" * 5000, "is not YAML"),
        ("seed: 2001-99-99", "is not YAML: month"),
        ("seed: \x00", "is not YAML"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=f"run.yaml.*{message}"):
        load("train", str(tmp_path / "run.yaml"), [], PPOConfig)


def test_aliases_and_lists_of_words(tmp_path):
    text = "\ufefftrain: &own {lora_r: 4, lora_target_modules: [a, b]}\neval: {<<: *own, lora_target_modules: null}\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = load("train", str(tmp_path / "run.yaml"), [], PPOConfig)
    assert (config.lora_r, config.lora_target_modules) == (4, "a,b")


@pytest.fixture
def run(tmp_path):
    """A folder whose policy was trained with a section's own settings."""
    of_run = PPOConfig(seed=3, temperature=0.7, response_length=9, sft_model_path="base", model_config=ARCHITECTURE)
    save(of_run, tmp_path / "run" / "train")
    return f"--output_dir={tmp_path / 'run'}"


def test_evaluation_takes_the_settings_of_the_run(file, run):
    config = load("eval", str(file), [run, "--response_length=5", "--seed=3"], EvalConfig)
    assert (config.seed, config.temperature, config.sft_model_path) == (3, 0.7, "base")
    assert config.response_length == 5
    assert json.loads(config.model_config) == json.loads(ARCHITECTURE)


@pytest.mark.parametrize("option", ["--seed=1", "--temperature=1", '--model_config={"model_type": "llama"}'])
def test_evaluation_against_another_reference_is_refused(run, option):
    name = option[2:].split("=")[0]
    with pytest.raises(UserError, match=f"{name} .* is not that of the run"):
        load("eval", None, [run, option], EvalConfig)


@pytest.mark.parametrize("options", [["--config=a.yaml"], ["--config", "a.yaml"]])
def test_spellings_of_options(monkeypatch, options):
    seen = []
    monkeypatch.setattr(command_line, "run", lambda *arguments: seen.append(arguments) or 0)
    assert main(["--local_rank=0", "train", "--output-dir=a-b", *options, "--kl-coef", "-0.5"]) == 0
    assert seen == [("train", "a.yaml", ["--output_dir=a-b", "--kl_coef", "-0.5"])]


def test_help_and_an_option_without_its_value(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in (*COMMANDS, "demo", "exact_cpu.yaml", "<command> --help"))
    assert main(["train", "--config"]) == 1
    assert "error: argument --config: expected one argument" in capsys.readouterr().err


def test_missing_file_is_named():
    with pytest.raises(UserError, match=r"no such file: nowhere.yaml"):
        load("train", "nowhere.yaml", [], PPOConfig)


def test_defaults_are_those_of_a_practitioner():
    """A run without them is one that somebody could want: answers are not cut, and a day's work is not lost."""
    ours, texts = PPOConfig(), SftConfig()
    assert (ours.response_length, ours.save_steps, texts.max_length, ours.ptx_max_length) == (256, 50, 1024, 1024)
    assert (ours.log_completions_steps, texts.logging_steps) == (10, 50)


def test_every_setting_is_explained():
    import dataclasses

    for kind in (PPOConfig, SftConfig):
        assert all(field.metadata.get("help") for field in dataclasses.fields(kind))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_read(path):
    for command, kind in COMMANDS.items():
        load(command, str(path), [], kind)
