"""Whether logits may be overwritten by their gradient, and whether they still hold what the forward read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels._registered import overlaps_itself

_PARTS = "_ppo_kernels_overwritten"


def check_overwritable(op: str, logits: Tensor) -> None:
    base = logits._base if logits._is_view() and logits._base is not None else logits
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            f"{op}: inplace_backward=True would overwrite a leaf (or a view of one); pass a layer's output"
        )
    if overlaps_itself(logits):
        raise ValueError(
            f"{op}: inplace_backward=True needs logits that do not overlap themselves; got shape"
            f" {tuple(logits.shape)} with strides {logits.stride()} (expanded or unfolded)"
        )
    if logits.stride(-1) != 1 and logits.size(-1) > 1:
        raise ValueError(f"{op}: inplace_backward=True needs logits with a last stride of 1")


class Chunk:
    """Logits that a backward will overwrite: all of a tensor, or a part of it whose other parts may have the same fate.

    All parts share one version, which each overwriting raises. So the logits are not saved for the backward, whose
    check would refuse every part but one; what each overwriting covered is kept with the whole tensor instead.
    """

    def __init__(self, logits: Tensor):
        self.whole = logits if logits._base is None else logits._base
        self.logits = logits.detach()
        self.version = logits._version

    def begin(self) -> None:
        """Raise if anything but the overwriting of other parts has changed the logits since the forward."""
        since = [part for version, part in getattr(self.whole, _PARTS, ()) if version > self.version]
        mine = _part(self.logits)
        if self.logits._version - self.version != len(since) or any(_meet(mine, part) for part in since):
            raise RuntimeError(
                "token_logprobs: logits that inplace_backward=True needs have been modified by an inplace operation"
                " since the forward; write to them after the backward, or pass inplace_backward=False"
            )

    def end(self) -> None:
        """The logits are overwritten, and their version is a new one."""
        parts = getattr(self.whole, _PARTS, [])
        parts.append((self.logits._version, _part(self.logits)))
        setattr(self.whole, _PARTS, parts)


class _Part(NamedTuple):
    """Where elements lie in memory: the first, the place after the last, and how many there are at each stride."""

    begin: int
    end: int
    sizes: dict[int, int]


def _part(x: Tensor) -> _Part:
    sizes: dict[int, int] = {}
    inner = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if sizes and stride == inner * sizes[inner]:  # goes on where the smaller stride ends
            sizes[inner] *= size
        else:
            sizes[stride], inner = size, stride
    begin = int(x.storage_offset())
    return _Part(begin, begin + 1 + sum((size - 1) * stride for stride, size in sizes.items()), sizes)


def _meet(a: _Part, b: _Part) -> bool:
    """Whether an element may be in both. Of parts with unlike strides some that do not meet are taken to."""
    if a.end <= b.begin or b.end <= a.begin:
        return False
    strides = sorted({1, *a.sizes, *b.sizes}, reverse=True)
    origin = min(a.begin, b.begin)
    box_a, box_b = _box(a, strides, origin), _box(b, strides, origin)
    if box_a is None or box_b is None:
        return True
    return all(max(i, j) < min(m, n) for (i, m), (j, n) in zip(box_a, box_b, strict=True))


def _box(part: _Part, strides: list[int], origin: int) -> list[tuple[int, int]] | None:
    """The first index and the one after the last at each stride, largest first, or None where they are ambiguous:
    where the smaller strides reach beyond a larger one.
    """
    box, offset, reach = [], part.begin - origin, part.end - 1 - part.begin
    for stride in strides:
        size = part.sizes.get(stride, 1)
        reach -= (size - 1) * stride  # of the smaller strides
        index, offset = divmod(offset, stride)
        if offset + reach >= stride:
            return None
        box.append((index, index + size))
    return box


def saved_as_they_are() -> bool:
    """Whether autograd keeps saved tensors itself. Checkpointing and offloading must see the logits among them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
