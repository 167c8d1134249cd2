"""The vocabulary in shards over the ranks of a group: what the whole of it gives, in every output and gradient."""

import os
import socket

import numpy as np
import pytest
import torch

from ppo_kernels import linear_policy_loss, linear_token_logprobs, merge, partial, token_logprobs
from ppo_kernels.ops._parts import finish, join, part_of
from tests.lib import devices
from tests.lib.helpers import INF, NAN, bit_equal, fresh_processes
from tests.test_linear_token_logprobs import SMALLEST

ROWS, WIDTH, VOCAB = 6, 8, 700
#: Uneven, and so that one of them is smaller than a tile.
SHARDS = {2: (0, 512, VOCAB), 3: (0, 40, 512, VOCAB)}
IDS = torch.tensor([3, 40, 300, 511, 512, VOCAB - 1, -1]).expand(ROWS, 7)
OPTIONS = (
    {},
    {"support": IDS, "memory_mib": SMALLEST},
    {"softcap": 3.0, "temperature": torch.linspace(0.5, 2.0, ROWS), "memory_mib": SMALLEST},
)


def make():
    g = torch.Generator().manual_seed(0)
    x = {"hidden": torch.randn(ROWS, WIDTH, generator=g), "weight": torch.randn(VOCAB, WIDTH, generator=g)}
    x["bias"] = torch.randn(VOCAB, generator=g)
    x["bias"][:40] = -INF  # a shard of three without a logit
    labels = torch.tensor([40, 511, 512, VOCAB - 1, -100, 300])
    return x, labels, torch.randn(2, ROWS, generator=g)


def outputs(tensors, labels, grads, impl, **options):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    *out, extras = linear_token_logprobs(
        **leaves, labels=labels, entropy=True, extras=("sum_sq_probs", "top1"), impl=impl, **options
    )
    torch.autograd.backward(out, list(grads))
    gradients = [x.grad for x in leaves.values()]
    row = {name: x[None] if name == "hidden" else x for name, x in tensors.items()}
    row = {name: x.detach().clone().requires_grad_() for name, x in row.items()}
    options = {name: x[None] if torch.is_tensor(x) else x for name, x in options.items()}
    loss = linear_policy_loss(
        **row, labels=labels[None], old_logprobs=grads[:1] - 6, advantages=grads[1:], impl=impl, **options
    )[0]
    loss.backward()
    return [*(x.detach() for x in out), *gradients, loss.detach(), *(x.grad for x in row.values()), *extras]


def make_logits():
    """One label for each row, or three, of which some are equal, some do not count and some are no label."""
    g = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(2, 3, VOCAB, generator=g)
    logits[0, 1, :40], logits[1, 0, 520], logits[1, 2] = -INF, 60.0, NAN
    one = torch.tensor([[-100, 511, 0], [520, VOCAB, 7]])
    many = torch.tensor([[[-100] * 3, [0, 512, 0], [699, -100, 40]], [[520, 520, 1], [5, VOCAB, 6], [1, 2, 3]]])
    options = {"mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "temperature": torch.linspace(0.5, 2.0, 6).view(2, 3)}
    grads = torch.randn(2, 2, 3, generator=g), torch.randn(2, 2, 3, 3, generator=g)
    return logits, ((one, (grads[0][0], grads[0][1])), (many, (grads[1][0], grads[0][1]))), options


def of_logits(logits, labels, grads, op=token_logprobs, **options):
    """Results and gradients, of a backward that overwrites and of one that does not."""
    found = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        out = op(leaf * 1, labels, entropy=True, inplace_backward=inplace, **options)
        (grad,) = torch.autograd.grad(out, leaf, grads)
        found += [*(x.detach() for x in out), grad]
    return found


def of_supports(logits, labels, impl, **options):
    """Ids of every shard, with padding, and a label that is in none."""
    ids = torch.tensor([3, 39, 40, 511, 520, 699, -1]).expand(*logits.shape[:-1], 7)
    leaf = logits.clone().requires_grad_()
    found = []
    for more in ({}, {"support": ids}):
        logp, h, extras = token_logprobs(
            leaf, labels, entropy=True, extras=("sum_sq_probs", "top1"), impl=impl, **options, **more
        )
        gradient = torch.autograd.grad((logp.nan_to_num(0.0) + h.nan_to_num(0.0)[..., None]).sum(), leaf)[0]
        found += [logp.detach(), h.detach(), extras.sum_sq_probs, extras.top1, gradient]
    return found


def by_hand(logits, labels, group, **options):
    """``group=`` for who communicates otherwise."""
    known = {name: x for name, x in options.items() if name != "inplace_backward"}
    part = partial(logits, labels, **known)
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part, group=group)
    return merge(parts, logits, labels, **options)


