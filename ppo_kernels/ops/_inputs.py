"""The checks that the public functions share. A message says what was given and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype, element, wide_dtype

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATING)


def check_tensor(op: str, name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if type(x) is not Tensor or x.is_nested or x.layout is not torch.strided:
        _refuse_other_kinds(op, name, x)
    return x


def _refuse_other_kinds(op: str, name: str, x: Tensor) -> None:
    if x.is_nested:
        jagged = "" if x.layout is torch.jagged else " of the strided layout; make it with layout=torch.jagged, then"
        raise TypeError(
            f"{op}: {name} is a NestedTensor{jagged or ';'} pass its .values() for every input, and cu_seqlens=its"
            " .offsets() where the op takes them"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has the layout {x.layout}, and dense tensors alone are taken; pass .to_dense()")
    if hasattr(x, "placements"):
        raise TypeError(
            f"{op}: {name} is a DTensor with placements {tuple(x.placements)}, and only replicas are taken as they are;"
            " pass .to_local() if every rank holds whole rows, with group= where the op takes one, else .full_tensor()"
        )


def check_floating(op: str, name: str, x: object) -> Tensor:
    x = check_tensor(op, name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    return x


def check_real(op: str, name: str, x: object) -> Tensor:
    """Floating, or integers, which count as float32: scores often are."""
    x = check_tensor(op, name, x)
    if x.dtype not in FLOATING and x.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be floating or an integer of 8 to 64 bits, got {x.dtype}")
    return x


def check_integer(op: str, name: str, x: object) -> Tensor:
    x = check_tensor(op, name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {x.dtype}")
    return x


def check_shape(op: str, name: str, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    if x.shape != shape and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have the shape of {meaning} {tuple(shape)}, got {tuple(x.shape)}")


def check_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, the other inputs are on {device}; move it there")


def check_group(op: str, name: str, group: object) -> None:
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"{op}: {name} must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> int:
    """The position of ``value`` in ``allowed``, which is what kernels take."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {tuple(allowed)}, got {value!r}")
    return allowed.index(value)


def check_number(
    op: str,
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    read: bool = True,
) -> float:
    """A float option as a Python number: given as one, as a NumPy scalar or as one element on the CPU.

    While tracing it becomes a 0-d tensor: a float would become a constant of the graph, and every new value a
    compilation. The value of one that was a tensor is not looked at: a graph outlives it. One that the call does not
    ``read`` stays a float: AOTAutograd makes a constant of a float whose tensor nothing needs.
    """
    if type(value) is not float:
        value = _as_number(op, name, value)
        if isinstance(value, Tensor):
            return value  # type: ignore[return-value]
    if not (value > above and value >= least and value <= most and -math.inf < value < math.inf):
        limits = [f"> {above}"] * (above > -math.inf) + [f">= {least}"] * (least > -math.inf)
        limits += [f"<= {most}"] * (most < math.inf)
        limits += ["finite"] * (not limits or value == math.inf)
        raise ValueError(f"{op}: {name} must be {' and '.join(limits)}, got {value}")
    if read and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return element(value)  # type: ignore[return-value]
    return value


def _as_number(op: str, name: str, value: object) -> float | Tensor:
    if isinstance(value, Tensor):
        return _one_element(op, name, value)
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{op}: {name} must be a number that fits a float, got one beyond it") from None
    if hasattr(value, "__array__"):  # NumPy's, whose dtype a traced graph does not know
        try:
            return _one_element(op, name, torch.as_tensor(value, device="cpu"))
        except TypeError:  # text, objects
            pass
    raise TypeError(f"{op}: {name} must be a number or one element, got {type(value).__name__}")


def _check_one(op: str, name: str, value: Tensor) -> None:
    check_tensor(op, name, value)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(
            f"{op}: {name} must be a number or one real element, got {value.dtype} of shape {tuple(value.shape)}"
        )
    refuse_gradient(op, name, value)


def refuse_gradient(op: str, name: str, value: Tensor) -> None:
    """Raise for an option that somebody means to learn: its gradient would be 0 in silence."""
    x = value
    while torch.is_grad_enabled():
        if x.requires_grad:
            raise ValueError(f"{op}: {name} requires grad and is not differentiated; pass .detach()")
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        x = torch._C._functorch.get_unwrapped(x)


