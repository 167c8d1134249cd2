"""Record what the Triton launchers launch, and compile each variant without a GPU: one JSON object per line.

Run without TRITON_INTERPRET, with any Triton: ``python -m tests.verify.aot.compile_all [module of the calls]``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # the one place that tells spills

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

import ppo_kernels  # noqa: E402, F401
from tests.verify.aot import sass  # noqa: E402

ARCHITECTURES = (90, 80, 100)


class Recorder:
    """Takes the place of a launch, and keeps what Triton would have compiled for it."""

    def __init__(self):
        self.variants = {}
        self.backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))

    def __call__(self, kernel, *args, grid, warmup, **kwargs):
        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = binder(*args, **kwargs)
        _, signature, constexprs, attrs = kernel._pack_args(self.backend, kwargs, bound, specialization, options)
        by_launch = any(f.f_code.co_name == "launch" and f.f_code.co_filename.endswith("_launch.py") for f in frames())
        what = (signature, sorted(constexprs.items(), key=str), sorted(attrs.items()), sorted(options.items()))
        key = f"{kernel.fn.__module__}.{kernel.fn.__name__} {what}"
        self.variants[key] = (kernel, signature, constexprs, attrs, options, by_launch)


def frames():
    frame = sys._getframe()
    while frame := frame.f_back:
        yield frame


def launchers(package):
    """Every public function of the launcher files that an op is named after."""
    names = torch._C._dispatch_get_all_op_names()
    ops = {name.partition("::")[2] for name in names if name.startswith("ppo_kernels_triton::")}
    folder = pathlib.Path(importlib.import_module(package).__file__).parent
    files = [importlib.import_module(f"{package}.{p.stem}") for p in sorted(folder.glob("[!_]*.py"))]
    return {op: next((getattr(f, op) for f in files if hasattr(f, op)), None) for op in sorted(ops)}


def _fullness(args):
    return args[0].dim(), sum(torch.is_tensor(x) or x is True for x in args)


def record(calls):
    recorder = Recorder()
    JITFunction.run = lambda kernel, *args, **kwargs: recorder(kernel, *args, **kwargs)
    targets = getattr(calls, "LAUNCHERS", None) or launchers("ppo_kernels.triton")
    for op, launcher in targets.items():
        assert launcher is not None, f"{op}: no launcher in ppo_kernels/triton"
        many = calls.all_of()[op]
        for args in many:
            launcher(*args)
        if hasattr(calls, "far") and (args := calls.far(op, max(many, key=_fullness))):
            launcher(*args)
    return recorder.variants


def choose(variants, architectures):
    """(variant, architecture): all for the first architecture, for the others what has a new option of its kernel."""
    chosen = []
    for arch in architectures:
        seen = set()
        for key, (kernel, signature, constexprs, _, options, _) in variants.items():
            features = {
                (kernel.fn.__name__, str(f)) for f in (*signature.items(), *constexprs.items(), *options.items())
            }
            if arch == architectures[0] or not features <= seen:
                chosen.append((key, arch))
            seen |= features
    return chosen


def narrow_offsets(ttir):
    """Multiplications in 32 bits of something that grows with the number of programs: a remainder does not."""
    grown, bad = set(), []
    for line in ttir.splitlines():
        line = line.partition(" loc(")[0]
        for name, init in re.findall(r"(%\w+) = (%[\w#]+)", line):  # loop variables
            if init in grown:
                grown.add(name)
        result = re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)", line)
        if not result:
            continue
        name, operation = result.groups()
        operands = re.findall(r"%\w+", line.partition("=")[2])
        if operation == "tt.get_program_id":
            grown.add(name)
        elif operation in ("tt.load", "arith.remsi", "arith.remui", "arith.cmpi", "tt.addptr"):
            continue
        elif any(operand in grown for operand in operands):
            grown.add(name)
            if operation in ("arith.muli", "arith.shli") and re.search(r"(: i32|xi32>)$", line.strip()):
                bad.append(line.strip())
    return bad


def loops(ptx):
    """For each loop of the PTX, how often it does what matters."""
    lines = ptx.splitlines()
    at = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\s*\$L\w+:", line)}
    found = []
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if target and at.get(target.group(1), i) < i:
            body = "\n".join(lines[at[target.group(1)] : i])
            count = lambda pattern, body=body: len(re.findall(pattern, body))  # noqa: E731
            found.append(
                {
                    "vector_loads": count(r"ld\.global\S*\.v[48]\.b32|ld\.global\S*\.v2\.b64"),
                    "vector_stores": count(r"st\.global\S*\.v[48]\.b32|st\.global\S*\.v2\.b64"),
                    "nan_maxima": count(r"\bmax\.NaN\.f32"),
                    "crossings": count(r"\bbar\.(?:warp\.)?sync|barrier\.sync|shfl\."),
                }
            )
    return found


def path_of(signature, attrs, constexprs):
    """ "packed" where rows have bounds, "aligned" where the first tensor begins at a 16-byte boundary, else "odd"."""
    bounds = (kind for name, kind in signature.items() if re.search("starts|bounds|rows", name))
    if any("*i64" in str(kind) for kind in bounds):
        return "packed"
    if "ALIGNED" in constexprs:
        return "aligned" if constexprs["ALIGNED"] == "True" else "odd"
    if constexprs.get("UNIT") == "1":
        return "odd"
    first = next((i for i, kind in enumerate(signature.values()) if str(kind).startswith("*")), 0)
    return "aligned" if "tt.divisibility" in str(attrs.get((first,), "")) else "odd"


def code_of(cubin, looped):
    """What the instructions say: of all of them, and of a round of the hot loop where there is one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (lines,) = sass.functions(pathlib.Path(file.name)).values()
    found = {"instructions": len(lines)}
    found |= {"barriers": sass.count(sass.BARRIER, lines), "membars": sass.count(sass.MEMBAR, lines)}
    if looped:
        way = sass.hot_loop(lines)
        found["instructions_per_element"] = round(len(way) / sass.count(sass.EXP2, sass.on(lines, way)), 2)
    return found


