"""The record as a page to read: ``resources.md``."""

from __future__ import annotations

from tests.verify.aot import paths

SHOWN = "sm_90"
INTRODUCTION = f"""# What is compiled

Made by `python -m tests.verify.aot.resources --write` from the compiled code, without a GPU; `resources.json` has the
same for every architecture, and `make verify PART=aot` fails where a kernel needs more than it says. The figures are of
{SHOWN}, registers and resident blocks of the others too.

- *blocks per SM*: resident at a time, by registers, shared memory and threads, on sm_80 / 90 / 100 / 120.
- *per element*: instructions of a lane on the shortest way through the hot part, over its logits or tokens; *odd* is
  the same where rows begin at no 16-byte boundary.
- *first use*: instructions from the last load of a tile's data (its vectors and the words of its mask) to the first
  instruction that reads any of them. **Negative: something waits for memory before all of the tile is asked for.**
- *before data*: barriers that a block passes before it asks for the first vector.
- *dependent launch*: the kernel allows the next one to begin, waits for the one before it, or both, and how many loads
  of what was there before are in front of that wait (`csrc/cuda/dependent_launch.cuh`).
"""


def markdown(record: dict) -> str:
    parts = [INTRODUCTION]
    if "cuda" in record:
        parts.append(f"## CUDA C++ (nvcc {record['cuda']['nvcc']})\n\n" + _cuda(record["cuda"]["kernels"]))
    if "launches" in record:
        parts.append("## Launches of a call of the CUDA ops, forward and backward\n\n" + _launches(record["launches"]))
    if "triton" in record:
        parts.append(f"## Triton ({record['triton']['triton']})\n\n" + _triton(record["triton"]["kernels"]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _lines(header: list[str], rows: list[list[object]]) -> str:
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    cells = [header, rule, *[["" if x is None else str(x) for x in row] for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _of_all(archs: dict, key: str) -> str:
    return " / ".join(str(entry.get(key, "")) for entry in archs.values())


def _cuda(kernels: dict) -> str:
    rows = []
    for kernel, archs in kernels.items():
        entry, path = archs[SHOWN], paths.of(kernel)
        odd = entry.get("odd_instructions_per_element")
        cells = [f"`{kernel}`", path.what, _of_all(archs, "registers"), entry["spill_bytes"], entry["shared_bytes"]]
        cells += [entry["threads"], _of_all(archs, "blocks_per_sm"), entry["instructions"]]
        cells += [entry.get("instructions_per_element"), odd and f"{odd} ({path.odd})", entry.get("first_use")]
        cells += [entry["barriers"], entry["membars"], entry.get("barriers_before_data")]
        rows.append([*cells, f"{entry['vector_loads']} / {entry['vector_stores']}", _dependent(entry)])
    header = ["kernel", "path", "registers", "spills, B", "shared, B", "threads", "blocks per SM", "instructions"]
    header += ["per element", "odd", "first use", "barriers", "membars", "before data", "vector loads / stores"]
    header += ["dependent launch"]
    return _lines(header, rows)


def _dependent(entry: dict) -> str:
    loads = f"waits, behind {entry.get('loads_before_wait')} loads,"
    return entry.get("dependent_launch", "").replace("waits", loads).rstrip(",")


def _launches(calls: dict[str, list[str]]) -> str:
    rows = [[call, " + ".join(f"`{name}`" for name in names), len(names)] for call, names in calls.items()]
    return _lines(["call", "launches", "number"], rows)


def _triton(kernels: dict) -> str:
    rows = []
    for kernel, archs in kernels.items():
        entry = archs.get(SHOWN)
        if entry is None:
            continue
        name, _, path = kernel.rpartition(" ")
        cells = [f"`{name}`", path, *(entry[key] for key in ("variants", "registers", "spill_bytes", "shared_bytes"))]
        cells += [
            entry["threads"],
            entry["blocks_per_sm"],
            entry["instructions"],
            entry.get("instructions_per_element"),
        ]
        rows.append([*cells, entry["barriers"], entry["membars"]])
    header = ["kernel", "path", "variants", "registers", "spills, B", "shared, B", "threads", "blocks per SM"]
    return _lines([*header, "instructions", "per element", "barriers", "membars"], rows)
