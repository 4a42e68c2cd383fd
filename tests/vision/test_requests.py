"""Requests side by side: shared work, turns, limits, and what becomes of those who hang up. Over gRPC."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc.aio
import pytest
import torch
from golden_data import GOLDEN, TINY
from watched import READER, Service, WatchedEncoder, error_of, page, rows_of, thumbnail

from foveate.chat.assets import ModelAssets
from foveate.config import Settings, VisionSettings
from foveate.transport.handle import EmbeddingHandle
from foveate.transport.local import LocalArena
from foveate.vision import vision_pb2 as pb
from foveate.vision.call import Call
from foveate.vision.pipeline import Pipeline

IMAGE1 = (GOLDEN / "assets" / "image1.jpg").read_bytes()
STAGES = ("decode", "slice", "queue", "encode", "write")


async def test_ten_requests_with_one_picture_cost_one_encode(service: Service, arena: LocalArena) -> None:
    service.encoder.hold()
    requests = [asyncio.create_task(service.encode(page(1))) for _ in range(10)]
    await service.until(lambda stats: stats["shared_total"] == 9)
    service.encoder.go()
    answers = await asyncio.gather(*requests)
    # 1 + 4 slices, 4 in a step.
    assert sum(len(step) for step in service.encoder.steps) == 5
    first, *others = [rows_of(reply, arena) for [reply] in answers]
    assert all(torch.equal(rows, first) for rows in others)
    assert len({reply.handle.lease for [reply] in answers}) == 10
    assert (await service.until(lambda stats: stats["shares"] == 0))["cache_misses_total"] == 1


@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "begun"])
async def test_a_share_survives_who_came_first(service: Service, begun: bool) -> None:
    service.encoder.hold()
    if not begun:
        # Something else is in the encoder.
        blocking = asyncio.create_task(service.encode(thumbnail()))
        await service.until(lambda stats: stats["slices_running"] == 1)
    first = service.stub.Encode(service.request(page(1)))
    await service.until(lambda stats: (stats["slices_running"] == 4) if begun else (stats["slices_waiting"] == 5))
    second = asyncio.create_task(service.encode(page(1)))
    await service.until(lambda stats: stats["shared_total"] == 1)
    first.cancel()
    await service.until(lambda stats: stats["cancelled_pictures_total"] == 1)
    service.encoder.go()
    [reply] = await second
    assert reply.WhichOneof("result") == "handle"
    assert sum(len(step) for step in service.encoder.steps) == 5 + (not begun)
    if not begun:
        await blocking


async def test_a_client_that_hangs_up_cancels_what_has_not_begun(service: Service, arena: LocalArena) -> None:
    service.encoder.hold()
    call = service.stub.Encode(service.request(*(page(number) for number in range(6))))
    await service.until(lambda stats: stats["slices_running"] == 4 and stats["slices_waiting"] > 0)
    call.cancel()
    await service.until(lambda stats: stats["cancelled_pictures_total"] == 6 and stats["slices_waiting"] == 0)
    service.encoder.go()
    stats = await service.until(lambda stats: stats["slices_running"] == 0)
    assert (stats["slices_total"], stats["shares"], stats["requests_running"]) == (4, 0, 0)
    assert arena.num_leases == 0


async def test_what_is_in_the_encoder_when_a_client_hangs_up_is_kept_for_the_next_one(service: Service) -> None:
    service.encoder.hold()
    call = service.stub.Encode(service.request(thumbnail()))
    await service.until(lambda stats: stats["slices_running"] == 1)
    call.cancel()
    await service.until(lambda stats: stats["requests_running"] == 0)
    again = asyncio.create_task(service.encode(thumbnail()))
    await service.until(lambda stats: stats["shared_total"] == 1)
    service.encoder.go()
    assert (await again)[0].WhichOneof("result") == "handle"
    assert len(service.encoder.steps) == 1


async def test_leases_that_the_client_did_not_receive_are_ended(service: Service, arena: LocalArena) -> None:
    service.encoder.hold()
    call = service.stub.Encode(service.request(thumbnail(1), thumbnail(2)))
    await service.until(lambda stats: stats["slices_running"] == 1)
    service.encoder.let()
    assert (await call.read()).WhichOneof("result") == "handle"
    call.cancel()
    await service.until(lambda stats: stats["requests_running"] == 0)
    service.encoder.go()
    await service.until(lambda stats: stats["slices_running"] == 0)
    # The first one was received: it is the client's to give back.
    assert arena.num_leases == 1


class HeldArena(LocalArena):
    """An arena in which publishing takes until it is let."""

    def __init__(self) -> None:
        super().__init__("held")
        self.let = threading.Event()

    def publish(self, rows: torch.Tensor, digest: bytes, reader: str = READER) -> EmbeddingHandle:
        """Publish when it is let."""
        assert self.let.wait(60)
        return super().publish(rows, digest, reader)


class TestHeldArena:
    @pytest.fixture
    def arena(self) -> HeldArena:
        return HeldArena()

    async def test_what_is_published_too_late_is_given_back(self, service: Service, arena: HeldArena) -> None:
        call = service.stub.Encode(service.request(thumbnail()))
        await service.until(lambda stats: stats["cache_entries"] == 1 and stats["shares"] == 0)
        call.cancel()
        await service.until(lambda stats: stats["requests_running"] == 0)
        arena.let.set()
        await service.until(lambda stats: stats["local_published_total"] == 1 and stats["local_leases"] == 0)

    async def test_waiting_for_the_arena_holds_up_nobody_else(self, service: Service, arena: HeldArena) -> None:
        waiting = asyncio.create_task(service.encode(thumbnail(1)))
        await service.until(lambda stats: stats["cache_entries"] == 1)
        for picture in (thumbnail(1), thumbnail(2)):
            assert (await service.encode(picture, reader=""))[0].WhichOneof("result") == "inline"
        assert not waiting.done()
        arena.let.set()
        assert (await waiting)[0].timings.write > 0


class Deaf:
    """A gRPC context whose client reads nothing, so that no write ends."""

    def __init__(self) -> None:
        self.writing = asyncio.Event()

    async def write(self, message: pb.EncodeReply) -> None:
        """Wait for ever."""
        self.writing.set()
        await asyncio.Event().wait()


async def test_what_could_not_be_sent_is_given_back(encoder: WatchedEncoder, arena: LocalArena) -> None:
    pipeline = Pipeline(encoder, ModelAssets.from_folder(TINY).pictures, Settings(), "tiny", 10_000)
    pipeline.start(lambda: None)
    request = pb.EncodeRequest(pictures=[pb.Picture(data=thumbnail(), max_slice_nums=9)], reader=READER)
    with ThreadPoolExecutor(1) as publishing:
        context = Deaf()
        call = Call(request, context, pipeline, arena, publishing)
        task = asyncio.create_task(call.run())
        await context.writing.wait()
        assert arena.num_leases == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.close() == []
    assert arena.num_leases == 0
    assert pipeline.stop(10)


async def test_cancel_gives_up_what_waits_and_gives_back_what_was_given(service: Service, arena: LocalArena) -> None:
    service.encoder.hold()
    call = service.stub.Encode(service.request(thumbnail(1), page(2), page(3), name="mine"))
    await service.until(lambda stats: stats["slices_running"] > 0)
    other = asyncio.create_task(service.encode(thumbnail(4)))
    service.encoder.let()
    first = await call.read()
    assert first.WhichOneof("result") == "handle"
    assert (await service.stub.Cancel(pb.CancelRequest(request_id="mine"))).pictures == 3
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    assert arena.num_leases == 0
    service.encoder.go()
    assert len(await other) == 1
    assert (await service.stub.Cancel(pb.CancelRequest(request_id="mine"))).pictures == 0


async def test_cancel_gives_back_the_leases_of_a_request_that_is_answered(service: Service, arena: LocalArena) -> None:
    request = service.request(thumbnail(1), thumbnail(2), name="done")
    assert len([reply async for reply in service.stub.Encode(request)]) == 2
    assert arena.num_leases == 2
    assert (await service.stub.Cancel(pb.CancelRequest(request_id="other"))).pictures == 0
    assert (await service.stub.Cancel(pb.CancelRequest(request_id="done"))).pictures == 2
    assert arena.num_leases == 0


async def test_a_document_does_not_block_a_thumbnail(service: Service) -> None:
    service.encoder.hold()
    document = asyncio.create_task(service.encode(*(page(number) for number in range(20))))
    # As many pages as it may have ahead, of which one is in the encoder.
    await service.until(lambda stats: stats["slices_running"] == 4 and stats["slices_waiting"] == 4 * 5 - 4)
    small = asyncio.create_task(service.encode(thumbnail()))
    await service.until(lambda stats: stats["slices_waiting"] == 4 * 5 - 4 + 1)
    service.encoder.let(2)
    await asyncio.wait_for(small, 30)
    assert not document.done()
    service.encoder.go()
    assert len(await document) == 20


class TestLimits:
    @pytest.fixture
    def vision_settings(self) -> VisionSettings:
        return VisionSettings(preprocess_threads=1, vision_batch_size=4, max_concurrency=2, max_vision_queue=3)

    async def test_requests_wait_in_a_queue_with_an_end(self, service: Service) -> None:
        service.encoder.hold()
        requests = [asyncio.create_task(service.encode(thumbnail(number))) for number in range(3)]
        await service.until(lambda stats: stats["requests_running"] == 2 and stats["pictures_waiting"] == 1)
        # Two pictures may still wait, three may not.
        refused = await service.encode(*(thumbnail(number) for number in range(10, 13)))
        assert len(refused) == 3
        for reply in refused:
            error = error_of(reply)
            assert (error.code, error.status, error.retry_after) == ("overloaded", 503, 1.0)
            assert "1 pictures wait" in error.message
        requests.append(asyncio.create_task(service.encode(thumbnail(20), thumbnail(21))))
        stats = await service.until(lambda stats: stats["pictures_waiting"] == 3)
        assert (stats["requests_running"], stats["refused_requests_total"]) == (2, 1)
        service.encoder.go()
        answers = await asyncio.gather(*requests)
        assert [len(replies) for replies in answers] == [1, 1, 1, 2]
        assert all(reply.WhichOneof("result") == "handle" for replies in answers for reply in replies)

    async def test_who_gives_up_waiting_makes_room(self, service: Service) -> None:
        service.encoder.hold()
        running = [asyncio.create_task(service.encode(thumbnail(number))) for number in range(2)]
        await service.until(lambda stats: stats["requests_running"] == 2)
        waiting = service.stub.Encode(service.request(*(thumbnail(number) for number in range(5, 8))))
        await service.until(lambda stats: stats["pictures_waiting"] == 3)
        waiting.cancel()
        await service.until(lambda stats: stats["pictures_waiting"] == 0)
        service.encoder.go()
        await asyncio.gather(*running)
