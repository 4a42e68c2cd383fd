"""What a server has of memory, files and threads, and whether that stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
import psutil

from foveate.manager.gpu import memory_by_process, query

MIB = 2**20
PROCESSES = {"foveate.cli": "API", "foveate.worker": "engine", "foveate.vision.process": "vision"}
"""The server's processes, by the module that each of them runs."""
RSS_SHARE, RSS_BYTES = 0.05, 30 * MIB
"""A process may grow by either, after the warm-up."""
GPU_BYTES = 64 * MIB
FILES, THREADS = 8, 8
"""What may come on top after the warm-up: pools of threads grow with the most that has ever been asked of them."""


@dataclass(frozen=True)
class Sample:
    """One look at everything.

    Attributes:
        seconds: since the beginning.
        requests: that have ended by then.
        values: numbers by what they are of; bytes where the name says nothing else.
    """

    seconds: float
    requests: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What became of one number, and whether that is well."""

    name: str
    values: list[float]
    allowed: float
    ok: bool


def processes_of(pid: int) -> dict[str, psutil.Process]:
    """Find the server's processes among the children of one, by name."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        for module, name in PROCESSES.items():
            if module in command[:6]:
                found[name] = process
    return found


def look(processes: Mapping[str, psutil.Process], metrics: Mapping[str, float]) -> dict[str, float]:
    """Sum up the processes, the GPUs and what the server says of itself."""
    values: dict[str, float] = {}
    for name, process in processes.items():
        with process.oneshot():
            values[f"{name}: resident"] = process.memory_info().rss
            values[f"{name}: files"] = process.num_fds()
            values[f"{name}: threads"] = process.num_threads()
    values |= gpu_memory({process.pid: name for name, process in processes.items()})
    if "foveate_engine_total_blocks" in metrics:
        values["KV blocks in use"] = metrics["foveate_engine_total_blocks"] - metrics["foveate_engine_free_blocks"]
    for arena in ("arena", "cuda_ipc"):
        counted = [metrics.get(f'foveate_vision_{arena}_{name}{{service="own"}}') for name in ("blocks", "blocks_free")]
        if counted[0] is not None and counted[1] is not None:
            values[f"{arena.replace('_', '-')} blocks in use"] = counted[0] - counted[1]
    return values


def gpu_memory(names: Mapping[int, str]) -> dict[str, float]:
    """Return the bytes that each process has of the GPUs; those of whole GPUs where nobody can tell them apart."""
    each = memory_by_process() or {}
    found: dict[str, float] = {f"{names[pid]}: GPU": used for pid, used in each.items() if pid in names}
    if not found:
        rows = query("--query-gpu=index,memory.used")
        found = {f"GPU {index}": int(used) * MIB for index, used in rows if used.isdigit()}
    return found


def read_metrics(text: str) -> dict[str, float]:
    """Return every sample of ``/metrics``, by its name with labels."""
    return {name: float(value) for name, value in re.findall(r"^([a-z]\S*) (\S+)$", text, re.MULTILINE)}


async def fetch_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Ask the server."""
    return read_metrics((await client.get("/metrics")).raise_for_status().text)


def is_idle(metrics: Mapping[str, float]) -> bool:
    """Whether nothing is worked on, and nothing is lent."""
    of_vision = (f'foveate_vision_{name}{{service="own"}}' for name in ("requests_running", "arena_leases", "shares"))
    names = ("foveate_engine_num_running", "foveate_engine_num_waiting", *of_vision)
    return all(metrics.get(name, 0) == 0 for name in names)


def judge(idle: Sequence[Sample]) -> list[Verdict]:
    """Compare looks at an idle server, the first of them after the warm-up."""
    first, last = idle[0].values, idle[-1].values
    verdicts = []
    for name in first:
        before, after = first[name], last.get(name, float("nan"))
        allowed = _allowed(name, before)
        # What is in use is to be nothing, whatever it was.
        bound = allowed if name.endswith("in use") else before + allowed
        least = before - allowed if "GPU" in name else 0
        values = [sample.values.get(name, float("nan")) for sample in idle]
        verdicts.append(Verdict(name, values, allowed, least <= after <= bound))
    return verdicts


def _allowed(name: str, before: float) -> float:
    if "GPU" in name:
        return GPU_BYTES
    if name.endswith("resident"):
        return max(RSS_SHARE * before, RSS_BYTES)
    return {"files": FILES, "threads": THREADS}.get(name.rpartition(" ")[2], 0)
