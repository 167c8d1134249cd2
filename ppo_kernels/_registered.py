"""What every registered op checks itself where it runs in Python: its fake, its Triton kernel, and what autograd knows.

The compiled ops check the same in ``csrc/checks.h``. Compiled graphs and C++ callers hand over what no public function
has seen, so that all of it is refused here in one sentence, without a look at a value: that would wait for a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

from ppo_kernels._types import Function


class Refusal(RuntimeError):
    """What a call got, what is allowed and what to do; the op's name is put before it."""


def not_a_graph(function: Function) -> Function:
    """A function that Dynamo leaves alone, and all that it calls.

    Where torch.compile has broken its graph inside a transform, Dynamo makes graphs of the eager code's single frames,
    those of an op that runs in Python among them. They know nothing of the transform: in some the refusal of a second
    derivative is lost, on others PyTorch fails.
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Refusal(message)


def arguments(schema: str) -> list[str]:
    """The arguments of a schema with their types."""
    return schema.partition("(")[2].partition(") ->")[0].split(", ")


def checked(schema: str, call: Callable, *, on_cpu: str = "") -> Callable:
    """``call`` for tensors of one device alone, but for the argument ``on_cpu``; refusals begin with the op's name.

    A meta tensor among others sends a call to the op's fake, whose outputs would be memory that nobody wrote.
    """
    op = schema.partition("(")[0]
    names = [argument.split()[-1] for argument in arguments(schema)]

    @not_a_graph
    def check_and_call(*args: object) -> object:
        try:
            _require_one_device(names, args, on_cpu)
            return call(*args)
        except Refusal as refusal:
            raise RuntimeError(f"{op}: {refusal}") from None

    return check_and_call


def _require_one_device(names: Sequence[str], args: Sequence[object], on_cpu: str) -> None:
    device = args[0].device  # type: ignore[attr-defined]  # every op's first argument is a tensor
    for name, x in zip(names, args, strict=False):
        if not isinstance(x, Tensor):
            continue
        wanted = torch.device("cpu") if name == on_cpu and device.type != "meta" else device
        require(x.device == wanted, f"{name} is on {x.device} and must be on {wanted}, as {names[0]} is on {device}")


def forward_mode_message(op: str) -> str:
    return f"{op}: forward-mode differentiation (jvp, jacfwd, hessian) is not supported; use grad, vjp or jacrev"


class _NoGradient(torch.autograd.Function):
    """A registered op. Without a backward its gradient would be 0; an exported program calls it."""

    @staticmethod
    def forward(ctx, op, call, *args):
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    @staticmethod
    def backward(ctx, *_grads):
        instead = f'call ppo_kernels.{ctx.op}, or export it with impl="torch"'
        if ctx.op == "token_logprobs_merge":  # whatever impl says, a registered op does it
            instead = "call ppo_kernels.merge outside of the exported program"
        raise RuntimeError(f"{ctx.op}: the registered op and what torch.export makes of it have no gradient; {instead}")


def guard(library: torch.library.Library, schema: str) -> None:
    """Register for an op that it loses no derivative in silence, and tells autograd what it overwrites."""
    name = schema.partition("(")[0]
    redispatch = getattr(getattr(torch.ops, library.ns), name).default._handle.redispatch_boxed
    after = torch._C._after_autograd_keyset

    @not_a_graph
    def call(keyset: torch._C.DispatchKeySet, *args: object) -> object:
        if forward_ad._current_level >= 0 and any(isinstance(x, Tensor) and _is_dual(x) for x in args):
            raise RuntimeError(forward_mode_message(name))
        if torch.is_grad_enabled() and "!" not in schema and torch._C._any_requires_grad(*args):
            return _NoGradient.apply(name, functools.partial(redispatch, keyset & after), *args)
        return redispatch(keyset & after, *args)

    library.impl(name, call, "Autograd", with_keyset=True)
    if "!" in schema:
        _guard_overwritten(library, schema)


def _is_dual(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share memory. A few views that do not are taken for such that do."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return x.numel() > 0
        reach += (size - 1) * stride
    return False


def require_overwritable(names: Sequence[str], args: Sequence[object]) -> None:
    """The first argument neither overlaps itself nor shares memory with another, which would be read as it changes.

    Tensors that lie between each other's elements are taken for such that share memory.
    """
    first = args[0]
    assert isinstance(first, Tensor)
    require(
        not overlaps_itself(first),
        f"{names[0]} is overwritten and must not overlap itself, got the shape {list(first.shape)} with strides"
        f" {list(first.stride())}; pass {names[0]}.contiguous()",
    )
    begin, end = _memory_of(first)
    for name, x in zip(names[1:], args[1:], strict=False):
        if not isinstance(x, Tensor) or x.numel() == 0:
            continue
        at, after = _memory_of(x)
        require(
            after <= begin or end <= at,
            f"{name} shares memory with {names[0]}, which is overwritten; pass a copy, {name}.clone()",
        )


def _memory_of(x: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of that after its last."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def _guard_overwritten(library: torch.library.Library, schema: str) -> None:
    """Do for an op that overwrites its first argument what torch's own in-place ops do: nothing that autograd tracks
    is overwritten, and its version tells whoever has saved it."""
    name, first = schema.partition("(")[0], arguments(schema)[0].split()[-1]
    op = getattr(getattr(torch.ops, library.ns), name).default

    def overwrite(keyset: torch._C.DispatchKeySet, x: Tensor, *rest: object) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: {first} is overwritten and requires grad, which autograd would not see; pass {first}.detach()"
                " of a layer's output"
            )
        op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x, *rest)
        torch.autograd.graph.increment_version(x)

    library.impl(name, overwrite, "ADInplaceOrView", with_keyset=True)
