"""What an adapter replaces, and whether it is still what the adapter was written for."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class NotCoveredError(Exception):
    """A replacement raises it before it computes anything: the trainer's own function has to serve this call."""


class AdapterError(Exception):
    """A trainer is not what its adapter was written for; nothing has been replaced."""


class Problem(NamedTuple):
    """Why a target cannot be replaced."""

    state: str  #: "absent" or "signature differs"
    why: str  #: one sentence


@dataclass(frozen=True)
class Target:
    """One function of a trainer and what takes its place."""

    module: str  #: where it is defined
    attribute: str  #: a name in the module, or ``Class.method``
    signature: str | None  #: what it takes; None for a method that the class inherits
    replacement: Callable[..., Any]  #: takes the same arguments
    covers: str  #: for the docs and the command
    #: Dictionaries of the module that hold it too, as ``path[key]``.
    registries: tuple[str, ...] = ()
    #: What the replacement relies on beside the target: paths in the module, with their signatures.
    reads: Mapping[str, str] = field(default_factory=dict)

    @property
    def signatures(self) -> dict[str, str]:
        own = {} if self.signature is None else {self.attribute: self.signature}
        return {**own, **self.reads}


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    default: str | None  #: its text, or None

    def fits(self, other: Parameter) -> bool:
        same_default = self.default == other.default
        if self.default is not None and other.default is not None and not same_default:
            same_default = not (_literal(self.default) and _literal(other.default))  # a constant's name tells nothing
        return (self.name, self.kind) == (other.name, other.kind) and same_default


def _literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def of_text(signature: str) -> list[Parameter]:
    """The parameters of ``(a, b=1, *, c)``."""
    function = ast.parse(f"def f{signature}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return of_node(function.args)


def of_node(arguments: ast.arguments) -> list[Parameter]:
    """The parameters of a function in a syntax tree."""
    found: list[Parameter] = []
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        found.append(Parameter(argument.arg, "positional", None if default is None else ast.unparse(default)))
    if arguments.vararg is not None:
        found.append(Parameter(arguments.vararg.arg, "*", None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(argument.arg, "keyword", None if default is None else ast.unparse(default)))
    if arguments.kwarg is not None:
        found.append(Parameter(arguments.kwarg.arg, "**", None))
    return found


_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def of_object(function: object) -> list[Parameter]:
    """The parameters of something that can be called."""
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    found = []
    for name, parameter in inspect.signature(function).parameters.items():  # type: ignore[arg-type]
        default = None if parameter.default is inspect.Parameter.empty else repr(parameter.default)
        found.append(Parameter(name, _KINDS[parameter.kind], default))
    return found


def text(parameters: list[Parameter]) -> str:
    parts: list[str] = []
    for i, p in enumerate(parameters):
        if p.kind == "keyword" and not any(q.kind in ("*", "keyword") for q in parameters[:i]):
            parts.append("*")
        stars = p.kind if p.kind.startswith("*") else ""
        parts.append(f"{stars}{p.name}" + ("" if p.default is None else f"={p.default}"))
    return f"({', '.join(parts)})"


def difference(where: str, expected: str, found: list[Parameter]) -> Problem | None:
    """What to say if a signature is not the expected one."""
    wanted = of_text(expected)
    if len(wanted) == len(found) and all(a.fits(b) for a, b in zip(wanted, found, strict=True)):
        return None
    why = f"{where} takes {text(found)} here, and the adapter was written for {text(wanted)}"
    return Problem("signature differs", why)


def absent(module: str, path: str) -> Problem:
    return Problem("absent", f"{module} has no {path}")


MISSING = object()


def lookup(owner: Any, path: str) -> Any:
    """The object at ``Class.method`` as its owner holds it: a staticmethod is one. MISSING if it is not there."""
    for name in path.split("."):
        try:
            owner = inspect.getattr_static(owner, name)
        except AttributeError:
            return MISSING
    return owner


def problem(target: Target, module: Any) -> Problem | None:
    """Why the target cannot be replaced in a loaded module."""
    if lookup(module, target.attribute) is MISSING:
        return absent(target.module, target.attribute)
    for path, expected in target.signatures.items():
        found = lookup(module, path)
        if found is MISSING:
            return absent(target.module, path)
        try:
            parameters = of_object(found)
        except (TypeError, ValueError) as error:
            return Problem("signature differs", f"{target.module}.{path} has no signature: {error}")
        why = difference(f"{target.module}.{path}", expected, parameters)
        if why is not None:
            return why
    return None
