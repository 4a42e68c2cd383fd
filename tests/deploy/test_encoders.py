"""Several encoders, other encoders, encoders in other places: the answer stays the same, or says what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from live import ask, live_server, picture, refused
from serving import ROOT, TINY_MODEL, RunningServer

from foveate.config import VisionSettings
from foveate.deploy.look import READY
from foveate.deploy.resolve import DEMO
from foveate.errors import Unavailable
from foveate.transport.handle import Offer
from foveate.vision import vision_pb2 as pb
from foveate.vision.client import VisionClient
from foveate.vision.remote import MAX_FAILURES, Encoded, PictureTask
from foveate.vision.rpc import handlers

Eventually = Callable[[Callable[[], bool]], None]

FEW = [picture(seed) for seed in range(40, 46)]
MORE = [picture(seed) for seed in range(50, 56)]
PAGE = picture(60, 1300, 1300)


class Vision(NamedTuple):
    """A vision service of its own."""

    process: subprocess.Popen[str]
    address: str


@contextlib.contextmanager
def vision_service(listen: str, *flags: str, model: Path = TINY_MODEL) -> Iterator[Vision]:
    """Run ``foveate vision`` from when it answers until the end of the block."""
    command = [sys.executable, "-m", "foveate.cli", "vision", str(model), f"--listen={listen}", *flags]
    process = subprocess.Popen(
        [*command, "--device=cpu", "--dtype=float32", "--threads=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith(READY))
            yield Vision(process, line.removeprefix(READY).split()[0])
        finally:
            process.kill()


def test_pictures_are_spread_and_a_dead_encoder_is_missed_by_nobody(
    runtime: Path, server: RunningServer, tmp_path: Path, eventually: Eventually
) -> None:
    few, more = ask(server.url, *FEW), ask(server.url, *MORE)
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(vision_service(f"unix:{tmp_path}/{name}.sock")) for name in "ab")
        live = stack.enter_context(
            live_server(runtime, "--encoder=none", f"--vision={one.address}", f"--vision={two.address}")
        )
        eventually(live.is_ready)
        assert live.ask(*FEW) == few
        shares = [live.vision("pictures_total", encoder.address) for encoder in (one, two)]
        assert shares == [3, 3]

        one.process.kill()
        assert live.ask(*MORE) == more
        assert live.vision("pictures_total", two.address) == 3 + len(MORE)
        eventually(live.is_degraded)
        assert live.ask(*FEW) == few

        stack.enter_context(vision_service(one.address))
        eventually(live.is_ready)
        assert live.ask(*MORE) == more
        assert live.vision("pictures_total", one.address) == 3


def test_over_tcp_with_a_token(runtime: Path, server: RunningServer) -> None:
    expected = ask(server.url, PAGE)
    with vision_service("127.0.0.1:0", "--vision-token=the-right-one") as encoder:
        elsewhere = ("--encoder=none", f"--vision={encoder.address}", "--transport=inline")
        with live_server(runtime, *elsewhere, "--vision-token=the-right-one") as live:
            assert live.ask(PAGE) == expected
            labels = f'{{service="{encoder.address}",transport="inline"}}'
            assert live.metrics()[f"foveate_vision_up{labels}"] == 1
        with live_server(runtime, *elsewhere, "--vision-token=a-wrong-one") as live:
            assert "unauthenticated" in refused(live.post(PAGE))
            assert live.post().status_code == 200
            assert live.is_degraded()


def test_another_model_s_encoder_is_not_used(runtime: Path, tmp_path: Path) -> None:
    with (
        vision_service(f"unix:{tmp_path}/v.sock", model=DEMO) as encoder,
        live_server(runtime, "--encoder=none", f"--vision={encoder.address}") as live,
    ):
        assert "another model's weights" in refused(live.post(PAGE))
        assert live.post().status_code == 200
        status, body = live.ready()
        assert (status, body["status"]) == (200, "degraded")
        assert "another model's weights" in body["problems"][0]


def test_answers_do_not_depend_on_the_transport(runtime: Path) -> None:
    ways = {"--transport=arena": "arena", "--transport=inline": "inline", "--encoder=engine": "local"}
    answers = []
    for flag, transport in ways.items():
        with live_server(runtime, flag) as live:
            answer = live.post(PAGE, tokens=16, logprobs=True, top_logprobs=5, ignore_eos=True)
            assert answer.status_code == 200, answer.text
            answers.append(answer.json()["choices"])
            assert live.metrics()[f'foveate_vision_up{{service="own",transport="{transport}"}}'] == 1
    assert len(answers[0][0]["logprobs"]["content"]) == 16
    assert answers[0] == answers[1] == answers[2]


def test_the_encoder_in_the_engine_comes_back_with_it(
    runtime: Path, server: RunningServer, eventually: Eventually
) -> None:
    expected = ask(server.url, PAGE)
    with live_server(runtime, "--encoder=engine") as live:
        live.engine.kill()
        eventually(lambda: live.ready()[0] == 503)
        eventually(lambda: live.ready()[0] == 200)
        assert live.ask(PAGE) == expected
        eventually(live.is_ready)


class Attached(NamedTuple):
    """How the engine below reads rows."""

    transport: str = "inline"
    reader: str = ""


class Engine:
    """An engine that takes every encoder's rows inline."""

    ready: object | None = object()

    async def attach(self, offer: Offer, transport: str) -> Attached:
        return Attached()


