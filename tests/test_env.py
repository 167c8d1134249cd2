"""``python -m ppo_kernels.env`` prints its report whatever is missing."""

from __future__ import annotations

import ast
import os
import pwd
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ppo_kernels
from ppo_kernels import _native, backends, env

pytestmark = pytest.mark.host

PACKAGE = Path(ppo_kernels.__file__).parent
BLOCKED = """if True:
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == {name!r}:
                raise ImportError("blocked: " + name)
    sys.meta_path.insert(0, Blocker())
    """


def run(*arguments: str, cwd: Path = PACKAGE.parent, **variables: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | variables
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report_without(module: str) -> str:
    code = BLOCKED.format(name=module) + "import runpy; runpy.run_module('ppo_kernels.env', run_name='__main__')"
    return run("-c", code)


def copy_of_the_package(folder: Path, *left_out: str) -> Path:
    """As a wheel installs it."""
    copy = folder / "ppo_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    if (PACKAGE.parent / "csrc").is_dir():
        shutil.copy(PACKAGE.parent / "csrc" / "ops.cpp", copy)
    return copy


def test_report_names_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(Path.home() / "cuda"))
    report = run("-m", "ppo_kernels.env")
    assert "~/cuda" in report
    assert str(Path.home() / "cuda") not in report
    assert f"ppo_kernels {ppo_kernels.__version__}. Copy this into a bug report." in report
    for word in (*env.PACKAGES, *backends.OPS, "python", "instruction set", "source_hash"):
        assert word in report
    assert "cannot tell" not in report
    assert "Triton ops           compiled at their first call, for cuda, xpu tensors; CPU tensors need" in report
    assert "gae                  cpu: cpu > torch   cuda:" in report


def test_report_with_the_interpreter_of_triton() -> None:
    report = run("-m", "ppo_kernels.env", TRITON_INTERPRET="1")
    assert "Triton ops           interpreted, for cuda, xpu, cpu tensors" in report
    assert "gae                  cpu: cpu > torch > triton   cuda:" in report


def test_report_with_a_triton_that_cannot_be_imported() -> None:
    report = report_without("triton.language")
    assert "none, Triton cannot be imported: ImportError: blocked: triton.language" in report
    assert "cannot tell" not in report


def test_home_may_be_missing_or_the_root_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "/root/bin /rootfs /root"
    monkeypatch.setenv("HOME", "/root")
    assert env.without_home(text) == "~/bin /rootfs ~"
    monkeypatch.setenv("HOME", "/")
    assert env.without_home(text) == text
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert env.without_home(text) == text


@pytest.mark.parametrize("broken", ["raise RuntimeError('torn')", "import sys; sys.exit('torn')", "torn = ("])
def test_report_with_a_broken_torch(tmp_path: Path, broken: str) -> None:
    (tmp_path / "torch.py").write_text(broken)
    report = run("-m", "ppo_kernels.env", PYTHONPATH=str(tmp_path))
    assert "cannot tell" in report
    assert ("torn" in report) == ("torn'" in broken)


