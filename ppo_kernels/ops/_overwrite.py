"""Whether logits may be overwritten by their gradient, and whether they still hold what the forward read."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._registered import overlaps_itself

_BOXES = "_ppo_kernels_overwritten"


def check_overwritable(logits: Tensor) -> None:
    base = logits._base if logits._is_view() and logits._base is not None else logits
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            "token_logprobs: inplace_backward=True would overwrite a leaf (or a view of one); pass a layer's output"
        )
    if overlaps_itself(logits):
        raise ValueError(
            "token_logprobs: inplace_backward=True needs logits that do not overlap themselves; got shape"
            f" {tuple(logits.shape)} with strides {logits.stride()} (expanded or unfolded)"
        )
    if logits.stride(-1) != 1 and logits.size(-1) > 1:
        raise ValueError("token_logprobs: inplace_backward=True needs logits with a last stride of 1")


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
        since = [box for version, box in getattr(self.whole, _BOXES, ()) if version > self.version]
        mine = self._box()
        if self.logits._version - self.version != len(since) or any(_meet(mine, box) for box in since):
            raise RuntimeError(
                "token_logprobs: logits that inplace_backward=True needs have been modified by an inplace operation"
                " since the forward; write to them after the backward, or pass inplace_backward=False"
            )

    def end(self) -> None:
        """The logits are overwritten, and their version is a new one."""
        boxes = getattr(self.whole, _BOXES, [])
        boxes.append((self.logits._version, self._box()))
        setattr(self.whole, _BOXES, boxes)

    def _box(self) -> list[tuple[int, int]] | None:
        """The first and last index of each dimension of the whole tensor, if the part is such a box, else None."""
        x, whole = self.logits, self.whole
        if x.stride() != whole.stride() or not whole.is_contiguous():
            return None
        box, offset = [], x.storage_offset() - whole.storage_offset()
        for stride, size in zip(x.stride(), x.shape, strict=True):
            box.append((offset // stride, offset // stride + size))
            offset %= stride
        return box


def _meet(a: list[tuple[int, int]] | None, b: list[tuple[int, int]] | None) -> bool:
    if a is None or b is None:
        return True
    return all(begin < end_b and begin_b < end for (begin, end), (begin_b, end_b) in zip(a, b, strict=True))


def saved_as_they_are() -> bool:
    """Whether autograd keeps saved tensors itself. Checkpointing and offloading must see the logits among them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
