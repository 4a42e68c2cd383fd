"""``foveate ps``: the services, and how they are doing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
from cyclopts import Parameter

from foveate.errors import ConfigError
from foveate.manager.gpu import memory_by_process
from foveate.manager.process import family_of
from foveate.manager.state import Folder, Record, all_folders

_SECONDS = 2.0
_HEADINGS = ("PORT(HTTP,RPC)", "NAME", "PID", "STATUS", "UPTIME", "MODEL", "GPU MEMORY", "DEPLOY PATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One service, as it is now.

    Attributes:
        name: its name.
        role: what runs.
        status: starting, ready, degraded, restarting, stopping, stopped, failed or dead.
        reason: why, if there is something to say.
        pid: the supervisor's process; None if it does not run.
        url: of its HTTP server.
        http_port: of that.
        rpc: the vision service's port, or ``unix``.
        address: the vision service's address.
        uptime_seconds: since it was started.
        restarts: how often the server was started again after it had died.
        model: the name that requests use.
        gpu_memory_bytes: of all its processes; None if nobody can tell.
        deploy_path: the folder with its configuration.
    """

    name: str
    role: str
    status: str
    reason: str
    pid: int | None
    url: str | None
    http_port: int | None
    rpc: str | None
    address: str | None
    uptime_seconds: float | None
    restarts: int
    model: str
    gpu_memory_bytes: int | None
    deploy_path: str


def command(*, json_: Annotated[bool, Parameter(name="--json", negative=())] = False) -> int:
    """List the services, those that have ended too.

    STATUS: starting; ready; degraded (text is answered, pictures may not be, or it does not say how it is); restarting
    (a part has died and is started again); stopping; stopped; failed (given up, the reason is in --json and
    in its logs); dead (its supervisor was killed, or the machine was restarted: foveate start or restart starts it
    again).

    Args:
        json_: Print an object for each service, in a list, with more about it.
    """
    rows = list_services()
    if json_:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(_table(rows))
    return 0


def list_services() -> list[Row]:
    """Look at every service, and ask those that run how they are."""
    folders = all_folders()
    if not folders:
        return []
    memory = memory_by_process()
    with ThreadPoolExecutor(min(len(folders), 16)) as pool:
        return list(pool.map(lambda folder: _row(folder, memory), folders))


def _row(folder: Folder, memory: Mapping[int, int] | None) -> Row:
    try:
        record = folder.read()
    except ConfigError as error:
        record = Record(name=folder.path.name, role="all", created=0.0, status="failed", reason=error.message)
    alive = record.alive
    status, reason = status_of(record)
    pid = record.supervisor.pid if alive and record.supervisor else None
    return Row(
        name=record.name,
        role=record.role,
        status=status,
        reason=reason,
        pid=pid,
        url=record.url,
        http_port=record.port,
        rpc=_rpc(record.address),
        address=record.address,
        uptime_seconds=round(time.time() - record.created, 1) if alive else None,
        restarts=record.restarts,
        model=record.model,
        gpu_memory_bytes=_memory_of(pid, memory) if pid else None,
        deploy_path=str(folder.deploy(record.generation)),
    )


def status_of(record: Record) -> tuple[str, str]:
    """Say how a service is, and why: what is written down, or where that says ready, what it says itself."""
    if record.dead:
        return "dead", "its supervisor was killed, or the machine was restarted"
    if record.status != "ready" or record.url is None:
        return record.status, record.reason
    try:
        # It is asked how it is, not who it is: its certificate may be for another name than this machine's address.
        with httpx.Client(verify=False, timeout=_SECONDS, trust_env=False) as client:  # noqa: S501
            answer = client.get(f"{record.url}/ready")
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        return "degraded", f"it does not say how it is ({type(error).__name__})"
    if answer.status_code == httpx.codes.OK:
        return str(body["status"]), "; ".join(body.get("problems", ()))
    return "restarting", str(body.get("error", {}).get("message", ""))


def _memory_of(pid: int, memory: Mapping[int, int] | None) -> int | None:
    if memory is None:
        return None
    return sum(memory.get(process.pid, 0) for process in family_of(pid))


def _rpc(address: str | None) -> str | None:
    if address is None:
        return None
    return "unix" if address.startswith("unix:") else address.rpartition(":")[2]


def _table(rows: Sequence[Row]) -> str:
    """Lay out the rows, for people and for programs that split at two spaces; nothing is cut off."""
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.http_port or '-'},{row.rpc or '-'}",
        row.name,
        str(row.pid or "-"),
        row.status,
        _duration(row.uptime_seconds),
        row.model or "-",
        "-" if row.gpu_memory_bytes is None else f"{row.gpu_memory_bytes / 2**30:.1f} GiB",
        str(Path(row.deploy_path)),
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = int(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= size:
            smaller = {"d": ("h", 3600), "h": ("m", 60), "m": ("s", 1)}[unit]
            return f"{whole // size}{unit} {whole % size // smaller[1]}{smaller[0]}"
    return f"{whole}s"