def _one_element(op: str, name: str, value: Tensor) -> float | Tensor:
    _check_one(op, name, value)
    if value.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} is on {value.device}, and to read it there would wait for the device;"
            " pass a number or a CPU tensor"
        )
    if torch.compiler.is_compiling():
        return element(value)
    _refuse_batched(op, name, value)
    return value.item()


def _refuse_batched(op: str, name: str, value: Tensor) -> None:
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            raise ValueError(
                f"{op}: {name} is one number for the whole call, and torch.func.vmap maps over it; call the op once for"
                " each value"
            )
        value = torch._C._functorch.get_unwrapped(value)


def check_integer_option(op: str, name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def check_constant(op: str, name: str, value: object, *, above: float, most: float) -> float:
    """``check_number`` of what is a constant of a graph: a limit that shapes the work."""
    value = value if type(value) is float else _as_number(op, name, value)
    if isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} is a constant of a compiled graph; pass a Python number in place of a tensor")
    if not above < value <= most:
        raise ValueError(f"{op}: {name} must be > {above} and <= {most}, got {value}")
    return value


def number_or_tensor(op: str, name: str, value: object, device: torch.device) -> tuple[float, Tensor | None]:
    """A number that may change from call to call, as ``(float, None)`` or ``(0.0, 0-d float64 tensor)``.

    The tensor is for a value that lives on the device, and for traced graphs: a float would become a constant of the
    graph, and every new value a compilation.
    """
    if isinstance(value, Tensor):
        _check_one(op, name, value)
        return 0.0, beside(op, name, value, device).reshape(())
    value = check_number(op, name, value)
    if torch.compiler.is_compiling():
        return 0.0, element(value).to(device, wide_dtype(device))
    return value, None


