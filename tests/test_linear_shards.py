"""The head's weight in shards over the ranks of a group: what the whole weight gives, in every output and gradient."""

import os
import socket

import numpy as np
import pytest
import torch

from ppo_kernels import linear_policy_loss, linear_token_logprobs
from ppo_kernels.ops._parts import finish, join, part_of
from tests.lib import devices
from tests.lib.helpers import INF, bit_equal, fresh_processes
from tests.test_linear_token_logprobs import SMALLEST

ROWS, WIDTH, VOCAB = 6, 8, 700
#: Uneven, and so that one of them is smaller than a tile.
SHARDS = {2: (0, 512, VOCAB), 3: (0, 40, 512, VOCAB)}
OPTIONS = ({}, {"softcap": 3.0, "temperature": torch.linspace(0.5, 2.0, ROWS), "memory_mib": SMALLEST})


def make():
    g = torch.Generator().manual_seed(0)
    x = {"hidden": torch.randn(ROWS, WIDTH, generator=g), "weight": torch.randn(VOCAB, WIDTH, generator=g)}
    x["bias"] = torch.randn(VOCAB, generator=g)
    x["bias"][:40] = -INF  # a shard of three without a logit
    labels = torch.tensor([40, 511, 512, VOCAB - 1, -100, 300])
    return x, labels, torch.randn(2, ROWS, generator=g)


def outputs(tensors, labels, grads, impl, **options):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out = linear_token_logprobs(**leaves, labels=labels, entropy=True, impl=impl, **options)
    torch.autograd.backward(out, list(grads))
    gradients = [x.grad for x in leaves.values()]
    row = {name: x[None] if name == "hidden" else x for name, x in tensors.items()}
    row = {name: x.detach().clone().requires_grad_() for name, x in row.items()}
    options = {name: x[None] if torch.is_tensor(x) else x for name, x in options.items()}
    loss = linear_policy_loss(
        **row, labels=labels[None], old_logprobs=grads[:1] - 6, advantages=grads[1:], impl=impl, **options
    )[0]
    loss.backward()
    return [*(x.detach() for x in out), *gradients, loss.detach(), *(x.grad for x in row.values())]


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
            whole = (0, 1, 2, 5, 6)  # log p, entropy, of hidden, loss, of hidden: alike on every rank
            for at, truth in enumerate(want):
                got = [found[at] for found in ranks]
                assert at not in whole or all(bit_equal(x, got[0]) for x in got)
                together = got[0] if at in whole else torch.cat(got)
                torch.testing.assert_close(together, truth, rtol=2e-5, atol=1e-5)


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
        all_at_once = join(torch.stack(parts), 0.7, torch.float32)
        in_two = join(
            torch.stack([parts[0].double(), join(torch.stack(parts[1:]), 0.7, torch.float32)]), 0.7, torch.float32
        )
        for part in (all_at_once, in_two):
            logp, stats = finish(part, 0.7, torch.float32)
            torch.testing.assert_close(stats, want[1], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(logp, want[0], rtol=2e-6, atol=1e-30 if impl == "cpu" else 1e-6)
        lost = join(torch.stack(parts[:1]), 0.7, torch.float32)
        logp, stats = finish(lost, 0.7, torch.float32)
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
