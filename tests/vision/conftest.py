"""Fixtures of the vision service's tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest
import torch
from golden_data import TINY
from watched import Service, WatchedEncoder, running

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.load import load_model
from foveate.config import MediaSettings, ModelSettings, Settings, VisionSettings
from foveate.models.minicpmv import VisionTower
from foveate.transport.local import LocalArena
from foveate.vision.rpc import OPTIONS, Stub
from foveate.vision.service import VisionServer


@pytest.fixture(scope="session")
def tower() -> VisionTower:
    torch.set_num_threads(1)
    return load_model(TINY, torch.device("cpu"), torch.float32, part="vision").vision


@pytest.fixture
def encoder(tower: VisionTower) -> Iterator[WatchedEncoder]:
    made = WatchedEncoder(tower)
    yield made
    made.go()


@pytest.fixture
def arena() -> LocalArena:
    return LocalArena("test")


@pytest.fixture
def vision_settings() -> VisionSettings:
    """What the service runs with; a test can replace it."""
    return VisionSettings(preprocess_threads=2, vision_batch_size=4)


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="foveate-test-") as folder:
        yield Path(folder)


@pytest.fixture
async def service(
    encoder: WatchedEncoder, arena: LocalArena, vision_settings: VisionSettings, socket_folder: Path
) -> AsyncIterator[Service]:
    settings = Settings(
        model=ModelSettings(threads=1), media=MediaSettings(max_image_pixels=2_000_000), vision=vision_settings
    )
    server = VisionServer(encoder, arena, ModelAssets.from_folder(TINY).pictures, settings, "tiny")
    path = socket_folder / "v.sock"
    with running(server, f"unix:{path}"):
        async with grpc.aio.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
            yield Service(Stub(channel), channel, server, encoder, arena, path)
        encoder.go()
