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


def imports_of(module: Path) -> list[tuple[int, str, set[str]]]:
    """Line, source and names of each import of ours, wherever it stands."""
    package = module.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*above, *([node.module] if node.module else [])))
            found.append((node.lineno, name, {alias.name for alias in node.names}))
    return [one for one in found if one[1].split(".")[0] == "python_trainer"]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_ours_resolve(module):
    for line, name, names in imports_of(module):
        source = file_of(name)
        assert source, f"line {line}: {name}"
        assert names <= names_of(source), f"line {line}: {name}"


def test_imports_of_the_trainer_have_few_floors_and_no_circle():
    """A module stands one floor above the highest that it imports, late imports too."""
    above = {
        module: {
            file_of(f"{name}.{each}") or file_of(name)
            for _, name, names in imports_of(module)
            for each in names or {""}
        }
        for module in MODULES
    }
    floors: list[set[Path]] = []
    left = dict(above)
    while left:
        floors.append({module for module, imported in left.items() if not imported & left.keys()})
        assert floors[-1], f"a circle among {sorted(path.stem for path in left)}"
        left = {module: imported for module, imported in left.items() if module not in floors[-1]}
    assert len(floors) <= 6
