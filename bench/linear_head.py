"""Peak memory and time of the head over tokens and vocabulary, as a picture: ``python -m bench.linear_head FILE``.

Forward and backward with gradients of the hidden states and of the weight, in float32, by one thread. The memory is
what torch's allocator holds at once beyond the inputs and beyond the two gradients.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import ppo_kernels
from bench.cases.linear_policy_loss import eager, inputs
from bench.measure import peak_extra
from ppo_kernels import linear_policy_loss, linear_token_logprobs, policy_loss

WIDTH = 256
TOKENS, VOCABULARY = [64, 128, 256, 512, 1024], [8192, 16384, 32768, 65536, 131072]
FIXED = {"tokens": 256, "vocabulary": 32768}


def four_products(hidden, weight, labels, old_logprobs, advantages, mask):
    logprobs = linear_token_logprobs(hidden, weight, labels, mask=mask)
    return policy_loss(logprobs, old_logprobs, advantages, mask)[0]


CALLS = {
    "eager, all logits": eager,
    "linear_token_logprobs + policy_loss": four_products,
    "linear_policy_loss": lambda *given: linear_policy_loss(*given)[0],
}


def measured(call: Callable, tokens: int, vocabulary: int) -> tuple[float, float]:
    """MiB and seconds."""
    x = inputs(torch.Generator().manual_seed(0), torch.float32, 4, tokens // 4, WIDTH, vocabulary)
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight")]

    def both() -> None:
        torch.autograd.grad(call(*x.values()), leaves)

    extra = peak_extra(both) - sum(leaf.nbytes for leaf in leaves)
    return extra / 2**20, min(timeit.repeat(both, number=1, repeat=3))


def main(file: str) -> None:
    torch.set_num_threads(1)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row", layout="constrained")
    for column, (axis, sizes) in enumerate((("tokens", TOKENS), ("vocabulary", VOCABULARY))):
        for name, call in CALLS.items():
            found = [measured(call, **FIXED | {axis: size}) for size in sizes]
            for row, values in enumerate(zip(*found, strict=True)):
                axes[row, column].loglog(sizes, values, marker="o", label=name)
        other = next(key for key in FIXED if key != axis)
        axes[1, column].set_xlabel(f"{axis} ({other} {FIXED[other]}, hidden {WIDTH})")
    axes[0, 0].set_ylabel("extra memory, MiB")
    axes[1, 0].set_ylabel("forward and backward, s")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"ppo_kernels {ppo_kernels.__version__}, float32, one thread of a CPU")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.linear_head", description=__doc__)
    parser.add_argument("file", help="the figure to write, such as docs/linear_head.png")
    main(parser.parse_args().file)
