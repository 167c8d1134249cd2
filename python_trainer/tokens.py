"""Token ids of prompts, texts and conversations: the tokenizer's own, by its chat template where the data are messages.

A tokenizer may put a start token before a text and an end token behind it. The start stays, as `tokenizer(prompt)` has
it, unless the text brings it along; the end goes from a prompt, which continues, and stands once behind a whole text.
"""

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import distributed
from .config import SamplingConfig, UserError
from .data import Content, Example, Message, Prompt, readable

SEQUENCES = ("prompts with their responses", "max_prompt_length or response_length")  # and what shortens them


CHAT_IN_JSON = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # or Python's way to write it


class Tokens(NamedTuple):
    """A whole text."""

    ids: list[int]
    learned: list[bool]  # the tokens that an imitation is of

    @property
    def predicted(self) -> int:
        """How many tokens are learned from it; nothing predicts the first."""
        return sum(self.learned[1:])


def prompt_ids(contents: Sequence[Content], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What responses continue. Messages end with the template's generation prompt, or in an open assistant's turn."""
    chat = [not isinstance(content, str) for content in contents]
    return _ids([text if isinstance(text, str) else _opened(text, tokenizer) for text in contents], chat, tokenizer)


def whole_ids(
    rows: Sequence[tuple[Content, Content]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    finished: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Of each prompt with its text. A plain one has the end token behind it; a chat what its template puts there.

    Not where `finished` is False: the text goes on.
    """
    closed = [True] * len(rows) if finished is None else list(finished)
    joined = [_joined(*row, tokenizer, whole) for row, whole in zip(rows, closed, strict=True)]
    ids = _ids(joined, [not isinstance(text, str) for _, text in rows], tokenizer)
    eos: int = tokenizer.eos_token_id
    return [
        [*row, eos] if whole and isinstance(text, str) and not _ended(row, tokenizer, ends) else row
        for row, (_, text), whole in zip(ids, rows, closed, strict=True)
    ]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    completion_only: bool,
    ends: Collection[int],
) -> list[Tokens]:
    """A text cut at max_length has no end token, since it does not end there."""
    if not examples:
        raise UserError("the text set is empty")
    rows = whole_ids([(example.prompt, example.text) for example in examples], tokenizer, ends)
    before = prompt_ids([example.prompt if isinstance(example.prompt, str) else "" for example in examples], tokenizer)
    found, last_turns = [], 0
    for example, ids, start in zip(examples, rows, before, strict=True):
        if not _ended(ids, tokenizer, ends):
            ids.append(tokenizer.eos_token_id)  # a template that ends no turn: nothing would be learned of the end
        learned = [True] * len(ids)
        if completion_only and isinstance(example.text, str) and example.prompt:
            learned = _from(ids, start)
        elif completion_only and not isinstance(example.text, str):
            learned, every_turn = _assistant_turns(ids, example, tokenizer)
            last_turns += not every_turn
        found.append(Tokens(ids[:max_length], learned[:max_length]))
    empty = sum(not row.predicted for row in found)
    tell(empty, len(found), f"texts are left out: within max_length {max_length} nothing of them is to be learned")
    tell(
        last_turns,
        len(found),
        "conversations: their last turn alone is learned, as the template rewrites earlier ones",
    )
    tell(sum(len(ids) > max_length for ids in rows), len(rows), f"texts are cut at max_length {max_length}")
    return found


def learnable(rows: Sequence[Tokens]) -> list[Tokens]:
    """Those with something to learn."""
    found = [row for row in rows if row.predicted]
    if not found:
        raise UserError("no text has a token to learn from within max_length: raise it")
    return found


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, context: int
) -> list[Prompt]:
    """With their ids. Those too long are refused, left out or cut, as `overlong_prompts` says, and counted."""
    if not prompts:
        raise UserError("the prompt set is empty")
    room = context - config.response_length
    most = room if config.max_prompt_length is None else min(room, config.max_prompt_length)
    if most < 1:
        raise UserError(
            f"response_length {config.response_length} leaves no room for a prompt in the model's context of {context} "
            "tokens: lower response_length"
        )
    found, cut, dropped = [], 0, 0
    rows = prompt_ids([prompt.content for prompt in prompts], tokenizer)
    for prompt, ids in zip(prompts, rows, strict=True):
        if not ids:
            raise UserError(f"prompt {readable(prompt.content)!r} has no tokens")
        if len(ids) <= most:
            found.append(replace(prompt, ids=tuple(ids)))
            continue
        if config.overlong_prompts == "error":
            limit = f"max_prompt_length is {most}" if most < room else f"the model's context is {context} tokens"
            raise UserError(
                f"prompt of {len(ids)} tokens and response_length {config.response_length} exceed what there is room "
                f"for ({limit}): set overlong_prompts to filter or truncate: {readable(prompt.content)[:60]!r}"
            )
        shorter = _shortened(prompt.content, ids, most, tokenizer) if config.overlong_prompts == "truncate" else None
        if shorter is None:
            dropped += 1
        else:
            cut += 1
            found.append(replace(prompt, content=shorter[0], ids=tuple(shorter[1])))
    tell(dropped, len(prompts), f"prompts are left out: they have more than {most} tokens")
    tell(cut, len(prompts), f"prompts have more than {most} tokens and lose their beginning")
    if not found:
        raise UserError(f"every prompt has more than {most} tokens: raise max_prompt_length or lower response_length")
    return found


