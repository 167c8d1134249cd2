"""How far each implementation is from float64, beside the eager code that a trainer writes: a table in Markdown.

``python -m bench --accuracy``. The truth is the oracle (bench/oracle); eager is PyTorch on the same inputs in
float32. A cell is the worst error over its data sets, and in brackets the worst ratio to eager's error on one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bench.cases import CASES, Case, Data, flat
from bench.results import Table
from ppo_kernels import backends

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


def rows() -> dict[tuple[str, str, str], dict[str, tuple[float, float]]]:
    """Per op, result and dtype: for eager and each implementation the worst error and the worst ratio to eager's."""
    g = torch.Generator().manual_seed(0)
    worst: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    for case in (case for case in CASES if case.accuracy):
        eager, have = case.accurate_eager or case.eager, backends.op(case.op).implementations("cpu")
        calls = {impl: case.call(impl) for impl in IMPLS if impl in have}
        for data in case.accuracy(g):
            want, base = truth(case, data), computed(case, data, eager)
            outputs = {"eager": base} | {impl: computed(case, data, call) for impl, call in calls.items()}
            dtype = max((x for x in data.inputs.values() if x.is_floating_point()), key=torch.Tensor.numel).dtype
            for name in want:
                row = worst.setdefault((case.op, name, str(dtype).removeprefix("torch.")), {})
                least = error(name, base[name], want[name])
                for impl, out in outputs.items():
                    off = error(name, out[name], want[name])
                    ratio = off / least if least else (0.0 if off == 0 else float("inf"))
                    was = row.get(impl, (0.0, 0.0))
                    row[impl] = max(was[0], off), max(was[1], ratio)
    return worst


def main() -> int:
    table = Table("Accuracy", "", ["op", "result", "inputs", "eager", *IMPLS])
    for (op, name, dtype), row in rows().items():
        cells = [f"{row[i][0]:.1e} ({row[i][1]:.2f})" if i in row else "–" for i in IMPLS]
        kind = "" if name in ABSOLUTE else " (relative)"
        table.lines.append([op, name + kind, dtype, f"{row['eager'][0]:.1e}", *cells])
    print(table.markdown())
    print(f"\nWorst errors against float64, torch {torch.__version__}; in brackets the worst ratio to eager's.")
    print("Triton's figures come from its interpreter, not from a GPU.")
    return 0
