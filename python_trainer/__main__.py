"""python -m python_trainer sft|reward|train|eval|frontier|demo --config file.yaml [--key value ...]"""

import argparse
import errno
import sys
from collections.abc import Sequence

from .config import CONFIGS, UserError
from .settings import COMMANDS

HELP = f"""{__doc__}

  sft      imitate texts                          -> <output_dir>/sft/model
  reward   a reward model from preference pairs   -> <output_dir>/reward/model
  train    reinforcement learning                 -> <output_dir>/train/model, metrics.jsonl, curves.png
  eval     a trained policy beside its reference  -> <output_dir>/eval/metrics.json
  frontier algorithms x kl_coefs                  -> <output_dir>/frontier/frontier.csv and .png
  demo     sft, reward and train on real reviews; fails if nothing is learned. Replaces its earlier results.

Shipped configurations: {", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))}
Every setting of a command: python -m python_trainer <command> --help"""


def main(arguments: Sequence[str]) -> int:
    # The deepspeed launcher puts its --local_rank=N before everything else; the environment says the same.
    rest = [argument for argument in map(_underscored, arguments) if not argument.startswith("--local_rank")]
    if not rest or rest[0] in ("-h", "--help"):
        print(HELP)
        return 0 if rest else 2
    command, *rest = rest
    try:
        return _run(command, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.strerror}: {error.filename or 'output_dir'}; what is committed is safe", file=sys.stderr)
        return 1


def _underscored(argument: str) -> str:
    """--output-dir is --output_dir; the value behind a = stays as it is."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _run(command: str, rest: list[str]) -> int:
    if command not in (*COMMANDS, "demo"):
        raise UserError(f"unknown command {command!r}; choose from {', '.join(COMMANDS)}, demo")
    from . import pipeline

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        given, rest = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    return pipeline.run(command, given.config, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
