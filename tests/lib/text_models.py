"""Tokenizers of each family, a byte a token, and models of them: what people bring, small enough to make in a test."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
# Turns as <user>...</s> and a line's end, which stands behind the end token.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# (what is put before a text, and behind it; the padding token)
FAMILIES = {
    "neither": ("", "", "<pad>"),
    "start": ("<s>", "", "<pad>"),
    "end": ("", "</s>", "<pad>"),
    "both": ("<s>", "</s>", "<pad>"),
    "padded by its end": ("<s>", "", "</s>"),
    "not padded": ("<s>", "", None),
    "begins with its end": ("</s>", "", "<pad>"),
}


def tokenizer_of(
    family: str = "start", *, metaspace: bool = False, chat: bool = False, **more
) -> PreTrainedTokenizerBase:
    """`metaspace`: a word's first letter has the blank before it, as in Llama 2, so that a text's start matters."""
    before, behind, pad = FAMILIES[family]
    marks = [mark for mark in ("<pad>", "<s>", "</s>") if mark != "<pad>" or pad == mark] + more.pop("marks", [])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = marks + letters + ([f"▁{letter}" for letter in letters] + ["▁"] if metaspace else [])
    merges = [("▁", letter) for letter in letters] if metaspace else []
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {behind}".strip(), special_tokens=[(mark, words.index(mark)) for mark in ("<s>", "</s>")]
    )
    special = {} if pad is None else {"pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **special)
    if chat:
        tokenizer.chat_template = more.pop("template", TEMPLATE)
    return tokenizer


def saved(folder, tokenizer, *, scores: bool = False, seed: int = 0, **settings) -> str:
    """A model in the folder with its tokenizer, of random weights."""
    torch.manual_seed(seed)
    known = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = AutoConfig.for_model(**LLAMA | known | {"pad_token_id": tokenizer.pad_token_id} | settings)
    if scores:
        config.num_labels = 1
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