def tell(count: int, of: int, what: str) -> None:
    """One line, if there is something to tell."""
    if count and distributed.is_main():
        print(f"{count} of {of} {what}", flush=True)


def reads_ids_of(other: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase, probes: Sequence[str]) -> bool:
    """Whether the policy's ids are those that the other tokenizer gives the same text; it may have more tokens."""
    known = other.get_vocab()
    if any(known.get(token) != number for token, number in policy.get_vocab().items()):
        return False
    return prompt_ids(probes, other) == prompt_ids(probes, policy)


def is_text(value: str) -> bool:
    """Whether it is Unicode: JSON can hold halves of characters."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def no_text(value: str) -> str | None:
    """What is wrong with it as a text of the data."""
    if not is_text(value):
        return "holds half a character, which no text has"
    if CHAT_IN_JSON.match(value):
        return "is the JSON of chat messages, as text: bring the messages themselves, in JSONL or Parquet"
    return None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids there are, counted to the last that means something."""
    return max(tokenizer.get_vocab().values()) + 1


def context_of(model: PreTrainedModel) -> int:
    """The most tokens a model can read."""
    config = model.config.get_text_config()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
    return next((length for length in lengths if length), sys.maxsize)


def refuse_short_context(model: PreTrainedModel, tokens: int, what: str, setting: str) -> None:
    context = context_of(model)
    if tokens > context:
        raise UserError(f"{what} have up to {tokens} tokens, and {_name(model)} reads {context}: lower {setting}")


def refuse_missing_embeddings(model: PreTrainedModel, ids: Iterable[int], what: str) -> None:
    """A token without an embedding would be read from beyond the table."""
    rows, largest = len(model.get_input_embeddings().weight), max(ids)
    if largest >= rows:
        raise UserError(
            f"{what} have the id {largest}, and {_name(model)} has embeddings of {rows} tokens, fewer than its "
            "tokenizer: call its resize_token_embeddings(len(tokenizer)) and save it, or take what was added to the "
            "tokenizer out again"
        )


def vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a policy may draw: those that are tokens, of a model that may have more or fewer."""
    return min(vocabulary_of(tokenizer), len(model.get_input_embeddings().weight))


def _name(model: PreTrainedModel) -> str:
    return getattr(model, "name_or_path", "") or f"the {model.config.model_type} of model_config"


def _ids(texts: Sequence[str], chat: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A rendered chat holds all its special tokens; a plain text gets the start that the tokenizer puts there."""
    if not texts:
        return []
    if broken := next((text for text in texts if not is_text(text)), None):
        raise UserError(f"there is half a character, which no text has: {broken[:60]!a}")
    start = tokenizer.bos_token
    if start and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        # It may be typed there: some tokenizers read what follows a typed one in another way.
        texts = [text if rendered else text.removeprefix(start) for text, rendered in zip(texts, chat, strict=True)]
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    plain = [row for row, rendered in enumerate(chat) if not rendered]
    whole = tokenizer([texts[row] for row in plain])["input_ids"] if plain else []
    for row, ids in zip(plain, whole, strict=True):
        found[row] = _started(found[row], ids)
    return found


def _started(bare: list[int], whole: list[int]) -> list[int]:
    """`whole` is `bare` between what the tokenizer adds: with the first part of it, once, and without the last."""
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            start = whole[:place]
            return bare if bare[:place] == start else start + bare
    return whole  # this tokenizer reads a text in another way when it adds nothing


