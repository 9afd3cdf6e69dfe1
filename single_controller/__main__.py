"""`python -m single_controller COMMAND`: a cluster, its groups, a trace or a program by hand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from single_controller.errors import SingleControllerError

__all__ = ["main"]

_COMMANDS = {
    "doctor": "check a cluster: exit code 1 if a check fails",
    "ps": "the groups of a running cluster, a line per rank, and what is reserved unused",
    "stacks": "the Python stack of each rank of a group, also of stuck ones",
    "kill": "end all processes of a group, or give a reservation back",
    "port": "change a program's imports from veRL's to ours, or show how",
    "timeline": "sum up a file that single_controller.trace wrote",
}
_OF_GROUPS = ("ps", "stacks", "kill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all is well, 1 if something is wrong, 2 for what cannot be done."""
    options = vars(_parser().parse_args(arguments))
    name = options.pop("command")
    # None of the others is imported: `port` and `timeline` need neither Ray nor torch.
    module = importlib.import_module(
        f"single_controller.cli.{'groups' if name in _OF_GROUPS else name}"
    )
    try:
        status: int = getattr(module, name)(**options)
    except (ValueError, OSError, SingleControllerError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m single_controller", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name == "port":
            command.add_argument("files", nargs="+", metavar="FILE")
            command.add_argument("--write", action="store_true", help="change the files, no diff")
        elif name == "timeline":
            command.add_argument("file", metavar="TRACE.json")
        else:
            command.add_argument("--address", help="of the cluster; by default the only one here")
        if name in ("stacks", "kill"):
            command.add_argument("name", help="the group (kill: or reservation), as ps shows it")
            command.add_argument("--namespace", help="which, if several groups have this name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
