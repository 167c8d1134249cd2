"""What every GPU kernel needs of the hardware, as compiled: ``resources.json``, which is in git.

``python -m tests.verify.aot.resources`` compiles the CUDA and the Triton kernels for every architecture, without a
GPU, prints registers, shared memory and the instructions per element of the hot ways through token_logprobs, and fails
on a regression; ``--write`` makes what was compiled the new record.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.verify.aot import sass

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

RECORD = HERE / "resources.json"
ARCHITECTURES = (80, 90, 100, 120)
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
#: Of a warp's lane, per bf16 logit: more would keep the forward from the bandwidth of the memory.
BUDGETS = {f"token_logprobs_kernel<{t}, true>": 8.0 for t in ("BFloat16", "Float16")}
LESS_IS_BETTER = (
    *("registers", "shared_bytes", "stack_bytes", "local_accesses"),
    *("instructions", "instructions_per_element"),
)
MORE_IS_BETTER = ("vector_loads", "vector_stores")


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.check_output([nvcc(), "--version"], text=True)).group(1)


def _plain(names: list[str]) -> dict[str, str]:
    """Names as in the sources: token_logprobs_kernel<BFloat16, true>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(.*|^void |ppo::", "", line.replace("(ppo::KlEstimator)", "")) for line in text.splitlines()]
    return dict(zip(names, short, strict=True))


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


def compile_cuda(source: Path, architectures=ARCHITECTURES) -> dict[str, dict[str, dict]]:
    """kernel -> sm_XX -> its resources."""
    import torch

    known = subprocess.check_output([nvcc(), "--list-gpu-code"], text=True).split()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures if f"sm_{a}" in known]
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.o"
        command = [nvcc(), "-c", str(source), "-o", str(target), *FLAGS, "-Xptxas=-v", *include, *targets]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-4000:]}"
        limits, code = _limits(done.stderr), sass.functions(target)
    names = _plain(sorted({name for _, name in limits}))
    kernels: dict[str, dict[str, dict]] = {}
    for (arch, name), lines in sorted(code.items()):
        entry = limits[arch, name] | {"instructions": len(lines)}
        way = lines
        if names[name].startswith("token_logprobs"):
            way = sass.straight(lines) if "backward" in names[name] else sass.hot_loop(lines)
            entry["instructions_per_element"] = round(len(way) / sass.count(sass.EXP2, way), 2)
        entry["vector_loads"] = sass.count(sass.VECTOR_LOAD, way)
        entry["vector_stores"] = sass.count(sass.VECTOR_STORE, way)
        entry["local_accesses"] = sass.count(r"\b(LDL|STL)\b", lines)
        kernels.setdefault(names[name], {})[f"sm_{arch}"] = entry
    return kernels


def compile_all_cuda() -> dict:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compile_cuda, sources))
    return {"nvcc": nvcc_version(), "kernels": {k: part[k] for part in parts for k in sorted(part)}}


def summarize_triton(reports: list[dict]) -> dict:
    """Of all variants of a kernel the most that one needs."""
    import triton

    kernels: dict[str, dict[str, dict]] = {}
    for report in reports:
        assert "registers" in report, report["problems"]
        entry = kernels.setdefault(report["kernel"], {}).setdefault(f"sm_{report['arch']}", {"variants": 0})
        entry["variants"] += 1
        for key, value in (("registers", report["registers"]), ("shared_bytes", report["shared"])):
            entry[key] = max(entry.get(key, 0), value)
        entry["spill_bytes"] = entry.get("spill_bytes", 0) + report["spills"]
        per_element = report.get("instructions_per_element")
        if per_element is not None:
            entry["instructions_per_element"] = max(entry.get("instructions_per_element", 0.0), per_element)
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
        bad += [f"{kernel} {arch}: {k} was {before.get(k, 0)}, is {entry.get(k, 0)}" for k in worse]
    gone = old.keys() - {(kernel, arch) for kernel, arch, _ in entries(found)}
    return bad + [f"{kernel} {arch} is in the record, but not compiled any more" for kernel, arch in sorted(gone)]


def entries(part: dict):
    for kernel, archs in part["kernels"].items():
        for arch, entry in archs.items():
            yield kernel, arch, entry


def table(part: dict) -> str:
    lines = []
    for kernel, archs in part["kernels"].items():
        for arch, entry in archs.items():
            cells = [f"{entry['registers']:4} registers", f"{entry['shared_bytes']:6} B shared"]
            if "instructions" in entry:
                cells.append(f"{entry['instructions']:6} instructions")
            if "instructions_per_element" in entry:
                cells.append(f"{entry['instructions_per_element']:6.2f} per element of the hot way")
            lines.append(f"{kernel:58} {arch:7}" + "".join(cells))
    return "\n".join(lines)


def main() -> int:
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = dict(recorded)
    if nvcc() is None:
        print("NO nvcc: the CUDA kernels are NOT compiled; the record of them is as it was", file=sys.stderr)
    else:
        found["cuda"] = compile_all_cuda()
    found["triton"] = compile_all_triton()
    bad = []
    for half, compiler in (("cuda", "nvcc"), ("triton", "triton")):
        if half not in found:
            continue
        print(table(found[half]))
        bad += faults(found[half])
        if recorded.get(half, {}).get(compiler) == found[half][compiler]:
            bad += regressions(found[half], recorded[half])
    if "--write" in sys.argv:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {RECORD}")
        return 0
    print("\n".join(bad) or "no regression")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
