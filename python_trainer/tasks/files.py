"""Data of one's own: texts, pairs and prompts from JSON, JSONL, CSV, Parquet, or what `datasets` saved.

All of a row is used or refused: a question beside two answers belongs to both of them, and of what is given twice
there are no copies on the two sides of the split.
"""

import csv
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .. import files
from ..config import RunConfig, SamplingConfig, UserError
from ..data import Content, Example, Pair, Prompt, Task
from ..reward_functions import refuse_columns
from ..tokens import is_text, no_text, tell

T = TypeVar("T")
Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # one of them is in what `save_to_disk` wrote
HELD_OUT_SPLITS = ("test", "validation", "eval")


class Files(Task):
    """`data_path` is a folder of texts, pairs and prompts, each in a file or a folder of that name, or one data set."""

    def __init__(
        self,
        path: str,
        *,
        eval_path: str | None = None,
        columns: dict[str, str] | None = None,
        as_chat: bool = False,
        for_function: bool = False,
        heldout: float = 0.1,
    ) -> None:
        self.path = Path(path)
        self.eval_path = None if eval_path is None else Path(eval_path)
        self.names = columns or {}
        self.as_chat = as_chat
        self.for_function = for_function
        self.heldout = heldout

    def texts(self) -> tuple[list[Example], list[Example]]:
        return self._read("texts", self._examples, lambda example: _key(example.prompt or example.text))

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        return self._read("pairs", self._pairs, lambda pair: _key(pair.prompt or pair.chosen))

    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        return self._read("prompts", self._prompts, lambda prompt: _key(prompt.content))

    def _read(
        self, kind: str, made: Callable[[str, list[Row]], list[T]], key: Callable[[T], str]
    ) -> tuple[list[T], list[T]]:
        """What the rows are, for training and held out; what has the same key is never on both sides."""
        place = find(self.path, kind)
        train, heldout = load(place)
        rows = made(str(place), self._renamed(place, train))
        if self.eval_path is not None:
            other = find(self.eval_path, kind)
            first, second = load(other)
            heldout, place_of_heldout = second or first, other
        elif heldout is None:
            return split(rows, key, self.heldout, place)
        else:
            place_of_heldout = place
        held = made(str(place_of_heldout), self._renamed(place_of_heldout, heldout))
        if not rows or not held:
            raise UserError(f"{place if not rows else place_of_heldout} holds no rows")
        known = {key(row) for row in rows}
        tell(sum(key(row) in known for row in held), len(held), f"held-out rows of {kind} are among those trained on")
        return rows, held

    def _renamed(self, place: Path, rows: list[Row]) -> list[Row]:
        """With our names for the columns of `column_mapping`."""
        theirs = {name: ours for ours, name in self.names.items()}
        for ours, name in self.names.items():
            if rows and not any(name in row for row in rows) and ours in rows[0]:
                raise UserError(f"{place}: column_mapping calls {ours} {name!r}, and there is {ours!r} but no {name!r}")
        kept = [{key: value for key, value in row.items() if key in theirs or key not in self.names} for row in rows]
        return [{theirs.get(key, key): value for key, value in row.items()} for row in kept]

    def _prompts(self, place: str, rows: list[Row]) -> list[Prompt]:
        found = []
        for number, row in enumerate(rows, 1):
            content = self._content(place, number, row, "prompt")
            columns = {name: value for name, value in row.items() if name != "prompt"}
            found.append(Prompt(self._as_messages(content), columns))
        if self.for_function:
            refuse_columns(place, found)
        else:
            _tell_unread(place, rows, {"prompt"})
        open_turns = sum(not isinstance(p.content, str) and p.content[-1]["role"] == "assistant" for p in found)
        tell(open_turns, len(found), "prompts end with an assistant's message, which responses continue")
        return found

    def _examples(self, place: str, rows: list[Row]) -> list[Example]:
        found, names = [], []
        for number, row in enumerate(rows, 1):
            name = next((name for name in ("messages", "completion", "text") if name in row), "text")
            if "prompt" in row and name != "completion" and not _begins_with(row[name], row["prompt"]):
                _refuse(
                    place,
                    number,
                    f"there is `prompt` beside `{name}`, which is a whole text: name the answer `completion` "
                    f'(column_mapping {{"completion": "{name}"}}), or leave `prompt` out',
                )
            prompt = self._content(place, number, row, "prompt") if "prompt" in row else ""
            found.append((prompt, [self._content(place, number, row, name)]))
            names.append(name)
        _tell_unread(place, rows, {"prompt", *names})
        return [Example(text, prompt) for prompt, (text,) in self._answers(found)]

    def _pairs(self, place: str, rows: list[Row]) -> list[Pair]:
        found, margins = [], []
        for number, row in enumerate(rows, 1):
            prompt = self._content(place, number, row, "prompt") if "prompt" in row else ""
            answers = [self._content(place, number, row, name, empty=bool(prompt)) for name in ("chosen", "rejected")]
            found.append((prompt, answers))
            margins.append(_number(place, number, row.get("margin", 0.0)))
        _tell_unread(place, rows, {"prompt", "chosen", "rejected", "margin"})
        return [
            Pair(chosen, rejected, margin, prompt)
            for (prompt, (chosen, rejected)), margin in zip(self._answers(found), margins, strict=True)
        ]

    def _answers(self, rows: list[tuple[Content, list[Content]]]) -> list[tuple[Content, list[Content]]]:
        """Prompts and what answers them, of one kind; an answer that repeats its prompt loses it."""
        rows = [self._of_one_kind(*row) for row in rows]
        plain = [(prompt, answers) for prompt, answers in rows if isinstance(prompt, str) and prompt]
        # By the rows together: a single answer may begin with its question's words.
        repeated = bool(plain) and all(str(answer).startswith(str(p)) for p, answers in plain for answer in answers)
        if repeated:
            tell(len(plain), len(rows), "rows have answers with their prompt in front, which is not put there again")
        found = []
        for prompt, answers in rows:
            if isinstance(prompt, str) and repeated:
                answers = [answer[len(prompt) :] for answer in answers]
            elif not isinstance(prompt, str):
                prompt = prompt or answers[0][: _before_the_answer(answers)]
                answers = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
            found.append((prompt, answers))
        return found

    def _of_one_kind(self, prompt: Content, answers: list[Content]) -> tuple[Content, list[Content]]:
        """Messages on both sides where one has them, or `apply_chat_template` asks for it."""
        chat = [answer for answer in answers if not isinstance(answer, str)]
        if isinstance(prompt, str) and not chat and not (self.as_chat and prompt):
            if self.as_chat:
                raise UserError(
                    "apply_chat_template: whole texts have no turns; bring them as prompt and completion (chosen, "
                    "rejected), or as messages"
                )
            return prompt, answers
        if not isinstance(prompt, str) or not prompt:
            messages = [] if isinstance(prompt, str) else prompt
        elif chat and {"role": "user", "content": prompt} in chat[0]:  # the conversation has it in full
            messages = chat[0][: chat[0].index({"role": "user", "content": prompt}) + 1]
        else:
            messages = [{"role": "user", "content": prompt}]
        return messages, [
            [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers
        ]

    def _as_messages(self, content: Content) -> Content:
        plain = isinstance(content, str) and self.as_chat
        return [{"role": "user", "content": content}] if plain else content

    def _content(self, place: str, number: int, row: Row, name: str, *, empty: bool = False) -> Content:
        """The text or the messages of a column."""
        if name not in row:
            there = ", ".join(row) or "nothing"
            mapped = f" ({self.names[name]!r}, says column_mapping)" if name in self.names else ""
            _refuse(place, number, f"expected a column {name}{mapped} and found {there}; column_mapping names yours")
        value = row[name]
        if isinstance(value, str):
            if not value and not empty:
                _refuse(place, number, f"{name} is empty: leave such rows out")
            if wrong := no_text(value):
                _refuse(place, number, f"{name} {wrong}: {value[:60]!a}")
            return value
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            _refuse(place, number, f"{name} must be text or a list of chat messages, not {value!r}"[:200])
        if not value:
            _refuse(place, number, f"{name} is empty: leave such rows out")
        for message in value:
            if "role" not in message or "content" not in message:
                _refuse(place, number, f"a message of {name} needs `role` and `content`, and has {', '.join(message)}")
            if not is_text(str(message["content"])):
                _refuse(place, number, f"a message of {name} holds half a character, which no text has")
        # Arrow gives every message all fields that one of them has.
        return [{name: field for name, field in message.items() if field is not None} for message in value]


def make(config: RunConfig) -> Task:
    if config.data_path is None:
        raise UserError("task files needs data_path: a folder of texts, pairs and prompts, or one data set")
    return Files(
        config.data_path,
        eval_path=config.eval_data_path,
        columns=None if config.column_mapping is None else json.loads(config.column_mapping),
        as_chat=config.apply_chat_template,
        for_function=isinstance(config, SamplingConfig) and config.reward_function is not None,
    )


def find(path: Path, kind: str) -> Path:
    """Where the rows of that kind are: `path` itself if it is one data set, else what has its name in there."""
    if not path.exists():
        raise UserError(f"cannot read {path}: there is nothing of that name")
    if path.is_file() or _is_saved(path):
        return path
    named = [path / f"{kind}{suffix}" for suffix in FORMATS]
    found = [place for place in (*named, path / kind) if place.exists()]
    if len(found) > 1:
        raise UserError(f"{path} has both {found[0].name} and {found[1].name}: leave one of them there")
    if found or _shards(path, "train"):
        return found[0] if found else path
    raise UserError(f"cannot read {named[0]}: there is no such file, nor one that ends in {', '.join(FORMATS[1:])}")


def load(place: Path) -> tuple[list[Row], list[Row] | None]:
    """The rows to train on, and those to hold out where the data set says which they are."""
    if not place.is_dir():
        return read_file(place), None
    if _is_saved(place):
        return _read_saved(place)
    train, held = _shards(place, "train"), [shards for name in HELD_OUT_SPLITS if (shards := _shards(place, name))]
    if not train:
        train = sorted(path for path in place.iterdir() if path.suffix in FORMATS)
    if not train:
        raise UserError(f"{place} holds no file of data ({', '.join(FORMATS)})")
    rows = [row for path in train for row in read_file(path)]
    return rows, [row for path in held[0] for row in read_file(path)] if held else None


def read_file(path: Path) -> list[Row]:
    if files.would_wait(path):
        raise UserError(f"{path} is {files.kind(path)}: data are read from a file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in FORMATS:
        raise UserError(f"{path} is none of {', '.join(FORMATS)}, nor a folder that `datasets` saved")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    return _read_csv(path, text) if path.suffix == ".csv" else _read_json(path, text)


def split(rows: list[T], key: Callable[[T], str], share: float, place: Path) -> tuple[list[T], list[T]]:
    """About `share` of what differs is held out, by the hash of each row's key: the same in all files, in any order.

    Rows that are added move no other. Of a few rows one at least is held out, and one is not.
    """
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in map(key, rows)}
    if len(places) < 2:
        alike = f", which are all the same, {next(iter(places))[:60]!r}" if len(rows) > 1 else ""
        raise UserError(
            f"{place} holds {len(rows)} rows{alike}; two different ones are needed, as one is held out: add some, or "
            "name a file for evaluation in eval_data_path"
        )
    bound = min(max(share, min(places.values())), sorted(places.values())[-2])
    ordered = sorted(rows, key=lambda row: places[key(row)])  # files are often sorted
    return [row for row in ordered if places[key(row)] > bound], [row for row in ordered if places[key(row)] <= bound]


def _read_json(path: Path, text: str) -> list[Row]:
    """An array, or an object on each line."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} begins as a JSON array and is none: {error}") from error
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                _refuse(str(path), number, f"expected a JSON object, not {row!r}"[:200])
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what splitlines calls a line's end
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected a JSON object (on each line one)") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, not {row!r}"[:300])
        rows.append(row)
    return rows


def _read_csv(path: Path, text: str) -> list[Row]:
    """Every value is text as it stands there: 007 stays 007, and NA is a word."""
    csv.field_size_limit(sys.maxsize)
    try:
        names, *table = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row] or [[]]
    except csv.Error as error:
        raise UserError(f"{path} is no CSV: {error}") from error
    names = [name or f"Unnamed: {at}" for at, name in enumerate(names)]  # as pandas reads the index that it writes
    if len({*names}) < len(names):
        raise UserError(f"{path}: two columns are called {max(names, key=names.count)!r}: give one another name")
    for number, row in enumerate(table, 1):
        if len(row) != len(names):
            _refuse(str(path), number, f"it does not have the {len(names)} values that the first line names")
    return [dict(zip(names, row, strict=True)) for row in table]


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Parquet needs pyarrow: pip install datasets ({error})") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _read_saved(place: Path) -> tuple[list[Row], list[Row] | None]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{place} needs the package that saved it: pip install datasets ({error})") from error
    try:
        saved = datasets.load_from_disk(str(place))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {place}: {str(error).splitlines()[0]}") from error
    if not isinstance(saved, dict):
        return saved.to_list(), None
    if "train" not in saved:
        raise UserError(f"{place} has the splits {', '.join(saved)} and no `train`: name the folder of one of them")
    held = next((saved[name].to_list() for name in HELD_OUT_SPLITS if name in saved), None)
    return saved["train"].to_list(), held


def _is_saved(place: Path) -> bool:
    return any((place / name).is_file() for name in SAVED)


def _shards(folder: Path, split_name: str) -> list[Path]:
    """Files of a split as the Hub has them: train.parquet, train-00000-of-00002.parquet, also in data/."""
    folders = (folder, folder / "data")
    found = [path for each in folders if each.is_dir() for path in each.iterdir() if path.suffix in FORMATS]
    return sorted(path for path in found if path.stem == split_name or path.stem.startswith(f"{split_name}-"))


def _tell_unread(place: str, rows: list[Row], read: set[str]) -> None:
    """One line of the columns that nobody looks at: they may hold half of a question."""
    there = dict.fromkeys(name for row in rows for name in row)
    others = [name for name in there if name not in read]
    tell(len(others), len(there), f"columns of {place} are not read: {', '.join(others)}")


def _begins_with(messages: Any, prompt: Any) -> bool:
    """Whether a conversation has that prompt in it, so that nothing of a row is lost."""
    if not isinstance(messages, list):
        return False
    first = next((m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"), None)
    return first == prompt if isinstance(prompt, str) else messages[: len(prompt or [])] == prompt


def _before_the_answer(conversations: list[Any]) -> int:
    """How many messages are the prompt: those that all begin with, or, of one, those before the assistant speaks."""
    if len(conversations) == 1:
        roles = [message["role"] for message in conversations[0]]
        return roles.index("assistant") if "assistant" in roles else len(roles)
    pairs = list(zip(*conversations, strict=False))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))


def _number(place: str, number: int, value: Any) -> float:
    try:
        margin = float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        _refuse(place, number, f"margin must be a finite number, not {value!r}")
    return margin


def _key(content: Content) -> str:
    """What makes a prompt the same one; a question is, as plain text and as a user's only message."""
    if not isinstance(content, str) and content == [{"role": "user", "content": content[-1].get("content")}]:
        content = content[0]["content"]
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)


def _refuse(place: str, number: int, what: str) -> NoReturn:
    raise UserError(f"{place}, row {number}: {what}")
