"""Hands CMakeLists.txt to CMake; every fact about the package is in pyproject.toml."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_torch() -> Path:
    """The folder of the torch to build against: an importable one, else the one outside pip's isolation."""
    spec = find_spec("torch") or PathFinder.find_spec("torch", [*map(sysconfig.get_path, ("purelib", "platlib"))])
    if spec is None or spec.origin is None:
        sys.exit("no torch here to build against: install 2.11 or later, then: pip install .")
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.in_source = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()
        if not self.in_source:  # Python reads the schemas from csrc/ in a checkout, from ppo_kernels/ in a wheel
            shutil.copy2(ROOT / "csrc" / "ops.cpp", Path(self.build_lib) / "ppo_kernels" / "ops.cpp")

    def build_extensions(self) -> None:
        import pybind11

        torch = find_torch()
        version = runpy.run_path(str(torch / "version.py"))  # read, not imported: no GPU is woken up
        self.cmake_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{version['__version__']}"
        env = {**os.environ, "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")}
        cmake, ninja = (shutil.which(tool, path=env["PATH"]) or tool for tool in ("cmake", "ninja"))
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,  # pip's isolated ninja has another path each time
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "PYTHON": sys.executable,
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYTHON_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
            "TORCH_ROOT": torch,
            "TORCH_VERSION": version["__version__"],
            "TORCH_CUDA": version.get("cuda") or "",
            "PPO_KERNELS_CUDA": os.environ.get("PPO_KERNELS_CUDA", "AUTO"),
            "PPO_KERNELS_SANITIZE": os.environ.get("PPO_KERNELS_SANITIZE", ""),
            "PPO_KERNELS_INPLACE": "ON" if self.in_source else "OFF",
            **({"CMAKE_CXX_COMPILER": os.environ["CXX"]} if "CXX" in os.environ else {}),  # else CMake keeps its first
        }
        configure = ["-S", ROOT, "-B", self.cmake_dir, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
        for step in (configure, ["--build", self.cmake_dir]):
            if subprocess.call([cmake, *step], env=env) != 0:
                sys.exit("ppo_kernels was not built: see the message of CMake or of the compiler above.")
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        built = self.cmake_dir / target.name
        if built.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        target.unlink(missing_ok=True)  # CMake left it out (CUDA): an old one must not stay
        if self.in_source:
            (ROOT / "ppo_kernels" / target.name).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """_C_cuda is a plain op library, not a Python module: no interpreter tag in its name."""
        plain = fullname.endswith("_C_cuda")  # asked for with and without the package's name
        return os.path.join(*fullname.split(".")) + ".so" if plain else super().get_ext_filename(fullname)


setup(
    ext_modules=[
        Extension("ppo_kernels._C", sources=[]),
        Extension("ppo_kernels._C_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