class Moody:
    """A vision service whose health and whose work can fail."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.encodes = 0
        self.fails = False
        self.ill_after = 10**9

    async def Encode(self, request: pb.EncodeRequest, context: Any) -> None:
        self.encodes += 1
        if self.fails:
            await context.abort(grpc.StatusCode.INTERNAL, "not today")
        for index in range(len(request.pictures)):
            await context.write(pb.EncodeReply(index=index, inline=pb.Inline(rows=self.name.encode())))

    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthReply:
        if self.encodes >= self.ill_after:
            await context.abort(grpc.StatusCode.INTERNAL, "not well")
        return pb.HealthReply(ready=True, offer=pb.Offer(arena=self.name))

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelReply:
        return pb.CancelReply()

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        return pb.StatsReply()


@pytest.fixture
async def moody(tmp_path: Path) -> AsyncIterator[tuple[Moody, Moody, VisionClient]]:
    """Two services, and a client that prefers the first one where they have equally much to do."""
    async with contextlib.AsyncExitStack() as stack:
        services = [Moody("first"), Moody("second")]
        for service in services:
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((handlers(service),))
            server.add_insecure_port(f"unix:{tmp_path}/{service.name}")
            await server.start()
            stack.push_async_callback(server.stop, None)
        urls = [f"unix:{tmp_path}/{service.name}" for service in services]
        client = VisionClient(None, VisionSettings(vision=urls), Engine(), transport="auto", identity=None)
        await client.start()
        stack.push_async_callback(client.close)
        await all_usable(client)
        yield services[0], services[1], client


async def all_usable(client: VisionClient) -> None:
    """Wait until no service has a problem."""
    for _ in range(600):
        if not client.problems:
            return
        await asyncio.sleep(0.05)
    pytest.fail("; ".join(client.problems))


async def encoder_of_a_picture(client: VisionClient) -> str:
    taken: list[Encoded] = []
    await client.encode([PictureTask(b"", 1, 1)], lambda _, encoded: taken.append(encoded))
    [encoded] = taken
    return bytes(encoded.embeddings.rows).decode()  # type: ignore[union-attr]


async def test_one_that_fails_three_times_in_a_row_is_left_out_until_its_health_returns(
    moody: tuple[Moody, Moody, VisionClient],
) -> None:
    first, _, client = moody
    assert await encoder_of_a_picture(client) == "first"
    first.fails, first.ill_after = True, first.encodes + MAX_FAILURES
    for _ in range(MAX_FAILURES):
        # The health it shows lets it be asked again.
        await all_usable(client)
        assert await encoder_of_a_picture(client) == "second"
    asked = first.encodes
    assert asked == 1 + MAX_FAILURES
    for _ in range(3):
        assert await encoder_of_a_picture(client) == "second"
    assert first.encodes == asked
    assert len(client.problems) == 1

    first.fails, first.ill_after = False, 10**9
    await all_usable(client)
    assert await encoder_of_a_picture(client) == "first"


async def test_a_success_between_failures_counts(moody: tuple[Moody, Moody, VisionClient]) -> None:
    first, _, client = moody
    for _ in range(MAX_FAILURES):
        first.fails = True
        assert await encoder_of_a_picture(client) == "second"
        await all_usable(client)
        first.fails = False
        assert await encoder_of_a_picture(client) == "first"


async def test_if_all_fail_the_reasons_are_given(moody: tuple[Moody, Moody, VisionClient]) -> None:
    first, second, client = moody
    first.fails = second.fails = True
    with pytest.raises(Unavailable, match=r"first: internal: not today; .*second: internal: not today") as refusal:
        await encoder_of_a_picture(client)
    assert refusal.value.retry_after
    assert (first.encodes, second.encodes) == (1, 1)
