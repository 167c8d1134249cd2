"""p3o_loss and group_advantages on random batches of every kind against the oracle."""

import os
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import oracle
from ppo_kernels import group_advantages, p3o_loss
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import NAN, assert_close_to_oracle, grad_of, out_dtype
from tests.lib.strategies import DTYPES, batches, poisoned, poisons

EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)


def total_of(x, y, valid) -> float:
    return float((x.double() - y.double())[valid].abs().nan_to_num(0.0).sum())


@st.composite
def p3o_calls(draw):
    batch = draw(batches().filter(lambda b: b.rows != 1))
    sizes = [k for k in (2, 3, 4) if batch.rows % k == 0]
    gap = draw(st.sampled_from([2.0**-6, 0.0, 2.0**-10, 0.25, 4.0]))
    old = batch.normal(2.0)
    tensors = {
        "logprobs": (old.double() + batch.normal(gap).double()).to(batch.dtype),
        "old_logprobs": old,
        "ref_logprobs": (old.double() + batch.normal(draw(st.sampled_from([0.125, 0.0, 2.0]))).double()).to(
            batch.dtype
        ),
    }
    bad = draw(poisons(tuple(tensors)))
    poisoned(batch, tensors, (bad[0], NAN) if bad else None)
    tensors = {name: batch.view(x) for name, x in tensors.items()} | {"scores": batch.normal(rows=True)}
    options = batch.options | {
        "variant": draw(st.sampled_from(["joint", "separate"])),
        "group_size": draw(st.sampled_from(sizes)),
        "kl_coef": draw(st.sampled_from([0.0625, 0.0, torch.tensor(0.5)])),
        "cliprange": draw(st.sampled_from([0.21, 0.0, 1.0])),
        "weight_clip": draw(st.sampled_from([10.0, 1.0, 1.5])),
        "log_ratio_clamp": draw(st.sampled_from([20.0, 1.0, *([None] if gap < 0.25 else [])])),
        "normalizer": draw(st.sampled_from([None, 4.0, torch.tensor(7), torch.tensor([2.5]), 0.0])),
    }
    return batch, tensors, options, draw(st.sampled_from([None, torch.tensor(-2.5)]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=p3o_calls())
def test_any_p3o_loss_matches_the_oracle(require_impl, impl, call):
    batch, tensors, options, grad_output = call
    impl, logp = require_impl("p3o_loss", impl), tensors["logprobs"]
    others = [x for name, x in tensors.items() if name != "logprobs"]
    (loss, stats), grad = grad_of(lambda x: p3o_loss(x, *others, batch.mask, impl=impl, **options), logp, grad_output)
    want, want_stats, want_grad = oracle.p3o_loss(**tensors, mask=batch.mask, **options)

    # All is float64 inside, so that what counts is one rounding of the result; sums over rows and pairs may cancel.
    u = torch.finfo(out_dtype(batch.dtype)).eps
    nats = total_of(logp, tensors["old_logprobs"], batch.valid)
    nats += total_of(tensors["old_logprobs"], tensors["ref_logprobs"], batch.valid)
    noise = 1e-14 * (1.0 + nats)
    wide = np.exp(min(nats, 40.0)) if options["log_ratio_clamp"] is None else np.exp(options["log_ratio_clamp"])
    sizes = {"loss": 0.0, **want_stats}
    size = max(options["weight_clip"] * (1.0 + nats) ** 2 * min(wide, 1e12), 1.0)

    def close(got, expected, what, rounding=0.0, least=0.0):
        scale = (4 * u + rounding + noise) * np.abs(np.nan_to_num(expected)) + 1e-16 * size + least
        assert_close_to_oracle(got, expected, ceiling=1.0, scale=scale, what=what)

    close(loss.detach(), want, "loss")
    for name, got in stats._asdict().items():
        close(got, sizes[name], name)
    kind = torch.finfo(grad.dtype)
    least = max(kind.smallest_normal * kind.eps, torch.finfo(torch.float32).smallest_normal)
    factor = 1.0 if grad_output is None else float(grad_output)
    close(grad, want_grad * factor, "gradient", kind.eps if grad.dtype.itemsize == 2 else 0.0, least)
    assert not grad[~batch.valid].any()


@st.composite
def groups(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    count = draw(st.sampled_from([7, 1, 2, 31, 33, 64, 130, 0]))
    wild = torch.tensor([0, 1, -1, 2**31, -(2**31), 2**40, 2**62, -(2**62)])
    ids = wild[torch.randint(0, draw(st.integers(1, len(wild))), (count,), generator=g)]
    scores = torch.randn(count, generator=g, dtype=torch.float64) * draw(st.sampled_from([1.0, 0.0, 2.0**-10, 32.0]))
    scores = (scores + draw(st.sampled_from([0.0, 100.0]))).to(draw(st.sampled_from(DTYPES)))
    mode, scale = draw(st.sampled_from(SCALED))
    return scores, ids, {"mode": mode, "scale_rewards": scale, "eps": draw(st.sampled_from([None, 1e-6, 0.5]))}


SCALED = [(mode, None) for mode in ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")]
SCALED += [("rloo", "group"), ("grpo", "batch")]


def divisors(scores, ids, mode, scale_rewards, eps):
    """What each difference of scores is divided by: the smaller it is, the more the difference's rounding shows."""
    groups = [ids == one for one in ids]
    if scale_rewards == "group":
        others = [scores[group & (np.arange(len(ids)) != i)] for i, group in enumerate(groups)]
        deviation = np.asarray([rest.std(ddof=1) if len(rest) > 1 else 0.0 for rest in others])
        return np.where(deviation > 0, deviation + (1e-4 if eps is None else eps), 1.0)
    if scale_rewards == "batch" and len(scores) > 1:
        return np.full(len(scores), scores.std(ddof=1) + (1e-4 if eps is None else eps))
    if mode == "grpo":
        deviation = [scores[group].std(ddof=1) if group.sum() > 1 else 0.0 for group in groups]
        return np.asarray(deviation) + (1e-4 if eps is None else eps)
    if mode == "reinforce++_baseline" and len(scores) > 1:
        centred = scores - [scores[group].mean() for group in groups]
        return np.sqrt(centred.var(ddof=1) + (1e-8 if eps is None else eps))
    return np.ones(len(scores))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=groups())
def test_any_groups_match_the_oracle(require_impl, impl, call):
    scores, ids, options = call
    got = group_advantages(scores, ids, impl=require_impl("group_advantages", impl), **options)
    want = oracle.group_advantages(scores, ids, **options)
    size = max(np.abs(want).max(initial=0.0), 1e-30)
    spread = float(scores.double().abs().max()) if len(scores) else 0.0
    noise = spread / divisors(scores.double().numpy(), ids.numpy(), **options)
    assert_close_to_oracle(got, want, ceiling=1.0, scale=4 * torch.finfo(got.dtype).eps * size + 1e-15 * noise)


OF_THE_BATCH = ({"mode": "grpo", "scale_rewards": "batch"}, {"mode": "gdpo"}, {"mode": "reinforce++_baseline"})


def _rank(rank, port, scores, ids, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for i, options in enumerate(OF_THE_BATCH):
        group = torch.distributed.group.WORLD
        out = group_advantages(scores[rank], ids[rank], process_group=group, impl="cpu", **options)
        torch.save(out, f"{results}/{rank}-{i}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_share_the_statistics_of_the_batch(tmp_path):
    """Groups on one rank each, several rewards, of which some are missing; one rank has fewer responses."""
    scores, ids = torch.randn(30, 2), torch.arange(30) // 5
    scores[3, 1], scores[21] = float("nan"), float("inf")
    parts = [scores[:20], scores[20:]], [ids[:20], ids[20:]]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, *parts, str(tmp_path)), nprocs=2)
    for i, options in enumerate(OF_THE_BATCH):
        got = torch.cat([torch.load(tmp_path / f"{rank}-{i}.pt", weights_only=True) for rank in range(2)])
        assert_close_to_oracle(got, oracle.group_advantages(scores, ids, **options), ceiling=1e-6, scale=4.0)
