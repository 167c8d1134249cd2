"""Which implementations of an op exist here, and which one a call gets.

An implementation is a name: "cuda" and "cpu" are the compiled kernels, "triton" the portable twin, "torch" the eager
reference. The first two share the ops ``ppo_kernels::<op>`` (one per dispatch key), Triton's are
``ppo_kernels_triton::<op>`` with the same schemas, so a public function never knows which kernel it calls.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

import torch

from ppo_kernels import _native, triton

logger = logging.getLogger("ppo_kernels")

#: The public ops, in the order of the documentation.
OPS = (
    *("token_logprobs", "kl_rewards", "gae", "whiten", "moments", "policy_loss", "value_loss"),
    *("p3o_loss", "group_advantages"),
)
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

_kernels: dict[tuple[str, str], torch._ops.OpOverload] = {}
_torch_calls: Counter[str] = Counter()
_torch_calls_lock = threading.Lock()


def declare(schema: str, fake: Callable) -> None:
    """Make the op with this schema callable and traceable: Triton's, and the compiled ones that are here."""
    name = schema.partition("(")[0]
    if triton.INSTALLED:
        _kernels["triton", name] = triton.define(schema, fake)
    for impl, error in (("cpu", _native.CPU_ERROR), ("cuda", _native.CUDA_ERROR)):
        if error is not None:
            continue
        if not _native.check_schema(name, schema):
            for key in [key for key in _kernels if key[0] != "triton"]:
                del _kernels[key]  # one op that differs makes the whole binary suspect
        elif _has_kernel(name, impl.upper()):
            _kernels[impl, name] = getattr(torch.ops.ppo_kernels, name).default
    if ("cpu", name) in _kernels or ("cuda", name) in _kernels:
        torch.library.register_fake(f"ppo_kernels::{name}", fake)


def _has_kernel(name: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ppo_kernels::{name}", dispatch_key)


def kernel(name: str, impl: str) -> torch._ops.OpOverload:
    """The registered op behind an implementation other than "torch"."""
    return _kernels[impl, name]


def implementations(op: str, device_type: str) -> tuple[str, ...]:
    """The implementations of an op that can run on a device type here, best first."""
    preference = PREFERENCE.get(device_type, ("torch",))
    return tuple([impl for impl in preference if impl == "torch" or _serves(impl, op, device_type)])


def _serves(impl: str, op: str, device_type: str) -> bool:
    return (impl, op) in _kernels and (impl != "triton" or device_type in triton.DEVICE_TYPES)


def choose(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    """Resolve ``impl`` for a call, or say why it cannot be served and what to do."""
    available = implementations(op, device_type)
    if impl == "auto":
        if dtype == torch.float64 and device_type != "cpu":
            return "torch"
        return available[0]
    if impl in available:
        if dtype == torch.float64 and impl != "torch" and device_type != "cpu":
            raise ValueError(f'{op}: impl="{impl}" has no float64 kernel; use impl="auto" or impl="torch"')
        return impl
    raise ValueError(f'{op}: impl="{impl}" {_why_not(op, impl, device_type)}; available here: {("auto", *available)}')


def _why_not(op: str, impl: str, device_type: str) -> str:
    if impl not in NAMES:
        return f"is not one of {NAMES}"
    if impl not in PREFERENCE.get(device_type, ("torch",)):
        return f'does not serve {device_type} tensors; move the inputs or use impl="auto"'
    if impl == "triton":
        if not triton.INSTALLED:
            return "cannot run: Triton is not installed; pip install triton"
        return "serves CPU tensors only in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
    error = _native.CPU_ERROR if impl == "cpu" else _native.CUDA_ERROR
    return f"cannot run: {error}" if error else "has no kernel for this op in the binary; rebuild it"


def count_torch_call(op: str) -> None:
    """Count an eager call of the reference. A traced one becomes part of a graph and is not a call any more."""
    if not torch.compiler.is_compiling():
        with _torch_calls_lock:
            _torch_calls[op] += 1


def status() -> dict[str, dict[str, int]]:
    """Calls so far per op and implementation, for example ``{"gae": {"cpu": 3}, "token_logprobs": {"torch": 1}}``.

    Kernels count inside the registered op, so compiled graphs count too; "torch" counts eager calls only.
    """
    calls: dict[str, dict[str, int]] = {}
    others = {"triton": triton.call_counts(), "torch": dict(_torch_calls)}
    for impl, counts in (*_native.call_counts().items(), *others.items()):
        for op, n in sorted(counts.items()):
            if n:
                calls.setdefault(op, {})[impl] = n
    return calls


def log_choice() -> None:
    """Say once, at import, what was found."""
    for device_type in PREFERENCE:
        chosen = {op: implementations(op, device_type)[0] for op in OPS}
        if len(set(chosen.values())) == 1:
            logger.info("%s tensors: every op runs on %r", device_type, chosen[OPS[0]])
        else:
            logger.info("%s tensors: %s", device_type, chosen)
