"""The checks that the ops on hidden states and a head's weight share."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype
from ppo_kernels.ops._inputs import (
    bound,
    check_constant,
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_shape,
)
from ppo_kernels.ops._logits_inputs import check_ignore_index, check_temperature

MIB = 2**20
HALF = (torch.bfloat16, torch.float16)


def check_head(op: str, hidden: object, weight: object, labels: object, bias: object) -> None:
    """The dtypes, shapes and devices."""
    hidden, weight = check_floating(op, "hidden", hidden), check_floating(op, "weight", weight)
    labels = check_integer(op, "labels", labels)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.size(0) == 0 or weight.size(1) != hidden.size(-1):
        raise ValueError(
            f"{op}: hidden must be [..., H] and weight [V, H] with V >= 1; got {tuple(hidden.shape)} and"
            f" {tuple(weight.shape)}"
            + ("; gather a weight that ZeRO-3 has partitioned first" if weight.numel() == 0 else "")
        )
    if labels.dim() == 0 or tuple(labels.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"{op}: labels must have the shape of hidden without H {tuple(hidden.shape[:-1])}, of one dimension or"
            f" more; got {tuple(labels.shape)}"
        )
    check_device(op, "weight", weight, hidden.device)
    check_device(op, "labels", labels, hidden.device)
    if bias is not None:
        bias = check_floating(op, "bias", bias)
        check_shape(op, "bias", bias, (weight.size(0),), "[V]")
        check_device(op, "bias", bias, hidden.device)


def check_logits_dtype(op: str, dtype: object, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    wide = compute_dtype(hidden, weight, bias)
    if dtype is None or dtype == wide:
        return
    alike = hidden.dtype == weight.dtype and hidden.dtype in HALF and wide == torch.float32
    if not (alike and dtype == hidden.dtype):
        allowed = f"None, {wide}" + (f" or {hidden.dtype}" if alike else "")
        raise ValueError(
            f"{op}: logits_dtype must be {allowed} for hidden in {hidden.dtype} and weight in {weight.dtype};"
            f" got {dtype}"
        )


def memory_bytes(op: str, memory_mib: object, device: torch.device, on_cpu: int) -> int:
    """``on_cpu`` MiB are what a call on a CPU may take if nothing is said."""
    if memory_mib is None:
        return (on_cpu if device.type == "cpu" else 1024) * MIB
    return int(check_constant(op, "memory_mib", memory_mib, above=0.0, most=2.0**42) * MIB)


def head_numbers(
    op: str, temperature: object, softcap: object, logit_scale: object, ignore_index: object, rows_of: Tensor
) -> tuple[Tensor | None, float, float, float, int]:
    """The temperature of each row or None, and what kernels take: temperature, softcap, scale, ignore_index."""
    ignore_index = check_ignore_index(op, ignore_index)
    rows, tau = check_temperature(op, temperature, rows_of)
    cap = bound(op, "softcap", softcap, above=0.0)
    return rows, tau, cap, check_number(op, "logit_scale", logit_scale, above=0.0), ignore_index
