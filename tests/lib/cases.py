"""One representative call of every op, for the contracts that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import ppo_kernels as pk
from tests.lib.helpers import cu, holey_mask


class Case(NamedTuple):
    op: str
    tensors: dict[str, torch.Tensor]
    call: Callable  # call(tensors, impl) -> tuple of outputs
    leaf: str | None  # the tensor that the op is differentiable in


def outputs(x) -> tuple[torch.Tensor, ...]:
    """Everything an op returns, flat: (loss, *stats) for the losses."""
    if torch.is_tensor(x):
        return (x,)
    return tuple(y for part in x for y in outputs(part))


def _token_logprobs(dtype, batch, length, g):
    vocab = 40 + length
    logits = (torch.randn(batch, length, vocab, generator=g) * 3).to(dtype)
    labels = torch.randint(0, vocab, (batch, length), generator=g)
    return {"logits": logits, "labels": labels, "mask": holey_mask(batch, length), "temperature": torch.tensor(0.8)}


def _tokens(dtype, batch, length, g, names):
    x = {name: (torch.randn(batch, length, generator=g) * 0.5 - 1).to(dtype) for name in names}
    return x | {"mask": holey_mask(batch, length)}


def _rows(dtype, batch, g, *names):
    return {name: torch.rand(batch, generator=g).to(dtype) for name in names}


def _pack(padded):
    batch, length = padded["mask"].shape
    return {k: x.reshape(-1) if x.dim() == 2 else x for k, x in padded.items()} | {"cu_seqlens": cu([length] * batch)}


def pick_rows(case: Case, rows: list[int]) -> dict[str, torch.Tensor]:
    """The case's tensors with only these rows, in this order."""
    if "cu_seqlens" not in case.tensors:
        return {k: x[rows] if x.dim() else x for k, x in case.tensors.items()}
    batch, tokens = case.tensors["cu_seqlens"].numel() - 1, case.tensors["mask"].numel()
    padded = {k: x.view(batch, -1) if x.numel() == tokens else x for k, x in case.tensors.items() if k != "cu_seqlens"}
    return _pack({k: x[rows] if x.dim() else x for k, x in padded.items()})


def fit(name: str, impl: str, length: int) -> int:
    """A length that the implementation can afford: a row of logits takes Triton's interpreter 25 ms."""
    return min(length, 4) if impl == "triton" and name.startswith("token_logprobs") else length


def make(name: str, dtype=torch.float32, batch=4, length=None, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)
    op, _, variant = name.partition(":")
    if length is None:
        length = 9 if op == "token_logprobs" else 33
    if op == "token_logprobs":
        entropy = {"": False, "entropy": True, "detached": "detached"}[variant]
        tensors = _token_logprobs(dtype, batch, length, g)
        return Case(op, tensors, lambda t, impl: outputs(pk.token_logprobs(**t, entropy=entropy, impl=impl)), "logits")
    if op == "kl_rewards":
        tensors = _tokens(dtype, batch, length, g, ("logprobs", "ref_logprobs"))
        tensors |= _rows(dtype, batch, g, "scores") | {"score_index": torch.randint(-1, length, (batch,), generator=g)}
        options, leaf = {"kl_estimator": "k3", "kl_log_clamp": 20.0, "kl_clamp": 10.0}, None
    elif op == "gae":
        tensors = _tokens(dtype, batch, length, g, ("rewards", "values"))
        tensors |= _rows(dtype, batch, g, "lam", "bootstrap_value")
        options, leaf = {"gamma": 0.97, "masked_steps": "zero"}, None
    elif op in ("whiten", "moments"):
        tensors, options, leaf = _tokens(dtype, batch, length, g, ("x",)), {}, None
    elif op == "policy_loss":
        tokens = ("logprobs", "old_logprobs", "advantages", "weights", "ref_logprobs")
        tensors = _tokens(dtype, batch, length, g, tokens) | _rows(dtype, batch, g, "row_weight")
        tensors["normalizer"] = torch.tensor(17.0)
        options, leaf = {"cliprange": (0.2, 0.3), "dual_clip": 3.0, "kl_coef": 0.1, "kl_estimator": "k3"}, "logprobs"
    elif op == "value_loss":
        tensors = _tokens(dtype, batch, length, g, ("values", "old_values", "returns"))
        tensors |= _rows(dtype, batch, g, "row_weight") | {"normalizer": torch.tensor(9.0)}
        options, leaf = {"cliprange_value": 0.3}, "values"
    elif op == "p3o_loss":
        batch += batch % 2  # pairs
        tensors = _tokens(dtype, batch, length, g, ("logprobs", "old_logprobs", "ref_logprobs"))
        tensors["mask"][1:4] |= torch.arange(length) % 3 == 0  # a row without a valid token has no pair
        tensors |= _rows(dtype, batch, g, "scores") | {"normalizer": torch.tensor(5.0), "kl_coef": torch.tensor(0.1)}
        options, leaf = {"variant": "separate" if variant == "separate" else "joint", "cliprange": 2.0}, "logprobs"
    elif op == "group_advantages":
        tensors = _rows(dtype, batch, g, "scores") | {"group_ids": torch.arange(batch) % 2}
        options, leaf = {"mode": "grpo"}, None
    else:
        raise AssertionError(name)
    if variant == "packed":
        tensors = _pack(tensors)
    fn = getattr(pk, op)
    return Case(op, tensors, lambda t, impl: outputs(fn(**t, **options, impl=impl)), leaf)


NAMES = (
    "token_logprobs",
    "token_logprobs:entropy",
    "token_logprobs:detached",
    "kl_rewards",
    "kl_rewards:packed",
    "gae",
    "gae:packed",
    "whiten",
    "moments",
    "policy_loss",
    "policy_loss:packed",
    "value_loss",
    "value_loss:packed",
    "p3o_loss",
    "p3o_loss:separate",
    "p3o_loss:packed",
    "group_advantages",
)
#: The others have one output per batch, or rows that know of each other.
ROWWISE = tuple(
    name for name in NAMES if name.split(":")[0] not in ("whiten", "moments", "p3o_loss", "group_advantages")
)
MASKED = tuple(name for name in NAMES if name not in ("moments", "group_advantages"))  # with an output per token
DIFFERENTIABLE = tuple(
    name for name in NAMES if name.split(":")[0] in ("token_logprobs", "policy_loss", "value_loss", "p3o_loss")
)


def run(case: Case, impl: str, tensors=None) -> tuple[torch.Tensor, ...]:
    """Outputs detached, and the gradient last if there is one: upstream ones of different sizes."""
    tensors = dict(case.tensors if tensors is None else tensors)
    if case.leaf is None:
        return case.call(tensors, impl)
    leaf = tensors[case.leaf] = tensors[case.leaf].detach().clone().requires_grad_()
    out = case.call(tensors, impl)
    torch.autograd.backward([x.sum() * (1 + i) for i, x in enumerate(out) if x.requires_grad])
    return (*(x.detach() for x in out), leaf.grad)
