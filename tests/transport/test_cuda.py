"""The hand-off where a GPU is: pinned shared memory, the GPU's own memory, bytes; always the same bits."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import CPU, encoder, rows_of, start

from foveate.config import TransportSettings
from foveate.errors import Unavailable
from foveate.transport.handle import Offer
from foveate.transport.identity import device_id
from foveate.transport.publisher import SharedPublisher
from foveate.transport.reader import attach
from foveate.transport.sources import Sources

pytestmark = pytest.mark.gpu
Eventually = Callable[[Callable[[], bool]], None]
SETTINGS = TransportSettings(arena_bytes=64 * 2**20, arena_wait_seconds=0)
DTYPES = ("float32", "bfloat16", "float16")
CUDA = "cuda:0"


@dataclass
class Encoder:
    """An encoder in a process of its own."""

    process: BaseProcess
    pipe: Connection
    offer: Offer

    def ask(self, seed: int, num_tokens: int, dtype: str, reader: str) -> Any:
        self.pipe.send((seed, num_tokens, dtype, reader))
        assert self.pipe.poll(60)
        return self.pipe.recv()

    def stats(self) -> dict[str, float]:
        self.pipe.send("stats")
        return self.pipe.recv()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(60)
        self.pipe.close()


@pytest.fixture
def start_encoder(tmp_path: Path) -> Iterator[Callable[..., Encoder]]:
    started: list[Encoder] = []

    def start_one(device: str = CUDA, settings: TransportSettings = SETTINGS) -> Encoder:
        number = len(started)
        address = str(tmp_path / f"arena{number}.sock")
        process, pipe = start(encoder, address, f"encoder {number}", settings, device)
        started.append(Encoder(process, pipe, pipe.recv()))
        return started[-1]

    yield start_one
    for one in started:
        one.stop()


@pytest.fixture
def sources() -> Iterator[Sources]:
    sources = Sources(torch.device(CUDA))
    yield sources
    sources.close()
    torch.cuda.synchronize()


@pytest.mark.parametrize("device", [CUDA, "cpu"])
@pytest.mark.parametrize("transport", ["arena", "cuda-ipc", "inline"])
def test_all_ways_give_the_same_bits(
    sources: Sources, start_encoder: Callable[..., Encoder], transport: str, device: str
) -> None:
    if (device, transport) == ("cpu", "cuda-ipc"):
        pytest.skip("an encoder on the CPU has no GPU memory")
    one = start_encoder(device)
    assert one.offer.device == device_id(torch.device(device))
    got, reader = sources.attach(one.offer, transport)
    assert got == transport
    for seed, num_tokens in enumerate((1, 640, 64, 5)):
        for dtype in DTYPES:
            embeddings = one.ask(seed, num_tokens, dtype, reader)
            rows = sources.read(embeddings)
            assert rows.device == torch.device(CUDA)
            assert torch.equal(rows.cpu(), rows_of(seed, num_tokens).to(getattr(torch, dtype)))
            sources.release(embeddings)


def test_a_shared_gpu_is_found_by_itself(sources: Sources, start_encoder: Callable[..., Encoder]) -> None:
    assert sources.attach(start_encoder().offer)[0] == "cuda-ipc"
    assert sources.attach(start_encoder("cpu").offer)[0] == "arena"
    on_cpu = Sources(CPU)
    one = start_encoder()
    transport, reader = on_cpu.attach(one.offer)
    assert transport == "arena"
    assert torch.equal(on_cpu.read(one.ask(3, 10, "bfloat16", reader)), rows_of(3, 10).bfloat16())
    on_cpu.close()


def test_memory_is_pinned_once(start_encoder: Callable[..., Encoder], caplog: pytest.LogCaptureFixture) -> None:
    reader = attach(start_encoder().offer.address, "engine", "arena", torch.device(CUDA))
    pinned = "not pinned" not in caplog.text
    print(f"the engine's read-only mapping is {'pinned' if pinned else 'not pinned: ' + caplog.text}")
    # Pinned or not, a refusal by CUDA leaves no error behind for the next kernel.
    assert torch.ones(4, device=CUDA).sum().item() == 4
    reader.close()


@pytest.mark.parametrize("transport", ["arena", "cuda-ipc"])
def test_rows_stay_when_the_memory_is_used_again(
    sources: Sources, start_encoder: Callable[..., Encoder], transport: str, eventually: Eventually
) -> None:
    one = start_encoder()
    _, reader = sources.attach(one.offer, transport)
    key = transport.replace("-", "_")
    kept, handles = [], []
    for seed in range(20):
        handle = one.ask(seed, 640, "bfloat16", reader)
        kept.append(sources.read(handle))
        sources.release(handle)
        handles.append(handle)
        eventually(lambda: one.stats()[f"{key}_leases"] == 0)
    assert len({handle.offset for handle in handles}) == 1
    for seed, rows in enumerate(kept):
        assert torch.equal(rows.cpu(), rows_of(seed, 640).bfloat16())
    for handle in handles:
        with pytest.raises(Unavailable, match="given up"):
            sources.read(handle)


@pytest.mark.parametrize("transport", ["arena", "cuda-ipc"])
def test_a_lease_that_ends_by_time_is_an_error(
    sources: Sources, start_encoder: Callable[..., Encoder], transport: str, eventually: Eventually
) -> None:
    one = start_encoder(CUDA, SETTINGS.model_copy(update={"lease_seconds": 0.2}))
    _, reader = sources.attach(one.offer, transport)
    handle = one.ask(1, 640, "float32", reader)
    eventually(lambda: one.stats()[f"{transport.replace('-', '_')}_leases_expired_total"] == 1)
    with pytest.raises(Unavailable, match="given up"):
        sources.read(handle)


def test_a_dead_encoder_s_shared_memory_can_be_read(sources: Sources, start_encoder: Callable[..., Encoder]) -> None:
    one = start_encoder()
    _, reader = sources.attach(one.offer, "arena")
    handle = one.ask(5, 640, "bfloat16", reader)
    one.kill()
    assert torch.equal(sources.read(handle).cpu(), rows_of(5, 640).bfloat16())


def test_a_dead_encoder_s_gpu_memory_is_an_error_and_the_engine_goes_on(
    sources: Sources, start_encoder: Callable[..., Encoder]
) -> None:
    one = start_encoder()
    _, reader = sources.attach(one.offer, "cuda-ipc")
    read, unread = (one.ask(seed, 640, "bfloat16", reader) for seed in (5, 6))
    rows = sources.read(read)
    one.kill()
    with pytest.raises(Unavailable, match="went with the encoder"):
        sources.read(unread)
    sources.release(unread)
    assert torch.equal(rows.cpu(), rows_of(5, 640).bfloat16())
    another = start_encoder()
    _, reader = sources.attach(another.offer, "cuda-ipc")
    assert torch.equal(sources.read(another.ask(7, 64, "float32", reader)).cpu(), rows_of(7, 64))


def test_detaching_ends_leases_and_unmaps(
    sources: Sources, start_encoder: Callable[..., Encoder], eventually: Eventually
) -> None:
    one = start_encoder()
    for _ in range(5):
        transport, reader = sources.attach(one.offer)
        assert transport == "cuda-ipc"
        handle = one.ask(2, 640, "bfloat16", reader)
        assert torch.equal(sources.read(handle).cpu(), rows_of(2, 640).bfloat16())
        sources.detach(one.offer.arena)
        eventually(lambda: one.stats()["cuda_ipc_readers"] == 0)
    stats = one.stats()
    assert (stats["cuda_ipc_leases"], stats["cuda_ipc_leases_died_total"]) == (0, 5)


def test_memory_for_an_engine_beside_is_taken_at_once(tmp_path: Path) -> None:
    publishers = [
        SharedPublisher(SETTINGS, name, str(tmp_path / name), torch.device(CUDA), shares_gpu=shares)
        for name, shares in (("late", False), ("early", True))
    ]
    late, early = (publisher.stats() for publisher in publishers)
    for publisher in publishers:
        publisher.close()
    assert "cuda_ipc_blocks" not in late
    assert early["cuda_ipc_blocks"] == early["cuda_ipc_blocks_free"] > 0