def test_report_with_a_folder_in_the_place_of_torch(tmp_path: Path) -> None:
    """And on a terminal that knows ASCII alone."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    report = run("-m", "ppo_kernels.env", PYTHONPATH=str(tmp_path), PYTHONIOENCODING="ascii", CUDA_HOME="/café")
    assert "module 'torch' has no attribute" in report
    assert "/caf\\xe9" in report


def test_report_without_torch() -> None:
    report = report_without("torch")
    assert "blocked: torch" in report
    assert "packages" in report


def test_report_without_the_native_library() -> None:
    report = report_without("ppo_kernels._C")
    assert "blocked: ppo_kernels._C" in report
    assert "gae                  cpu: torch" in report


def test_report_from_a_folder_that_was_never_built(tmp_path: Path) -> None:
    copy = copy_of_the_package(tmp_path, "*.so")
    report = run("-m", "ppo_kernels.env", cwd=tmp_path)
    assert "the C++ ops are not built in" in report
    assert "build them with: pip install -e ." in report
    assert "gae                  cpu: torch   cuda: triton > torch" in report

    (copy / "ops.cpp").unlink()
    code = "try: import ppo_kernels\nexcept ImportError as error: print(error)"
    assert "has no ops.cpp, which holds the schemas of the ops: install ppo_kernels again" in run(
        "-c", code, cwd=tmp_path
    )


@pytest.mark.skipif(_native.CPU_ERROR is not None, reason="the C++ ops are not built")
def test_sources_that_hide_an_installed_package_say_so(tmp_path: Path) -> None:
    """Whoever has installed from a checkout and stays in it gets the reference: not without a word."""
    sources = copy_of_the_package(tmp_path / "sources", "*.so").parent
    installed = copy_of_the_package(tmp_path / "installed")
    code = "import warnings; warnings.simplefilter('error'); import ppo_kernels"
    code = f"try:\n {code}\nexcept UserWarning as warning: print(warning)"
    said = run("-c", code, cwd=sources, PYTHONPATH=str(installed.parent))
    assert (
        f"the C++ ops are not built in {sources}/ppo_kernels, which hides {installed}; run Python from another" in said
    )


def test_schemas_are_read_as_cpp_reads_them(tmp_path: Path) -> None:
    """Blank lines and comments are skipped wherever they stand, and a line that is not indented begins a schema."""
    source = copy_of_the_package(tmp_path) / "ops.cpp"
    text = source.read_text()
    parts = text.partition("    Tensor? cu_seqlens, float gamma, float lam")
    assert parts[1]
    source.write_text(f"{parts[0]}\n// about(int gamma) -> ()\n\n{parts[1]}{parts[2]}")
    assert "C++ ops              loaded" in run("-m", "ppo_kernels.env", cwd=tmp_path)
    source.write_text(f"{parts[0]}about() -> ()\n{parts[1]}{parts[2]}")
    assert "torch cannot parse the schema 'gae(" in run("-m", "ppo_kernels.env", cwd=tmp_path)


def test_a_schema_that_torch_cannot_parse_turns_the_kernels_off(tmp_path: Path) -> None:
    source = copy_of_the_package(tmp_path) / "ops.cpp"
    source.write_text(source.read_text().replace("gae(Tensor rewards", "gae(Tensr rewards"))
    report = run("-m", "ppo_kernels.env", cwd=tmp_path)
    assert "torch cannot parse the schema 'gae(Tensr rewards, " in report
    assert "gae                  cpu: torch   cuda: torch" in report
    assert "whiten               cpu: torch   cuda: triton > torch" in report
    code = "import torch, ppo_kernels as k; x = torch.ones(1, 2); print(k.gae(x, x)[0].shape)\n"
    code += "try: k.gae(x, x, impl='triton')\nexcept ValueError as error: print(error)"
    printed = run("-c", code, cwd=tmp_path, TRITON_INTERPRET="1")
    assert "[1, 2]" in printed
    assert 'gae: impl="triton" has no kernel: torch cannot parse its schema in ops.cpp; correct it' in printed


def test_the_ops_are_public_functions() -> None:
    assert set(backends.OPS) < set(ppo_kernels.__all__)


@pytest.mark.parametrize("name", ppo_kernels.__all__)
def test_annotations_can_be_read(name: str) -> None:
    assert typing.get_type_hints(getattr(ppo_kernels, name))


def test_a_failing_probe_does_not_end_the_report() -> None:
    def probe() -> env.Lines:
        yield "first", 1
        raise OSError("no such luck")

    assert env.section("title", probe) == f"title\n  {'first':<20} 1\n  cannot tell: OSError: no such luck"


def test_use_without_torch_says_what_is_missing() -> None:
    code = BLOCKED.format(name="torch") + (
        "import ppo_kernels\n    try: ppo_kernels.gae\n    except ImportError as error: print(error)"
    )
    assert "needs PyTorch" in run("-c", code)


def test_only_the_standard_library_is_imported_at_the_top() -> None:
    tree = ast.parse(Path(env.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [a.name for node in imports if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


EACH = """
import os, sys, traceback
import torch

for case in sys.stdin.read().split("---"):
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            exec(case)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", end="")
        sys.stdout.flush()
        os._exit(0)
    status = os.wait()[1]
    print(f" killed by {status}---" if status else "---", end="")
