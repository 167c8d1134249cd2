"""The registry: what is known about each op, in one file per op, as ``Case`` objects.

The contracts that all ops share, the calls that are compiled ahead of time, the selections of the sanitizers and of the
GPU run, the benchmarks with their targets and the accuracy table derive from ``CASES``. A file of this folder lists its
own in a tuple ``CASES`` and is found by its name: an op's, or that of a chain of ops.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import ppo_kernels
from bench import oracle
from ppo_kernels import backends
from ppo_kernels._compositions import compositions

Inputs = dict[str, Tensor]
Shape = tuple[int, ...]

# What the eager code and other libraries get, too.
CLIP, GAMMA, LAM = 0.2, 1.0, 0.95
KL_COEF, SCORE_CLIP, ENTROPY_COEF = 0.1, 5.0, 0.01
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # what is timed
ESTIMATORS = ("k1", "abs", "k2", "k3")
MEASURED = ("quick", "small", "full")  # the sizes of the benchmarks on a CPU


class Data(NamedTuple):
    """One data set of the accuracy table: inputs, and what the results are called, a gradient last."""

    inputs: Inputs
    results: tuple[str, ...]
    options: Mapping[str, object] = {}
    view: Callable[[list], list] = list  # the part of the results that is compared


@dataclass(frozen=True)
class Target:
    """At least ``ratio`` times as fast as ``provider``; below 1, at most 1 / ``ratio`` times as slow.

    A ratio that cannot be, for the reason in ``limit`` (bench/NOTES.md has the figures), is refuted; ``reached`` of it
    must be, all the same.
    """

    provider: str
    ratio: float
    reached: float | None = None
    limit: str = ""

    def verdict(self, measured: float | None) -> str:
        if measured is None:
            return "not measured"
        if measured >= self.ratio:
            return "met"
        if self.reached is not None and measured >= self.reached:
            return f"refuted: {self.limit}"
        return "MISSED"


@dataclass(frozen=True)
class DeviceTarget:
    """On a GPU: at least ``share`` of the rate at which the same run copies memory (``odd`` where rows begin at no
    16-byte boundary), or at most ``seconds`` of the device; and at most ``call_seconds`` for a whole call.
    """

    share: float = 0.0
    odd: float = 0.0
    seconds: Mapping[Shape, float] = field(default_factory=dict)
    call_seconds: float = math.inf

    def most(self, shape: Shape, floor: float) -> float:
        """Seconds that the device may take where copying as many bytes takes ``floor``."""
        if shape in self.seconds:
            return self.seconds[shape]
        share = self.odd if self.odd and shape[-1] % 8 else self.share
        return floor / share if share else math.inf

    def verdict(self, shape: Shape, floor: float, device: float, call: float) -> str:
        if device > self.most(shape, floor):
            return "MISSED"
        return "call MISSED" if call > self.call_seconds else "met"


#: A call costs at most half as much again as the registered op, and is never slower than eager code.
SMALL_CALL_TARGETS = (Target("eager", 1), Target("bare op", 1 / 1.5))


@dataclass(frozen=True)
class Axis:
    """A scaling line: the shapes at powers of two, from ``2**first`` to ``2**last[size]``."""

    letter: str
    shape: Callable[[int], Shape]
    first: int
    last: Mapping[str, int]

    def points(self, size: str) -> list[int]:
        return [2**k for k in range(self.first, self.last[size] + 1)]


LOGITS_AXES = (
    Axis("V", lambda vocab: (16, vocab), 10, {"small": 18, "full": 18}),
    Axis("B", lambda rows: (rows, 8192), 0, {"small": 5, "full": 9}),
)
TOKEN_AXES = (
    Axis("T", lambda length: (16, length), 4, {"small": 14, "full": 17}),
    Axis("B", lambda rows: (rows, 1024), 0, {"small": 7, "full": 11}),
)
#: [sequences, tokens]: of a whole rollout, and of one minibatch of a loss.
TINY, GPU = [(4, 40)], [(512, 2048), (64, 32768)]
ROLLOUT = {"quick": [(256, 8192)], "small": [(64, 2048)], "full": [(256, 8192)], "gpu": GPU, "tiny": TINY}
#: One launch over tokens, forward and backward, in 1.6 times what copying the bytes takes.
ONE_LAUNCH = DeviceTarget(share=1 / 1.6)
MINIBATCH = {"quick": [(512, 2048)], "small": [(64, 2048)], "full": [(512, 2048)], "gpu": GPU, "tiny": TINY}


#: dtype, shape and options of a call.
Calls = tuple[tuple[torch.dtype, Shape, Mapping], ...]


def meetings(gpu: tuple[Shape, ...], host: tuple[Shape, ...], **choices: tuple) -> dict[str, Calls]:
    """``Case.meetings`` at these shapes, with each value of each choice."""
    options = [{name: value} for name, values in choices.items() for value in values] or [{}]
    every = {"gpu": gpu, "host": host}
    return {
        where: tuple((torch.float32, shape, option) for shape in shapes for option in options)
        for where, shapes in every.items()
    }


#: Short and long rows, of sizes that 16 divides and that it does not.
REACH = tuple((torch.float32, shape, {}) for shape in ((4, 64), (3, 7), (2, 8192), (5, 3001)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op, or a chain of ops, with one choice of inputs and options."""

    op: str  # of a chain the last one
    variant: str = ""
    file: str = ""  # the file of this folder that it is in
    inputs: Callable[..., Inputs]  # inputs(generator, dtype, *shape), on the generator's device
    options: Mapping[str, object] = field(default_factory=dict)
    function: Callable[..., object] | None = None  # of a chain; else the public function of the op
    leaf: str | None = None  # the input that is differentiated
    also: tuple[str, ...] = ()  # others whose gradients are timed with it

    # For the contracts (tests/lib/cases.py), where a shape is (batch, length) and every optional input is given.
    contract: bool = False
    rowwise: bool = True  # what a row becomes depends on no other row
    per_token: bool = True  # there is an output for each token, which the mask clears
    dense: bool = False  # the registered op takes contiguous tensors alone, not rows that lie apart
    packed: bool = False  # the inputs are packed sequences: ``pack`` of the padded ones
    vocabulary: bool = False  # the last dimension of the input is V
    output_dtype: torch.dtype | None = None  # else float32, and float64 where an input is that
    differentiable_outputs: int = 1
    matrix_products: bool = False  # torch's: they round with the shape and with the number of threads
    gradcheck: bool = True  # the gradient is that of the loss: nothing in it is constant by definition
    reach: Calls = REACH  # what reaches every kernel
    # What makes many blocks hand one another their parts at the same time: of all of a GPU ("gpu"), and as few as show
    # a race where every block is simulated ("host"). None where no block needs another.
    meetings: Mapping[str, Calls] = field(default_factory=dict)
    per_row: tuple[str, ...] = ()  # inputs that may have one number per row in place of one per token
    choices: Mapping[str, tuple] = field(default_factory=dict)  # options that choose another kernel, and their values
    bare_options: Mapping[str, object] = field(default_factory=dict)  # of the call without optional inputs
    in_a_group: Callable[..., tuple] | None = None  # what the registered op gets where processes share statistics

    # For the benchmarks. ``work`` says what is computed, whatever the shape; other libraries are known by it.
    work: str = ""
    not_timed: str = ""  # why a contract has none
    dtype: torch.dtype = torch.float32
    shapes: Mapping[str, list[Shape]] = field(default_factory=dict)  # by size
    small_call: Shape | None = None  # where next to nothing is computed
    axes: tuple[Axis, ...] = ()
    threads: Shape | None = None  # where one thread is compared with two
    eager: Callable[..., object] | None = None  # the same in the few lines of a trainer; its outputs are our first ones
    time_loop: bool = False  # ... which are a Python loop over time
    bare: Callable[..., object] | None = None  # the registered op without the public function around it
    products: Callable[..., Callable] | None = None  # the matrix products alone that the work consists of
    portable_loops: bool = False  # the CPU op has loops for AVX-512, which a row compares with the portable ones
    moved: Callable[[Inputs], int] | None = None  # bytes that have to be read and written at least, gradients too
    tolerance: float = 1e-5
    eager_tolerance: float = 1e-4  # of code that computes in the dtype of the inputs
    compiled: tuple[str, ...] = (*MEASURED, "gpu", "tiny")  # the sizes at which torch.compile's time is worth a row
    targets: tuple[Target, ...] = ()  # at the sizes quick and full, on a 2-core CPU
    small_call_targets: tuple[Target, ...] = ()
    device_target: DeviceTarget | None = None  # at the size gpu
    most_extra: Callable[..., int] | None = None  # most_extra(*shape): bytes of memory beside the inputs

    # For the accuracy table.
    accuracy: Callable[[torch.Generator], Iterator[Data]] | None = None
    accurate_eager: Callable[..., object] | None = None  # eager code in float32, where ``eager`` is not that
    truth: Callable[..., object] | None = None  # where the oracle of the op takes other arguments than the op

    @property
    def name(self) -> str:
        return f"{self.op}:{self.variant}" if self.variant else self.op

    @property
    def composed(self) -> bool:
        """Made of other ops: it has no kernel of its own."""
        return self.op in compositions()

    @property
    def differentiable(self) -> int:
        """How many outputs have a gradient: the first ones."""
        return self.differentiable_outputs if self.leaf else 0

    def call(self, impl: str) -> Callable[..., object]:
        """The public function with the options of the case, for inputs by name."""
        return partial(self.function or getattr(ppo_kernels, self.op), **self.options, impl=impl)

    def run(self, impl: str, **inputs: object) -> object:
        return self.call(impl)(**inputs)

    @property
    def oracle(self) -> Callable[..., object]:
        return getattr(oracle, self.op)

    @property
    def small_call_threads(self) -> tuple[int | None, ...]:
        """With torch's number of threads; what has a target with one, too."""
        return (None, 1) if self.small_call_targets and DEVICE == "cpu" else (None,)

    def group(self, shape: Shape, threads: int | None = None) -> str:
        """The name of the rows that do this work at this shape."""
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{self.work} {dtype} {list(shape)}" + (f", {threads} thread" if threads else "")


