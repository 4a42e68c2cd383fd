"""The service as a process of its own: from its start to every way in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psutil
import pytest
import torch
from golden_data import EMBEDS_ATOL, GOLDEN, PICTURE_CASES, TINY, picture_names, tensors
from serving import ROOT
from watched import error_of, handle_of, page, thumbnail

from foveate.checkpoint.identity import identity
from foveate.config import EngineSettings, ModelSettings, Settings, TransportSettings, VisionSettings
from foveate.errors import Overloaded, PictureError, Unavailable
from foveate.transport.handle import Offer
from foveate.transport.sources import Sources
from foveate.vision import vision_pb2 as pb
from foveate.vision.process import NICENESS
from foveate.vision.rpc import OPTIONS, Stub

START_SECONDS = 60
STOP_SECONDS = 10


@dataclass
class Running:
    """A process with its folder."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"unix:{self.folder}/vision.sock"

    @property
    def log(self) -> str:
        """Everything it printed."""
        return (self.folder / "log").read_text()

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        return self.process.wait(STOP_SECONDS)


def start(folder: Path, settings: Settings) -> Running:
    (folder / "settings.json").write_text(settings.model_dump_json())
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "foveate.vision.process", str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Running(process, folder)


def settings(model: Path = TINY, **transport: float) -> Settings:
    return Settings(
        model=ModelSettings(model=str(model), device="cpu", dtype="float32", threads=1),
        engine=EngineSettings(),
        vision=VisionSettings(preprocess_threads=1, vision_batch_size=4),
        transport=TransportSettings(**{"arena_bytes": 2**20, "arena_wait_seconds": 30.0} | transport),  # type: ignore[arg-type]
    )


@pytest.fixture
def running(socket_folder: Path) -> Iterator[Running]:
    """A service with an arena of 1 MiB, where a picture of 5 slices takes 320 KiB."""
    made = start(socket_folder, settings())
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def sources() -> Iterator[Sources]:
    """An engine's end."""
    with contextlib.closing(Sources(torch.device("cpu"))) as made:
        yield made


async def offer_of(stub: Stub) -> Offer:
    """Wait until the service answers, and return what it offers."""
    reply = await stub.Health(pb.HealthRequest(), wait_for_ready=True, timeout=START_SECONDS)
    assert reply.ready
    assert reply.identity == identity(TINY, dummy=False)
    return Offer(**{field: getattr(reply.offer, field) for field in Offer.__struct_fields__})


def request(*pictures: bytes, reader: str) -> pb.EncodeRequest:
    return pb.EncodeRequest(
        request_id="r", pictures=[pb.Picture(data=data, max_slice_nums=9) for data in pictures], reader=reader
    )


async def encode(stub: Stub, *pictures: bytes, reader: str) -> list[pb.EncodeReply]:
    replies = [reply async for reply in stub.Encode(request(*pictures, reader=reader), wait_for_ready=True)]
    return sorted(replies, key=lambda reply: reply.index)


async def test_embeddings_through_shared_memory_and_inline_are_the_published_model_s(
    running: Running, sources: Sources
) -> None:
    async with grpc.aio.insecure_channel(running.address, options=OPTIONS) as channel:
        stub = Stub(channel)
        transport, reader = sources.attach(await offer_of(stub))
        assert transport == "arena"
        case = PICTURE_CASES[1]
        files = [(GOLDEN / "assets" / name).read_bytes() for name in picture_names(case)]
        shared = await encode(stub, *files, reader=reader)
        rows = torch.cat([sources.read(handle_of(reply)) for reply in shared])
        inline = b"".join(reply.inline.rows for reply in await encode(stub, *files, reader=""))
        assert rows.numpy().tobytes() == inline
        torch.testing.assert_close(rows, tensors(case)["resampler_out"].flatten(0, 1), atol=EMBEDS_ATOL, rtol=0)
        niceness = os.nice(0)
        assert psutil.Process(running.process.pid).nice() == min(niceness + NICENESS, 19)


async def test_a_full_arena_stops_nobody_else(running: Running, sources: Sources) -> None:
    async with grpc.aio.insecure_channel(running.address, options=OPTIONS) as channel:
        stub = Stub(channel)
        _, reader = sources.attach(await offer_of(stub))
        held = await encode(stub, *(page(number) for number in range(3)), reader=reader)
        waiting = asyncio.create_task(encode(stub, page(10), reader=reader))
        for number in range(20, 23):
            [reply] = await encode(stub, page(number), reader="")
            assert reply.WhichOneof("result") == "inline"
        assert not waiting.done()
        sources.release(handle_of(held[0]))
        [reply] = await waiting
        assert reply.WhichOneof("result") == "handle"


