"""Thousands of requests with pictures, some given up, while processes are killed: nothing is lost, nothing piles up."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live import SECONDS, Live, ask, live_server, picture, question
from serving import RunningServer

Eventually = Callable[[Callable[[], bool]], None]

REQUESTS = 2000
CONCURRENCY = 16
TOKENS = 4
KILLS = ("encoder", "engine") * 3
FLAGS = (
    "--arena-bytes=2097152",  # 32 pictures of one slice
    "--embedding-cache-bytes=2097152",
    "--lease-seconds=20",
)
GROWTH_MIB = 200
"""Of each process: steps are as large as the pictures that wait. The last encoder gets 700 pictures of 0.6 MiB each."""

KNOWN = [picture(seed, 100, 100) for seed in range(20)]
"""Pictures that are asked about again and again; what is said of each is known."""


class Crowd:
    """Many clients at once, who ask, wait, and at times lose patience.

    Args:
        live: whom they ask.
        answers: what is right to say about each of the known pictures.

    Attributes:
        started: requests so far.
        ends: how they ended: with an HTTP status, an error within a stream, or given up.
        wrong: answers that were not right.
    """

    def __init__(self, live: Live, answers: list[str]) -> None:
        self.started = 0
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._live = live
        self._answers = answers
        self._random = random.Random(7)

    async def send(self, requests: int) -> None:
        """Send so many requests and see how each of them ends."""
        self.started, last = 0, requests
        limits = httpx.Limits(max_connections=CONCURRENCY)
        async with httpx.AsyncClient(base_url=self._live.url, timeout=SECONDS, limits=limits) as client:

            async def one_after_the_other() -> None:
                while self.started < last:
                    self.started += 1
                    await self._one(client)

            async with asyncio.TaskGroup() as group:
                for _ in range(CONCURRENCY):
                    group.create_task(one_after_the_other())

    async def _one(self, client: httpx.AsyncClient) -> None:
        kind, patience = self._random.random(), self._random.random()
        known = self._random.randrange(len(KNOWN)) if kind < 0.5 else None
        if known is not None:
            pictures = [KNOWN[known]]
        else:
            fresh = [picture(self._random.random(), 100, 100) for _ in range(self._random.randint(1, 2))]
            pictures = fresh if kind < 0.75 else []
        fields = question(*pictures, tokens=TOKENS, stream=self._random.random() < 0.5, ignore_eos=True)
        try:
            async with asyncio.timeout(patience if patience < 0.15 else None):
                end, said = await answer(client, fields)
        except TimeoutError:
            self.ends["given up"] += 1
            return
        self.ends[end] += 1
        if end == "200" and known is not None and said != self._answers[known]:
            self.wrong.append(f"{known}: {said!r} instead of {self._answers[known]!r}")
        while end != "200" and (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110 (no event tells)
            await asyncio.sleep(0.1)


async def answer(client: httpx.AsyncClient, fields: dict[str, Any]) -> tuple[str, str]:
    """Return how a request ended, and what was said."""
    if not fields["stream"]:
        whole = await client.post("/v1/chat/completions", json=fields)
        if whole.status_code != 200:
            return str(whole.status_code), ""
        return "200", whole.json()["choices"][0]["message"]["content"]
    async with client.stream("POST", "/v1/chat/completions", json=fields) as stream:
        if stream.status_code != 200:
            return str(stream.status_code), ""
        events = [line.removeprefix("data: ") async for line in stream.aiter_lines() if line]
    bodies = [json.loads(event) for event in events if event != "[DONE]"]
    if "error" in bodies[-1]:
        return "error in a stream", ""
    assert events[-1] == "[DONE]"
    return "200", "".join(body["choices"][0]["delta"].get("content", "") for body in bodies)


async def kill_now_and_then(live: Live, crowd: Crowd, eventually: Eventually) -> None:
    """Kill a process, again and again, as soon as everything works and enough requests have been sent since."""
    for number, name in enumerate(KILLS, start=1):
        while crowd.started < number * REQUESTS // (len(KILLS) + 1):  # noqa: ASYNC110 (no event tells)
            await asyncio.sleep(0.05)
        await asyncio.to_thread(eventually, live.is_ready)
        process: psutil.Process = getattr(live, name)
        process.kill()


def is_idle(live: Live) -> bool:
    numbers = live.metrics()
    vision = live.vision_numbers()
    return (
        numbers.get("foveate_engine_num_running") == numbers.get("foveate_engine_num_waiting") == 0
        and vision.get("requests_running") == vision.get("arena_leases") == 0
        and live.is_ready()
    )


def mapped_arenas(process: psutil.Process) -> int:
    return len({region.path for region in process.memory_maps(grouped=False) if "/memfd:vision-" in region.path})


def measure(live: Live) -> dict[str, float]:
    """Everything that could pile up."""
    engine, vision = live.metrics(), live.vision_numbers()
    numbers: dict[str, float] = {
        "entries of /dev/shm": len(os.listdir("/dev/shm")),
        "arena blocks in use": vision["arena_blocks"] - vision["arena_blocks_free"],
        "leases": vision["arena_leases"],
        "leases that ended by time": vision["arena_leases_expired_total"],
        "arenas that the engine maps": mapped_arenas(live.engine),
        "readers of the arena": vision["arena_readers"],
        "KV blocks in use": engine["foveate_engine_total_blocks"] - engine["foveate_engine_free_blocks"],
    }
    for name, process in (("API", psutil.Process(live.process.pid)), ("engine", live.engine), ("vision", live.encoder)):
        numbers[f"{name}: file descriptors"] = process.num_fds()
        numbers[f"{name}: resident MiB"] = process.memory_info().rss / 2**20
    return numbers


def table(before: dict[str, float], after: dict[str, float]) -> str:
    rows = [f"{name:30} {before[name]:8.0f} {after[name]:8.0f}" for name in before]
    return "\n".join(["", f"{'':30} {'before':>8} {'after':>8}", *rows])


def test_nothing_piles_up(
    runtime: Path,
    server: RunningServer,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Whatever a killed process leaves in a temporary folder is seen in the end.
    monkeypatch.setenv("TMPDIR", str(runtime))
    answers = [ask(server.url, one, tokens=TOKENS) for one in KNOWN]
    assert len(set(answers)) > len(KNOWN) // 2
    with live_server(runtime, *FLAGS) as live:
        crowd = Crowd(live, answers)

        async def soak() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(crowd.send(REQUESTS))
                group.create_task(kill_now_and_then(live, crowd, eventually))

        asyncio.run(crowd.send(200))
        eventually(lambda: is_idle(live))
        before = measure(live)
        crowd.ends.clear()
        asyncio.run(soak())
        ends = dict(crowd.ends)
        eventually(live.is_ready)
        crowd.ends.clear()
        asyncio.run(crowd.send(100))
        eventually(lambda: is_idle(live))
        eventually(lambda: live.ask(KNOWN[0]) != "" and mapped_arenas(live.engine) == 1)
        eventually(lambda: is_idle(live))
        after = measure(live)
    with capsys.disabled():
        print(table(before, after))
        print("ends:", ends)
    assert sum(ends.values()) == REQUESTS
    assert set(ends) <= {"200", "500", "503", "error in a stream", "given up"}
    assert crowd.wrong == []
    assert set(crowd.ends) <= {"200", "given up"}
    for name, value in after.items():
        allowed = GROWTH_MIB if "MiB" in name else 0
        assert value <= before[name] + allowed, name
