"""What people bring as data: every format and layout, nothing of a row unread, and one line where it cannot be used."""

import csv
import json
from datetime import datetime

import pytest

from python_trainer.config import RewardConfig, RunConfig, UserError
from python_trainer.data import Example, Pair, Prompt, load_task
from python_trainer.logging import as_json, read
from python_trainer.ppo_config import PPOConfig
from python_trainer.sft import reward
from python_trainer.tasks.files import Files
from tests.lib.text_models import saved, tokenizer_of, write_rows
from tests.lib.trainer import TINY

ROWS = [{"prompt": f"{number} + 1 =", "answer": str(number + 1)} for number in range(20)]
CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
PLAIN = {(row["prompt"], row["answer"]) for row in ROWS}


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def jsonl(folder, rows, mark=b""):
    (folder / "prompts.jsonl").write_bytes(mark + "".join(json.dumps(row) + "\n" for row in rows).encode())


def array(folder, rows):
    (folder / "prompts.json").write_text(json.dumps(rows, indent=2))


def comma_separated(folder, rows):
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def parquet(folder, rows):
    datasets().Dataset.from_list(rows).to_parquet(folder / "prompts.parquet")


def on_disk(folder, rows):
    datasets().Dataset.from_list(rows).save_to_disk(folder / "prompts")


def shards(folder, rows):
    """As the Hub has them, without a part that is held out."""
    (folder / "data").mkdir()
    for number in range(2):
        part = datasets().Dataset.from_list(rows[number::2])
        part.to_parquet(folder / "data" / f"train-{number:05}-of-00002.parquet")


def datasets():
    return pytest.importorskip("datasets", reason="Parquet and saved data sets need the package datasets")


FORMATS = {
    "jsonl": jsonl,
    "jsonl with a mark": lambda folder, rows: jsonl(folder, rows, b"\xef\xbb\xbf"),
    "array": array,
    "array in a file of lines": lambda folder, rows: (folder / "prompts.jsonl").write_text(json.dumps(rows)),
    "csv": comma_separated,
    "parquet": parquet,
    "saved": on_disk,
    "shards": shards,
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(tmp_path, form, rows):
    """All hold the same; a table of CSV has text alone."""
    if form == "csv" and rows is CHAT:
        pytest.skip("CSV holds no messages")
    FORMATS[form](tmp_path, rows)
    train, heldout = Files(str(tmp_path)).prompts()
    assert len(train) > len(heldout) > 0
    found = [(prompt.content, prompt.columns) for prompt in train + heldout]
    assert sorted(found, key=str) == sorted(((row["prompt"], {"answer": row["answer"]}) for row in rows), key=str)
    assert Files(str(tmp_path)).prompts() == (train, heldout)


def test_a_row_per_line_whatever_it_holds_and_a_split_that_does_not_follow_the_order(tmp_path):
    rows = [f"row {number}\u2028\x85 of a sorted file" for number in range(50)]
    content = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "texts.jsonl").write_text(content, encoding="utf-8")
    train, heldout = Files(str(tmp_path)).texts()
    assert sorted(train + heldout) == sorted(map(Example, rows))
    assert 1 <= len(heldout) <= 12
    (tmp_path / "texts.jsonl").write_text("\n".join(reversed(content.split("\n"))), encoding="utf-8")
    assert Files(str(tmp_path)).texts() == (train, heldout)
    more = "".join(json.dumps({"text": f"one more, {number}"}) + "\n" for number in range(500))
    (tmp_path / "texts.jsonl").write_text(content + more, encoding="utf-8")
    larger = Files(str(tmp_path)).texts()
    assert [len([row for row in side if row.text in rows]) for side in larger] == [len(train), len(heldout)]
    assert {*heldout} <= {*larger[1]}
    assert len(larger[1]) == pytest.approx(55, abs=25)


def test_a_question_is_on_the_same_side_at_all_stages(tmp_path):
    """Plain or a chat, with one answer or several, in another order, beside others."""
    questions = [f"question {number}" for number in range(60)]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": question} for question in questions])
    pairs = [{"prompt": question, "chosen": "a", "rejected": "b"} for question in reversed(questions[:50])]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    texts = [{"messages": [say("user", question), say("assistant", "a")]} for question in questions[10:]]
    write_rows(tmp_path / "texts.jsonl", texts)
    task = Files(str(tmp_path))
    held = {prompt.content for prompt in task.prompts()[1]}
    assert held
    for rows, there in ((task.pairs(), questions[:50]), (task.texts(), questions[10:])):
        shown = {row.prompt if isinstance(row.prompt, str) else row.prompt[0]["content"] for row in rows[1]}
        assert shown == held & {*there}


