"""Requests of all sizes, thousands of them: does the memory stay as it is?

    python benchmarks/memory.py [--requests N] [--clients C] [--seconds S] [--json FILE] [flags of foveate serve]

Starts a server. A tenth of the requests warms it up: after that no process may grow by more than 5 % or 30 MiB, nor its
share of a GPU by more than 64 MiB; at the end no block of keys and values and none of an arena may be in use; and no
request may have failed but for what is wrong with it or because there were too many. Exit status 1 otherwise.

Caches that are filled bit by bit look like leaks, so the embedding cache is small here, and so are the KV cache and
the arena on a CPU; flags of one's own go first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
from memory_requests import Kind, Requests
from memory_samples import MIB, Sample, Verdict, fetch_metrics, is_idle, judge, look, processes_of
from rich.console import Console
from rich.table import Table

from foveate.deploy.launch import launched
from foveate.manager.gpu import query

STAGES = (0.1, 0.5, 1.0)
"""Shares of the requests after which everybody waits until the server is idle, and it is looked at."""
SAMPLE_SECONDS = 1.0
SETTLE_SECONDS = 4.0
"""How long a look at the idle server waits: until closed connections are noticed, and free memory is given back."""
IDLE_SECONDS = 90.0
PATIENCE_SECONDS = 600.0
SMALL = {"--embedding-cache-bytes": 16 * MIB}
SMALL_ON_CPU = {"--embedding-cache-bytes": 2 * MIB, "--num-kv-blocks": 512, "--arena-bytes": 4 * MIB}


class Soak:
    """Clients who ask one after the other, and somebody who looks at the server every second.

    Args:
        url: the server's.
        model: the name that requests use.
        processes: the server's, by name.
        seed: makes the same requests again.

    Attributes:
        samples: one for each second.
        ends: how requests ended: an HTTP status, the code of an error within a stream, given up.
        wrong: ends that should not be, by kind and end.
    """

    def __init__(self, url: str, model: str, processes: Mapping[str, psutil.Process], seed: int) -> None:
        self.samples: list[Sample] = []
        self.ends: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.ended = 0
        self._url = url
        self._requests = Requests(model, seed)
        self._processes = processes
        self._started = time.monotonic()

    async def run(self, requests: int, clients: int, seconds: float, settle: float) -> list[Sample]:
        """Send all requests, or as many as there is time for; return a look at the idle server after each stage."""
        deadline = self._started + seconds
        idle = []
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE_SECONDS) as watcher:
            watching = asyncio.create_task(self._watch(watcher))
            for share in STAGES:
                until = self._started + share * seconds
                await self._send(round(share * requests), clients, min(until, deadline))
                idle.append(await self._settle(watcher, settle))
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return idle

    async def _send(self, last: int, clients: int, deadline: float) -> None:
        started = self.ended
        # A client for each stage: its connections are closed when the server is looked at.
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE_SECONDS, limits=limits) as client:

            async def one_after_the_other() -> None:
                nonlocal started
                while started < last and time.monotonic() < deadline:
                    started += 1
                    await self._one(client)
                    self.ended += 1

            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(one_after_the_other())

    async def _one(self, client: httpx.AsyncClient) -> None:
        # Drawing takes a while, and others listen meanwhile.
        kind, body, events = await asyncio.to_thread(self._requests.next)
        try:
            end = await _ask(client, body, events)
        except httpx.HTTPError as error:
            end = type(error).__name__
        self.ends[end] += 1
        if not _is_fine(kind, end):
            self.wrong[f"{kind}: {end}"] += 1

    async def _watch(self, client: httpx.AsyncClient) -> None:
        while True:
            await self._look(client)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _look(self, client: httpx.AsyncClient) -> Sample:
        values = look(self._processes, await fetch_metrics(client))
        self.samples.append(Sample(time.monotonic() - self._started, self.ended, values))
        return self.samples[-1]

    async def _settle(self, client: httpx.AsyncClient, seconds: float) -> Sample:
        """Wait until the server is idle, and look at it."""
        deadline = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < deadline and not is_idle(await fetch_metrics(client)):  # noqa: ASYNC110
            await asyncio.sleep(SAMPLE_SECONDS)
        await asyncio.sleep(seconds)
        return await self._look(client)


async def _ask(client: httpx.AsyncClient, body: bytes, events: int | None) -> str:
    """Send a request, hang up after some events if that is wanted, and say how it ended."""
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
            return str(response.status_code)
        seen, last = 0, ""
        async for line in response.aiter_lines():
            if events is not None and seen >= events:
                return "given up"
            seen += line.startswith("data: ")
            last = line if line.startswith(("data: {", "{")) else last
    answer: dict[str, Any] = json.loads(last.removeprefix("data: "))
    return f"{answer['error'].get('code')} in a stream" if "error" in answer else "200"


def _is_fine(kind: Kind, end: str) -> bool:
    if end in ("503", "overloaded in a stream", "unavailable in a stream"):
        return True
    return end in ("400", "413", "422") if kind == "invalid" else end in ("200", "given up")


def with_defaults(flags: list[str]) -> list[str]:
    """Add flags that make caches small where none are given."""
    given = {flag.partition("=")[0] for flag in flags}
    device = next((flag for flag in flags if "cuda" in flag or flag.endswith("cpu")), "")
    on_gpu = "cuda" in device or (not device and bool(query("--query-gpu=name")))
    small = SMALL if on_gpu else SMALL | SMALL_ON_CPU
    return [*(f"{flag}={value}" for flag, value in small.items() if flag not in given), *flags]


def show(soak: Soak, verdicts: list[Verdict], idle: list[Sample]) -> None:
    """Print what was found."""
    console = Console(highlight=False)
    table = Table(title=f"{soak.ended:,} requests in {idle[-1].seconds:.0f} s; the idle server after", box=None)
    table.add_column("")
    for sample in idle:
        table.add_column(f"{sample.requests:,}", justify="right")
    for heading in ("highest", "may grow by", ""):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        write = _writer(verdict.name)
        highest = max(sample.values.get(verdict.name, 0) for sample in soak.samples)
        cells = [*verdict.values, highest, verdict.allowed]
        table.add_row(verdict.name, *(write(value) for value in cells), "ok" if verdict.ok else "FAILED")
    console.print(table)
    console.print("ends:", ", ".join(f"{count} {end}" for end, count in soak.ends.most_common()))
    for what, count in soak.wrong.most_common():
        console.print(f"FAILED: {count} requests, {what}")


def _writer(name: str) -> Callable[[float], str]:
    in_bytes = "GPU" in name or name.endswith("resident")
    return lambda value: f"{value / MIB:,.0f} MiB" if in_bytes else f"{value:,.0f}"


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after about so long")
    parser.add_argument("--settle", type=float, default=SETTLE_SECONDS, help="seconds before each look when idle")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options, flags = parser.parse_known_args()
    flags = with_defaults(flags)
    random.seed(options.seed)
    with launched(flags) as (url, _):
        model = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
        soak = Soak(url, model, processes_of(os.getpid()), options.seed)
        idle = asyncio.run(soak.run(options.requests, options.clients, options.seconds, options.settle))
    verdicts = judge(idle)
    show(soak, verdicts, idle)
    if soak.ended < options.requests:
        print(f"{soak.ended} of {options.requests} requests were sent: there was no time for more")
    ok = all(verdict.ok for verdict in verdicts) and not soak.wrong and soak.ended > 0
    print("The memory stays as it is." if ok else "FAILED")
    if options.json:
        document = {
            "flags": flags, "requests": soak.ended, "wanted": options.requests, "clients": options.clients, "ok": ok,
            "ends": soak.ends, "wrong": soak.wrong, "verdicts": [vars(verdict) for verdict in verdicts],
            "samples": [vars(sample) for sample in soak.samples],
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
