"""How far each implementation is from float64, beside the eager code that a trainer writes: a table in Markdown.

``python -m bench --accuracy``. The truth is the oracle (bench/oracle); eager is PyTorch on the same inputs in
float32. A cell is the worst error over its data sets, and in brackets the worst ratio to eager's error on one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

from bench.cases import CASES, Case, Data, flat
from bench.interpreter import round_to_bfloat16
from bench.results import Table
from ppo_kernels import backends, triton

IMPLS = ("torch", "cpu", "triton")
# log p, entropy and whitened values are of the order of 1; the others are measured by the largest of their kind.
ABSOLUTE = ("log p", "entropy", "whitened")
GRADIENT = "gradient"


def named(data: Data, outputs: list, gradient: object) -> dict[str, np.ndarray]:
    """The results that are compared, by name."""
    wanted = [name for name in data.results if name != GRADIENT]
    found = dict(zip(wanted, data.view(outputs), strict=False))
    return found | ({GRADIENT: gradient} if GRADIENT in data.results else {})


def computed(case: Case, data: Data, call: Callable[..., object]) -> dict[str, torch.Tensor]:
    """Of an implementation; the gradient is that of the sum of all outputs."""
    inputs, leaf = dict(data.inputs), None
    if case.leaf:
        leaf = inputs[case.leaf] = inputs[case.leaf].clone().requires_grad_()
    outputs = flat(call(**inputs, **data.options))
    if leaf is not None:
        sum(x.sum() for x in outputs if x.requires_grad).backward()
    return named(data, [x.detach() for x in outputs], leaf.grad if leaf is not None else None)


def truth(case: Case, data: Data) -> dict[str, np.ndarray]:
    found = flat((case.truth or case.oracle)(**data.inputs, **{**case.options, **data.options}))
    return named(data, found, found[-1])


def error(name: str, got: torch.Tensor, want: np.ndarray) -> float:
    """The largest error: absolute, or relative to the value itself near p = 1 and else to the largest value."""
    off = np.abs(got.double().numpy() - want)
    if not np.isfinite(off).all():
        return float("inf")
    if name == "log p, p near 1":
        return float((off / np.abs(want)).max())
    return float(off.max() / (1.0 if name in ABSOLUTE else np.abs(want).max()))


def rows() -> dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]]:
    """Per op, result and dtype: the errors of eager and each implementation, and their ratios to eager's."""
    g = torch.Generator().manual_seed(0)
    found: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for case in (case for case in CASES if case.accuracy):
        have = backends.op(case.op).implementations("cpu")
        calls = {"eager": case.accurate_eager or case.eager}
        calls |= {impl: case.call(impl) for impl in IMPLS if impl in have}
        for data in case.accuracy(g):
            print(".", end="", file=sys.stderr, flush=True)
            want = truth(case, data)
            outputs = {impl: computed(case, data, call) for impl, call in calls.items()}
            dtype = max((x for x in data.inputs.values() if x.is_floating_point()), key=torch.Tensor.numel).dtype
            for name in want:
                row = found.setdefault((case.op, name, str(dtype).removeprefix("torch.")), {})
                errors = {impl: error(name, out[name], want[name]) for impl, out in outputs.items()}
                for impl, off in errors.items():
                    ratio = off / errors["eager"] if errors["eager"] else (0.0 if off == 0 else float("inf"))
                    row.setdefault(impl, []).append((off, ratio))
    return found


def main() -> int:
    if triton.INTERPRETED and triton.INSTALLED:
        round_to_bfloat16()
    table = Table("Accuracy", "", ["op", "result", "inputs", "eager", *IMPLS])
    for (op, name, dtype), row in rows().items():
        worst = {impl: tuple(map(max, zip(*pairs, strict=True))) for impl, pairs in row.items()}
        cells = [f"{worst[i][0]:.1e} ({worst[i][1]:.2f})" if i in worst else "–" for i in IMPLS]
        kind = "" if name in ABSOLUTE else " (relative)"
        table.lines.append([op, name + kind, dtype, f"{worst['eager'][0]:.1e}", *cells])
    print("\n", file=sys.stderr)
    print(table.markdown())
    print(f"\nWorst errors against float64, torch {torch.__version__}; in brackets the worst ratio to eager's.")
    print("Triton's figures come from its interpreter, not from a GPU.")
    return 0