def test_csv_changes_no_value(tmp_path):
    rows = [{"prompt": word, "answer": word} for word in ("007", "NA", "null", "1e3", 'a "b",\n\u2028c', " d ")]
    comma_separated(tmp_path, rows)
    train, heldout = Files(str(tmp_path)).prompts()
    assert {prompt.content for prompt in train + heldout} == {row["prompt"] for row in rows}
    assert all(prompt.columns == {"answer": prompt.content} for prompt in train + heldout)


def test_a_column_of_csv_may_have_no_name(tmp_path):
    """pandas writes its index so, unless it is told not to."""
    (tmp_path / "prompts.csv").write_text(",prompt\n0,a\n\n1,b\n")
    rows = [row for part in Files(str(tmp_path)).prompts() for row in part]
    assert sorted((row.content, row.columns["Unnamed: 0"]) for row in rows) == [("a", "0"), ("b", "1")]


def test_what_a_data_set_calls_test_is_held_out(tmp_path):
    make = datasets()
    parts = {"train": ROWS[:12], "test": ROWS[12:]}
    make.DatasetDict({name: make.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
        tmp_path / "one"
    )
    for name, rows in parts.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    for path in (tmp_path / "one", tmp_path):
        train, heldout = Files(str(path)).prompts()
        assert [prompt.content for prompt in train] == [row["prompt"] for row in ROWS[:12]]
        assert [prompt.content for prompt in heldout] == [row["prompt"] for row in ROWS[12:]]
    make.DatasetDict({"first": make.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="other has the splits first and no `train`"):
        Files(str(tmp_path / "other")).prompts()


def test_an_evaluation_file_of_ones_own(tmp_path, capsys):
    write_rows(tmp_path / "mine.jsonl", ROWS[:12])
    write_rows(tmp_path / "test.jsonl", ROWS[11:])
    train, heldout = Files(str(tmp_path / "mine.jsonl"), eval_path=str(tmp_path / "test.jsonl")).prompts()
    assert [len(train), len(heldout)] == [12, 9]
    assert "1 of 9 held-out rows of prompts are among those trained on" in capsys.readouterr().out
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="test.jsonl holds no rows"):
        Files(str(tmp_path / "mine.jsonl"), eval_path=str(tmp_path / "test.jsonl")).prompts()


def test_copies_of_a_prompt_are_never_on_both_sides(tmp_path):
    rows = [{"prompt": f"q{n % 7}", "chosen": f"a{n}", "rejected": "b"} for n in range(70)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": [say("user", row["prompt"])]} for row in rows])
    for train, heldout in (Files(str(tmp_path)).pairs(), Files(str(tmp_path)).prompts()):
        shown = [{str(getattr(row, "prompt", None) or row.content) for row in side} for side in (train, heldout)]
        assert not shown[0] & shown[1]
        assert len(train) + len(heldout) == 70
        assert len(heldout) % 10 == 0


def test_columns_by_other_names(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"question": f"q{n}", "prompt": "an id", "reply": n} for n in range(4)])
    train, heldout = Files(str(tmp_path), columns={"prompt": "question", "answer": "reply"}).prompts()
    assert {(prompt.content, prompt.columns["answer"]) for prompt in train + heldout} == {
        (f"q{n}", n) for n in range(4)
    }
    config = PPOConfig(data_path=str(tmp_path), column_mapping='{"prompt": "question"}', apply_chat_template=True)
    assert load_task(config).prompts()[0][0].content[0]["role"] == "user"
    with pytest.raises(UserError, match="column_mapping calls prompt 'query', and there is 'prompt' but no 'query'"):
        Files(str(tmp_path), columns={"prompt": "query"}).prompts()
    write_rows(tmp_path / "prompts.jsonl", [{"question": "q"}])
    with pytest.raises(UserError, match="expected a column prompt .'query', says column_mapping. and found question; "):
        Files(str(tmp_path), columns={"prompt": "query"}).prompts()
    for wrong in ("[]", '{"prompt": 1}', '{"a": "x", "b": "x"}'):
        with pytest.raises(ValueError, match="column_mapping must"):
            RunConfig(column_mapping=wrong)
    with pytest.raises(UserError, match="column_mapping is for task files; task exact has data of its own"):
        load_task(PPOConfig(**TINY, column_mapping='{"prompt": "question"}'))


