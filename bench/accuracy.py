"""How far each implementation is from float64, beside the eager code that a trainer writes: a table in Markdown.

``python -m bench.accuracy``. The truth is tests/lib/oracle.py; eager is PyTorch on the same inputs in float32.
A cell is the worst error over its data sets, and in brackets the largest ratio to eager's error on the same data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the package is imported

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

import ppo_kernels as pk
from ppo_kernels import backends
from tests.lib import oracle, oracle_groups
from tests.lib.helpers import as_array, eager_entropy, eager_logprobs, eager_policy_terms

IMPLS = ("torch", "cpu", "triton")
LOW = (torch.bfloat16, torch.float16, torch.float32)


class Data(NamedTuple):
    """One data set: what each implementation, eager code and the oracle make of it, by the name of the result."""

    op: str
    dtype: torch.dtype
    run: Callable[[str], dict[str, torch.Tensor]]
    eager: dict[str, torch.Tensor]
    truth: dict[str, np.ndarray]


def of_leaf(fn: Callable, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Outputs, and the gradient of the sum of them all."""
    leaf = x.detach().clone().requires_grad_()
    out = fn(leaf)
    out = out if isinstance(out, tuple) else (out,)
    sum(y.sum() for y in out if y.requires_grad).backward()
    return tuple(y.detach() for y in out), leaf.grad


def logits_of(kind: str, vocab: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, vocab, (4,), generator=g)
    z = torch.randn(4, vocab, generator=g) * {"flat": 1e-3, "peaked": 4.0, "far apart": 2.0, "p near 1": 1.0}[kind]
    if kind == "peaked":
        z[torch.arange(4), labels] += torch.tensor([0.0, 8.0, 16.0, 24.0])
    if kind == "far apart":
        z += torch.tensor([-1e4, 1e4, -100.0, 0.0])[:, None]
    if kind == "p near 1":
        z[torch.arange(4), labels] = torch.tensor([20.0, 25.0, 30.0, 40.0])
    return z, labels


def logprobs_data(g: torch.Generator) -> Iterator[Data]:
    for dtype in LOW:
        for kind in ("flat", "peaked", "far apart", "p near 1"):
            for vocab in (50257, 151936):
                z, y = logits_of(kind, vocab, g)
                z = z.to(dtype)
                logp, h, grad = oracle.token_logprobs(z, y, grad_logp=torch.ones(4), grad_entropy=torch.ones(4))
                names = ("log p", "entropy", "gradient") if kind != "p near 1" else ("log p, p near 1",)

                def results(fn, z=z, names=names):
                    out, grad = of_leaf(fn, z)
                    return dict(zip(names, (*out, grad), strict=False))

                yield Data(
                    "token_logprobs",
                    dtype,
                    lambda impl, y=y, results=results: results(
                        lambda x: pk.token_logprobs(x, y, entropy=True, impl=impl)
                    ),
                    results(lambda x, y=y: (eager_logprobs(x, y), eager_entropy(x))),
                    dict(zip(names, (logp, h, grad), strict=False)),
                )


def kl_data(g: torch.Generator) -> Iterator[Data]:
    for gap in (1e-3, 1e-2, 0.3):
        logp = -torch.rand(8, 1024, generator=g) * 4
        ref, scores = logp + torch.randn(8, 1024, generator=g) * gap, torch.randn(8, generator=g)
        rewards, kl = oracle.kl_rewards(logp, ref, scores, kl_estimator="k3", score_clip=None)
        d = ref - logp
        k3 = d.exp() - d - 1
        eager = -0.1 * k3
        eager[:, -1] += scores

        def run(impl, logp=logp, ref=ref, scores=scores):
            options = {"kl_estimator": "k3", "score_clip": None}
            out, sums = pk.kl_rewards(logp, ref, scores, **options, impl=impl)
            return {"k3 rewards": out[:, :-1], "k3 sums": sums}

        truth = {"k3 rewards": rewards[:, :-1], "k3 sums": kl}
        yield Data("kl_rewards", torch.float32, run, {"k3 rewards": eager[:, :-1], "k3 sums": k3.sum(1)}, truth)


def gae_data(g: torch.Generator) -> Iterator[Data]:
    for length, gamma, lam in ((1024, 1.0, 0.95), (32768, 1.0, 1.0), (32768, 0.999, 0.99)):
        r, v = torch.randn(2, length, generator=g) * 0.1, torch.randn(2, length, generator=g)
        adv, ahead_a, ahead_v = torch.zeros_like(r), torch.zeros(2), torch.zeros(2)
        for t in reversed(range(length)):
            ahead_a = r[:, t] + gamma * ahead_v - v[:, t] + gamma * lam * ahead_a
            ahead_v = v[:, t]
            adv[:, t] = ahead_a
        names = ("advantages", "returns")

        def run(impl, r=r, v=v, gamma=gamma, lam=lam, names=names):
            return dict(zip(names, pk.gae(r, v, gamma=gamma, lam=lam, impl=impl), strict=True))

        truth = dict(zip(names, oracle.gae(r, v, gamma=gamma, lam=lam), strict=True))
        yield Data("gae", torch.float32, run, {"advantages": adv, "returns": adv + v}, truth)


def whiten_data(g: torch.Generator) -> Iterator[Data]:
    for mean in (0.0, 100.0, 1e4):
        x = torch.randn(8, 4096, generator=g) + mean
        eager = (x - x.mean()) * torch.rsqrt(x.var() + 1e-8)

        def run(impl, x=x):
            return {"whitened": pk.whiten(x, impl=impl)}

        yield Data("whiten", torch.float32, run, {"whitened": eager}, {"whitened": oracle.whiten(x)})