def build(key, arch):
    kernel, signature, constexprs, attrs, options, by_launch = VARIANTS[key]
    report = {"kernel": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", "arch": arch}
    report |= {"variant": key, "options": options, "by_launch": by_launch, "problems": []}
    report |= {"constexprs": {kernel.arg_names[path[0]]: str(value) for path, value in constexprs.items()}}
    log = io.StringIO()
    try:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        with contextlib.redirect_stdout(log):
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    except Exception as error:
        return report | {"problems": [f"does not compile: {error}"]}
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())]
    report |= {"registers": int(re.search(r"Used (\d+) registers", log.getvalue()).group(1)), "spills": sum(spills)}
    report |= {
        "shared": built.metadata.shared,
        "loops": loops(built.asm["ptx"]),
        "path": path_of(signature, attrs, report["constexprs"]),
    }
    report["code"] = code_of(built.asm["cubin"], report["kernel"] == "token_logprobs._forward")
    report["problems"] += [f"32-bit offset: {line}" for line in narrow_offsets(built.asm["ttir"])]
    if sum(spills) or not spills:
        report["problems"].append(f"spills: {spills}")
    if built.metadata.shared > 99 * 1024:  # what every architecture from sm_86 on has
        report["problems"].append(f"shared memory: {built.metadata.shared} bytes")
    if not by_launch:
        report["problems"].append("launched without _launch.launch")
    return report


if __name__ == "__main__":
    calls = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "tests.verify.aot.calls")
    VARIANTS = record(calls)
    chosen = choose(VARIANTS, getattr(calls, "ARCHITECTURES", ARCHITECTURES))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a kernel from a cache would have no log
        workers = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), workers) as pool:
            for report in pool.map(build, *zip(*chosen, strict=True)):
                print(json.dumps(report), flush=True)