QUESTION = [say("user", "q")]
YES, NO = [say("assistant", "yes")], [say("assistant", "no")]
PAIRS = {
    "whole texts": ({"chosen": "q yes", "rejected": "q no"}, Pair("q yes", "q no")),
    "a prompt": ({"prompt": "q", "chosen": " yes", "rejected": " no"}, Pair(" yes", " no", 0.0, "q")),
    "a prompt in front": ({"prompt": "q", "chosen": "q yes", "rejected": "q no"}, Pair(" yes", " no", 0.0, "q")),
    "nothing said": ({"prompt": "q", "chosen": " yes", "rejected": ""}, Pair(" yes", "", 0.0, "q")),
    "messages": ({"prompt": QUESTION, "chosen": YES, "rejected": NO}, Pair(YES, NO, 0.0, QUESTION)),
    "messages and text": ({"prompt": QUESTION, "chosen": "yes", "rejected": "no"}, Pair(YES, NO, 0.0, QUESTION)),
    "text and messages": ({"prompt": "q", "chosen": YES, "rejected": NO}, Pair(YES, NO, 0.0, QUESTION)),
    "conversations": (
        {"chosen": QUESTION + YES, "rejected": QUESTION + NO},
        Pair(YES, NO, 0.0, QUESTION),
    ),
    "conversations and their prompt": (
        {"prompt": "q", "chosen": QUESTION + YES, "rejected": QUESTION + NO},
        Pair(YES, NO, 0.0, QUESTION),
    ),
    "a margin": ({"chosen": "a", "rejected": "b", "margin": "0.5"}, Pair("a", "b", 0.5)),
}


@pytest.mark.parametrize("form", PAIRS)
def test_forms_of_pairs(tmp_path, form):
    """A prompt beside the answers is never passed over, and never read twice."""
    row, expected = PAIRS[form]
    write_rows(tmp_path / "pairs.jsonl", [row])
    found = Files(str(tmp_path), eval_path=str(tmp_path / "pairs.jsonl")).pairs()[0]
    assert found == [expected]