def loss_data(g: torch.Generator) -> Iterator[Data]:
    names = ("loss", "gradient")

    def results(fn, x):
        out, grad = of_leaf(fn, x)
        return dict(zip(names, (out[0], grad), strict=True))

    for spread in (0.01, 0.5):
        old = -torch.rand(64, 1024, generator=g) * 6
        logp, adv = old + torch.randn(64, 1024, generator=g) * spread, torch.randn(64, 1024, generator=g)
        truth = oracle.policy_loss(logp, old, adv)
        yield Data(
            "policy_loss",
            torch.float32,
            lambda impl, logp=logp, old=old, adv=adv: results(
                lambda x: pk.policy_loss(x, old, adv, impl=impl)[0], logp
            ),
            results(lambda x, old=old, adv=adv: eager_policy_terms(x, old, adv).mean(), logp),
            {"loss": truth[0], "gradient": truth[2]},
        )
        v, ret = torch.randn(64, 1024, generator=g), torch.randn(64, 1024, generator=g) + 10.0
        old_v = v + torch.randn(64, 1024, generator=g) * spread
        truth = oracle.value_loss(v, old_v, ret)
        yield Data(
            "value_loss",
            torch.float32,
            lambda impl, v=v, old_v=old_v, ret=ret: results(lambda x: pk.value_loss(x, old_v, ret, impl=impl)[0], v),
            results(
                lambda x, old_v=old_v, ret=ret: (
                    0.5 * torch.max((x - ret) ** 2, (x.clamp(old_v - 0.2, old_v + 0.2) - ret) ** 2).mean()
                ),
                v,
            ),
            {"loss": truth[0], "gradient": truth[2]},
        )


def groups_data(g: torch.Generator) -> Iterator[Data]:
    def eager_p3o(x, old, ref, scores):
        s, s_old, r = (t.view(-1, 2) for t in ((x - ref).sum(1), (old - ref).sum(1), scores))
        d, d_old = s[:, 0] - s[:, 1], s_old[:, 0] - s_old[:, 1]
        q = r[:, 0] - r[:, 1] - 0.05 * d.detach()
        k = q * (s - s_old).detach().sum(1).exp().clamp(0.1, 10.0)
        return (0.5 * torch.maximum(-k * d, -k * torch.clamp(d, d_old - 0.2, d_old + 0.2)).mean(),)

    for spread in (0.1, 1.0):
        old = -torch.rand(32, 1024, generator=g) * 6
        logp, ref = old + torch.randn(2, 32, 1024, generator=g) * spread / 32
        rest = (old, ref, torch.randn(32, generator=g))
        truth = oracle_groups.p3o_loss(logp, *rest)

        def results(fn, x=logp):
            (loss,), grad = of_leaf(fn, x)
            return {"loss": loss, "gradient": grad}

        yield Data(
            "p3o_loss",
            torch.float32,
            lambda impl, results=results, rest=rest: results(lambda x: pk.p3o_loss(x, *rest, impl=impl)[0]),
            results(lambda x, rest=rest: eager_p3o(x, *rest)),
            {"loss": truth[0], "gradient": truth[2]},
        )
    for offset in (0.0, 100.0):
        scores = torch.randn(64, 8, generator=g) + offset
        eager = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
        flat = scores.flatten()
        yield Data(
            "group_advantages",
            torch.float32,
            lambda impl, flat=flat: {"advantages": pk.group_advantages(flat, group_size=8, mode="grpo", impl=impl)},
            {"advantages": eager.flatten()},
            {"advantages": oracle_groups.group_advantages(flat, group_size=8, mode="grpo")},
        )


# log p, entropy and whitened values are of the order of 1; the others are measured by the largest of their kind.
ABSOLUTE = ("log p", "entropy", "whitened")


def error(name: str, got: torch.Tensor, want: np.ndarray) -> float:
    """The largest error: absolute, or relative to the value itself near p = 1 and else to the largest value."""
    got, want = as_array(got), np.asarray(want)
    off = np.abs(got - want)
    if not np.isfinite(got).all():
        return float("inf")
    if name == "log p, p near 1":
        return float((off / np.abs(want)).max())
    return float(off.max() / (1.0 if name in ABSOLUTE else np.abs(want).max()))


def main() -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    worst: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    for data in (
        d for part in (logprobs_data, kl_data, gae_data, whiten_data, loss_data, groups_data) for d in part(g)
    ):
        have = backends.implementations(data.op, "cpu")
        outputs = {"eager": data.eager} | {impl: data.run(impl) for impl in IMPLS if impl in have}
        for name, want in data.truth.items():
            row = worst.setdefault((data.op, name, str(data.dtype).removeprefix("torch.")), {})
            base = error(name, data.eager[name], want)
            for impl, out in outputs.items():
                off = error(name, out[name], want)
                ratio = off / base if base else (0.0 if off == 0 else float("inf"))
                was = row.get(impl, (0.0, 0.0))
                row[impl] = max(was[0], off), max(was[1], ratio)
    print("| op | result | inputs | eager | " + " | ".join(IMPLS) + " |")
    print("|---|---|---|" + "---:|" * (1 + len(IMPLS)))
    for (op, name, dtype), row in worst.items():
        cells = [f"{row[i][0]:.1e} ({row[i][1]:.2f})" if i in row else "–" for i in IMPLS]
        kind = "" if name in ABSOLUTE else " (relative)"
        print(f"| {op} | {name}{kind} | {dtype} | {row['eager'][0]:.1e} | " + " | ".join(cells) + " |")
    print(f"\nWorst errors against float64, torch {torch.__version__}; in brackets the worst ratio to eager's.")
    print("Triton's figures come from its interpreter, not from a GPU.")


if __name__ == "__main__":
    main()
