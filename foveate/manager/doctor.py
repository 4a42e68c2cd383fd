"""``foveate doctor``: whether this machine can serve, and what to do if it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from foveate.errors import ConfigError
from foveate.manager.checks import DEFAULT_PORT, Check, machine_checks
from foveate.manager.leftovers import leftovers

EXIT_FAILED = 1
_COLOURS = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "red"}


def command(
    *,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    clean: Annotated[bool, Parameter(negative=())] = False,
    port: int = DEFAULT_PORT,
) -> int:
    """Check this machine, and say what to do about what is not well.

    Each check is ok, note (good to know), warn (some things will not work) or fail. Exit codes: 0, or 1 if one fails.

    Args:
        json_: Print an object for each check, in a list.
        clean: Remove what services that were killed have left behind: processes, sockets and folders.
        port: The port to look at.
    """
    if not 0 < port < 2**16:
        raise ConfigError(f"--port: got {port}, expected an integer of at least 1 and at most 65535")
    console = Console(highlight=False, soft_wrap=True)
    checks = []
    for check in chain(_leftovers(clean), machine_checks(port)):
        checks.append(check)
        if not json_:
            mark = f"[{_COLOURS[check.state]}]{check.state:<4}[/]"
            console.print(f"{mark}  {escape(check.name)}: {escape(check.detail)}")
            if check.remedy:
                console.print(f"      {escape(check.remedy)}")
    if json_:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    return EXIT_FAILED if any(check.state == "fail" for check in checks) else 0


def _leftovers(clean: bool) -> Iterator[Check]:
    found = list(leftovers())
    if not found:
        yield Check("leftovers", "ok", "none of services that were killed")
    for leftover in found:
        if clean:
            leftover.remove()
            yield Check("leftovers", "ok", f"removed: {leftover.what}")
        else:
            yield Check("leftovers", "warn", leftover.what, "foveate doctor --clean removes it")
