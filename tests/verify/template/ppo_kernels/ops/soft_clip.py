"""Soft clipping of rewards or advantages."""

from __future__ import annotations

from torch import Tensor

from ppo_kernels._types import compute_dtype
from ppo_kernels.backends import register
from ppo_kernels.ops._fakes import like_first
from ppo_kernels.ops._inputs import check_floating, check_number, to_mask
from ppo_kernels.ops._public import public
from ppo_kernels.reference.soft_clip import soft_clip as reference


def _triton_kernel():
    from ppo_kernels.triton.soft_clip import soft_clip

    return soft_clip


_SOFT_CLIP = register("soft_clip", fake=like_first, triton_kernel=_triton_kernel, reference=reference)


@public
def soft_clip(x: Tensor, mask: Tensor | None = None, *, cap: float = 5.0, impl: str = "auto") -> Tensor:
    r"""Bound values without a corner: :math:`y = x / (1 + |x| / c)`, which lies between -c and c.

    Args:
        x: any shape, floating and finite.
        mask: same shape; non-zero = valid. None means all valid.
        cap: what no value exceeds, > 0.
        impl: "auto", "cuda", "triton", "cpu" or "torch".

    Returns:
        A tensor of the shape of ``x``, float32 (float64 if ``x`` is), 0 at masked elements. It does not require grad.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices, options or ``impl`` that do not fit.
    """
    cap = check_number("soft_clip", "cap", cap, above=0.0)
    check_floating("soft_clip", "x", x)
    mask = to_mask("soft_clip", mask, x)
    x, mask = x.detach().to(compute_dtype(x)).contiguous(), None if mask is None else mask.contiguous()
    impl = _SOFT_CLIP.choose(impl, x.device.type, x.dtype)
    if impl == "torch":
        return _SOFT_CLIP.reference(x, mask, cap=cap)
    return _SOFT_CLIP.call(impl, x, mask, cap)
