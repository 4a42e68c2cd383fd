"""What pictures do to somebody else's text: the time between its tokens, with and without pictures arriving.

    python benchmarks/stall.py [--pictures N] [--size WxH] [--json FILE] [flags of foveate serve]

One client streams text, alone for a while and then while pictures arrive all at once. Both are measured with
the encoder in a process of its own and with the encoder inside the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.table import Table

from foveate.deploy.launch import launched
from foveate.workload import Workload

ENCODERS = ("own", "engine")
IDLE_SECONDS = 5.0
TIMEOUT_SECONDS = 600.0
HEADERS = {"Content-Type": "application/json"}


class Gaps(NamedTuple):
    """Times between tokens, in milliseconds."""

    tokens: int
    median: float
    p99: float
    longest: float


def summarize(gaps: list[float]) -> Gaps:
    """Sum up gaps given in seconds."""
    cuts = statistics.quantiles(gaps, n=100, method="inclusive")
    return Gaps(len(gaps), 1000 * cuts[49], 1000 * cuts[98], 1000 * max(gaps))


async def stream(client: httpx.AsyncClient, body: bytes, gaps: list[float]) -> None:
    """Add the times between one answer's events to ``gaps``."""
    async with client.stream("POST", "/v1/chat/completions", content=body) as response:
        response.raise_for_status()
        last = None
        async for line in response.aiter_lines():
            if '"content":' in line:
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now


async def stream_until(client: httpx.AsyncClient, bodies: list[bytes], ended: asyncio.Event) -> list[float]:
    """Stream one text after another until ``ended``, and return the times between tokens."""
    gaps: list[float] = []
    for body in bodies:
        streaming = asyncio.create_task(stream(client, body, gaps))
        ending = asyncio.create_task(ended.wait())
        await asyncio.wait((streaming, ending), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if ended.is_set():
            streaming.cancel()
            break
        await streaming
    return gaps


async def measure(url: str, pictures: int, size: tuple[int, int]) -> tuple[Gaps, Gaps, float]:
    """Return the gaps alone, the gaps beside pictures, and the seconds that the pictures took."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, headers=HEADERS) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        text = Workload(1024, 12, None, same_picture=False, seed=1).bodies(model)
        shown = Workload(1, 12, size, same_picture=False, seed=2).bodies(model)
        texts, pictured = [next(text) for _ in range(64)], [next(shown) for _ in range(pictures)]
        await stream(client, texts.pop(), [])

        ended = asyncio.Event()
        asyncio.get_running_loop().call_later(IDLE_SECONDS, ended.set)
        idle = await stream_until(client, texts, ended)

        ended = asyncio.Event()
        reading = asyncio.create_task(stream_until(client, texts, ended))
        await asyncio.sleep(0.5)
        started = time.perf_counter()
        replies = await asyncio.gather(*(client.post("/v1/chat/completions", content=body) for body in pictured))
        seconds = time.perf_counter() - started
        for reply in replies:
            reply.raise_for_status()
        ended.set()
        return summarize(idle), summarize(await reading), seconds


def main() -> None:
    """Measure both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--size", default="1344x1344", help="ten slices with the demo's and the real model's settings")
    parser.add_argument("--json", type=Path)
    args, flags = parser.parse_known_args()
    width, height = (int(side) for side in args.size.split("x"))
    table = Table(title=f"Milliseconds between tokens, {args.pictures} pictures of {args.size} arriving")
    for column in ("encoder", "pictures", "tokens", "p50", "p99", "longest", "pictures took"):
        table.add_column(column, justify="left" if column in ("encoder", "pictures") else "right")
    results = {}
    for encoder in ENCODERS:
        with launched([*flags, "--encoder", encoder]) as (url, _):
            idle, busy, seconds = asyncio.run(measure(url, args.pictures, (width, height)))
        results[encoder] = {"idle": idle._asdict(), "busy": busy._asdict(), "pictures_seconds": seconds}
        for name, gaps, took in (("none", idle, ""), ("arriving", busy, f"{seconds:.1f} s")):
            figures = [f"{value:.2f}" for value in gaps[1:]]
            table.add_row(encoder, name, str(gaps.tokens), *figures, took)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
