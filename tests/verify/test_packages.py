"""A wheel and a source archive, installed into fresh environments as a user would: the old and the new torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "torch==2.11.0"
(NEWEST,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
ONE_OP_PER_IMPLEMENTATION = """
import torch, ppo_kernels
x = torch.randn(3, 17)
ours, eager = (ppo_kernels.gae(x, x, None, impl=impl) for impl in ("cpu", "torch"))
torch.testing.assert_close(ours, eager)
"""
PLUGIN_OF_VERL = """
from importlib.metadata import entry_points
(one,) = entry_points(group="verl.plugins")
assert one.value == "ppo_kernels.integrations.verl_plugin"
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PPO_"))}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{words} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source archive, and of a wheel that was built from it."""
    out = tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def environment_with(folder: Path, torch: str) -> Path:
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", torch, "numpy", cwd=folder)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("torch", [OLDEST, NEWEST])
def test_a_wheel_needs_no_compiler(packages: Path, tmp_path: Path, torch: str) -> None:
    (wheel,) = packages.glob("*.whl")
    python = environment_with(tmp_path, torch)
    run(python, "-m", "pip", "install", "--quiet", "--no-index", wheel, cwd=tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for code in (example, ONE_OP_PER_IMPLEMENTATION, PLUGIN_OF_VERL):
        run(python, "-c", code, cwd=tmp_path, PATH="/nonexistent")
    for command in ("ppo_kernels.env", "ppo_kernels.integrations"):
        run(python, "-m", command, cwd=tmp_path, PATH="/nonexistent")


@pytest.mark.slow
def test_the_source_archive_installs_with_one_command(packages: Path, tmp_path: Path) -> None:
    (archive,) = packages.glob("*.tar.gz")
    python = environment_with(tmp_path, NEWEST)
    run(python, "-m", "pip", "install", "--quiet", archive, cwd=tmp_path)
    run(python, "-c", ONE_OP_PER_IMPLEMENTATION, cwd=tmp_path)


@pytest.mark.slow
def test_the_commands_of_the_readme_install_and_say_what_is_built(packages: Path, tmp_path: Path) -> None:
    """As they stand, and once more, in sources whose folder has a space in its name; then it is gone without a rest."""
    (archive,) = packages.glob("*.tar.gz")
    sources = tmp_path / "my sources"
    sources.mkdir()
    run("tar", "--extract", "--file", archive, "--strip-components=1", cwd=sources)
    (commands,) = re.findall(r"```\n(pip install torch .*?)```", (ROOT / "README.md").read_text(), re.S)
    python = environment_with(tmp_path, NEWEST)
    home = {"HOME": str(tmp_path / "home"), "PATH": f"{python.parent}:{os.environ['PATH']}", "PPO_KERNELS_CUDA": "OFF"}
    (tmp_path / "home").mkdir()
    for _ in range(2):
        assert "C++ ops              loaded" in run("bash", "-euc", commands, cwd=sources, **home)
    run("pip", "uninstall", "--quiet", "--yes", "ppo_kernels", cwd=sources, **home)
    assert not list(python.parents[1].glob("lib/*/site-packages/*ppo_kernels*"))
    assert not list(python.parents[1].glob("lib/*/site-packages/python_trainer*"))
