"""What every GPU kernel needs of the hardware, as compiled: ``resources.json``, and ``resources.md`` to read.

``python -m tests.verify.aot.resources`` compiles the CUDA and the Triton kernels for every architecture, without a
GPU, counts the launches of the CUDA ops, prints the table and fails on a regression; ``--write`` makes what was found
the new record. ``cuda``, ``triton`` or ``launches`` as arguments do a part of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lib.host_cuda.launches import plain
from tests.verify.aot import paths, sass, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

COMPILED = ROOT / "build" / "aot"
RECORD, TABLE = HERE / "resources.json", HERE / "resources.md"
ARCHITECTURES = (80, 90, 100, 120)
PARTS = ("cuda", "triton", "launches")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
#: Of a warp's lane, per bf16 logit: more would keep the forward from the bandwidth of the memory.
BUDGETS = {f"token_logprobs_kernel<{t}, true>": 8.0 for t in ("BFloat16", "Float16")}
#: They load inputs, which were there before the launches they wait for; others begin with what one of those writes.
LOADS_FIRST = ("whiten_kernel",)
LESS_IS_BETTER = (
    *("registers", "shared_bytes", "stack_bytes", "local_accesses", "instructions", "instructions_per_element"),
    *("odd_instructions_per_element", "barriers", "membars", "barriers_before_data"),
)
MORE_IS_BETTER = ("vector_loads", "vector_stores", "blocks_per_sm", "loads_before_wait")


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.check_output([nvcc(), "--version"], text=True)).group(1)


def _limits(log: str) -> dict[tuple[int, str], dict[str, int]]:
    """What ptxas says of each kernel."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\w+)' for 'sm_(\d+)", part).groups()
        stack, *spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        found[int(arch), name] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            "spill_bytes": sum(map(int, spills)),
            "stack_bytes": int(stack),
            "shared_bytes": int(shared.group(1)) if shared else 0,
        }
    return found


def _compiled(source: Path, architectures: tuple[int, ...]) -> tuple[Path, str]:
    """The object file and what ptxas said; what was compiled before from the same text is taken as it is."""
    import torch

    known = subprocess.check_output([nvcc(), "--list-gpu-code"], text=True).split()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures if f"sm_{a}" in known]
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    command = [nvcc(), "-c", str(source), *FLAGS, "-Xptxas=-v", *include, *targets]
    state = hashlib.sha256(" ".join([*command, nvcc_version(), torch.__version__]).encode())
    for path in (source, *sorted(ROOT.glob("csrc/**/*.h")), *sorted(ROOT.glob("csrc/**/*.cuh"))):
        state.update(path.read_bytes())
    folder = COMPILED if ROOT in source.parents else source.parent
    target = folder / f"{source.stem}-{state.hexdigest()[:16]}.o"
    log = target.with_suffix(".log")
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.o")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
        part.rename(target)
        log.write_text(done.stderr)
    return target, log.read_text()


def compile_cuda(source: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, dict[str, dict]]:
    """kernel -> sm_XX -> its resources."""
    target, log = _compiled(source, architectures)
    limits, code, threads = _limits(log), sass.functions(target), sass.threads(target)
    mangled = sorted({name for _, name in limits})
    names = dict(zip(mangled, plain(mangled), strict=True))
    kernels: dict[str, dict[str, dict]] = {}
    for (arch, name), lines in sorted(code.items()):
        entry = limits[arch, name] | {"threads": threads[arch, name], "instructions": len(lines)}
        entry["blocks_per_sm"] = paths.blocks_per_sm(arch, entry["registers"], entry["shared_bytes"], entry["threads"])
        kernels.setdefault(names[name], {})[f"sm_{arch}"] = entry | measured(lines, paths.of(names[name]))
    return kernels


def measured(lines: list[str], path: paths.Path) -> dict[str, float]:
    """What the instructions of a kernel say, of the whole and of the hot ways through it."""
    found = {"local_accesses": sass.count(r"\b(LDL|STL)\b", lines)}
    found |= {"barriers": sass.count(sass.BARRIER, lines), "membars": sass.count(sass.MEMBAR, lines)}
    waits = [i for i, line in enumerate(lines) if re.search(sass.WAITS_FOR_PRIMARY, line)]
    roles = ["waits"] * bool(waits) + ["allows"] * bool(sass.count(sass.ALLOWS_DEPENDENT, lines))
    if roles:
        found["dependent_launch"] = " and ".join(roles)
    if waits:
        loads = [sass.count(r"\bLDG\b", lines[:wait]) for wait in (waits[0], waits[-1])]
        found |= {"loads_before_first_wait": loads[0], "loads_before_wait": loads[1]}
    ways = {"": [], "odd_": []}
    if path.way == paths.LOOP:
        ways = {"": sass.hot_loop(lines), "odd_": sass.hot_loop(lines, r"\bLOP3\b")}
    elif path.way == paths.STRAIGHT:
        ways[""] = sass.straight(lines)
        ways["odd_"] = sass.straight(lines, sass.SCALAR_LOAD, sass.SCALAR_STORE) if path.odd else []
    for which, way in ways.items():
        if way:
            elements = path.elements or sass.count(sass.EXP2, sass.on(lines, way))
            found[f"{which}instructions_per_element"] = round(len(way) / elements, 2)
    text = sass.on(lines, ways[""] or range(len(lines)))
    found |= {"vector_loads": sass.count(sass.VECTOR_LOAD, text), "vector_stores": sass.count(sass.VECTOR_STORE, text)}
    if found["vector_loads"] and ways[""]:
        found["first_use"] = sass.first_use(lines, ways[""])
        found["barriers_before_data"] = sass.barriers_before_data(lines, ways[""])
    return found


