"""The output_processor of Megatron on two ranks, with sequence parallelism and without, and the call of the package."""

from __future__ import annotations

import ast
import os
import socket
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from ppo_kernels.integrations import megatron
from tests.lib.checkout import ROOT
from tests.lib.helpers import fresh_processes

#: pip install --no-deps --ignore-requires-python --only-binary=:all: --python-version 3.12 --target build/megatron \
#:   megatron-core==0.19.2
PACKAGE = ROOT / "build" / "megatron" / "megatron" / "core"
S, B, WIDTH, VOCABULARY, WORLD = 6, 2, 8, 40, 2


def test_the_package_passes_what_the_function_takes():
    if not PACKAGE.is_dir():
        pytest.skip(f"there is no {PACKAGE}")
    tree = ast.parse((PACKAGE / "models" / "gpt" / "gpt_model.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if getattr(node.func, "id", "") == "output_processor"]
    passed = {keyword.arg for keyword in call.keywords}
    assert not call.args
    assert {"hidden_states", "output_layer", "output_weight", "labels", "loss_mask", "context", "config"} <= passed
    layers = (PACKAGE / "tensor_parallel" / "layers.py").read_text()
    assert "self.tp_group = tp_group" in layers
    mappings = (PACKAGE / "tensor_parallel" / "mappings.py").read_text()
    assert "def gather_from_sequence_parallel_region(\n    input_,\n    tensor_parallel_output_grad=True," in mappings


class _Gather(torch.autograd.Function):
    """What Megatron's does: all parts forward; backward this rank's part of the gradient, or of its sum."""

    @staticmethod
    def forward(ctx, part, summed, group):
        ctx.summed, ctx.group = summed, group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        distributed.all_gather(parts, part, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        if ctx.summed:
            distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None, None


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g) for shape in ((S, B, WIDTH), (VOCABULARY, WIDTH)))
    return hidden, weight, torch.randint(VOCABULARY, (B, S), generator=g), torch.randn(2, B, S, generator=g)


def outputs(hidden, weight, group, sequence_parallel):
    labels, seeds = inputs()[2:]
    found = megatron.output_processor(
        hidden_states=hidden,
        output_layer=SimpleNamespace(weight=weight, bias=None, tp_group=group),
        output_weight=None,
        labels=labels,
        context=megatron.Head(temperature=0.7, entropy=True),
        config=SimpleNamespace(sequence_parallel=sequence_parallel, use_mup=False),
    )
    return [*(x.detach() for x in found), *torch.autograd.grad(found, (hidden, weight), list(seeds))]


def rank_of(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    mappings = types.ModuleType("megatron.core.tensor_parallel.mappings")
    mappings.gather_from_sequence_parallel_region = lambda x, tensor_parallel_output_grad=True, group=None: (
        _Gather.apply(x, tensor_parallel_output_grad, group)
    )
    for name in ("megatron", "megatron.core", "megatron.core.tensor_parallel"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[mappings.__name__] = mappings
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    hidden, weight, *_ = inputs()
    shard = weight.chunk(WORLD)[rank].clone().requires_grad_()
    for sequence_parallel in (False, True):
        own = (hidden.chunk(WORLD)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        found = outputs(own, shard, distributed.group.WORLD, sequence_parallel)
        torch.save(found, f"{folder}/{sequence_parallel}-{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_together_give_what_one_gives(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = fresh_processes().get_start_method()
    torch.multiprocessing.start_processes(rank_of, (port, str(tmp_path)), WORLD, start_method=start)
    hidden, weight, *_ = (x.requires_grad_() if x.is_floating_point() else x for x in inputs())
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    logprobs, entropy, of_hidden, of_weight = outputs(hidden, weight, one, False)
    for sequence_parallel in (False, True):
        ranks = [torch.load(tmp_path / f"{sequence_parallel}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
        for found in ranks:
            torch.testing.assert_close(found[0], logprobs)
            torch.testing.assert_close(found[1], entropy)
        torch.testing.assert_close(torch.cat([found[3] for found in ranks]), of_weight)
        parts = torch.cat([found[2] for found in ranks]) if sequence_parallel else ranks[0][2]
        torch.testing.assert_close(parts, of_hidden)
