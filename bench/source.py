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
    statements += [_method(statements, name) for name in names if "." in name]
    wanted = [name.rpartition(".")[2] for name in names]
    space: dict[str, object] = {"__name__": f"bench.{package}", **given}
    body = ast.Module(_needed(statements, set(wanted), set(space)), type_ignores=[])
    code = compile(body, str(path), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, space)
    return {name: space[name] for name in wanted}


def _method(statements: list[ast.stmt], name: str) -> ast.stmt:
    owner, _, method = name.partition(".")
    for statement in statements:
        if isinstance(statement, ast.ClassDef) and statement.name == owner:
            return next(part for part in statement.body if getattr(part, "name", None) == method)
    raise LookupError(f"there is no class {owner}")


def _needed(statements: list[ast.stmt], wanted: set[str], given: set[str]) -> list[ast.stmt]:
    """The top-level statements that bind the wanted names, and whatever those use in turn; in the file's order."""
    bound = [set(_binds(statement)) for statement in statements]
    if missing := wanted.difference(*bound):
        raise LookupError(f"it has no {', '.join(sorted(missing))}")
    names, keep = wanted, set()
    while more := {i for i, own in enumerate(bound) if own & (names - given)} - keep:
        keep |= more
        names = names.union(*(_uses(statements[i]) for i in more))
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
    nodes = list(ast.walk(statement))
    annotations = [getattr(node, field, None) for node in nodes for field in ("annotation", "returns")]
    unread = {id(part) for annotation in annotations if annotation for part in ast.walk(annotation)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in unread}
