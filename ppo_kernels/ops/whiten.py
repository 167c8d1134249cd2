"""Masked whitening, and the moments it rests on."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import ProcessGroup, compute_dtype
from ppo_kernels.backends import register
from ppo_kernels.ops._fakes import like_first
from ppo_kernels.ops._inputs import check_floating, check_group, check_number, to_mask
from ppo_kernels.ops._public import public
from ppo_kernels.reference import whiten as reference


def _fake_moments(x, mask):
    return tuple(x.new_empty((), dtype=torch.float64) for _ in range(3))


def _triton_kernels():
    from ppo_kernels.triton import whiten

    return whiten


_MOMENTS = register(
    "moments",
    fake=_fake_moments,
    triton_kernel=lambda: _triton_kernels().moments,
    reference=reference.moments,
)
_WHITEN = register(
    "whiten",
    fake=like_first,
    triton_kernel=lambda: _triton_kernels().whiten,
    reference=reference.whiten,
)


def _prepare(op: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_floating(op, "x", x)
    mask = to_mask(op, mask, x)
    return x.detach().to(compute_dtype(x)).contiguous(), None if mask is None else mask.contiguous()


@public
def moments(
    x: Tensor, mask: Tensor | None = None, *, impl: str = "auto", validate: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Number, mean and sum of squared deviations of the valid elements.

    .. math:: n = \sum m,\quad \mu = \tfrac{1}{n}\sum m x,\quad M_2 = \sum m (x - \mu)^2

    Args:
        x: any shape, floating.
        mask: same shape; non-zero = valid. None means all valid.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: accepted for symmetry; there is no value to check.

    Returns:
        ``(count, mean, m2)``: 0-d float64 tensors on the device of ``x``, all 0 when nothing is valid. They can be
        gathered over ranks and merged. They do not require grad.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices or ``impl`` that do not fit.
    """
    x, mask = _prepare("moments", x, mask)
    impl = _MOMENTS.choose(impl, x.device.type, x.dtype)
    if impl == "torch":
        return _MOMENTS.reference(x, mask)
    return _MOMENTS.call(impl, x, mask)


@public
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor:
    r"""Shift and scale the valid elements to mean 0 and variance 1.

    .. math:: y = (x - \mu) / \sqrt{\sigma^2 + \mathrm{eps}},\quad \sigma^2 = M_2 / (n - 1)

    Args:
        x: any shape, floating (advantages ``[B, T]`` or packed ``[N]``).
        mask: same shape; non-zero = valid. None means all valid.
        shift_mean: False adds the mean back: only the scale changes.
        unbiased: divide by n - 1 (else by n).
        eps: added to the variance, >= 0.
        group: a ``torch.distributed`` group whose ranks share the statistics. Every rank of it must call, one without
            valid elements too. One all-gather of three float64 numbers, merged in rank order, so that all ranks see
            the same bits. None means this process alone.
        impl: "auto", "cuda", "triton", "cpu" or "torch".
        validate: accepted for symmetry; there is no value to check.

    Returns:
        A tensor of the shape of ``x``, float32 (float64 if ``x`` is), 0 at masked elements. It does not require grad.
        With n <= 1 the variance is 0: the result is 0, or ``x`` itself with ``shift_mean=False``.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.

    Source: Ziegler et al. (2019); moments merged as by Chan, Golub and LeVeque (1979).
    """
    eps = check_number("whiten", "eps", eps, least=0.0)
    x, mask = _prepare("whiten", x, mask)
    statistics = None
    if group is not None:
        check_group("whiten", "group", group)
        statistics = shared_moments(x, mask, group, impl)
    impl = _WHITEN.choose(impl, x.device.type, x.dtype)
    if impl == "torch":
        return _WHITEN.reference(x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps, statistics=statistics)
    return _WHITEN.call(impl, x, mask, *(statistics or (None, None, None)), bool(shift_mean), bool(unbiased), eps)


def shared_moments(
    x: Tensor, mask: Tensor | None, group: ProcessGroup | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``moments`` over the elements of all ranks of a group, of this process alone without one."""
    if group is None:
        return moments(x, mask, impl=impl)
    mine = torch.stack(moments(x, mask, impl=impl))
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, mine, group=group)
    return reference.merge_moments([(p[0], p[1], p[2]) for p in parts])