def _joined(prompt: Content, text: Content, tokenizer: PreTrainedTokenizerBase, finished: bool) -> str:
    if isinstance(prompt, str) and isinstance(text, str):
        return prompt + text
    before, after = ([] if isinstance(content, str) else content for content in (prompt, text))
    if finished:
        return _rendered(_conversation(before, after), tokenizer)
    return _opened([*before, *after[:-1]], tokenizer) + after[-1]["content"]


def _conversation(before: list[Message], after: list[Message]) -> list[Message]:
    """Both; where `after` goes on in the assistant's turn that `before` leaves open, they have one turn there."""
    if not _goes_on(before, after):
        return [*before, *after]
    return [
        *before[:-1],
        {**before[-1], **after[0], "content": before[-1]["content"] + after[0]["content"]},
        *after[1:],
    ]


def _goes_on(before: list[Message], after: list[Message]) -> bool:
    if not before or not after or {before[-1]["role"], after[0]["role"]} != {"assistant"}:
        return False
    kinds = {type(messages.get("content")) for messages in (before[-1], after[0])}
    return kinds in ({str}, {list})  # else it is a call of a tool


def _opened(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Up to where the assistant speaks on."""
    if messages[-1]["role"] == "assistant":
        return _rendered(messages, tokenizer, continue_final_message=True)
    return _rendered(messages, tokenizer, add_generation_prompt=True)


def _rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"the data are chat messages, and the tokenizer {tokenizer.name_or_path} has no chat template: "
            "take a model that has one, save its tokenizer with a `chat_template`, or bring plain text"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (ValueError, TypeError, KeyError, jinja2.TemplateError) as error:
        shown = readable(messages)[:60]
        raise UserError(
            f"the tokenizer's chat template does not take this conversation ({error}): {shown!r}"
        ) from error
    parts = [part for message in messages if isinstance(part := message.get("content"), list | dict) and part]
    if written := next((part for part in parts if str(part) in text), None):
        raise UserError(
            "the tokenizer's chat template takes text as a message's content, and would have the model read the parts "
            f"as Python writes them: make one text of them in the data: {str(written)[:60]!r}"
        )
    return text


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> bool:
    """Whether an end token is the last that is no blank: templates may put a line's end behind it."""
    for token in reversed(ids):
        if token in ends:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _from(ids: list[int], before: list[int]) -> list[bool]:
    """True from the first token that `before`, which comes first, does not have."""
    same = next((at for at, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), len(before))
    return [at >= same for at in range(len(ids))]


def _assistant_turns(ids: list[int], example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[bool], bool]:
    """The assistant's turns after the prompt, each with its end; False beside the last one alone."""
    before = [] if isinstance(example.prompt, str) else example.prompt
    after = [] if isinstance(example.text, str) else example.text
    messages, first = _conversation(before, after), len(before) - _goes_on(before, after)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"a conversation to learn from must end with the assistant: {readable(messages)[-60:]!r}")
    learned = [False] * len(ids)
    turns = [at for at in range(first, len(messages)) if messages[at]["role"] == "assistant"]
    for at in turns:
        asked = before if at < len(before) else messages[:at]  # the answer may begin inside a turn
        start = prompt_ids([asked], tokenizer)[0] if asked else []
        if at == turns[-1]:
            end = ids
        else:
            (end,) = _ids([_rendered(messages[: at + 1], tokenizer)], [True], tokenizer)
        if at != turns[-1] and (ids[: len(start)] != start or ids[: len(end)] != end):
            return _from(ids, prompt_ids([messages[:-1]], tokenizer)[0]), False
        for place, new in enumerate(_from(end, start)):
            learned[place] |= new
    return learned, True


def _shortened(
    content: Content, ids: list[int], most: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Content, list[int]] | None:
    """The end of a prompt: its last tokens, or its last turns under the system's message. None where nothing fits."""
    if isinstance(content, str):
        start = ids[:1] if ids[0] == tokenizer.bos_token_id and most > 1 else []
        kept = ids[len(ids) - most + len(start) :]
        return tokenizer.decode(kept), start + kept
    system = content[:1] if content[0]["role"] == "system" else []
    for at in range(len(system) + 1, len(content)):
        if content[at]["role"] != "user":
            continue
        messages = [*system, *content[at:]]
        (shorter,) = prompt_ids([messages], tokenizer)
        if len(shorter) <= most:
            return messages, shorter
    return None