def rank_of(rank, world, port, impls, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    devices.serve()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    tensors, labels, grads = make()
    first, last = SHARDS[world][rank : rank + 2]
    mine = {name: x if name == "hidden" else x[first:last] for name, x in tensors.items()}
    group = torch.distributed.group.WORLD
    for impl in impls:
        for i, options in enumerate(OPTIONS):
            found = outputs(mine, labels, grads, impl, group=group, vocab_start=first, **options)
            torch.save(found, f"{folder}/{impl}-{i}-{rank}.pt")
        logits, cases, options = make_logits()
        for i, (several, of_logprobs) in enumerate(cases):
            given = options | {"group": group, "vocab_start": first, "impl": impl}
            found = [
                of_logits(logits[..., first:last], several, of_logprobs, op, **given)
                for op in (token_logprobs, by_hand)
            ]
            torch.save(found, f"{folder}/logits-{impl}-{i}-{rank}.pt")
        found = of_supports(logits[..., first:last].nan_to_num(0.0), several, **given)  # of several labels
        torch.save(found, f"{folder}/supports-{impl}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.large)])
def test_shards_give_what_the_whole_weight_gives(require_impl, world, tmp_path):
    impls = [require_impl("linear_token_logprobs", impl) for impl in ("cpu", "torch")]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    method = fresh_processes().get_start_method()
    torch.multiprocessing.start_processes(rank_of, (world, port, impls, str(tmp_path)), world, start_method=method)
    tensors, labels, grads = make()
    for impl in impls:
        for i, options in enumerate(OPTIONS):
            ranks = [torch.load(tmp_path / f"{impl}-{i}-{rank}.pt", weights_only=True) for rank in range(world)]
            want = outputs(tensors, labels, grads, impl, **options)
            whole = (0, 1, 2, 5, 6, 9, 10)  # log p, entropy, of hidden, loss, of hidden, extras: alike on every rank
            for at, truth in enumerate(want):
                got = [found[at] for found in ranks]
                assert at not in whole or all(bit_equal(x, got[0]) for x in got)
                together = got[0] if at in whole else torch.cat(got)
                torch.testing.assert_close(together, truth, rtol=2e-5, atol=1e-5)
        logits, cases, options = make_logits()
        for i, (several, of_logprobs) in enumerate(cases):
            ranks = [torch.load(tmp_path / f"logits-{impl}-{i}-{rank}.pt", weights_only=True) for rank in range(world)]
            want = of_logits(logits, several, of_logprobs, impl=impl, **options)
            for found in zip(*ranks, strict=True):  # of both ways
                check_logits(found, want)
        ranks = [torch.load(tmp_path / f"supports-{impl}-{rank}.pt", weights_only=True) for rank in range(world)]
        for at, truth in enumerate(of_supports(logits.nan_to_num(0.0), several, "cpu", **options)):
            got = [found[at] for found in ranks]
            together = torch.cat(got, -1) if at % 5 == 4 else got[0]
            torch.testing.assert_close(together, truth, rtol=1e-5, atol=2e-6, equal_nan=True)
            assert at % 5 == 4 or all(bit_equal(x, got[0]) for x in got)


def check_logits(ranks, want):
    for at, truth in enumerate(want):
        got = [found[at] for found in ranks]
        if at % 3 < 2:  # log p and entropy
            assert all(bit_equal(x, got[0]) for x in got)
        together = got[0] if at % 3 < 2 else torch.cat(got, -1)
        torch.testing.assert_close(together, truth, rtol=2e-6, atol=1e-6, equal_nan=True)


def test_parts_join_in_any_grouping(require_impl):
    """To what token_logprobs says of the whole row; p near 1 and a part without a logit too."""
    require_impl("token_logprobs", "cpu")
    logits, labels = torch.randn(5, VOCAB) * 4, torch.tensor([0, 699, 350, 41, 5])
    logits[2, 350], logits[3, :40] = 60.0, -INF
    want = torch.ops.ppo_kernels.token_logprobs(logits, labels, None, None, 0.7, -100, True)
    for impl in ("cpu", "torch"):
        parts = [
            part_of(impl, logits[:, a:b], labels, a, 0.7, None, True) for a, b in ((0, 40), (40, 500), (500, VOCAB))
        ]
        all_at_once = join(torch.stack(parts), 0.7, torch.float32, True)
        rest = join(torch.stack(parts[1:]), 0.7, torch.float32, True)
        in_two = join(torch.stack([parts[0].double(), rest]), 0.7, torch.float32, True)
        for part in (all_at_once, in_two):
            (logp,), stats = finish(part, 0.7, torch.float32, True)
            torch.testing.assert_close(stats, want[1], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(logp, want[0], rtol=2e-6, atol=1e-30 if impl == "cpu" else 1e-6)
        lost = join(torch.stack(parts[:1]), 0.7, torch.float32, True)
        (logp,), stats = finish(lost, 0.7, torch.float32, True)
        assert logp.isnan().tolist() == [False, True, True, True, False]
        assert stats[2].isnan().tolist() == logp.isnan().tolist()


def test_a_place_without_a_group_is_refused():
    tensors, labels, _ = make()
    for place in (5, np.int64(5)):
        with pytest.raises(ValueError, match="vocab_start=5 is the place of a shard in a group; pass group= too"):
            linear_token_logprobs(**tensors, labels=labels, vocab_start=place)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup"):
        linear_policy_loss(
            tensors["hidden"][None], tensors["weight"], labels[None], labels[None], labels[None], group=3
        )