def test_an_answer_may_begin_with_its_questions_words(tmp_path):
    rows = [
        {"prompt": "yes", "chosen": "yes indeed", "rejected": "no"},
        {"prompt": "a", "chosen": "a b", "rejected": "ab"},
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    found = Files(str(tmp_path), eval_path=str(tmp_path / "pairs.jsonl")).pairs()[0]
    assert [pair.chosen for pair in found] == ["yes indeed", "a b"]


TEXTS = {
    "text": ({"text": "a b"}, Example("a b")),
    "completion": ({"prompt": "a", "completion": " b"}, Example(" b", "a")),
    "messages": ({"messages": QUESTION + YES}, Example(YES, QUESTION)),
    "messages and their prompt": ({"prompt": "q", "messages": QUESTION + YES}, Example(YES, QUESTION)),
    "completion of messages": ({"prompt": QUESTION, "completion": YES}, Example(YES, QUESTION)),
}


@pytest.mark.parametrize("form", TEXTS)
def test_forms_of_texts(tmp_path, form):
    row, expected = TEXTS[form]
    write_rows(tmp_path / "texts.jsonl", [row])
    assert Files(str(tmp_path), eval_path=str(tmp_path / "texts.jsonl")).texts()[0] == [expected]


def test_plain_data_as_a_chat(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    task = Files(str(tmp_path), eval_path=str(tmp_path), as_chat=True)
    assert task.prompts()[0] == [Prompt(QUESTION)]
    assert task.pairs()[0] == [Pair(YES, NO, 0.0, QUESTION)]
    write_rows(tmp_path / "texts.jsonl", [{"text": "q yes"}])
    with pytest.raises(UserError, match="apply_chat_template: whole texts have no turns"):
        task.texts()


def test_fields_that_arrow_adds_to_messages_are_none_of_theirs(tmp_path):
    rows = [{"prompt": [say("user", f"q{n}") | ({"name": "me"} if n else {})]} for n in range(3)]
    datasets().Dataset.from_list(rows).to_parquet(tmp_path / "prompts.parquet")
    found = Files(str(tmp_path), eval_path=str(tmp_path)).prompts()[0]
    assert [prompt.content for prompt in found] == [row["prompt"] for row in rows]


def test_messages_with_a_date_are_told_apart_and_recorded(tmp_path):
    """Parquet has dates, and JSON none."""
    rows = [{"prompt": [say("user", "q") | {"at": datetime(2026, 1, day)}]} for day in (1, 2)]
    datasets().Dataset.from_list(rows).to_parquet(tmp_path / "prompts.parquet")
    (train,), (held,) = Files(str(tmp_path)).prompts()
    assert train != held
    assert '"at": "2026-01-0' in as_json({"prompt": train.content})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "texts.jsonl",
            '{"prompt": "q", "text": "q a"}',
            "row 1: there is `prompt` beside `text`.*name the answer `compl",
        ),
        ("texts.jsonl", '{"text": "a"}\n{"text": ""}', "texts.jsonl, row 2: text is empty"),
        ("texts.jsonl", '{"prompt": "q", "messages": []}', "row 1: there is `prompt` beside `messages`"),
        ("texts.jsonl", '{"messages": []}', "row 1: messages is empty"),
        ("texts.jsonl", '{"text": "a \\ud800"}', "row 1: text holds half a character"),
        ("texts.jsonl", "[" * 100_000, "texts.jsonl begins as a JSON array and is none"),
        ("texts.jsonl", '{"text": ' * 100_000, "line 1: expected a JSON object"),
        (
            "texts.jsonl",
            '{"messages": [{"from": "human"}]}',
            "a message of messages needs `role` and `content`, and has from",
        ),
        ("texts.jsonl", '{"messages": "hello"} x', "texts.jsonl, line 1: expected a JSON object .on each line one."),
        ("texts.jsonl", '"hello"', "texts.jsonl, line 1: expected a JSON object, not 'hello'"),
        ("texts.json", "[1, 2]", "texts.json, row 1: expected a JSON object, not 1"),
        ("texts.json", "[1, 2", "texts.json begins as a JSON array and is none"),
        ("texts.csv", "text,label\na\n", "texts.csv, row 1: it does not have the 2 values that the first line names"),
        ("texts.csv", 'text\n"a\n', "texts.csv is no CSV"),
        ("texts.csv", "text,text\na,b\n", "texts.csv: two columns are called 'text'"),
        ("prompts.csv", 'prompt\n"[{""role"": ""user""}]"\n', "row 1: prompt is the JSON of chat messages, as text"),
        ("texts.jsonl", '{"text": "[{\'content\': 1}]"}', "row 1: text is the JSON of chat messages, as text"),
        ("texts.parquet", "PAR1", "cannot read .*texts.parquet"),
        (
            "texts.txt",
            "a",
            "cannot read .*texts.jsonl: there is no such file, nor one that ends in .json, .csv, .parquet",
        ),
        ("pairs.jsonl", '{"prompt": "", "chosen": "a", "rejected": "b"}', "row 1: prompt is empty"),
        ("pairs.jsonl", '{"chosen": "a", "rejected": ""}', "row 1: rejected is empty"),
        (
            "pairs.jsonl",
            '{"chosen": "a", "rejected": "b", "margin": "much"}',
            "margin must be a finite number, not 'much'",
        ),
        (
            "pairs.jsonl",
            '{"chosen": "a"}',
            "row 1: expected a column rejected and found chosen; column_mapping names yours",
        ),
        (
            "prompts.jsonl",
            '{"prompt": "a", "completions": "b"}',
            "name of an argument of reward functions, completions: .*map",
        ),
        (
            "prompts.jsonl",
            '{"prompt": {"role": "user"}}',
            "prompt must be text or a list of chat messages, not {'role'",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content + "\n")
    with pytest.raises(UserError, match=message) as raised:
        getattr(Files(str(tmp_path), for_function=True), name.split(".")[0])()
    assert "\n" not in str(raised.value)


def test_two_files_of_one_name_are_refused(tmp_path):
    jsonl(tmp_path, ROWS)
    comma_separated(tmp_path, ROWS)
    with pytest.raises(UserError, match="has both prompts.jsonl and prompts.csv: leave one of them there"):
        Files(str(tmp_path)).prompts()
    with pytest.raises(UserError, match="cannot read .*nowhere: there is nothing of that name"):
        Files(str(tmp_path / "nowhere")).prompts()
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(UserError, match="prompts.txt is none of .jsonl, .json, .csv, .parquet"):
        Files(str(tmp_path / "prompts.txt")).prompts()


def test_another_encoding_is_refused(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="texts.jsonl is not UTF-8"):
        Files(str(tmp_path)).texts()


def test_prompts_that_end_with_the_assistant_are_told(tmp_path, capsys):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": QUESTION}, {"prompt": QUESTION + YES}])
    Files(str(tmp_path)).prompts()
    assert "1 of 2 prompts end with an assistant's message, which responses continue" in capsys.readouterr().out


def test_the_question_of_a_pair_reaches_the_reward_model(tmp_path):
    """Which answer is right depends on it alone."""
    model = saved(tmp_path / "model", tokenizer_of())
    words = {"a": ("x", "y"), "b": ("y", "x")}
    rows = [{"prompt": f"{n}{q}", "chosen": c, "rejected": r} for n in range(20) for q, (c, r) in words.items()]
    write_rows(tmp_path / "pairs.jsonl", rows)
    config = RewardConfig(
        data_path=str(tmp_path),
        model_path=model,
        output_dir=str(tmp_path / "run"),
        num_train_epochs=25,
        batch_size=36,
        learning_rate=2e-2,
        eval_steps=5,
        disable_tqdm=True,
    )
    assert reward(config)["eval/accuracy"] == 1.0
    rows = read(tmp_path / "run" / "reward" / "metrics.jsonl")
    assert len(rows) == 25  # steps of an epoch each
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [5, 10, 15, 20, 25]
    assert (tmp_path / "run" / "reward" / "curves.png").is_file()
