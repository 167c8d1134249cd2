"""python -m python_trainer sft|reward|train|eval|demo --config file.yaml [--key value ...]"""

import sys
from collections.abc import Sequence

from .config import COMMANDS, UserError


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    # The deepspeed launcher puts its --local_rank=N before everything else; the environment says the same.
    rest = [argument for argument in arguments if not argument.startswith("--local_rank")]
    command, *rest = rest
    try:
        return _run(command, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(command: str, rest: list[str]) -> int:
    if command not in (*COMMANDS, "demo"):
        raise UserError(f"unknown command {command!r}; choose from {', '.join(COMMANDS)}, demo")
    from . import pipeline

    path = None
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise UserError("--config needs a file")
        path = rest[at + 1]
        del rest[at : at + 2]
    return pipeline.run(command, path, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
