"""The head of a language model in tiles: some rows of hidden states times some rows of the weight, and back.

A tile holds logits up to a factor: those of ``softcap * tanh(logit_scale * (x W' + b) / softcap)`` divided by the
softcap, or without one by ``logit_scale``. The temperature is divided by the same factor, so that a scale costs
nothing. The products are torch's own. What is multiplied and what is added up:

- A tile has the dtype that is computed in (float32) unless a narrower one is asked for.
- On a CUDA device half-precision operands stay as they are, and their products are float32. Elsewhere such products do
  not exist: operands are widened, a tile's at a time.
- Gradients of the weight and of the hidden states add up in the dtype that is computed in.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels._types import compute_dtype
from ppo_kernels.ops._autograd import is_batch

_MOST_ROWS, _FEW_ROWS = 2048, 256
_MOST_COLUMNS, _FEW_COLUMNS = 8192, 256
_CACHED_COLUMNS = 1024  # whose copy a CPU's product finds in the cache
_OF_A_PART = 120  # bytes for each row, when the parts of a row are merged in float64
_PAD = 16  # columns: rows of a tile begin at the same alignment
_AT_ONCE = 2**16  # numbers that are rounded at a time, where all of them would take memory that is not counted


class Tiling(NamedTuple):
    """How many rows and how many columns of logits there are at a time."""

    rows: int
    columns: int

    def blocks(self, rows: int) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, rows)) for i in range(0, rows, self.rows))

    def slabs(self, vocab: int) -> Iterator[slice]:
        return (slice(i, min(i + self.columns, vocab)) for i in range(0, vocab, self.columns))


class CountedRows:
    """The rows of hidden states that count. No other enters a product. On a GPU, finding them waits for the device."""

    def __init__(self, hidden: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int):
        live = labels != ignore_index
        if mask is not None:
            live = live & (mask != 0)
        self.at = live.nonzero(as_tuple=True)
        self.all = len(self.at[0]) == labels.numel()
        self.source = hidden
        self.flat: Tensor | None = None
        if self.all:
            with contextlib.suppress(RuntimeError):  # of rows that no one stride leads along
                flat = hidden.view(-1, hidden.size(-1))
                self.flat = flat if _multiplied_in_place(flat) else None

    def __len__(self) -> int:
        return len(self.at[0])

    def hidden(self, block: slice) -> Tensor:
        return self.source[tuple(i[block] for i in self.at)] if self.flat is None else self.flat[block]

    def pick(self, x: Any, dim: int = 0) -> Any:
        """What belongs to the rows, of a tensor with a number for each row from dimension ``dim`` on; None of None."""
        return None if x is None else x[(slice(None),) * dim + self.at]

    def put(self, out: Tensor, x: Tensor, dim: int = 0) -> None:
        out[(slice(None),) * dim + self.at] = x

    def spread(self, x: Tensor, like: Tensor, scale: Tensor | None = None) -> Tensor:
        """``x [rows, H]``, times ``scale``, as gradient of the hidden states ``like``: 0 where a row does not count."""
        return spread(x, self.at, self.all, like, scale)


class Head:
    """The arguments that make logits, and the tiles of them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float,
        logit_scale: float,
        logits_dtype: torch.dtype | None,
    ):
        self.weight, self.bias, self.input_dtype, self.is_cuda = weight, bias, hidden.dtype, hidden.is_cuda
        require(_is_there(weight, hidden.size(-1)), released(weight))
        self.vocab, self.width = weight.shape
        self.dtype = compute_dtype(hidden, weight, bias)
        self.tile_dtype = self.dtype if logits_dtype is None else logits_dtype
        narrow = hidden.dtype == weight.dtype and (hidden.is_cuda or self.tile_dtype == hidden.dtype)
        self.operand_dtype = hidden.dtype if narrow else self.dtype
        self.copied = weight.dtype != self.operand_dtype or not _multiplied_in_place(weight)
        self.capped = softcap < math.inf
        self.inner = logit_scale / softcap if self.capped else 1.0  # the factor within tanh
        self.factor = softcap if self.capped else logit_scale
        self._wide: Tensor | None = None

    def temperature(self, number: float, rows: Tensor | None) -> tuple[float, Tensor | None]:
        """For the values of tiles."""
        return number / self.factor, None if rows is None else rows / self.factor

    def tiling(
        self, rows: CountedRows, memory: int, *, all_columns: bool = False, support: Tensor | None = None
    ) -> Tiling:
        """Tiles as large as ``memory`` bytes allow, together with all that is made beside them; the smallest there are
        where they do not. The same for the forward and the backward, so that the logits of both round alike: p is as
        near to 1 as its sum says. With ``all_columns`` a row of logits is whole, and ``columns`` those of a product.
        """
        most = _CACHED_COLUMNS if all_columns and self.copied and not self.is_cuda else _MOST_COLUMNS
        n, columns = max(1, min(len(rows), _MOST_ROWS)), min(self.vocab, most)
        gathered = rows.flat is None
        ids = 0 if support is None else support.size(-1)

        def fits() -> bool:
            of_ids = n * (columns + 1 + 32 * ids) if ids else 0  # what is outside of it, and where the ids are
            return self._bytes(n, columns, gathered, all_columns) + of_ids <= memory

        while not fits():
            if (
                columns > _FEW_COLUMNS
                and (columns > n or n <= _FEW_ROWS)
                and not (all_columns and columns <= _CACHED_COLUMNS)
            ):
                columns = -(-columns // 2)
            elif n > 1:
                n = -(-n // 2)
            else:
                break
        while all_columns and n < len(rows):  # halving stops at up to half of what fits
            n += max(1, n // 8)
            if not fits():
                n -= max(1, n // 9)
                break
        return Tiling(n, columns)

    def _bytes(self, rows: int, columns: int, gathered: bool, all_columns: bool) -> int:
        """What a tile takes, and what is made beside it."""
        of_tile, operand, wide = (x.itemsize for x in (self.tile_dtype, self.operand_dtype, self.dtype))
        kept = self.vocab if all_columns else columns
        total = rows * (kept + 2 * _PAD) * of_tile * (1 + self.capped)
        if gathered:
            total += rows * self.width * self.input_dtype.itemsize
        if self.operand_dtype != self.input_dtype:
            total += rows * self.width * operand
        if self.copied:
            total += columns * self.width * operand
        if not all_columns:
            total += rows * -(-self.vocab // columns) * _OF_A_PART
            if self.weight.dtype != self.dtype:
                total += columns * self.width * wide
        if self.tile_dtype != self.operand_dtype:
            total += rows * columns * operand
        elif self.tile_dtype != self.dtype and not self.is_cuda:
            total += max(rows, columns) * self.width * of_tile
        return total

    def keeps_less(self, rows: int) -> bool:
        """Whether the gradient of so many rows of logits, and their hidden states, are less than that of the weight."""
        of_rows = rows * (self.vocab * self.tile_dtype.itemsize + self.width * self.operand_dtype.itemsize)
        return of_rows < self.vocab * self.width * self.dtype.itemsize

    def buffer(self, rows: int, columns: int) -> Tensor:
        """Memory for tiles, with a column more than there are logits."""
        pitch = (columns // _PAD + 1) * _PAD
        return self.weight.new_empty((rows, pitch), dtype=self.tile_dtype)

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.operand_dtype)

    def weight_of(self, columns: slice) -> Tensor:
        """As products take it; where it has to be converted or copied, until it is asked for others."""
        rows = self.weight[columns]
        if not self.copied:
            return rows
        if self._wide is None:
            self._wide = torch.empty(rows.shape, dtype=self.operand_dtype, device=rows.device)
        return self._wide[: len(rows)].copy_(rows)

    def write(self, x: Tensor, weight: Tensor, columns: slice, tile: Tensor) -> Tensor:
        """The tile of these operands."""
        write_product(tile, x, weight.t())
        if self.bias is not None:
            tile += self.bias[columns].to(tile.dtype)
        return tile.mul_(self.inner).tanh_() if self.capped else tile

    def slope(self, tile: Tensor) -> Tensor | None:
        """What the gradient of a tile is to be multiplied by, from its values."""
        return tile.square().neg_().add_(1.0).mul_(self.inner) if self.capped else None


class Gradients:
    """Those of the hidden states' rows, of the weight and of the bias that are needed, as tiles add to them."""

    def __init__(self, head: Head, rows: CountedRows, needs: Sequence[bool], *, rounded: bool = True):
        weight, bias = head.weight, head.bias
        self.head = head
        self.hidden = weight.new_zeros((len(rows), head.width), dtype=head.dtype) if needs[0] else None
        of_weight = weight.dtype if rounded else head.dtype
        make = weight.new_empty if len(rows) else weight.new_zeros  # tiles of the first rows write to it
        self.weight = make(weight.shape, dtype=of_weight) if needs[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=head.dtype) if needs[2] and bias is not None else None
        self._slab: Tensor | None = None

    def begin(self, columns: slice) -> Tensor | None:
        """What tiles of these columns add to for the weight."""
        if self.weight is None or self.weight.dtype == self.head.dtype:
            return None if self.weight is None else self.weight[columns]
        rows = self.weight[columns]
        if self._slab is None:
            self._slab = rows.new_empty(rows.shape, dtype=self.head.dtype)
        return self._slab[: len(rows)]

    def end(self, columns: slice) -> None:
        """Round what has been added up, once."""
        if self.weight is not None and self._slab is not None:
            rows = self.weight[columns]
            rows.copy_(self._slab[: len(rows)])

    def add(self, tile: Tensor, x: Tensor, weight: Tensor, block: slice, columns: slice, into: Tensor | None) -> None:
        """What the gradient of a tile adds; ``into`` is what it adds to for the weight, and the first rows write to."""
        if tile.dtype != self.head.operand_dtype:
            tile = tile.to(self.head.operand_dtype)
        if self.hidden is not None:
            add_product(self.hidden[block], tile, weight)
        if into is not None:
            (add_product if block.start else write_product)(into, tile.t(), x)
        if self.bias is not None:
            self.bias[columns] += tile.sum(0, dtype=self.head.dtype)

    def finished(self, hidden: Tensor, rows: CountedRows) -> tuple[Tensor, Tensor, Tensor]:
        """As the inputs have them; what was not needed is empty."""
        nothing, bias = hidden.new_empty(0, dtype=self.head.dtype), self.head.bias
        of_hidden = hidden.new_empty(0) if self.hidden is None else rows.spread(self.hidden, hidden)
        of_weight = self.head.weight.new_empty(0) if self.weight is None else self.weight
        if bias is None:
            return of_hidden, of_weight, nothing
        return of_hidden, of_weight, bias.new_empty(0) if self.bias is None else self.bias.to(bias.dtype)


def _is_there(weight: Tensor, width: int) -> bool:
    fits = weight.dim() == 2 and weight.size(1) == width
    return fits and (weight.numel() == 0 or weight.untyped_storage().nbytes() > 0)


def released(weight: Tensor) -> str:
    return (
        f"the weight of the head, now of shape {tuple(weight.shape)} with {weight.untyped_storage().nbytes()} bytes of"
        " memory, has been released by ZeRO-3 or FSDP; keep it gathered until backward() has returned:"
        " deepspeed.zero.GatheredParameters, or pass weight.full_tensor() of a DTensor"
    )


def _multiplied_in_place(x: Tensor) -> bool:
    """Whether products read this matrix where it is; torch copies any other, whole and without a word."""
    (rows, columns), (down, across) = x.shape, x.stride()
    return (across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows))


def spread(
    x: Tensor, at: tuple[Tensor, ...], every: bool, like: Tensor, scale: Tensor | None, *, over: bool = False
) -> Tensor:
    """See ``CountedRows.spread``, of which ``at`` and ``every`` are, and ``rounded``."""
    if every:
        return rounded(x, like.dtype, scale, over=over).view(like.shape)
    if is_batch(scale):
        return torch.index_put(like.new_zeros(like.shape), at, rounded(x, like.dtype, scale))
    out, some = like.new_zeros(like.shape), max(1, _AT_ONCE // max(1, x.size(1)))
    for i in range(0, len(x), some):
        part = x[i : i + some] if scale is None else x[i : i + some] * scale
        out[tuple(index[i : i + some] for index in at)] = part.to(like.dtype)
    return out


def rounded(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, *, over: bool = False) -> Tensor:
    """``x``, times ``scale``, in ``dtype``; with ``over`` in the memory of ``x`` where it has this dtype."""
    if scale is None:
        return x.to(dtype)
    if is_batch(scale):
        return (x * scale).to(dtype)
    if x.dtype == dtype:
        return x.mul_(scale) if over else x * scale
    out = x.new_empty(x.shape, dtype=dtype)
    some = max(1, _AT_ONCE // max(1, x[:1].numel()))
    for i in range(0, len(x), some):
        torch.mul(x[i : i + some], scale, out=out[i : i + some])
    return out


def product_of_rows(
    tile: Tensor, x: Tensor, shape: torch.Size, dtype: torch.dtype, wide: torch.dtype, scale: Tensor | None
) -> Tensor:
    """``tile.t() @ x`` times ``scale`` in ``dtype``, added up in ``wide`` and rounded once: the gradient of a weight of
    this shape from that of all logits."""
    if is_batch(scale):
        return rounded(product_of_rows(tile, x, shape, wide, wide, None), dtype, scale)
    if scale is not None and x.dtype == wide:
        x, scale = x * scale, None  # fewer numbers
    out, some = x.new_empty(shape, dtype=dtype), _MOST_COLUMNS if dtype == wide else _CACHED_COLUMNS
    slab = None if dtype == wide else x.new_empty((min(some, len(out)), x.size(1)), dtype=wide)
    for i in range(0, len(out), some):
        rows, of_rows = out[i : i + some], tile[:, i : i + some].t().to(x.dtype)
        into = rows if slab is None else slab[: len(rows)]
        write_product(into, of_rows, x)
        if scale is not None:
            into.mul_(scale)
        if slab is not None:
            rows.copy_(into)
    return out


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``; see ``add_product``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``. Added up in the dtype of ``total``; a CPU rounds the product of narrower operands first."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)