def differentiated(kernel: Callable[..., tuple], leaf: Tensor, *arguments: object) -> Tensor:
    """The loss of a registered op by an autograd function that does nothing else."""
    return _Bare.apply(kernel, leaf, arguments)


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, leaf, arguments):
        loss, _, grad, inv_normalizer = kernel(leaf, *arguments, True)
        ctx.save_for_backward(grad, inv_normalizer)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, inv_normalizer = ctx.saved_tensors
        return None, grad * (grad_loss * inv_normalizer), None


def flat(result: object) -> list:
    """Everything that an op returns, in order: (loss, *statistics) of a loss."""
    return [x for part in result for x in flat(part)] if isinstance(result, (tuple, list)) else [result]


def grid(x: Tensor) -> Tensor:
    """Multiples of 1/64: no token is so near to a clip (0.2, log 0.8, log 1.2) that rounding decides its gradient."""
    return (64 * x).round() / 64


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device)


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, device=g.device)


def right_padded(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """A mask of responses of 80 to 100 % of the columns."""
    lengths = torch.randint(max(1, columns * 4 // 5), columns + 1, (rows, 1), generator=g, device=g.device)
    return torch.arange(columns, device=g.device) < lengths


def with_holes(batch: int, length: int, seed: int = 0, share: float = 0.7) -> Tensor:
    """Random holes; row 0 full, row 1 empty, row 2 a single first token, row 3 a single last one."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share
    for row, pick in enumerate((slice(None), slice(0, 0), slice(0, 1), slice(-1, None))):
        if row < batch - 1:
            mask[row] = False
            mask[row, pick] = True
    return mask


def tokens(g: torch.Generator, dtype: torch.dtype, batch: int, length: int, *names: str) -> Inputs:
    """Inputs of a contract: one number per token under each name, and a mask with holes."""
    x = {name: (normal(g, batch, length) * 0.5 - 1).to(dtype) for name in names}
    return x | {"mask": with_holes(batch, length)}


def rows(g: torch.Generator, dtype: torch.dtype, batch: int, *names: str) -> Inputs:
    """Inputs of a contract: one number per row under each name."""
    return {name: uniform(g, batch).to(dtype) for name in names}


def pack(padded: Inputs) -> Inputs:
    """The same tokens as packed sequences of equal lengths."""
    batch, length = padded["mask"].shape
    bounds = torch.arange(batch + 1, dtype=torch.int32) * length
    return {k: x.reshape(-1) if x.dim() == 2 else x for k, x in padded.items()} | {"cu_seqlens": bounds}


def packed(case: Case) -> Case:
    """The variant of a contract with packed sequences."""
    return replace(case, variant="packed", packed=True, inputs=lambda *args: pack(case.inputs(*args)))


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """As trainers write it."""
    return (x * mask).sum() / mask.sum()


def _found() -> tuple[Case, ...]:
    """In the order of the ops, chains after the last op that they call."""
    cases: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        part = importlib.import_module(f"{__name__}.{module.name}")
        cases += (replace(case, file=module.name) for case in part.CASES)
    ops = (*backends.OPS, *compositions())
    return tuple(sorted(cases, key=lambda case: (ops.index(case.op), case.file != case.op)))


CASES = _found()
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def benchmarks() -> list[Case]:
    return [case for case in CASES if case.work]


def benchmark(work: str, dtype: torch.dtype = torch.float32) -> Case:
    """The case of a work by its name."""
    return next(case for case in benchmarks() if (case.work, case.dtype) == (work, dtype))


def described() -> dict[str, str]:
    """What each file says that its op does, in the order of the ops."""
    files = dict.fromkeys(case.file for case in benchmarks())
    return {file: (importlib.import_module(f"{__name__}.{file}").__doc__ or "").partition("\n")[0] for file in files}
