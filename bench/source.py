"""Functions of a package that cannot be imported without its whole world (ray, vLLM, accelerate, ...).

``functions`` reads one file of the installed package and runs the statements that the wanted functions need: their own
definitions, the helpers and constants of the same file that they use, and the imports of those. The text of the
functions is the package's own, unchanged; annotations are not evaluated.
"""

from __future__ import annotations
import __future__

import ast
from collections.abc import Iterator
from importlib.metadata import distribution
from typing import Any


def functions(package: str, file: str, *names: str, **given: object) -> dict[str, Any]:
    """The functions (or ``Class.method``) of ``file``, by name. ``given`` stands in for what they would import."""
    path = distribution(package).locate_file(file)
    statements = ast.parse(path.read_text(), str(path)).body
    for name in names:
        if "." in name:
            statements.append(_method(statements, name))
    wanted = [name.rpartition(".")[2] for name in names]
    space: dict[str, object] = {"__name__": f"bench.{package}", **given}
    body = ast.Module(_needed(statements, wanted, set(space)), type_ignores=[])
    code = compile(body, str(path), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, space)
    return {name: space[name] for name in wanted}


def _method(statements: list[ast.stmt], name: str) -> ast.stmt:
    owner, _, method = name.partition(".")
    for statement in statements:
        if isinstance(statement, ast.ClassDef) and statement.name == owner:
            return next(part for part in statement.body if getattr(part, "name", None) == method)
    raise LookupError(f"there is no class {owner}")


def _needed(statements: list[ast.stmt], wanted: list[str], given: set[str]) -> list[ast.stmt]:
    """The top-level statements that bind the wanted names, and whatever those use in turn; in the file's order."""
    bound: dict[str, list[int]] = {}
    for i, statement in enumerate(statements):
        for name in _binds(statement):
            bound.setdefault(name, []).append(i)
    keep: set[int] = set()
    names, seen = list(wanted), set(given)
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for i in bound.get(name, []):
            if i not in keep:
                keep.add(i)
                names.extend(_uses(statements[i]))
    missing = [name for name in wanted if name not in bound]
    if missing:
        raise LookupError(f"it has no {', '.join(missing)}")
    return [statements[i] for i in sorted(keep)]


def _binds(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _uses(statement: ast.stmt) -> set[str]:
    annotations: set[int] = set()
    for node in ast.walk(statement):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                annotations.update(id(part) for part in ast.walk(annotation))
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and id(node) not in annotations}
