"""Which implementations of an op exist here, and which one a call gets.

An implementation is a name: "cuda" and "cpu" are the compiled kernels, "triton" the Triton kernels, "torch" the eager
reference. The first two share the ops ``ppo_kernels::<op>`` (one per dispatch key), Triton's are
``ppo_kernels_triton::<op>`` with the same schemas, so a public function never knows which kernel it calls.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from ppo_kernels import __all__ as _public_names
from ppo_kernels import _native, triton
from ppo_kernels._registered import arguments, checked, guard, require
from ppo_kernels._schemas import SCHEMAS
from ppo_kernels._types import element, wide_dtype

logger = logging.getLogger("ppo_kernels")

#: The public ops, in the order of their schemas.
OPS = tuple(name for name in SCHEMAS if name in _public_names)
#: For each device type, the implementations that can serve it, best first.
PREFERENCE = {
    "cpu": ("cpu", "torch", "triton"),
    # Neither has been run on a GPU yet. token_logprobs needs half of Triton's instructions per logit in CUDA
    # (tests/verify/aot/resources.json), and the CUDA sources alone run under sanitizers; the table of bench/gpu_run.sh
    # decides the order, op by op, once there is one.
    "cuda": ("cuda", "triton", "torch"),
    "xpu": ("triton", "torch"),
}
NAMES = ("auto", "cuda", "triton", "cpu", "torch")

_AUTOGRAD_CPU = torch._C.DispatchKey.AutogradCPU
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded

_ops: dict[str, Op] = {}
_torch_calls: Counter[str] = Counter()
_torch_calls_lock = threading.Lock()


@dataclass(eq=False)
class Op:
    """An op that is registered with torch, as the public function next to it uses it."""

    name: str
    #: By implementation, what runs it. "torch" is not among them: that is ``reference``.
    kernels: dict[str, Callable]
    #: By device type, the implementations that can run here, best first.
    available: dict[str, tuple[str, ...]]
    _reference: Callable | None
    #: Its outputs without their values.
    fake: Callable
    #: Positions of the float arguments, and by implementation the op that takes them as one tensor.
    floats: tuple[int, ...]
    traced: dict[str, Callable]
    #: By implementation, what eager calls of it go to.
    eager: dict[str, Callable] = field(default_factory=dict)
    #: Whether there is a CPU kernel.
    on_cpu: bool = False
    overwrites: bool = False

    def __post_init__(self) -> None:
        self.overwrites = self.name.endswith("_")
        for impl, kernel in self.kernels.items():
            self.serve(impl, kernel)
        self.on_cpu = "cpu" in self.kernels

    def serve(self, impl: str, kernel: Callable) -> None:
        """Let ``kernel`` run an implementation."""
        self.kernels[impl] = kernel
        self.eager[impl] = getattr(kernel, "_op", kernel)  # without the Python call around a registered op

    def implementations(self, device_type: str) -> tuple[str, ...]:
        """The implementations that can run on a device type here, best first."""
        return self.available.get(device_type, ("torch",))

    def choose(self, impl: str, device_type: str, dtype: torch.dtype) -> str:
        """Resolve ``impl`` for a call, or say why it cannot be served and what to do."""
        available = self.implementations(device_type)
        if impl == "auto":
            if dtype == torch.float64 and device_type != "cpu":
                return "torch"
            return available[0]
        if impl in available:
            if dtype == torch.float64 and impl != "torch" and device_type != "cpu":
                raise ValueError(f'{self.name}: impl="{impl}" has no float64 kernel; use impl="auto" or impl="torch"')
            return impl
        why = _why_not(impl, device_type)
        raise ValueError(f'{self.name}: impl="{impl}" {why}; available here: {("auto", *available)}')

    def kernel(self, impl: str) -> Callable:
        """The registered op behind an implementation other than "torch"."""
        return self.kernels[impl]

    def shortcut(self, impl: str, mask: object, first: object, *others: object) -> bool:
        """Whether a call with these tensors may go to the CPU's kernel unchecked: plain ones, and nothing around it.

        What the kernel refuses goes the way of every other call, which converts it or says what is wrong. That takes
        20 microseconds, so what is often converted is not tried: masks of integers here, half precision by callers.
        """
        if type(first) is not torch.Tensor or not first.is_cpu or impl not in ("auto", "cpu") or not self.on_cpu:
            return False
        for x in others:  # a generator costs a microsecond
            if type(x) is not torch.Tensor:
                return False
        if mask is not None and (type(mask) is not torch.Tensor or mask.dtype != torch.bool):
            return False
        around = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return not around and forward_ad._current_level < 0

    def call(self, impl: str, *args: Any) -> Any:
        """Call the registered op."""
        if torch.compiler.is_compiling():
            traced, args = self.traceable(impl, args)
            return traced(*args)
        return self.run(impl, *args)

    def run(self, impl: str, *args: Any) -> Any:
        """Call the registered op eagerly, from where it is differentiated by other means or not at all."""
        if impl != "cpu" or self.overwrites or _is_excluded(_AUTOGRAD_CPU):
            with torch._C._AutoDispatchBelowAutograd():
                return self.eager[impl](*args)
        _exclude(_AUTOGRAD_CPU, True)  # by hand: an object that does it costs a microsecond
        try:
            return self.eager["cpu"](*args)
        finally:
            _exclude(_AUTOGRAD_CPU, False)

    def traceable(self, impl: str, args: tuple) -> tuple[Callable, tuple]:
        """The op for a graph, and its arguments there: the floats as one float64 tensor on the CPU.

        A float would become a constant of the graph, and each new value a compilation. What torch.export makes keeps
        its constants, and with them runs without Python.
        """
        traced = self.traced.get(impl)
        if traced is None or torch.compiler.is_exporting():
            return self.kernels[impl], args
        numbers = torch.stack([element(args[i]) for i in self.floats if i < len(args)])
        rest = [x for i, x in enumerate(args) if i not in self.floats]
        rest.insert(self.floats[0], numbers)
        return traced, tuple(rest)

    def reference(self, *args: Any, **options: Any) -> Any:
        """Call the eager reference and count the call. A traced one becomes part of a graph and is not a call."""
        assert self._reference is not None
        if torch.compiler.is_compiling():
            options = {name: _beside(args[0], x) for name, x in options.items()}
        else:
            if args[0].requires_grad:  # autograd refuses to save tensors of inference mode
                args = tuple(_out_of_inference(x) for x in args)
                options = {name: _out_of_inference(x) for name, x in options.items()}
            with _torch_calls_lock:
                _torch_calls[self.name] += 1
        return self._reference(*args, **options)


_library = torch.library.Library("ppo_kernels", "FRAGMENT")
_traced_library = torch.library.Library("ppo_kernels_traced", "DEF")
#: These ops read ``numbers`` on the CPU, which the replay of a CUDA graph would not: it would keep the first values.
_TRACED_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def register_traced(name: str, schema: str, floats: tuple[int, ...], fake: Callable, kernel: Callable) -> Callable:
    """The op with its float arguments as one tensor, which takes the place of the first."""
    inside = [x for i, x in enumerate(arguments(schema)) if i not in floats]
    inside.insert(floats[0], "Tensor numbers")
    schema = f"{name}({', '.join(inside)}) ->{schema.partition(') ->')[2]}"
    _traced_library.define(schema, tags=_TRACED_TAGS)

    def with_floats(args: tuple, values: Sequence[float]) -> list:
        full = list(args)
        del full[floats[0]]
        for i, value in zip(floats, values, strict=True):
            full.insert(i, value)
        return full

    def numbers_of(args: tuple) -> torch.Tensor:
        x = args[floats[0]]
        fits = x.shape == (len(floats),) and x.dtype == torch.float64
        require(fits, f"numbers must be float64 [{len(floats)}], got {x.dtype} {tuple(x.shape)}")
        return x

    def call(*args: Any) -> Any:
        return kernel(*with_floats(args, numbers_of(args).tolist()))

    def fake_call(*args: Any) -> Any:
        numbers_of(args)
        return fake(*with_floats(args, [0.0] * len(floats)))

    for key in ("CPU", "CUDA", "XPU"):
        _traced_library.impl(name, checked(schema, call, on_cpu="numbers"), key)
    torch.library.register_fake(
        f"ppo_kernels_traced::{name}", checked(schema, fake_call, on_cpu="numbers"), lib=_traced_library
    )
    return getattr(torch.ops.ppo_kernels_traced, name).default


def _beside(x: torch.Tensor, option: Any) -> Any:
    """A traced option, an element on the CPU, next to ``x``: clamp takes no bounds from another device."""
    if isinstance(option, tuple):
        return tuple(_beside(x, part) for part in option)
    if isinstance(option, torch.Tensor) and option.dim() == 0 and option.device != x.device:
        return option.to(x.device, wide_dtype(x.device))
    return option


def _out_of_inference(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def vmap_by_calls(kernel: Any) -> Callable:
    """A rule for ``torch.func.vmap``: one call per element of the batch."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        def call(i: int) -> Any:
            return kernel(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))

        results = [call(i) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def register(name: str, *, fake: Callable, triton_kernel: Callable, reference: Callable | None = None) -> Op:
    """Make the op of this name in ``csrc/ops.cpp`` callable and traceable.

    Args:
        fake: the op's outputs without their values, for tracing.
        triton_kernel: returns the function that launches the Triton kernel. It is called at the first launch, because
            importing that function imports Triton.
        reference: the same in eager PyTorch; a backward op has none.
    """
    schema = SCHEMAS[name]
    fake = checked(schema, fake)
    kernels: dict[str, Callable] = {}
    for impl, error in (("cpu", _native.CPU_ERROR), ("cuda", _native.CUDA_ERROR)):
        if error is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"ppo_kernels::{name}", impl.upper()):
            kernels[impl] = getattr(torch.ops.ppo_kernels, name).default
    if kernels:
        torch.library.register_fake(f"ppo_kernels::{name}", fake)
        guard(_library, schema)
    if triton.INSTALLED:
        try:
            kernels["triton"] = triton.register(schema, fake, triton_kernel)
        except RuntimeError as error:  # torch cannot parse the schema: the reference needs none
            logger.warning("%s: no Triton kernel, %s", name, error)
    if "!" not in schema:  # writes to no argument
        for kernel in set(kernels.values()):
            torch.library.register_vmap(kernel, vmap_by_calls(kernel))  # type: ignore[arg-type]

    floats = tuple(i for i, argument in enumerate(arguments(schema)) if argument.startswith("float "))
    traced: dict[str, Callable] = {}
    if floats and "!" not in schema:
        for kernel in set(kernels.values()):
            suffix = "_triton" if kernel is kernels.get("triton") else ""
            op = register_traced(name + suffix, schema, floats, fake, kernel)
            traced |= {impl: op for impl in kernels if kernels[impl] is kernel}

    def runs(impl: str, device_type: str) -> bool:
        if impl == "triton":
            return "triton" in kernels and device_type in triton.DEVICE_TYPES
        return impl == "torch" or impl in kernels

    available = {
        device_type: tuple(impl for impl in preference if runs(impl, device_type))
        for device_type, preference in PREFERENCE.items()
    }
    _ops[name] = Op(name, kernels, available, reference, fake, floats, traced)
    return _ops[name]


