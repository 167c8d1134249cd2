"""p3o_loss: the clipped loss on differences between answers to one prompt, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.cases import GPU, MINIBATCH, Case, Data, meetings, normal, packed, right_padded, rows, tokens, uniform

# [B, T] and the size of a group: every number of members that a program takes.
GROUPS = (((4, 64), 4), ((6, 7), 3), ((2, 8192), 2), ((6, 3001), 6), ((64, 512), 16), ((64, 512), 64))


def eager(logprobs, old_logprobs, ref_logprobs, scores, mask, group_size):
    """Joint clipping, all pairs of each group."""
    s, s_old = ((x - ref_logprobs).mul(mask).sum(1).view(-1, group_size) for x in (logprobs, old_logprobs))
    first, second = torch.triu_indices(group_size, group_size, 1, device=logprobs.device)
    r = scores.view(-1, group_size)
    d, d_old = s[:, first] - s[:, second], s_old[:, first] - s_old[:, second]
    q = r[:, first] - r[:, second] - 0.05 * d.detach()
    drift = (s - s_old).detach()
    k = q * (drift[:, first] + drift[:, second]).exp().clamp(0.1, 10.0)
    return 0.5 * torch.max(-k * d, -k * torch.clamp(d, d_old - 0.2, d_old + 0.2)).mean()


def inputs(g, dtype, batch, length):
    logprobs = -uniform(g, batch, length)
    old_logprobs, ref_logprobs = logprobs + normal(g, 2, batch, length) * 0.3 / length**0.5
    x = {"logprobs": logprobs, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    return x | {"scores": normal(g, batch), "mask": right_padded(g, batch, length)}


def contract_inputs(g, dtype, batch, length):
    batch += batch % 2  # pairs
    x = tokens(g, dtype, batch, length, "logprobs", "old_logprobs", "ref_logprobs")
    x["mask"][1:4] |= torch.arange(length) % 3 == 0  # a row without a valid token has no pair
    x |= rows(g, dtype, batch, "scores")
    return x | {"normalizer": torch.tensor(5.0), "kl_coef": torch.tensor(0.1)}


def work(group_size, shapes, **more):
    return Case(
        op="p3o_loss",
        work=f"p3o_loss of {group_size} fwd+bwd",
        inputs=inputs,
        options={"group_size": group_size},
        leaf="logprobs",
        eager=lambda **x: eager(**x, group_size=group_size),
        moved=lambda x: 4 * x["logprobs"].nbytes + x["mask"].nbytes,
        eager_tolerance=1e-3,
        shapes=shapes,
        **more,
    )


def accuracy(g):
    for spread in (0.1, 1.0):
        old = -torch.rand(32, 1024, generator=g) * 6
        logp, ref = old + torch.randn(2, 32, 1024, generator=g) * spread / 32
        x = {"logprobs": logp, "old_logprobs": old, "ref_logprobs": ref, "scores": torch.randn(32, generator=g)}
        yield Data(x | {"mask": torch.ones(32, 1024, dtype=torch.bool)}, ("loss", "gradient"))


JOINT = Case(
    op="p3o_loss",
    contract=True,
    rowwise=False,
    inputs=contract_inputs,
    options={"variant": "joint", "cliprange": 2.0},
    leaf="logprobs",
    reach=tuple((torch.float32, shape, {"group_size": size}) for shape, size in GROUPS),
    gradcheck=False,  # q and the weights are constants of the loss
    bare_options={"log_ratio_clamp": None},
    meetings=meetings(((512, 2048),), ((16, 1001),), group_size=(2, 8)),
)
CASES = (
    JOINT,
    replace(JOINT, variant="separate", options={"variant": "separate", "cliprange": 2.0}),
    packed(JOINT),
    work(2, MINIBATCH | {"gpu": GPU[:1]}, accuracy=accuracy),
    work(8, {"full": MINIBATCH["full"]}),
)