"""


def each(*cases: str) -> list[str]:
    """What each piece of code printed, in a fork of its own of one process that has imported torch."""
    done = subprocess.run([sys.executable, "-c", EACH], input="---".join(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("---")[:-1]


@pytest.mark.skipif(_native.CPU_ERROR is not None, reason="the C++ ops are not built")
def test_a_second_copy_in_a_process_is_refused(tmp_path: Path) -> None:
    """Registering its ops again would end in a crash inside torch."""
    one, other = (copy_of_the_package(tmp_path / name) for name in ("one", "other"))
    library = next(other.glob("_C.*.so"))
    forget = "for name in [n for n in sys.modules if n.partition('.')[0] == 'ppo_kernels']: del sys.modules[name]\n"
    use = "import ppo_kernels\nx = torch.ones(1, 2)\nprint(ppo_kernels.gae(x, x)[0].shape, ppo_kernels.status())\n"

    def first(folder: Path) -> str:
        return f"sys.path.insert(0, {str(folder.parent)!r})\n"

    load = f"torch.ops.load_library({str(library)!r})\n"
    python_only = "sys.modules['ppo_kernels._C'] = None\n"
    found = each(
        first(one) + "import ppo_kernels\n" + forget + first(other) + use,
        first(one) + "import ppo_kernels\n" + forget + use,
        first(one) + python_only + "import ppo_kernels\n" + forget + first(other) + use,
        load + first(one) + use,
        f"import ctypes\nctypes.CDLL({str(library)!r})\n" + first(one) + use,
        load + first(other) + use,
    )
    refused = "ImportError: the ops of ppo_kernels are in this process already, from {}, and torch takes no second copy"
    for text, source in zip(found, (one, one, one, library, "another folder"), strict=False):
        assert text.startswith(refused.format(source)), text
    assert found[-1] == "torch.Size([1, 2]) {'gae': {'cpu': 1}}\n"


@pytest.mark.skipif(_native.CPU_ERROR is not None, reason="the C++ ops are not built")
def test_a_library_that_is_cut_short_leaves_the_reference(tmp_path: Path) -> None:
    """Mapped without its end it would kill the process."""
    copy = copy_of_the_package(tmp_path)
    library = next(copy.glob("_C.*.so"))
    whole = library.read_bytes()
    damaged = {length: whole[:length] for length in (0, 63, 64, 5000, len(whole) // 2, len(whole) - 1)}
    damaged |= {"zeros": bytes(len(whole)), "text": b"version https://git-lfs\n", "counts": whole[:54] + b"\0" * 9}
    half = len(whole) // 2
    damaged |= {f"zeros from {at}": whole[:at] + bytes(len(whole) - at) for at in (half, len(whole) - 4096)}
    cases = []
    for name, content in damaged.items():
        (tmp_path / str(name)).write_bytes(content)
        cases.append(
            f"import shutil; shutil.copy({str(tmp_path / str(name))!r}, {str(library)!r})\n"
            f"sys.path.insert(0, {str(tmp_path)!r})\nimport ppo_kernels\nfrom ppo_kernels.env import binaries\n"
            "x = torch.ones(1, 2)\nppo_kernels.gae(x, x)\nprint(ppo_kernels.status(), dict(binaries())['C++ ops'])\n"
            "ppo_kernels.gae(x, x, impl='cpu')\n"
        )
    for name, text in zip(damaged, each(*cases), strict=True):
        assert text.startswith(f"{{'gae': {{'torch': 1}}}} cannot load {library} with torch"), (name, text)
        assert 'ValueError: gae: impl="cpu" cannot run: cannot load' in text, (name, text)
        if name in (64, 5000, len(whole) // 2, len(whole) - 1):
            assert f"it is cut short, {name} of {len(whole)} bytes; build it again: pip install" in text
        if "from" in str(name):
            assert "its end is damaged; build it again: pip install" in text


def test_a_subinterpreter_gets_a_sentence() -> None:
    """Torch hangs or crashes in it."""
    interpreters = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    inside = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\ntry: import ppo_kernels\n"
    inside += "except ImportError as error: print(error)"
    code = f"import {interpreters} as i; i.run_string(i.create(), {inside!r})"
    assert "ppo_kernels works in the main interpreter of a process alone" in run("-c", code)