async def test_refusals_of_the_arena_are_errors_of_pictures(socket_folder: Path, sources: Sources) -> None:
    running = start(socket_folder, settings(arena_bytes=2 * 2**16, arena_wait_seconds=0.1))
    try:
        async with grpc.aio.insecure_channel(running.address, options=OPTIONS) as channel:
            stub = Stub(channel)
            _, reader = sources.attach(await offer_of(stub))
            # 5 slices of 64 KiB where there are two blocks: refused from the header, so truncated is no matter.
            [large] = await encode(stub, page(1)[:100], reader=reader)
            error = error_of(large)
            assert isinstance(error, PictureError)
            assert "needs 327680 bytes of embeddings for its 5 slices; at most 131072 can be handed over" in str(error)
            assert (await encode(stub, page(1), reader=""))[0].WhichOneof("result") == "inline"
            replies = await encode(stub, thumbnail(1), thumbnail(2), thumbnail(3), reader=reader)
            [full] = [error_of(reply) for reply in replies if reply.WhichOneof("result") == "error"]
            assert isinstance(full, Overloaded)
            assert full.retry_after
            [unknown] = await encode(stub, thumbnail(1), reader="nobody")
            assert isinstance(error_of(unknown), Unavailable)
    finally:
        running.process.kill()
        running.process.wait()


_CLIENT = """
import sys
import grpc
from foveate.vision import vision_pb2 as pb
channel = grpc.insecure_channel(sys.argv[1])
call = channel.unary_stream("/foveate.vision.v1.Vision/Encode", pb.EncodeRequest.SerializeToString,
                            pb.EncodeReply.FromString)
for reply in call(pb.EncodeRequest.FromString(sys.stdin.buffer.read())):
    print(reply.WhichOneof("result"), flush=True)
"""


async def test_the_work_of_a_client_that_is_killed_is_given_up(running: Running, sources: Sources) -> None:
    async with grpc.aio.insecure_channel(running.address, options=OPTIONS) as channel:
        stub = Stub(channel)
        _, reader = sources.attach(await offer_of(stub))
        with subprocess.Popen(  # noqa: ASYNC220 (it takes no time)
            [sys.executable, "-c", _CLIENT, running.address],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            # More than the arena holds, so that it is never done.
            client.stdin.write(request(*(page(number) for number in range(12)), reader=reader).SerializeToString())
            client.stdin.close()
            assert await asyncio.to_thread(client.stdout.readline) == b"handle\n"
            client.kill()
        for _ in range(600):
            stats = (await stub.Stats(pb.StatsRequest())).values
            if stats["requests_running"] == 0 and stats["slices_running"] == 0:
                break
            await asyncio.sleep(0.05)
        assert (stats["requests_running"], stats["slices_waiting"], stats["pictures_running"]) == (0, 0, 0)
        assert stats["cancelled_pictures_total"] >= 12 - 3
        # What was not received is free again: there is room for one more.
        assert (await stub.Cancel(pb.CancelRequest(request_id="r"))).pictures <= 3
        assert (await encode(stub, page(50), reader=reader))[0].WhichOneof("result") == "handle"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_the_middle_of_work(running: Running, number: signal.Signals) -> None:
    async with grpc.aio.insecure_channel(running.address, options=OPTIONS) as channel:
        stub = Stub(channel)
        await offer_of(stub)
        call = stub.Encode(request(*(page(number) for number in range(60)), reader=""))
        assert (await call.read()).WhichOneof("result") == "inline"
        running.process.send_signal(number)
        assert await asyncio.to_thread(running.wait) == 0, running.log
        call.cancel()
    assert sorted(path.name for path in running.folder.iterdir()) == ["log", "memory-cpu.json", "settings.json"]


def copy_of(folder: Path, **config: object) -> Path:
    model = Path(shutil.copytree(TINY, folder / "model"))
    changed = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(changed))
    return model


def test_a_bad_checkpoint_ends_it(socket_folder: Path) -> None:
    model = copy_of(socket_folder, model_type="llava")
    running = start(socket_folder, settings(model))
    assert running.process.wait(START_SECONDS) == 3
    assert "error: model_type 'llava' is not supported" in running.log
    assert "Traceback" not in running.log


def test_an_impossible_setting_ends_it(socket_folder: Path) -> None:
    impossible = settings()
    vision = impossible.vision.model_copy(update={"vision_device": "cuda:99"})
    running = start(socket_folder, impossible.model_copy(update={"vision": vision}))
    assert running.process.wait(START_SECONDS) == 2
    assert "error: device: cuda:99 is not there" in running.log
    assert "Traceback" not in running.log


def test_it_needs_nothing_of_the_language_model(socket_folder: Path) -> None:
    command = (
        "import sys, foveate.vision.process; print([name for name in sys.modules if name.startswith('foveate.engine')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert done.stdout == b"[]\n"
