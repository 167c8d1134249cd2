"""Token ids are those of the tokenizer, of each family, whatever is done with them."""

import functools

import pytest
import torch

from python_trainer import sft as sft_module
from python_trainer.config import RewardConfig, SamplingConfig, SftConfig, UserError
from python_trainer.data import Example, Pair, Prompt, left_pad
from python_trainer.sft import reward, sft
from python_trainer.tokens import encode_examples, encode_prompts, prompt_ids, whole_ids
from tests.lib.text_models import FAMILIES, TEMPLATE, saved, tokenizer_of, write_rows

TEXT = "2 + 2 ="
ASKED = [{"role": "user", "content": "2 + 2"}]
TALK = [
    {"role": "system", "content": "add"},
    *ASKED,
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3 + 4"},
]
ANSWER = [{"role": "assistant", "content": "7"}]
EARLIER = "{{ '...' if message.role == 'assistant' and not loop.last else message.content }}"
REWRITING = TEMPLATE.replace("{{ message.content }}", EARLIER)


@pytest.fixture(params=["bytes", "metaspace"])
def make(request):
    return lambda family, **more: tokenizer_of(family, metaspace=request.param == "metaspace", **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_ids_of_the_tokenizer(make, family):
    """But not an end token that it adds: nothing would come after it."""
    tokenizer = make(family)
    theirs = tokenizer(TEXT)["input_ids"]
    if family in ("end", "both"):
        assert theirs.pop() == tokenizer.eos_token_id
    assert prompt_ids([TEXT], tokenizer) == [theirs]
    starts = family not in ("neither", "end")
    assert (theirs[0] in (tokenizer.bos_token_id, tokenizer.eos_token_id)) == starts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_or_an_end_that_is_typed_is_not_doubled(make, family):
    tokenizer = make(family)
    (plain,) = whole_ids([("", TEXT)], tokenizer, [tokenizer.eos_token_id])
    assert plain.count(tokenizer.eos_token_id) == (2 if family == "begins with its end" else 1)
    assert plain[-1] == tokenizer.eos_token_id
    assert whole_ids([("", TEXT + "</s>")], tokenizer, [tokenizer.eos_token_id]) == [plain]
    start = FAMILIES[family][0]
    if start == "<s>":
        assert prompt_ids([start + TEXT], tokenizer) == prompt_ids([TEXT], tokenizer)
    typed = prompt_ids(["</s>" + TEXT], tokenizer)[0]
    assert typed.count(tokenizer.eos_token_id) == 1
    # What is typed at a prompt's end stands there; another end token of the model's ends a text as well.
    assert prompt_ids([TEXT + "</s>"], tokenizer)[0][-1] == tokenizer.eos_token_id
    assert whole_ids([("", TEXT)], tokenizer, [tokenizer.eos_token_id, plain[-2]]) == [plain[:-1]]


def test_a_prompt_and_its_answer_are_one_text(make):
    tokenizer = make("start")
    (together,) = whole_ids([(TEXT, " 4")], tokenizer, [tokenizer.eos_token_id])
    assert together == [*tokenizer(TEXT + " 4")["input_ids"], tokenizer.eos_token_id]
    assert whole_ids([(TEXT, " 4")], tokenizer, [tokenizer.eos_token_id], [False]) == [together[:-1]]


@pytest.mark.parametrize("messages", [ASKED, TALK], ids=["one turn", "several"])
@pytest.mark.parametrize("family", ["start", "both", "neither"])
def test_messages_have_the_ids_of_the_chat_template(make, family, messages):
    tokenizer = make(family, chat=True)
    options = {"tokenize": True, "return_dict": False}
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    assert prompt_ids([messages], tokenizer) == [theirs]
    assert theirs.count(tokenizer.bos_token_id) == 1
    whole = tokenizer.apply_chat_template(messages + ANSWER, **options)
    assert whole_ids([(messages, ANSWER)], tokenizer, [tokenizer.eos_token_id]) == [whole]
    (open_ended,) = whole_ids([(messages, ANSWER)], tokenizer, [], [False])
    assert tokenizer.decode(open_ended) == tokenizer.decode(theirs) + "7"
    begun = [*messages, {"role": "assistant", "content": "The"}]
    assert tokenizer.decode(prompt_ids([begun], tokenizer)[0]) == tokenizer.decode(theirs) + "The"


def test_messages_without_a_template_or_against_it_are_refused():
    with pytest.raises(UserError, match="chat messages, and the tokenizer .* has no chat template: .* plain text"):
        prompt_ids([ASKED], tokenizer_of())
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + TEMPLATE
    with pytest.raises(UserError, match="does not take this conversation .the user speaks first.: 'system: add"):
        prompt_ids([TALK], tokenizer_of(chat=True, template=strict))


def test_the_parts_of_a_message_are_read_by_a_template_that_knows_them():
    """Another one writes them as Python does, and the model would read braces and quotes."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "add"}]}]
    with pytest.raises(UserError, match="takes text as a message's content.* one text of them .*'type': 'text'"):
        prompt_ids([parts], tokenizer_of(chat=True))
    knows = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    tokenizer = tokenizer_of(chat=True, template=knows)
    assert tokenizer.decode(prompt_ids([parts], tokenizer)[0]) == "add"


def learned(example: Example, tokenizer, *, completion_only: bool = True) -> list[str]:
    """The stretches of a text that are learned."""
    ends = [tokenizer.eos_token_id]
    (row,) = encode_examples([example], tokenizer, 100, completion_only=completion_only, ends=ends)
    parts, before = [], False
    for token, wanted in zip(row.ids, row.learned, strict=True):
        parts += [[]] if wanted and not before else []
        if wanted:
            parts[-1].append(token)
        before = wanted
    return [tokenizer.decode(part).replace("\n", "").replace("<s> ", "<s>").strip() for part in parts]


def test_what_is_learned(make, capsys):
    tokenizer = make("start", chat=True)
    assert learned(Example(TEXT), tokenizer) == ["<s>" + TEXT + "</s>"]
    assert learned(Example(" 4", TEXT), tokenizer) == ["4</s>"]
    assert learned(Example(" 4", TEXT), tokenizer, completion_only=False) == ["<s>" + TEXT + " 4</s>"]
    assert learned(Example(TALK + ANSWER), tokenizer) == ["4</s>", "7</s>"]
    assert learned(Example(ANSWER, TALK), tokenizer) == ["7</s>"]
    assert len(learned(Example(TALK + ANSWER), tokenizer, completion_only=False)) == 1
    with pytest.raises(UserError, match="must end with the assistant"):
        learned(Example(TALK), tokenizer)
    assert capsys.readouterr().out == ""


OPEN = [*ASKED, {"role": "assistant", "content": "It is"}]
GOES_ON = [{"role": "assistant", "content": " 4"}]


def test_an_answer_goes_on_in_the_turn_that_its_prompt_leaves_open(make):
    """For the policy, a reward model, pairs and imitation it is one turn."""
    tokenizer = make("start", chat=True)
    one_turn = [*ASKED, {"role": "assistant", "content": "It is 4"}]
    ends = [tokenizer.eos_token_id]
    closed, open_ended = (whole_ids([(OPEN, GOES_ON)], tokenizer, ends, [whole])[0] for whole in (True, False))
    assert closed == tokenizer.apply_chat_template(one_turn, tokenize=True, return_dict=False)
    assert tokenizer.decode(open_ended) == tokenizer.decode(prompt_ids([OPEN], tokenizer)[0]) + " 4"
    assert tokenizer.decode(closed).startswith(tokenizer.decode(open_ended))
    assert learned(Example(GOES_ON, OPEN), tokenizer) == ["4</s>"]
    more = [*GOES_ON, {"role": "user", "content": "3 + 4"}, *ANSWER]
    assert learned(Example(more, OPEN), tokenizer) == ["4</s>", "7</s>"]
    pair = Pair(GOES_ON, [{"role": "assistant", "content": " 5"}], 0.0, OPEN)
    (row,) = sft_module._encode_pairs([pair], tokenizer, ends, RewardConfig(max_length=100))
    assert row.chosen == closed


def test_templates_that_rewrite_earlier_turns_or_end_none(make, capsys):
    tokenizer = make("start", chat=True, template=REWRITING)
    assert learned(Example(TALK + ANSWER), tokenizer) == ["7</s>"]
    assert "1 of 1 conversations: their last turn alone is learned" in capsys.readouterr().out
    tokenizer = make("start", chat=True, template=TEMPLATE.replace("{{ eos_token }}", ""))
    assert learned(Example(ANSWER, ASKED), tokenizer) == ["7</s>"]


def test_texts_of_which_nothing_is_left_to_learn_are_counted(capsys):
    tokenizer = tokenizer_of()
    examples = [Example("4", "a long question"), Example("4", "q")]
    rows = encode_examples(examples, tokenizer, 8, completion_only=True, ends=[tokenizer.eos_token_id])
    assert [row.predicted for row in rows] == [0, 2]
    told = capsys.readouterr().out
    assert "1 of 2 texts are left out: within max_length 8 nothing of them is to be learned" in told
    assert "1 of 2 texts are cut at max_length 8" in told


def encoded(prompts, tokenizer, **settings):
    config = SamplingConfig(response_length=4, **settings)
    return encode_prompts(
        [Prompt(content, {"number": at}) for at, content in enumerate(prompts)], tokenizer, config, 40
    )


def test_prompts_that_are_too_long(capsys):
    tokenizer = tokenizer_of(chat=True)
    prompts = ["x" * 35, "0123456789" * 4, "y" * 36]  # with their start tokens 36, 41 and 37
    with pytest.raises(UserError, match="prompt of 41 tokens and response_length 4 .*context is 40 .*overlong_prompts"):
        encoded(prompts, tokenizer)
    with pytest.raises(UserError, match="prompt of 36 tokens .*max_prompt_length is 5"):
        encoded(prompts, tokenizer, max_prompt_length=5)
    kept = encoded(prompts, tokenizer, overlong_prompts="filter")
    assert [(prompt.content, prompt.columns["number"]) for prompt in kept] == [("x" * 35, 0)]
    assert "2 of 3 prompts are left out: they have more than 36 tokens" in capsys.readouterr().out
    kept = encoded(prompts, tokenizer, overlong_prompts="truncate", max_prompt_length=11)
    assert [prompt.content for prompt in kept] == ["x" * 10, "0123456789", "y" * 10]
    assert [list(prompt.ids) for prompt in kept] == prompt_ids([prompt.content for prompt in kept], tokenizer)
    assert "3 of 3 prompts have more than 11 tokens and lose their beginning" in capsys.readouterr().out
    with pytest.raises(UserError, match="every prompt has more than 2 tokens"):
        encoded(prompts, tokenizer, overlong_prompts="filter", max_prompt_length=2)


def test_a_chat_loses_its_first_turns(capsys):
    tokenizer = tokenizer_of(chat=True)
    tokens = len(prompt_ids([[TALK[0], TALK[3]]], tokenizer)[0])
    settings = {"overlong_prompts": "truncate", "max_prompt_length": tokens}
    wide = SamplingConfig(response_length=4, **settings)
    (kept,) = encode_prompts([Prompt(TALK)], tokenizer, wide, 1000)
    assert kept.content == [TALK[0], TALK[3]]
    assert "1 of 1 prompts have more than" in capsys.readouterr().out
    with pytest.raises(UserError, match="every prompt has more than"):
        encode_prompts([Prompt([TALK[3] | {"content": "x" * 200}])], tokenizer, wide, 1000)


@pytest.fixture
def brought(tmp_path):
    """A model with a start token, in a folder with data, and the settings that name both."""
    tokenizer = tokenizer_of("padded by its end", chat=True)
    model = saved(tmp_path / "policy", tokenizer)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{number} + 1 ="} for number in range(6)])
    write_rows(tmp_path / "texts.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(6)])
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(6)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "reward.py").write_text(
        "def score(prompts, completions, **_):\n    return [float(len(text)) for text in completions]\n"
    )
    common = {"task": "files", "data_path": str(tmp_path), "model_config": None, "disable_tqdm": True}
    return tokenizer, model, common | {"output_dir": str(tmp_path / "run")}


def rlhf(brought, tmp_path, **settings) -> dict:
    """Settings of train that every test of a rollout here has."""
    _, model, common = brought
    small = {"algorithm": "rloo", "batch_size": 4, "per_device_train_batch_size": 4, "num_ppo_epochs": 1}
    score = {} if "reward_model_path" in settings else {"reward_function": f"{tmp_path}/reward.py:score"}
    return common | small | {"sft_model_path": model, "response_length": 6} | score | settings


def test_every_stage_reads_the_ids_of_the_tokenizer(brought, tiny, tmp_path, monkeypatch):
    """Padding with the end token too: lengths come from what was written and drawn."""
    tokenizer, model, common = brought
    seen = {"sft": [], "reward": []}
    for stage, name in (("sft", "text_losses"), ("reward", "pair_loss")):

        def watched(plain, model, rows, *more, stage=stage):
            seen[stage].extend(rows)
            return plain(model, rows, *more)

        monkeypatch.setattr(sft_module, name, functools.partial(watched, getattr(sft_module, name)))
    sizes = {"model_path": model, "max_steps": 2, "batch_size": 4, "max_length": 20}
    sft(SftConfig(**common, **sizes))
    reward(RewardConfig(**common, **sizes))
    eos = tokenizer.eos_token_id
    whole = {tuple([*tokenizer(f"{n} + 1 = {n + 1}")["input_ids"], eos]) for n in range(6)}
    assert {tuple(row.ids) for row in seen["sft"]} | {tuple(row.chosen) for row in seen["reward"]} <= whole
    assert all(tokenizer.decode([t for t, new in zip(*row, strict=True) if new])[2:] == "</s>" for row in seen["sft"])
    trainer = tiny(**rlhf(brought, tmp_path, ptx_coef=1.0))
    assert {tuple(row.ids) for row in trainer.ptx.rows} <= whole
    rollout = trainer.collect_experience().rollout
    asked = [ids[mask].tolist() for ids, mask in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    prompts = [tokenizer(f"{n} + 1 =")["input_ids"] for n in range(6)]
    assert all(any(row[: len(ids)] == ids for ids in prompts) for row in asked)
    assert all(row.count(tokenizer.bos_token_id) >= 1 for row in asked)
    trainer.train_step()


def test_a_function_gets_chat_where_the_data_are_chat(brought, tiny, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 1"}], "answer": n + 1} for n in range(6)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    trainer = tiny(**rlhf(brought, tmp_path))
    calls = []
    trainer.reward_fn.functions[0] = lambda prompts, completions, answer: (
        calls.append((prompts, completions, answer)) or [0.0] * len(prompts)
    )
    rollout = trainer.collect_experience().rollout
    prompts, completions, answers = calls[0]
    assert prompts == [[{"role": "user", "content": f"{answer - 1} + 1"}] for answer in answers]
    assert all(message["role"] == "assistant" for (message,) in completions)
    tokenizer = trainer.tokenizer
    shown = tokenizer.decode(rollout.sequences[0][rollout.attention_mask[0]])
    assert shown.startswith(f"<s><user>{answers[0] - 1} + 1</s>\n<assistant>" + completions[0][0]["content"])


class Recorder(torch.nn.Module):
    """A reward model of which the tokens that it reads are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.read = []

    def forward(self, input_ids, attention_mask, **_):
        self.read += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return attention_mask.cumsum(dim=1).float()  # at the end: how many tokens there are


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_a_reward_model_with_another_tokenizer_reads_the_text(brought, tiny, tmp_path, kind):
    tokenizer, _, _ = brought
    if kind == "chat":
        rows = [{"prompt": [{"role": "user", "content": f"{n} + 1"}]} for n in range(6)]
        write_rows(tmp_path / "prompts.jsonl", rows)
    own = tokenizer_of(
        "both", marks=["<one>", "<more>"], chat=True, template=TEMPLATE.replace("<assistant>", "<model>")
    )
    scorer = saved(tmp_path / "scorer", own, scores=True)
    trainer = tiny(**rlhf(brought, tmp_path, reward_model_path=scorer))
    trainer.reward_fn.model = Recorder()
    experience = trainer.collect_experience()
    rollout = experience.rollout
    width = rollout.prompt_width
    ended = experience.ended.tolist()
    answers = [
        tokenizer.decode(row[width:][mask[width:]], skip_special_tokens=True)
        for row, mask in zip(rollout.sequences, rollout.attention_mask, strict=True)
    ]
    texts = [own.decode(ids) for ids in trainer.reward_fn.model.read]
    assert len(texts) == 4
    for text, answer, done in zip(texts, answers, ended, strict=True):
        assert text.startswith("<s>")
        assert text.count("<s>") == 1
        if kind == "plain":
            assert text.removesuffix("</s>").endswith("+ 1 =" + answer)
            assert text.endswith("</s>") == done
        else:
            assert ("<model>" + answer) in text or ("<assistant>" + answer + "</s>") in text
    lengths = [float(len(ids)) for ids in trainer.reward_fn.model.read]
    assert experience.raw_scores.tolist() == lengths


def test_a_reward_model_with_the_same_tokenizer_reads_the_ids(brought, tiny, tmp_path):
    longer = tokenizer_of("padded by its end", chat=True)
    longer.add_special_tokens({"pad_token": "<|pad|>"})  # one token more changes none of the others
    scorer = saved(tmp_path / "scorer", longer, scores=True)
    trainer = tiny(**rlhf(brought, tmp_path, reward_model_path=scorer, algorithm="ppo", value_model_init="reward"))
    trainer.reward_fn.model = Recorder()
    rollout = trainer.collect_experience().rollout
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    assert trainer.reward_fn.model.read == rows


@pytest.mark.parametrize("key", ["value_model_init", "value_model_path"])
def test_a_critic_with_another_tokenizer_is_refused(brought, tiny, tmp_path, key):
    scorer = saved(tmp_path / "scorer", tokenizer_of("both", metaspace=True), scores=True)
    value = {"value_model_init": "reward"} if key == "value_model_init" else {"value_model_path": scorer}
    with pytest.raises(UserError, match="scorer has another tokenizer than the policy, whose ids a critic reads"):
        tiny(**rlhf(brought, tmp_path, reward_model_path=scorer, algorithm="ppo", **value))


def test_ids_that_are_no_tokens_are_never_drawn(brought, tiny, tmp_path):
    """Embeddings are often padded to a round number of rows."""
    tokenizer, _, _ = brought
    model = saved(tmp_path / "padded", tokenizer, vocab_size=4 * len(tokenizer))
    trainer = tiny(**rlhf(brought, tmp_path, sft_model_path=model, batch_size=32, per_device_train_batch_size=32))
    ids, attention = left_pad([trainer.train_prompts[0].ids] * 32, tokenizer.pad_token_id)
    with trainer.generator.serving(trainer.actor, tokenizer) as generate:
        drawn, _ = generate(ids, attention, torch.linspace(0, 1 - 1e-9, 32, dtype=torch.float64)[:, None])
    assert drawn.max() < len(tokenizer)
    experience = trainer.collect_experience()
    assert experience.rollout.responses[experience.mask].max() < len(tokenizer)
    trainer.update(experience)
    assert experience.logprobs[experience.mask].min() > -20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pad", "pad or end token have the id 258, and .*policy has embeddings of 258 tokens.*resize_token_embeddings"),
        ("word", "prompts have the id 258, and .*policy has embeddings of 258 tokens"),
        ("reward", "reward_model_path: texts have the id .*embeddings of 200 tokens"),
        ("reward context", "prompts with their responses have .* 14 tokens, and .*scorer reads 12: lower max_prompt"),
        ("critic context", "prompts with their responses have .* 14 tokens, and .*scorer reads 12: lower max_prompt"),
    ],
)
def test_models_that_cannot_hold_the_tokens_are_refused(brought, tiny, tmp_path, change, message):
    tokenizer, model, _ = brought
    settings = {}
    if change == "pad":
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    elif change == "word":
        tokenizer.add_tokens(["<|word|>"])
        write_rows(tmp_path / "prompts.jsonl", [{"prompt": "<|word|>"}, {"prompt": "a"}])
    else:
        less = {"vocab_size": 200} if change == "reward" else {"max_position_embeddings": 12}
        scorer = saved(tmp_path / "scorer", tokenizer, scores=True, **less)
        key = "value_model_path" if change == "critic context" else "reward_model_path"
        settings = {key: scorer, "algorithm": "ppo" if change == "critic context" else "rloo"}
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=message):
        tiny(**rlhf(brought, tmp_path, **settings))


@pytest.mark.parametrize(("stage", "config"), [(sft, SftConfig), (reward, RewardConfig)])
def test_texts_and_pairs_beyond_the_context_are_refused(brought, tmp_path, stage, config):
    tokenizer, _, common = brought
    model = saved(tmp_path / "short", tokenizer, max_position_embeddings=8)
    with pytest.raises(UserError, match="(texts|pairs) have up to 1[0-2] tokens, and .*reads 8: lower max_length"):
        stage(config(**common, model_path=model, max_length=64, max_steps=1))


def test_a_folder_without_a_tokenizer_is_not_one_with_an_empty_one(brought, tiny, tmp_path):
    model = saved(tmp_path / "bare", tokenizer_of(), model_type="qwen2")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="bare (has|holds) no tokenizer|cannot load a model from .*bare"):
        tiny(**rlhf(brought, tmp_path, sft_model_path=model))
