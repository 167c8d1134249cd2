"""What the binaries depend on, that wheels work elsewhere, and that a wrong binary is noticed and named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import ppo_kernels
from tests.lib.checkout import copy_sources

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(ppo_kernels.__file__).parent
BINARIES = [*PACKAGE.glob("_C.*so"), *PACKAGE.glob("_C_cuda.so")]
REBUILD = "pip install -e ."
SO = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


def run(*command: object, cwd: Path, ok: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PPO_KERNELS_CUDA")}
    inherited["PATH"] = sysconfig.get_path("scripts") + os.pathsep + inherited["PATH"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if ok:
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=cwd, **env)


def report(cwd: Path) -> dict[str, str]:
    """The lines of ``python -m ppo_kernels.env``."""
    lines = re.findall(r"^  (.{20}) (.*)", run(sys.executable, "-m", "ppo_kernels.env", cwd=cwd).stdout, re.MULTILINE)
    return {name.rstrip(): value for name, value in lines}


def build_in_place(checkout: Path, **env: str) -> str:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout, **env).stdout


def build_wheel(checkout: Path, out: Path, **env: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    run(*pip, "--wheel-dir", out, checkout, cwd=out, **env)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fresh checkout and the wheel built in it. Its build folder serves the other tests."""
    checkout = copy_sources(tmp_path_factory.mktemp("checkout"))
    return checkout, build_wheel(checkout, tmp_path_factory.mktemp("wheel"), PPO_KERNELS_CUDA="OFF")


@pytest.fixture(scope="module")
def checkout(wheel: tuple[Path, Path]) -> Path:
    build_in_place(wheel[0], PPO_KERNELS_CUDA="OFF")
    return wheel[0]


def undefined_symbols(binary: Path) -> set[str]:
    """What a binary wants from torch: undefined, and not from libc, libstdc++ or Python."""
    lines = run("nm", "-D", "--undefined-only", binary, cwd=ROOT).stdout.splitlines()
    names = {parts[1] for parts in map(str.split, lines) if parts[0] == "U"}
    others = re.compile(r".*@|_?Py|_ZN?K?St(?!.*(2at|3c10|5torch))")  # versioned, Python's, namespace std
    return {name for name in names if not others.match(name)}


def stable_symbols() -> set[str]:
    """The C functions that torch 2.11 promises, as the compiler sees them in the installed headers."""
    headers = ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")
    source = "".join(f"#include <torch/csrc/{header}>\n" for header in headers)
    target = "-DTORCH_TARGET_VERSION=" + report(ROOT)["torch_target_version"]
    include = Path(torch.__file__).parent / "include"
    command = ("c++", "-std=c++20", "-E", "-P", "-x", "c++", target, "-DUSE_CUDA", "-I", str(include), "-")
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def assert_stable_abi_only(binary: Path) -> None:
    symbols = undefined_symbols(binary)
    assert any("torch" in name for name in symbols), "the binary takes nothing from torch: is this the right file?"
    assert symbols <= stable_symbols()


def test_is_built() -> None:
    assert BINARIES
    found = report(ROOT)
    assert found["C++ ops"] == "loaded"
    assert found["instruction set"].partition(",")[0] in ("default", "x86-64-v3", "x86-64-v4")


@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name)
def test_binary_needs_only_the_stable_abi(binary: Path) -> None:
    assert_stable_abi_only(binary)


@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name)
def test_binary_holds_no_build_path(binary: Path) -> None:
    content = binary.read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(path).encode() not in content


def test_importing_costs_little() -> None:
    code = """if True:
        import time, torch
        start = time.process_time()
        import ppo_kernels
        print(time.process_time() - start)"""
    assert min(float(python(code, cwd=ROOT).stdout) for _ in range(3)) < 0.3


def test_the_binary_is_of_these_sources() -> None:
    assert report(ROOT)["sources"] == "match the binary"


