"""The vision encoder behind its socket, with the real client."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zmq
from golden_data import GOLDEN, TINY, asset, pixels
from PIL import Image

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.load import load_model
from foveate.config import MediaSettings, Settings, VisionSettings
from foveate.errors import PictureError
from foveate.transport.local import LocalArena
from foveate.vision.client import VisionClient
from foveate.vision.encoder import VisionEncoder
from foveate.vision.service import EmbeddingCache, VisionService

IMAGE1 = (GOLDEN / "assets" / "image1.jpg").read_bytes()


@dataclass
class Bench:
    client: VisionClient
    arena: LocalArena
    encoder: VisionEncoder


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    model = load_model(TINY, torch.device("cpu"), torch.float32)
    return VisionEncoder(model.vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=4)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[VisionClient]:
    made = VisionClient(f"ipc://{tmp_path}/v.ipc")
    await made.start()
    yield made
    await made.close()


@pytest.fixture
def arena() -> LocalArena:
    return LocalArena("test")


@pytest.fixture
def start_service(encoder: VisionEncoder, arena: LocalArena, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A function that starts the service, which ends with the test."""
    settings = Settings(media=MediaSettings(max_image_pixels=2_000_000), vision=VisionSettings(preprocess_threads=2))
    service = VisionService(encoder, arena, ModelAssets.from_folder(TINY).pictures, settings, "tiny")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        thread = threading.Thread(target=service.serve, args=(socket,))

        def start() -> None:
            socket.connect(f"ipc://{tmp_path}/v.ipc")
            thread.start()

        yield start
        service.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def bench(client: VisionClient, arena: LocalArena, encoder: VisionEncoder, start_service: Callable[[], None]) -> Bench:
    start_service()
    return Bench(client, arena, encoder)


async def test_what_is_sent_to_nobody_waits_for_the_next_encoder(
    client: VisionClient, start_service: Callable[[], None]
) -> None:
    waiting = asyncio.create_task(client.encode(IMAGE1, max_slice_nums=1))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    start_service()
    assert (await waiting).handle.num_tokens == 64


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


async def test_the_rows_are_the_encoder_s_own(bench: Bench) -> None:
    encoded = await bench.client.encode(IMAGE1, max_slice_nums=9)
    assert (encoded.handle.num_tokens, encoded.handle.hidden_size) == (5 * 64, 256)
    [expected] = bench.encoder.encode([pixels("image1.jpg")])
    torch.testing.assert_close(bench.arena.read(encoded.handle), expected, atol=1e-5, rtol=0)
    bench.client.release(encoded)
    while bench.arena.num_leases:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_the_same_pixels_are_encoded_once(bench: Bench) -> None:
    first = await bench.client.encode(IMAGE1, max_slice_nums=9)
    again = await bench.client.encode(png(asset("image1.jpg")), max_slice_nums=9)
    other = await bench.client.encode(IMAGE1, max_slice_nums=1)
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert first.handle.digest == again.handle.digest != other.handle.digest
    assert torch.equal(bench.arena.read(first.handle), bench.arena.read(again.handle))
    assert other.handle.num_tokens == 64


async def test_many_at_once_each_get_their_own(bench: Bench) -> None:
    names = ["syn_palette.png", "syn_wide.png", "frame_0.jpg", "syn_rgba.png"] * 3
    data = [(GOLDEN / "assets" / name).read_bytes() for name in names]
    encoded = await asyncio.gather(*(bench.client.encode(file, max_slice_nums=9) for file in data))
    for name, reply in zip(names, encoded, strict=True):
        [expected] = bench.encoder.encode([pixels(name)])
        torch.testing.assert_close(bench.arena.read(reply.handle), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("data", [b"", b"not a picture", IMAGE1[:5000]])
async def test_broken_pictures_are_refused_and_the_next_one_works(bench: Bench, data: bytes) -> None:
    with pytest.raises(PictureError):
        await bench.client.encode(data, max_slice_nums=9)
    await bench.client.encode(png(Image.new("RGB", (20, 20))), max_slice_nums=9)


async def test_too_many_pixels(bench: Bench) -> None:
    with pytest.raises(PictureError, match=r"2000000|2,000,000"):
        await bench.client.encode(png(Image.new("1", (2001, 1000))), max_slice_nums=9)


async def test_heights_that_the_reference_cannot_do(bench: Bench) -> None:
    for size in ((5, 1), (7, 3), (1, 1)):
        encoded = await bench.client.encode(png(Image.new("RGB", size, "red")), max_slice_nums=9)
        assert bench.arena.read(encoded.handle).isfinite().all()


async def test_a_cancelled_request_leaves_nothing_behind(bench: Bench) -> None:
    task = asyncio.create_task(bench.client.encode(IMAGE1, max_slice_nums=9))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    kept = await bench.client.encode(png(Image.new("RGB", (30, 30))), max_slice_nums=9)
    bench.client.release(kept)
    while bench.arena.num_leases:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_the_cache_keeps_to_its_bytes_and_drops_the_oldest() -> None:
    cache = EmbeddingCache(100)
    rows = torch.zeros(10, dtype=torch.float32)  # 40 bytes
    for key in (b"a", b"b"):
        cache.put(key, rows)
    assert cache.get(b"a") is rows
    cache.put(b"c", rows)
    assert cache.get(b"b") is None
    assert cache.get(b"a") is rows
    assert cache.size == 80
    cache.put(b"too large", torch.zeros(26))
    assert cache.size == 80
