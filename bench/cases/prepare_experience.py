"""prepare_experience: the contract of the chain, which experience.py times."""

from __future__ import annotations

from bench.cases import ESTIMATORS, Case, packed, rows, tokens


def contract_inputs(g, dtype, batch, length):
    x = tokens(g, dtype, batch, length, "logprobs", "ref_logprobs", "values")
    return x | rows(g, dtype, batch, "scores", "lam", "bootstrap_value")


CONTRACT = Case(
    op="prepare_experience",
    contract=True,
    inputs=contract_inputs,
    options={"gamma": 0.97, "kl_coef": 0.1, "score_clip": 0.4},
    rowwise=False,
    choices={"kl_estimator": ESTIMATORS},
)
CASES = (CONTRACT, packed(CONTRACT))
