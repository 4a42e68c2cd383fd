"""What a client of the vision service gets: replies, errors, refusals. Over gRPC, with the real encoder."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import grpc.aio
import pytest
import torch
from golden_data import EMBEDS_ATOL, GOLDEN, PICTURE_CASES, TINY, picture_names, pixels, tensors
from PIL import Image
from watched import READER, Service, WatchedEncoder, error_of, file, page, png, rows_of, running, thumbnail

from foveate.chat.assets import ModelAssets
from foveate.config import Settings, VisionSettings
from foveate.errors import PictureError, Unavailable
from foveate.kernels import memory
from foveate.transport.local import LocalArena
from foveate.vision import vision_pb2 as pb
from foveate.vision.rpc import Stub
from foveate.vision.service import VisionServer

IMAGE1 = (GOLDEN / "assets" / "image1.jpg").read_bytes()
STAGES = ("decode", "slice", "queue", "encode", "write")


@pytest.mark.parametrize("reader", [READER, ""], ids=["handle", "inline"])
@pytest.mark.parametrize("case", PICTURE_CASES)
async def test_embeddings_are_those_of_the_published_model(
    service: Service, arena: LocalArena, case: str, reader: str
) -> None:
    replies = await service.encode(*(file(name) for name in picture_names(case)), reader=reader)
    rows = torch.cat([rows_of(reply, arena) for reply in replies])
    golden = tensors(case)["resampler_out"].flatten(0, 1)
    torch.testing.assert_close(rows, golden, atol=EMBEDS_ATOL, rtol=0)


async def test_handle_and_inline_rows_are_the_same_bits(service: Service, arena: LocalArena) -> None:
    [given] = await service.encode(IMAGE1)
    [inline] = await service.encode(IMAGE1, reader="")
    assert torch.equal(rows_of(given, arena), rows_of(inline, arena))
    assert (given.handle.num_tokens, given.handle.hidden_size, given.handle.dtype) == (5 * 64, 256, "float32")
    assert given.handle.digest == inline.inline.digest


async def test_the_same_file_is_encoded_once(service: Service) -> None:
    [first] = await service.encode(IMAGE1)
    # Who comes before the rows are in the cache shares them as well, but that is counted elsewhere.
    await service.until(lambda stats: stats["shares"] == 0)
    [again] = await service.encode(IMAGE1)
    [other] = await service.encode((IMAGE1, 1))
    await service.until(lambda stats: stats["shares"] == 0)
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert first.handle.digest == again.handle.digest != other.handle.digest
    assert other.handle.num_tokens == 64
    stats = await service.stats()
    assert (stats["cache_hits_total"], stats["cache_misses_total"], stats["cache_entries"]) == (1, 2, 2)
    assert stats["cache_bytes"] == (5 + 1) * 64 * 256 * 4


async def test_times_of_each_stage(service: Service) -> None:
    [fresh], [known] = await service.encode(page(1)), await service.encode(page(1))
    assert all(getattr(fresh.timings, stage) > 0 for stage in STAGES)
    assert known.timings.decode > 0
    assert (known.timings.slice, known.timings.encode) == (0, 0)
    stats = await service.stats()
    for stage in STAGES:
        both = getattr(fresh.timings, stage) + getattr(known.timings, stage)
        assert stats[f"{stage}_seconds_total"] == pytest.approx(both)


async def test_many_requests_at_once_each_get_their_own(service: Service, arena: LocalArena) -> None:
    names = ["syn_palette.png", "syn_wide.png", "frame_0.jpg", "syn_rgba.png"] * 3
    answers = await asyncio.gather(*(service.encode(file(name)) for name in names))
    for name, [reply] in zip(names, answers, strict=True):
        [expected] = service.encoder.encode([pixels(name)])
        torch.testing.assert_close(rows_of(reply, arena), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("data", [b"", b"not a picture", IMAGE1[:5000]], ids=["empty", "text", "truncated"])
async def test_a_broken_picture_is_an_error_and_the_others_of_its_request_are_not(
    service: Service, data: bytes
) -> None:
    good, broken, thin = await service.encode(thumbnail(), data, png(Image.new("RGB", (5, 1))))
    assert isinstance(error_of(broken), PictureError)
    assert broken.index == 1
    assert {good.WhichOneof("result"), thin.WhichOneof("result")} == {"handle"}
    assert (await service.stats())["failed_pictures_total"] == 1


@pytest.mark.parametrize("slices", [0, 10])
async def test_more_slices_than_the_model_knows(service: Service, slices: int) -> None:
    [reply] = await service.encode((IMAGE1, slices))
    assert error_of(reply).status == 400
    assert f"max_slice_nums is {slices}; for this model it is from 1 to 9" in error_of(reply).message


async def test_what_cannot_fit_is_refused_from_its_header(service: Service) -> None:
    large = png(Image.new("1", (2001, 1000)))
    # Steps of 4 slices have memory for 4 · 33 · 34 patches, and this one slice would be of one row of 7142.
    long = png(Image.new("1", (100_000, 1)))
    replies = await service.encode(large, (long, 1), (long[:60], 1))
    messages = [error_of(reply).message for reply in replies]
    assert "2001×1000 pixels, more than the 2000000 allowed" in messages[0]
    assert "the picture of 100000×1 pixels needs 7143 patches" in messages[1]
    assert "in one slice; this encoder has memory for 4488" in messages[1]
    # Its pixels are missing, but that is not what is wrong first: the header is enough.
    assert messages[2] == messages[1]
    assert service.encoder.steps == []


async def test_equal_slices_are_neighbours_in_a_step(service: Service) -> None:
    service.encoder.hold()
    first = asyncio.create_task(service.encode(thumbnail(1)))
    await asyncio.to_thread(service.encoder.reached.acquire)
    # However long their preparation takes, all of these are there when the next step is put together.
    others = asyncio.create_task(service.encode(file("syn_wide.png"), file("image1.jpg"), thumbnail()))
    await service.until(lambda stats: stats["slices_waiting"] == 7)
    service.encoder.go()
    await asyncio.gather(first, others)
    assert any(len(set(step)) > 1 for step in service.encoder.steps)
    assert all(step == sorted(step) and len(step) <= 4 for step in service.encoder.steps)


class TestSmallCache:
    @pytest.fixture
    def vision_settings(self) -> VisionSettings:
        return VisionSettings(preprocess_threads=1, embedding_cache_bytes=2 * 64 * 256 * 4)

    async def test_the_least_recently_used_go_first(self, service: Service) -> None:
        for number, cached in ((1, False), (2, False), (1, True), (3, False), (1, True), (2, False)):
            [reply] = await service.encode(thumbnail(number))
            assert reply.cached is cached
            await service.until(lambda stats: stats["shares"] == 0)
        assert (await service.stats())["cache_bytes"] == 2 * 64 * 256 * 4


async def test_a_failed_step_is_its_pictures_error_only(service: Service) -> None:
    service.encoder.failure = RuntimeError("no such luck")
    [failed] = await service.encode(page(1))
    assert error_of(failed).code == "engine_error"
    service.encoder.failure = torch.OutOfMemoryError("CUDA out of memory")
    [refused] = await service.encode(page(2))
    assert (error_of(refused).code, error_of(refused).retry_after) == ("overloaded", 1)
    service.encoder.failure = None
    [again] = await service.encode(page(1))
    assert (again.WhichOneof("result"), again.cached) == ("handle", False)
    assert (await service.stats())["failed_batches_total"] == 2
    assert (await service.stub.Health(pb.HealthRequest())).ready


async def test_an_idle_service_gives_free_memory_back(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(memory, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(memory, "trim_heap", trimmed.set)
    [reply] = await service.encode(thumbnail(1))
    assert reply.WhichOneof("result") == "handle"
    assert await asyncio.to_thread(trimmed.wait, 60)
    [reply] = await service.encode(thumbnail(2))
    assert reply.WhichOneof("result") == "handle"


async def test_a_broken_device_ends_the_service(
    encoder: WatchedEncoder, arena: LocalArena, socket_folder: Path
) -> None:
    server = VisionServer(encoder, arena, ModelAssets.from_folder(TINY).pictures, Settings(), "tiny")
    address = f"unix:{socket_folder}/v.sock"
    encoder.failure = torch.AcceleratorError("an illegal memory access was encountered")
    with running(server, address) as thread:
        async with grpc.aio.insecure_channel(address) as channel:
            broken = Service(Stub(channel), channel, server, encoder, arena, socket_folder)
            [reply] = await broken.encode(thumbnail())
            assert isinstance(error_of(reply), Unavailable)
        thread.join()
    assert isinstance(thread.error, Unavailable)
    assert "illegal memory access" in str(thread.error)


async def test_health_says_what_this_is(service: Service) -> None:
    reply = await service.stub.Health(pb.HealthRequest())
    assert (reply.ready, reply.identity, reply.device, reply.dtype) == (True, "tiny", "cpu", "float32")
    assert (reply.hidden_size, reply.offer.arena, reply.offer.device) == (256, "test", "cpu")
    assert reply.version