def op(name: str) -> Op:
    """The op of this name."""
    return _ops[name]


def _why_not(impl: str, device_type: str) -> str:
    if impl not in NAMES:
        return f"is not one of {NAMES}"
    if impl not in PREFERENCE.get(device_type, ("torch",)):
        return f'does not serve {device_type} tensors; move the inputs or use impl="auto"'
    if impl == "triton":
        if not triton.INSTALLED:
            return "cannot run: Triton is not installed; pip install triton"
        if device_type in triton.DEVICE_TYPES:
            return "has no kernel: torch cannot parse its schema in ops.cpp; correct it"
        return "serves CPU tensors only in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
    error = _native.CPU_ERROR if impl == "cpu" else _native.CUDA_ERROR
    return f"cannot run: {error}" if error else "has no kernel for this op in the binary; rebuild it"


def status() -> dict[str, dict[str, int]]:
    """Calls so far per op and implementation, for example ``{"gae": {"cpu": 3}, "token_logprobs": {"torch": 1}}``.

    Kernels count inside the registered op, so compiled graphs count too; "torch" counts eager calls only.
    """
    calls: dict[str, dict[str, int]] = {}
    others = {"triton": triton.call_counts(), "torch": dict(_torch_calls)}
    for impl, counts in (*_native.call_counts().items(), *others.items()):
        for name, n in sorted(counts.items()):
            if n:
                calls.setdefault(name, {})[impl] = n
    return calls


def log_choice() -> None:
    """Say once, at import, what was found."""
    for device_type in PREFERENCE:
        chosen = {name: op(name).implementations(device_type)[0] for name in OPS}
        if len(set(chosen.values())) == 1:
            logger.info("%s tensors: every op runs on %r", device_type, chosen[OPS[0]])
        else:
            logger.info("%s tensors: %s", device_type, chosen)
