"""Log-probabilities of the labels: the one op that reads the logits."""

from __future__ import annotations

import torch

from bench import rows, setups

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = {"small": 64, "full": 1024}
ROWS_BACKWARD = {"small": 64, "full": 256}
VOCAB = {"small": 32000, "full": 151936}


def rows_of(size: str) -> list[rows.Row]:
    full = size == "full"
    if setups.DEVICE == "cuda":
        forward, backward = (8192, VOCAB[size]), (8192, VOCAB[size])
    else:
        forward, backward = (ROWS[size], VOCAB[size]), (ROWS_BACKWARD[size], VOCAB[size])
    return [
        *rows.of(setups.token_logprobs(BF16, *forward)),
        *rows.of(setups.token_logprobs(FP32, *forward), compiled=full),
        *rows.of(setups.token_logprobs(BF16, *forward, entropy=True), compiled=full),
        *rows.of(setups.token_logprobs(BF16, *backward, backward=True)),
        *rows.of(setups.token_logprobs(FP32, *backward, backward=True), compiled=full),
    ]


def bench_token_logprobs(measure, row):
    measure(row)