def beside(op: str, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A tensor of one element, in the widest dtype of the device that it is brought to."""
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{op}: {name} is on meta, where it has no value; pass one with a value, or a number")
    return value.detach().to(device=device, dtype=wide_dtype(device))


def bound(
    op: str, name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, read: bool = True
) -> float:
    """A clip or clamp as kernels take it: infinity where None or infinity switches it off."""
    if value is None:
        return math.inf
    if type(value) is float and above < value and least <= value < math.inf and not torch.compiler.is_compiling():
        return value
    if type(value) is not float:
        value = _as_number(op, name, value)
    if isinstance(value, Tensor) or value != math.inf:
        return check_number(op, name, value, above=above, least=least, read=read)
    return math.inf


def check_mask(op: str, name: str, mask: object) -> Tensor:
    mask = check_tensor(op, name, mask)
    if mask.dtype not in _MASK_DTYPES:
        raise TypeError(f"{op}: {name} must be bool, an integer of 8 to 64 bits or floating, got {mask.dtype}")
    return mask


def to_mask(op: str, mask: object, like: Tensor) -> Tensor | None:
    """The mask as a bool or uint8 tensor with a contiguous last dimension: kernels read both as bytes."""
    if mask is None:
        return None
    mask = check_mask(op, "mask", mask)
    check_shape(op, "mask", mask, like.shape, "its tokens")
    check_device(op, "mask", mask, like.device)
    if mask.dtype not in (torch.bool, torch.uint8):
        mask = mask != 0
    return unit_last_stride(mask)


def reraise_unless_refused(op: str, error: RuntimeError) -> None:
    """Raise what a kernel did not say: running out of memory, or the error of a hook."""
    if not isinstance(error, NotImplementedError) and op not in str(error):
        raise error


def keepable(x: Tensor | None) -> Tensor | None:
    """``x``, or a copy of a tensor of inference mode, which autograd refuses to save."""
    return x.clone() if x is not None and x.is_inference() else x


def unit_last_stride(x: Tensor) -> Tensor:
    if x.dim() == 0 or x.stride(-1) == 1 or x.size(-1) <= 1:
        return x
    return x.contiguous()


def check_packed(op: str, cu_seqlens: object, name: str, tokens: Tensor) -> None:
    cu_seqlens = check_integer(op, "cu_seqlens", cu_seqlens)
    if tokens.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{op}: with cu_seqlens [B+1], {name} must be [N]; got cu_seqlens {tuple(cu_seqlens.shape)} and {name}"
            f" {tuple(tokens.shape)}"
        )
    check_device(op, "cu_seqlens", cu_seqlens, tokens.device)


class Tokens:
    """The token-level inputs of one call, padded ``[B, T]`` or packed ``[N]`` with ``cu_seqlens [B+1]``.

    Checks that they agree, knows the number of rows, and brings every further input to the form that kernels take:
    one floating dtype, contiguous last dimension, masks as bytes.
    """

    def __init__(self, op: str, cu_seqlens: Tensor | None, *, extra: Sequence[object] = (), **tensors: object):
        self.op = op
        for name, x in tensors.items():
            check_floating(op, name, x)
        checked: dict[str, Tensor] = tensors  # type: ignore[assignment]
        first_name, first = next(iter(checked.items()))
        if cu_seqlens is None:
            if first.dim() != 2:
                raise ValueError(
                    f"{op}: {first_name} must be [B, T], or [N] with cu_seqlens; got shape {tuple(first.shape)}"
                )
            self.rows = first.size(0)
        else:
            check_packed(op, cu_seqlens, first_name, first)
            self.rows = cu_seqlens.numel() - 1
        shape, device = first.shape, first.device
        for name, x in checked.items():
            if x is not first:
                check_shape(op, name, x, shape, first_name)
                check_device(op, name, x, device)
        self.like = first
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        self.dtype = compute_dtype(*checked.values(), *[x for x in extra if isinstance(x, Tensor)])

    def cast(self, x: Tensor) -> Tensor:
        return unit_last_stride(x if x.dtype == self.dtype else x.to(self.dtype))

    def constant(self, x: Tensor) -> Tensor:
        """``cast`` for an input that takes no gradient."""
        return self.cast(x.detach() if x.requires_grad else x)

    def mask(self, mask: object) -> Tensor | None:
        return to_mask(self.op, mask, self.like)

    def per_token(self, name: str, x: object) -> Tensor:
        """A token-level input (``[B, T]`` or ``[N]``), or a row-level one (``[B]`` or ``[B, 1]``) as ``[B, 1]``."""
        x = check_floating(self.op, name, x)
        check_device(self.op, name, x, self.like.device)
        if x.shape == self.like.shape:
            return self.cast(x)
        shape = tuple(x.shape)
        if shape != (self.rows,) and shape != (self.rows, 1):  # Dynamo's `in` takes a symbol that is 1 for another
            raise ValueError(
                f"{self.op}: {name} must have the tokens' shape {tuple(self.like.shape)}, or one value per row"
                f" [{self.rows}] or [{self.rows}, 1]; got {shape}"
            )
        return x.to(self.dtype).reshape(self.rows, 1)

    def per_row(self, name: str, x: object) -> Tensor:
        x = check_real(self.op, name, x)
        check_shape(self.op, name, x, (self.rows,), "one value per row")
        check_device(self.op, name, x, self.like.device)
        return x.to(self.dtype).contiguous()

    def normalizer(self, value: object, name: str = "normalizer") -> Tensor | None:
        if value is None:
            return None
        device = self.like.device
        if isinstance(value, Tensor):
            _check_one(self.op, name, value)
            return beside(self.op, name, value, device).reshape(())
        value = check_number(self.op, name, value, least=0.0)
        if torch.compiler.is_compiling():
            return element(value).to(device, wide_dtype(device))
        return torch.full((), value, dtype=wide_dtype(device), device=device)

    def validate_cu_seqlens(self) -> None:
        cu = self.cu_seqlens
        if cu is None:
            return
        if int(cu[0]) != 0 or int(cu[-1]) != self.like.numel() or bool((cu[1:] < cu[:-1]).any()):
            raise ValueError(
                f"{self.op}: cu_seqlens must start at 0, never fall and end at N = {self.like.numel()};"
                f" got {cu.tolist() if cu.numel() <= 16 else f'{cu[:8].tolist()} ... {cu[-8:].tolist()}'}"
            )


def temperature_rows(op: str, temperature: Tensor, logits: Tensor) -> Tensor:
    """The temperature of each row of logits [..., V], contiguous, in the widest dtype of their device."""
    refuse_gradient(op, "temperature", temperature)
    if temperature.numel() == 1:
        _, one = number_or_tensor(op, "temperature", temperature, logits.device)
        temperature = temperature if one is None else one
    check_floating(op, "temperature", temperature)
    check_device(op, "temperature", temperature, logits.device)
    try:
        rows = temperature.detach().to(wide_dtype(temperature.device)).expand(logits.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"{op}: temperature must broadcast to the logits' shape without V {tuple(logits.shape[:-1])},"
            f" got {tuple(temperature.shape)}"
        ) from error
    return rows.contiguous()
