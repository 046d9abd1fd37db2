"""`python -m distwd`: the arguments, and which function each command runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import distwd

from .cli import bench, plan, verify
from .cli.process import end_process


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, on every rank.

    torchrun ends the others as soon as one is gone, so a message left to rank 0 might never be printed.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 well, 1 not as promised, 2 wrong arguments.

    arguments: None: those of the command line.
    """
    parser = Parser(
        prog="python -m distwd", description="Weight decay for sharded models: what it does, and whether it holds here."
    )
    parser.add_argument("--version", action="version", version=distwd.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module, name, help_ in (
        (plan, "plan", "who holds what of a model on a mesh, and what it costs, without running it"),
        (bench, "bench", "what does a decay cost here, beside the step of AdamW and a training step?"),
        (verify, "verify", "does every layout decay as one process does, on the ranks that torchrun starts?"),
    ):
        # By the docstring, which says more than a line of help.
        command = commands.add_parser(
            name, help=help_, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    end_process(main())