@pytest.mark.slow
def test_wheel_works_in_another_folder(wheel: tuple[Path, Path], tmp_path: Path) -> None:
    checkout, path = wheel
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in path.name  # one wheel per Python, for every torch
    site = tmp_path / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert f"ppo_kernels/{SO}" in names
    assert {"ppo_kernels/py.typed", "ppo_kernels/ops.cpp"} <= set(names)
    assert any(name.startswith("python_trainer/configs/") for name in names)
    assert not [name for name in names if name.startswith(("csrc/", "tests/"))]
    assert str(checkout).encode() not in (site / "ppo_kernels" / SO).read_bytes()
    code = """if True:
        import torch, ppo_kernels
        x = torch.randn(3, 17)
        ours, eager = (ppo_kernels.gae(x, x, None, impl=impl) for impl in ("cpu", "torch"))
        torch.testing.assert_close(ours, eager)
        print(ppo_kernels.__file__)"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = python(code, cwd=elsewhere, PYTHONPATH=str(site)).stdout
    assert Path(printed.strip()).is_relative_to(site)


@pytest.mark.slow
def test_rebuild_compiles_only_what_changed(checkout: Path) -> None:
    source = checkout / "csrc" / "cpu" / "gae.cpp"
    objects = {path: path.stat().st_mtime_ns for path in checkout.glob("build/*/CMakeFiles/_C.dir/**/*.o")}
    assert "-- Build" in build_in_place(checkout, PPO_KERNELS_CUDA="OFF")
    assert objects == {path: path.stat().st_mtime_ns for path in objects}, "nothing changed, nothing is compiled"
    source.write_text(source.read_text() + "// changed\n")
    build_in_place(checkout, PPO_KERNELS_CUDA="OFF")
    touched = {path.name for path, before in objects.items() if path.stat().st_mtime_ns != before}
    assert touched == {"gae.cpp.o", "build_info.cpp.o"}  # the second holds the hash of the sources


@pytest.mark.slow
def test_stale_binary_is_noticed_and_named(checkout: Path) -> None:
    source = checkout / "csrc" / "cpu" / "gae.cpp"
    build_in_place(checkout, PPO_KERNELS_CUDA="OFF")
    assert "stale" not in python("import ppo_kernels", cwd=checkout).stderr
    source.write_text(source.read_text() + "// changed again\n")
    warned = python("import ppo_kernels", cwd=checkout).stderr
    assert warned.count("is stale") == 1
    assert str(checkout / "ppo_kernels" / SO) in warned
    assert REBUILD in warned
    build_in_place(checkout, PPO_KERNELS_CUDA="OFF")
    assert "stale" not in python("import ppo_kernels", cwd=checkout).stderr


def test_a_binary_of_other_schemas_is_refused(tmp_path: Path) -> None:
    """A difference in one op turns all compiled ops off, with a message that shows it."""
    copy_sources(tmp_path)
    shutil.copy(PACKAGE / SO, tmp_path / "ppo_kernels")
    text = (ROOT / "csrc" / "ops.cpp").read_text()
    for found, schema, old, new in (
        ("ppo_kernels::gae(Tensor rewards", "gae(Tensor x, ", "\ngae(", "\ngae(Tensor x, "),
        ("no such op", "nothing() -> ()", 'R"(\n', 'R"(\nnothing() -> ()\n'),
    ):
        (tmp_path / "csrc" / "ops.cpp").write_text(text.replace(old, new))
        done = run(sys.executable, "-m", "ppo_kernels.env", cwd=tmp_path)
        for words in (
            found,
            f"this ppo_kernels expects ppo_kernels::{schema}",
            REBUILD,
            SO,
            "whiten               cpu: torch",
        ):
            assert words in done.stdout
        assert done.stderr.count("the native ops are off") == 1


def test_not_built_and_cannot_load_are_told_apart(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    package = tmp_path / "ppo_kernels"
    assert report(tmp_path)["C++ ops"] == f"the C++ ops are not built in {package}; build them with: {REBUILD}"

    (package / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    assert "only for another Python (_C.cpython-27-x86_64-linux-gnu.so)" in report(tmp_path)["C++ ops"]

    (package / SO).write_text("not a library")
    message = report(tmp_path)["C++ ops"]
    assert message.startswith(f"cannot load {package / SO} with torch {torch.__version__}")
    assert f"because {package / SO}: " in message  # what the loader says

    falls_back = "import torch, ppo_kernels as k; print(k.gae(torch.ones(1, 2), torch.zeros(1, 2), None)[0].shape)"
    assert "[1, 2]" in python(falls_back, cwd=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA half cannot be compiled here")
def test_cuda_compiles_against_any_torch(checkout: Path, tmp_path: Path) -> None:
    """PPO_KERNELS_CUDA=ON needs neither a GPU nor a torch with CUDA, and installs what it builds."""
    wanted = {"PPO_KERNELS_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": "9.0"}
    build_in_place(checkout, **wanted)
    library = checkout / "ppo_kernels" / "_C_cuda.so"
    assert_stable_abi_only(library)
    assert report(checkout)["cuda_archs"] == "90-real"
    assert "BIND_NOW" in run("readelf", "-d", library, cwd=checkout).stdout
    with zipfile.ZipFile(build_wheel(checkout, tmp_path, **wanted)) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
    assert libraries == {f"ppo_kernels/{name}" for name in (SO, "_C_cuda.so")}

    build_in_place(checkout, PPO_KERNELS_CUDA="OFF")
    assert not library.exists(), "an old CUDA library must not stay beside a build without CUDA"


def test_cuda_on_without_nvcc_fails_loudly(tmp_path: Path) -> None:
    torch_root = f"-DTORCH_ROOT={Path(torch.__file__).parent}"
    configure = ("cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, torch_root, "-DPPO_KERNELS_CUDA=ON")
    failed = run(*configure, cwd=tmp_path, ok=False, CUDACXX=str(tmp_path / "nvcc"))
    assert failed.returncode != 0
    assert "PPO_KERNELS_CUDA=ON, but no nvcc" in failed.stderr
