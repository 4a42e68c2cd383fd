"""How much of the GPUs' memory belongs to which process, as the driver's own tool tells."""

from __future__ import annotations

import shutil
import subprocess

_SECONDS = 10.0
_MIB = 2**20


def query(*arguments: str) -> list[list[str]]:
    """Ask ``nvidia-smi`` for a table and return its rows; none if it is not there or does not answer.

    Args:
        arguments: such as ``--query-gpu=name``.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, *arguments, "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if result.returncode:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines() if line.strip()]


def memory_by_process() -> dict[int, int] | None:
    """Return the bytes that each process has on all GPUs together; None if nobody can tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    used: dict[int, int] = {}
    for pid, mebibytes in query("--query-compute-apps=pid,used_memory"):
        # Inside a container the driver may not know its own figures.
        if pid.isdigit() and mebibytes.isdigit():
            used[int(pid)] = used.get(int(pid), 0) + int(mebibytes) * _MIB
    return used
