"""A look at a trainer's files without importing them."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path

from ppo_kernels.integrations._target import Problem, Target, absent, difference, of_node


def package_folder(package: str, path: Sequence[str] | None = None) -> Path | None:
    """Where a package lies on ``path``, by default on sys.path."""
    spec = PathFinder.find_spec(package, list(sys.path if path is None else path))
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def module_file(module: str, path: Sequence[str] | None = None) -> Path | None:
    package, *inside = module.split(".")
    folder = package_folder(package, path)
    if folder is None:
        return None
    base = folder.joinpath(*inside)
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)


def version(distribution: str, path: Sequence[str] | None = None) -> str | None:
    """The version of the first distribution of this name on ``path``; a folder of its own may lack the metadata."""
    places = list(sys.path if path is None else path)
    for found in distributions(name=distribution, path=places):
        return found.version
    return None


@functools.lru_cache(maxsize=64)
def _parsed(file: Path, _modified: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def tree(file: Path) -> ast.Module:
    return _parsed(file, file.stat().st_mtime_ns)


def definition(module: ast.Module, path: str) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None:
    """The last definition of ``name`` or ``Class.method`` outside functions: it is the one that is bound."""
    body: list[ast.stmt] = module.body
    found = None
    for name in path.split("."):
        found = None
        for statement in _statements(body):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(statement, kinds) and statement.name == name:
                found = statement
        if found is None:
            return None
        body = found.body
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, part, []))


def find(
    module: str, wanted: str, path: Sequence[str] | None = None
) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None:
    """The definition of a name in a module, or in the one that it is imported from."""
    file = module_file(module, path)
    if file is None:
        return None
    found = definition(tree(file), wanted)
    for statement in _statements(tree(file).body) if found is None else ():
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == wanted:
                    return find(statement.module, alias.name, path)
    return found


def problem(target: Target, path: Sequence[str] | None = None) -> Problem | None:
    """Why the target cannot be replaced, by its source."""
    if module_file(target.module, path) is None:
        return Problem("absent", f"there is no module {target.module}")
    for wanted, expected in target.signatures.items():
        found = find(target.module, wanted, path)
        if found is None or isinstance(found, ast.ClassDef):
            return absent(target.module, wanted)
        why = difference(f"{target.module}.{wanted}", expected, of_node(found.args))
        if why is not None:
            return why
    return None


def body(target: Target, path: Sequence[str] | None = None) -> dict[str, str]:
    """What the target and what it relies on do, as text that neither comments nor docstrings nor layout change."""
    texts: dict[str, str] = {}
    for wanted in target.signatures:
        found = find(target.module, wanted, path)
        if found is not None:
            statements = found.body
            first = statements[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                statements = statements[1:]
            texts[wanted] = "\n".join(map(ast.unparse, statements))
    return texts
