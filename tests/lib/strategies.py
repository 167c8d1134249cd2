"""Random batches of tokens for the property tests: every layout, dtype and mask that the ops take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.lib.helpers import INF, MASK_DTYPES, NAN, cu, out_dtype, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTHS = st.sampled_from([33, 1, 2, 31, 32, 127, 128, 129, 300, 1030, 0])
ROWS = st.sampled_from([3, 1, 2, 4, 0])  # not integers(0, 4): half of those examples would be empty
#: Powers of two: with values on a grid of 2^-12 the differences that the formulas start with are exact in float32, so
#: that what is measured is the op and not the spacing of its inputs.
SCALES = st.sampled_from([1.0, 0.0, 2.0**-10, 2.0**5, 2.0**13])
GRID = 4096.0


@dataclass
class Batch:
    """Rows of tokens, padded ``[B, T]`` or packed ``[N]``; ``valid`` is what the mask says."""

    g: torch.Generator
    lengths: list[int]
    packed: bool
    dtype: torch.dtype
    valid: torch.Tensor
    mask: torch.Tensor | None
    options: dict
    pad: int
    offset: int

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def normal(self, scale: float = 1.0, rows: bool = False) -> torch.Tensor:
        """Values on the grid, one per token or one per row."""
        shape = (self.rows,) if rows else self.valid.shape
        x = torch.randn(shape, generator=self.g, dtype=torch.float64)
        return ((x * GRID).round() / GRID * scale).to(self.dtype)

    def view(self, x: torch.Tensor, readable: torch.Tensor | None = None) -> torch.Tensor:
        """As the op gets it: junk where it must not look, and strides of a slice off a vector boundary."""
        readable = self.valid if readable is None else readable
        junk = torch.tensor([NAN, INF, -INF, 1e30], dtype=torch.float64).to(x.dtype)
        at = torch.randint(0, 4, x.shape, generator=self.g)
        return strided(torch.where(readable, x, junk[at]), self.pad, self.offset)

    def until_last(self) -> torch.Tensor:
        """Tokens up to the last valid one of their row."""
        parts = self.valid.reshape(-1).split(self.lengths) if self.rows else []
        reach = [p.flip(0).cumsum(0).flip(0) > 0 for p in parts]
        return torch.cat(reach).view(self.valid.shape) if reach else self.valid

    def compute_dtype(self) -> torch.dtype:
        return out_dtype(self.dtype)

    def unit(self) -> float:
        """The rounding of one operation."""
        return torch.finfo(self.compute_dtype()).eps


@st.composite
def batches(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    packed = draw(st.booleans())
    if packed:
        lengths = [draw(LENGTHS) for _ in range(draw(ROWS))]
        shape, options = (sum(lengths),), {"cu_seqlens": cu(lengths, draw(st.sampled_from([torch.int32, torch.int64])))}
    else:
        lengths = [draw(LENGTHS)] * draw(ROWS)
        shape, options = (len(lengths), lengths[0] if lengths else 3), {}
    valid, mask = torch.ones(shape, dtype=torch.bool), None
    if draw(st.booleans()):
        valid = torch.rand(shape, generator=g) < draw(st.sampled_from([0.8, 0.5, 0.1, 0.9, 0.0]))
        mask = valid.to(draw(st.sampled_from(MASK_DTYPES)))
        if mask.dtype != torch.bool:
            mask = mask * draw(st.sampled_from([1, 3]))
    pad, offset = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    return Batch(g, lengths, packed, draw(st.sampled_from(DTYPES)), valid, mask, options, pad, offset)


@st.composite
def poisons(draw, names):
    """``(name, value)`` of one input that gets a NaN or an infinity in a valid token, or None."""
    return draw(st.sampled_from([None, None, None, *((name, bad) for name in names for bad in (NAN, INF))]))


def poisoned(batch: Batch, tensors: dict[str, torch.Tensor], poison) -> torch.Tensor:
    """Put the poison into a valid token of the named tensor; where that is, as a mask over the tokens."""
    spots = torch.zeros_like(batch.valid)
    where = batch.valid.nonzero()
    if poison is None or not len(where) or poison[0] not in tensors:
        return spots
    at = tuple(where[len(where) // 2])
    if tensors[poison[0]].shape == batch.valid.shape:
        tensors[poison[0]][at] = poison[1]
        spots[at] = True
    return spots
