"""Calls of the registered ops as no public function makes them: recorded ones (``recorded.samples``) with some of
their arguments changed, their tensors between guard pages.

Whatever a call holds, it is refused in one sentence, or answered: with the shapes and dtypes that its fake has, without
an element that nobody wrote, without a change of its inputs. ``problem`` makes the calls of some seeds in a process of
its own, so that a wild access is a finding and not the end.
"""

from __future__ import annotations

import functools
import math
import random
import signal
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_kernels._registered import arguments
from ppo_kernels._schemas import SCHEMAS
from tests.lib import recorded
from tests.lib.devices import registered
from tests.lib.helpers import bit_equal, fresh_processes
from tests.lib.memory import fenced

LONG = [0, 1, -1, 2, 3, 5, 7, 14, 40, 2**31, -(2**31), 2**40, 2**62, -(2**62), 2**63 - 1, -(2**63)]
DOUBLE = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-46, 1e-320, 1e46, 1e300, math.inf, -math.inf, math.nan]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8)


def _values(x: torch.Tensor, pick: random.Random) -> torch.Tensor:
    if x.dtype == torch.bool:
        return torch.tensor([pick.random() < 0.5 for _ in range(x.numel())], dtype=torch.bool).view(x.shape)
    pool = DOUBLE if x.is_floating_point() else [n for n in LONG if x.dtype == torch.int64 or 0 <= n < 128]
    some = torch.tensor([pick.choice(pool) for _ in range(x.numel())], dtype=x.dtype).view(x.shape)
    return torch.where(torch.rand(x.shape) < pick.choice((0.2, 1.0)), some, x)


def _strided(x: torch.Tensor, pick: random.Random) -> torch.Tensor:
    """The same values in rows that lie apart."""
    return torch.cat([x, x], -1)[..., : x.size(-1)]


Change = Callable[[torch.Tensor, random.Random], "torch.Tensor | None"]
ANY: tuple[Change, ...] = (
    _values,
    _values,
    _values,
    lambda x, pick: x[None],
    lambda x, pick: x.to(pick.choice(DTYPES)),
    lambda x, pick: x.to("meta"),
    lambda x, pick: x.detach().requires_grad_() if x.is_floating_point() else x,
    lambda x, pick: None,
)
OF_DIMENSIONS: tuple[Change, ...] = (
    *ANY,
    _strided,
    lambda x, pick: x[..., ::2],
    lambda x, pick: x.mT.contiguous().mT if x.dim() > 1 else x.flip(0),
    lambda x, pick: x.mT if x.dim() > 1 else x.expand(2, *x.shape),
    lambda x, pick: x[..., :1].expand(x.shape),
    lambda x, pick: x[:1].expand(x.shape),
    lambda x, pick: x.flatten().unfold(0, 2, 1) if x.numel() > 1 else x,
    lambda x, pick: x[1:],
    lambda x, pick: x[:0],
    lambda x, pick: x[..., :0],
    lambda x, pick: x.reshape(-1),
    lambda x, pick: x[..., None],
    lambda x, pick: x.any(),
)


def _changed(x: object, kind: str, pick: random.Random) -> object:
    if isinstance(x, torch.Tensor):
        y = pick.choice(OF_DIMENSIONS if x.dim() else ANY)(x, pick)
        return x if y is None and kind != "Tensor?" else y
    if kind == "int":
        return pick.choice(LONG)
    if kind == "float":
        return pick.choice(DOUBLE)
    return not x if kind == "bool" else x