def compile_all_cuda() -> dict:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compile_cuda, sources))
    return {"nvcc": nvcc_version(), "kernels": {k: part[k] for part in parts for k in sorted(part)}}


def summarize_triton(reports: list[dict]) -> dict:
    """Of all variants of a kernel on one path the most that one needs, and the fewest programs that fit."""
    import triton

    kernels: dict[str, dict[str, dict]] = {}
    for report in reports:
        assert "registers" in report, report["problems"]
        of_kernel = kernels.setdefault(f"{report['kernel']} {report['path']}", {})
        entry = of_kernel.setdefault(f"sm_{report['arch']}", {"variants": 0, "spill_bytes": 0})
        entry["variants"] += 1
        entry["spill_bytes"] += report["spills"]
        warps, arch = report["options"]["num_warps"], report["arch"]
        blocks = paths.blocks_per_sm(arch, report["registers"], report["shared"], 32 * warps)
        entry["blocks_per_sm"] = min(entry.get("blocks_per_sm", blocks), blocks)
        most = {"registers": report["registers"], "shared_bytes": report["shared"], "threads": 32 * warps}
        for key, value in (most | report["code"]).items():
            entry[key] = max(entry.get(key, value), value)
    return {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}


def compile_all_triton() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.verify.aot.compile_all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return summarize_triton([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])


def faults(found: dict) -> list[str]:
    """What no kernel may do, whatever the compiler."""
    bad = []
    for kernel, arch, entry in entries(found):
        if entry["spill_bytes"]:
            bad.append(f"{kernel} {arch}: spill_bytes = {entry['spill_bytes']}, and must be 0")
        early = 0 if kernel in LOADS_FIRST else entry.get("loads_before_first_wait", 0)
        if early:
            bad.append(f"{kernel} {arch}: {early} loads before its first wait; a launch before may still write them")
        per_element, budget = entry.get("instructions_per_element"), BUDGETS.get(kernel)
        if budget is not None and per_element > budget:
            bad.append(f"{kernel} {arch}: {per_element} instructions per element, and at most {budget} are allowed")
    return bad


def regressions(found: dict, recorded: dict) -> list[str]:
    """Where the kernels need more than the record says, or load in narrower pieces. The compiler must be the same."""
    bad = []
    old = {(kernel, arch): entry for kernel, arch, entry in entries(recorded)}
    for kernel, arch, entry in entries(found):
        before = old.get((kernel, arch))
        if before is None:
            bad.append(f"{kernel} {arch} is not in the record")
            continue
        worse = [k for k in LESS_IS_BETTER if entry.get(k, 0) > before.get(k, 0)]
        worse += [k for k in MORE_IS_BETTER if entry.get(k, 0) < before.get(k, 0)]
        if min(entry.get("first_use", 0), 0) < min(before.get("first_use", 0), 0):
            worse.append("first_use")
        bad += [f"{kernel} {arch}: {k} was {before.get(k, 0)}, is {entry.get(k, 0)}" for k in worse]
    gone = old.keys() - {(kernel, arch) for kernel, arch, _ in entries(found)}
    return bad + [f"{kernel} {arch} is in the record, but not compiled any more" for kernel, arch in sorted(gone)]


def more_launches(found: dict, recorded: dict) -> list[str]:
    """Calls that launch more than the record says, or that the record does not know or has lost."""
    bad = [f"launches of {call}: not both found and in the record" for call in sorted(found.keys() ^ recorded.keys())]
    for call in sorted(found.keys() & recorded.keys()):
        if len(found[call]) > len(recorded[call]):
            bad.append(f"launches of {call}: {' + '.join(found[call])}; the record has {' + '.join(recorded[call])}")
    return bad


def entries(part: dict):
    for kernel, archs in part["kernels"].items():
        for arch, entry in archs.items():
            yield kernel, arch, entry


def main(parts: list[str], write: bool) -> int:
    from tests.verify.aot import launches

    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = dict(recorded)
    if "cuda" in parts and nvcc() is None:
        print("NO nvcc: the CUDA kernels are NOT compiled; the record of them is as it was", file=sys.stderr)
    elif "cuda" in parts:
        found["cuda"] = compile_all_cuda()
    if "triton" in parts:
        found["triton"] = compile_all_triton()
    if "launches" in parts:
        found["launches"] = launches.all_of()
    bad = []
    for half, compiler in (("cuda", "nvcc"), ("triton", "triton")):
        bad += faults(found.get(half, {"kernels": {}}))
        if recorded.get(half, {}).get(compiler) == found.get(half, {}).get(compiler):
            bad += regressions(found[half], recorded[half])
    bad += more_launches(found["launches"], recorded.get("launches", {}))
    if write:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    text = table.markdown(found)
    print(text)
    if write:
        TABLE.write_text(text)
        print(f"wrote {RECORD} and {TABLE}")
        return 0
    print("\n".join(bad) or "no regression")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.verify.aot.resources", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make what is found the record, and its page")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all, in minutes")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    sys.exit(main(given.parts or list(PARTS), given.write))
