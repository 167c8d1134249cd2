"""The one place that launches a Triton kernel."""

from __future__ import annotations

import triton


def launch(
    kernel: triton.JITFunction,
    programs: int,
    *args: object,
    num_warps: int,
    fp_fusion: bool = False,
    **constexprs: object,
) -> None:
    """Run ``programs`` programs along the first grid axis, the one without the 65535 limit.

    ``fp_fusion`` lets the compiler contract ``a * b + c``. It is said at every launch because Triton's default moves
    from version to version, and off by default so that a formula gives the same bits wherever it is inlined.
    """
    if programs > 0:
        kernel[(programs,)](*args, **constexprs, num_warps=num_warps, enable_fp_fusion=fp_fusion)
