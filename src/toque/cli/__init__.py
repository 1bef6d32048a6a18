"""The `toque` command. Here it is decided what works without the `cli` extra: `toque worker`, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Final

from toque.cli.output import EXIT_FAILED, EXIT_USAGE, report_error, say

BARE_COMMANDS: Final = ("worker", "inspect")  # `inspect` is for `toque dev` alone
CLI_PACKAGES: Final = ("typer>=0.15", "rich>=13")  # the extra `cli` of pyproject.toml


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code.

    0 ok, 1 a failed operation, 2 wrong usage, 3 something is away (try again), 130 Ctrl-C. Errors are one line on
    stderr; with TOQUE_DEBUG=1 the traceback stands before it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in BARE_COMMANDS:
            return _run_bare(arguments)
        missing = [name for name in CLI_PACKAGES if importlib.util.find_spec(name.partition(">")[0]) is None]
        return _say_missing(missing) if missing else _run(arguments)
    except BrokenPipeError:  # `toque instances list | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost edge says it in a line
        return report_error(error)


def _say_missing(missing: Sequence[str]) -> int:
    packages = " ".join(f"'{name}'" for name in missing)
    say(f"toque: this command needs packages that are not installed: {sys.executable} -m pip install {packages}")
    return EXIT_USAGE


def _run_bare(arguments: list[str]) -> int:
    from toque.cli import worker  # loads the runtime, which no other command needs

    return worker.run(arguments)


def _run(arguments: list[str]) -> int:
    from toque.cli import app  # needs the extra

    return app.run(arguments)
