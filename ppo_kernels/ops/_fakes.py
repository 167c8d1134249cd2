"""What the ops return, without the values: what torch.compile and FakeTensor know of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def like_first(x: Tensor, *_others: object) -> Tensor:
    """One tensor like the first argument, contiguous."""
    return x.new_empty(x.shape)


def loss(stats: Sequence[str]) -> Callable:
    """The outputs of a loss kernel with these statistics: loss, statistics, gradient, 1 / normalizer."""

    def fake(x: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad = others[-1]
        return x.new_empty(()), x.new_empty(len(stats)), x.new_empty(x.shape if grad else 0), x.new_empty(())

    return fake
