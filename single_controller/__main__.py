"""`python -m single_controller doctor | ps | stacks | kill`: a cluster and its groups by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "skip"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all is well, 1 if something is wrong, 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m single_controller", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, what in (
        ("doctor", _doctor, "check a cluster: exit code 1 if a check fails"),
        (
            "ps",
            _ps,
            "the groups of a running cluster, a line per rank, and what is reserved unused",
        ),
        ("stacks", _stacks, "the Python stack of each rank of a group, also of stuck ones"),
        ("kill", _kill, "end all processes of a group, or give a reservation back"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument(
            "--address", help="of the cluster; by default the only one that runs here"
        )
        command.set_defaults(run=run)
        if name in ("stacks", "kill"):
            command.add_argument(
                "name", metavar="NAME", help="the group (kill: or reservation), as ps shows it"
            )
            command.add_argument("--namespace", help="which, if several groups have this name")
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from single_controller.ray.doctor import connect, examine

    first = connect(options.address)
    states = [first.state]
    _show(first.check, first.state, first.detail, first.fix)
    for finding in examine() if first.state != "fail" else ():
        _show(finding.check, finding.state, finding.detail, finding.fix)
        states.append(finding.state)
    failed = states.count("fail")
    sys.stdout.write(f"{failed} of {len(states)} checks failed\n" if failed else "all is well\n")
    return 1 if failed else 0


def _show(check: str, state: str, detail: str, fix: str) -> None:
    sys.stdout.write(f"{_MARKS[state]}  {check:<16}{detail}\n")
    if fix:
        sys.stdout.write(f"      {'to do:':<16}{fix}\n")
    sys.stdout.flush()


def _attached(address: str | None) -> bool:
    """Connect to a cluster that runs, and say which; whether that worked."""
    from single_controller.ray.doctor import connect

    finding = connect(address or "auto")
    if finding.state == "fail":
        sys.stderr.write(f"{finding.detail}\n{finding.fix}\n")
        return False
    sys.stdout.write(f"{finding.detail}\n")
    return True


def _ps(options: argparse.Namespace) -> int:
    from single_controller.ray.running import (
        groups_table,
        reservations_table,
        running_groups,
        unused_reservations,
    )

    if not _attached(options.address):
        return 2
    groups, unused = running_groups(), unused_reservations()
    sys.stdout.write(f"{groups_table(groups)}\n" if groups else "no groups are running\n")
    if unused:
        table = reservations_table(unused)
        sys.stdout.write(f"\nreserved without a group (`kill` gives them back):\n{table}\n")
    return 0


def _stacks(options: argparse.Namespace) -> int:
    from single_controller.ray.running import group_stacks

    if not _attached(options.address):
        return 2
    try:
        stacks = group_stacks(options.name, options.namespace)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.writelines(f"rank {rank}\n{stack}\n" for rank, stack in stacks.items())
    return 0


def _kill(options: argparse.Namespace) -> int:
    from single_controller.errors import SingleControllerError
    from single_controller.ray.running import kill_group, kill_reservation

    if not _attached(options.address):
        return 2
    if kill_reservation(options.name):
        sys.stdout.write(f"gave {options.name} back\n")
        return 0
    try:
        group = kill_group(options.name, options.namespace)
    except (ValueError, SingleControllerError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ValueError) else 1
    sys.stdout.write(f"ended the {len(group.hosts)} hosts of {group.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