@functools.cache
def _samples() -> list[tuple[str, tuple]]:
    kinds = {dtype: recorded.samples(dtype, "cpu") for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    chosen = [(op, args) for dtype, found in kinds.items() for op, calls in found.items() for args in calls]
    return [(op, args) for op, args in chosen if args[0].dtype != torch.bfloat16 or op.startswith("token_logprobs")]


def call_of(seed: int) -> tuple[str, list]:
    """An op and arguments for it."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    op, args = pick.choice(_samples())
    kinds = [argument.split()[0] for argument in arguments(SCHEMAS[op])]
    changed = list(args)
    for i in pick.sample(range(len(args)), pick.randint(1, min(3, len(args)))):
        changed[i] = _changed(changed[i], kinds[i], pick)
    return op, [_placed(x, pick.random() < 0.5) for x in changed]


def _placed(x: object, front: bool) -> object:
    """A tensor as it is, in memory between guard pages."""
    if not isinstance(x, torch.Tensor) or x.is_meta or x.numel() == 0:
        return x
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    memory = x.detach().as_strided((reach,), (1,), x.storage_offset())
    return fenced(memory.contiguous(), front).as_strided(x.shape, x.stride(), 0).requires_grad_(x.requires_grad)


def _copies(args: list) -> list:
    return [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]


def _outputs(result: object) -> tuple:
    return () if result is None else result if isinstance(result, tuple) else (result,)


def answer(impl: str, op: str, args: list, *, filled: bool) -> tuple | str:
    """What the call returns, and what it wrote; or the sentence that it is refused with. Memory that is not written
    is NaN, or whatever was there."""
    if not filled:
        del [torch.full((n,), 1234.5) for n in (1, 2, 4, 7, 14, 16, 64, 258) for _ in range(4)][:]
    torch.utils.deterministic.fill_uninitialized_memory = filled
    try:
        result = registered(op, impl)(*args)
    except RuntimeError as refusal:
        return str(refusal)
    return tuple(x.detach().clone() for x in (_outputs(result) if result is not None else args[:1]))


def check(seed: int, impl: str) -> None:
    op, args = call_of(seed)
    if impl == "cuda" and any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
        return  # compiled for the host its ops have no fakes
    before = _copies(args)
    first = answer(impl, op, args, filled=True)
    written = op.endswith("_")
    for x, y in zip(args[written:], before[written:], strict=True):
        same = not isinstance(x, torch.Tensor) or x.is_meta or bit_equal(x.detach(), y)
        assert same, "an input was changed"
    if isinstance(first, str):
        assert "\n" not in first, first
        assert first.startswith(f"{op}: "), first
        assert not written or args[0].is_meta or bit_equal(args[0].detach(), before[0]), "refused, but written to"
        return
    op, args = call_of(seed)
    second = answer(impl, op, args, filled=False)
    assert not isinstance(second, str), second
    if not first or first[0].is_meta:
        return
    assert bit_equal(first, second), "two answers to one call: an element is not written"
    if impl != "cuda":
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
            expected = _outputs(registered(op, impl)(*fake)) or (fake[0],)
        assert [(x.shape, x.dtype) for x in first] == [(x.shape, x.dtype) for x in expected], "not what the fake has"


def _check_all(impl: str, seeds: range, at, pipe) -> None:
    from tests.lib import devices

    devices.serve()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        at.value = seed
        try:
            check(seed, impl)
        except Exception as error:  # whatever else is raised is a finding too
            op, args = call_of(seed)
            text = f"{type(error).__name__}: {error}"[:2000]
            found.append(f"{impl}, seed {seed}: {text}\n    {op}({', '.join(_described(args))})")
    pipe.send("\n".join(found))


def _described(args: list) -> Iterator[str]:
    for x in args:
        if isinstance(x, torch.Tensor):
            yield f"{x.dtype}{list(x.shape)} strides {list(x.stride())} on {x.device}"
        else:
            yield repr(x)


def problem(impl: str, seeds: range, seconds: float = 600) -> str:
    """What is wrong with the calls of these seeds; nothing if it is empty."""
    context = fresh_processes()
    at, (ours, theirs) = context.Value("q", seeds.start), context.Pipe(duplex=False)
    process = context.Process(target=_check_all, args=(impl, seeds, at, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return f"{impl}, seed {at.value}: not done in {seconds} s"
    except EOFError:
        process.join(10)
        code = process.exitcode or 0
        return f"{impl}, seed {at.value}: the process ended with {signal.Signals(-code).name if code < 0 else code}"
    finally:
        process.kill()
        process.join()
