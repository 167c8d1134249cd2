"""Every import of ours leads somewhere, also one that runs late or with a package that is not installed."""

import ast
from pathlib import Path

import pytest

from tests.lib.trainer import ROOT

MODULES = sorted((ROOT / "python_trainer").rglob("*.py"))


def names_of(module: Path) -> set[str]:
    """What can be imported from it."""
    found = {path.stem for path in module.parent.glob("*")} if module.name == "__init__.py" else set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def file_of(name: str) -> Path | None:
    place = ROOT / name.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_ours_resolve(module):
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names if alias.name.startswith("python_trainer")):
                assert file_of(name), f"line {node.lineno}: {name}"
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*above, *([node.module] if node.module else [])))
            if name.split(".")[0] != "python_trainer":
                continue
            source = file_of(name)
            assert source, f"line {node.lineno}: {name}"
            assert {alias.name for alias in node.names} <= names_of(source), f"line {node.lineno}: {name}"
