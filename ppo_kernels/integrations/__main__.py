"""What fits the trainers that are installed: ``python -m ppo_kernels.integrations``. See ``--help``."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ppo_kernels import integrations
from ppo_kernels.integrations import _source
from ppo_kernels.integrations._adapter import Adapter, Row

DESCRIPTION = """
Per trainer its version, the versions that its adapter was tested with, and target by target whether the function here
takes what the adapter was written for. By default sources are read and nothing of a trainer is imported. Exits 1 if a
target does not fit.

After a release of a trainer, see what has changed, its signatures and the text of its functions:

    pip install --no-deps --target build/newer trl
    python -m ppo_kernels.integrations trl --path build/newer --since build/trainers

A script with the adapters of TRL in place, and nothing added to it (-m takes a module):

    python -m ppo_kernels.integrations run trl script.py --its arguments
"""


def rows(adapter: Adapter, path: Sequence[str] | None, since: Sequence[str] | None) -> list[Row]:
    """By the sources alone."""
    found = []
    for target in adapter.targets:
        problem = _source.problem(target, path)
        if problem is not None:
            found.append(Row(adapter.name, target.attribute, *problem))
            continue
        changed = []
        if since is not None:
            old, new = _source.body(target, since), _source.body(target, path)
            changed = [name for name in new if old.get(name) != new[name]]
        if changed:
            found.append(Row(adapter.name, target.attribute, "text differs", f"read {', '.join(changed)} again"))
        else:
            found.append(Row(adapter.name, target.attribute, "fits", target.covers))
    return found


def imported(adapter: Adapter) -> list[Row]:
    """By replacing it: the trainer is imported for that."""
    adapter.apply(strict=False)
    for module in dict.fromkeys(target.module for target in adapter.targets):
        try:
            importlib.import_module(module)
        except Exception as error:
            print(f"  {module} cannot be imported: {type(error).__name__}: {error}")
    return adapter.report()


def describe(adapter: Adapter, path: Sequence[str] | None, since: Sequence[str] | None, imports: bool) -> bool:
    """Whether all targets fit, or the trainer is not there."""
    if _source.package_folder(adapter.package, path) is None:
        print(f"{adapter.name}: not installed")
        return True
    version = _source.version(adapter.distribution, path) or "of no known version"
    tested = "tested" if version in adapter.tested else f"tested with {', '.join(adapter.tested)}"
    print(f"{adapter.name} {version} ({tested})")
    table = imported(adapter) if imports else rows(adapter, path, since)
    widest = max(len(row.target) for row in table)
    for row in table:
        print(f"  {row.target:<{widest}} {row.state:<12} {row.detail}".rstrip())
    return all(row.state in ("fits", "replaced") for row in table)


USAGE_OF_RUN = (
    "usage: python -m ppo_kernels.integrations run TRAINER[,TRAINER] [-m] SCRIPT_OR_MODULE [ARGUMENT ...]\n"
    f"  of the trainers {', '.join(integrations.TRAINERS)}"
)


def run(words: list[str]) -> None:
    """``NAMES script.py ...`` or ``NAMES -m module ...`` with the adapters in place, here and in what it starts."""
    if {"-h", "--help"} & set(words[:1]):
        print(USAGE_OF_RUN)
        return
    if len(words) < 2 or words[1:] == ["-m"]:
        sys.exit(USAGE_OF_RUN)
    if unknown := [name for name in words[0].split(",") if name.strip() not in (*integrations.TRAINERS, "none")]:
        sys.exit(_no_adapter(unknown))
    if words[1] != "-m" and not Path(words[1]).exists():
        sys.exit(f"there is no script {words[1]} here; -m in front of it runs a module by its name")
    os.environ[integrations.VARIABLE] = words[0]
    integrations.from_environment()
    if words[1] == "-m":
        sys.argv = words[2:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words[1:]
        sys.path[0] = str(Path(words[1]).resolve().parent)
        runpy.run_path(words[1], run_name="__main__")


def _no_adapter(names: list[str]) -> str:
    return f"there is no adapter for {', '.join(names)}; the trainers are {', '.join(integrations.TRAINERS)}"


def main(words: list[str]) -> int:
    if words[:1] == ["run"]:
        run(words[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m ppo_kernels.integrations",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trainer", nargs="*", help=f"of {', '.join(integrations.TRAINERS)}; by default all")
    parser.add_argument("--path", help="a folder to look in, instead of sys.path")
    parser.add_argument("--since", help="a folder with the release that is known: also compare what functions do")
    parser.add_argument("--import", dest="imports", action="store_true", help="import the trainers, and replace")
    given = parser.parse_args(words)
    unknown = [name for name in given.trainer if name not in integrations.TRAINERS]
    if unknown:
        parser.error(_no_adapter(unknown))
    if given.imports and (given.path or given.since):
        parser.error("--import looks at sys.path; --path and --since read sources alone")
    path, since = ([folder] if folder else None for folder in (given.path, given.since))
    names = given.trainer or integrations.TRAINERS
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    fit = [describe(integrations.adapter(name), path, since, given.imports) for name in names]
    return 0 if all(fit) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
