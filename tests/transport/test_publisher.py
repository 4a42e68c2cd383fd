"""Publishing, attaching and reading within one process; other files do it with several."""

import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from clock import Clock

from foveate.config import TransportSettings
from foveate.errors import EngineError, InvalidRequest, Overloaded, PictureError, Unavailable
from foveate.transport.cuda_ipc import CudaReader
from foveate.transport.handle import EmbeddingHandle
from foveate.transport.publisher import SharedPublisher
from foveate.transport.reader import MAX_UNSENT_BYTES, ArenaReader, attach
from foveate.transport.wire import CudaExport

Eventually = Callable[[Callable[[], bool]], None]
CPU = torch.device("cpu")
SETTINGS = TransportSettings(arena_bytes=8 * 4096, arena_block_bytes=4096, arena_wait_seconds=0)


@pytest.fixture
def publisher(tmp_path: Path, clock: Clock) -> Iterator[SharedPublisher]:
    publisher = SharedPublisher(SETTINGS, "encoder", str(tmp_path / "arena.sock"), CPU, clock=clock)
    yield publisher
    publisher.close()


@pytest.fixture
def reader(publisher: SharedPublisher) -> Iterator[ArenaReader]:
    reader = attach(publisher.offer.address, "engine", "arena", CPU)
    yield reader
    reader.close()


def rows(value: float = 1.0, num_tokens: int = 4) -> torch.Tensor:
    return torch.arange(num_tokens * 256.0).reshape(num_tokens, 256) + value


def test_the_offer_says_where_and_on_what(publisher: SharedPublisher, tmp_path: Path) -> None:
    offer = publisher.offer
    assert (offer.arena, offer.address, offer.device) == ("encoder", str(tmp_path / "arena.sock"), "cpu")
    assert offer.host == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert publisher.largest == 8 * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_what_was_published(
    publisher: SharedPublisher, reader: ArenaReader, dtype: torch.dtype
) -> None:
    first, second = rows(0.1).to(dtype), rows(0.2, 5).to(dtype).T
    handles = [publisher.publish(tensor, b"digest", "engine") for tensor in (first, second)]
    for handle, tensor in zip(handles, (first, second), strict=True):
        assert (handle.arena, handle.num_tokens, handle.hidden_size) == ("encoder", *tensor.shape)
        assert handle.digest == b"digest"
        read = reader.read(handle)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)
    assert handles[0].offset != handles[1].offset


def test_no_rows_are_published_too(publisher: SharedPublisher, reader: ArenaReader) -> None:
    assert reader.read(publisher.publish(torch.zeros(0, 8), b"", "engine")).shape == (0, 8)


def test_what_was_read_stays_when_the_memory_is_used_again(
    publisher: SharedPublisher, reader: ArenaReader, eventually: Eventually
) -> None:
    read = reader.read(handle := publisher.publish(rows(5), b"", "engine"))
    reader.release(handle)
    eventually(lambda: publisher.stats()["arena_leases"] == 0)
    again = publisher.publish(rows(6), b"", "engine")
    assert again.offset == handle.offset
    assert torch.equal(read, rows(5))
    with pytest.raises(Unavailable):
        reader.read(handle)


def test_readers_release_their_own_leases_and_the_encoder_any(
    publisher: SharedPublisher, reader: ArenaReader, eventually: Eventually
) -> None:
    with_other = attach(publisher.offer.address, "other", "arena", CPU)
    first, second = (publisher.publish(rows(), b"", "engine") for _ in range(2))
    with_other.release(first)
    reader.release(second)
    reader.release(second)
    eventually(lambda: publisher.stats()["arena_leases"] == 1)
    reader.read(first)
    publisher.release(first.lease)
    publisher.release(first.lease)
    assert publisher.stats()["arena_leases_released_total"] == 2
    with_other.close()


def test_a_gone_reader_s_leases_end_and_its_name_is_free(publisher: SharedPublisher, eventually: Eventually) -> None:
    for _ in range(2):
        reader = attach(publisher.offer.address, "engine", "arena", CPU)
        publisher.publish(rows(), b"", "engine")
        reader.close()
        reader.close()
        eventually(lambda: publisher.stats()["arena_readers"] == 0)
    stats = publisher.stats()
    assert (stats["arena_leases"], stats["arena_leases_died_total"], stats["arena_blocks_free"]) == (0, 2, 8)
    with pytest.raises(Unavailable, match="engine"):
        publisher.publish(rows(), b"", "engine")


def test_a_living_reader_s_name_is_taken(publisher: SharedPublisher, reader: ArenaReader) -> None:
    with pytest.raises(InvalidRequest, match="already"):
        attach(publisher.offer.address, "engine", "arena", CPU)
    reader.read(publisher.publish(rows(), b"", "engine"))


def test_leases_end_by_time_without_anybody_asking(tmp_path: Path, eventually: Eventually) -> None:
    settings = SETTINGS.model_copy(update={"lease_seconds": 0.05})
    publisher = SharedPublisher(settings, "encoder", str(tmp_path / "arena.sock"), CPU)
    reader = attach(publisher.offer.address, "engine", "arena", CPU)

    def late(handle: EmbeddingHandle) -> bool:
        try:
            reader.read(handle)
        except Unavailable:
            return True
        return False

    for _ in range(5):  # from the second time on, the lender surely sleeps without an end when the lease begins
        handle = publisher.publish(rows(), b"", "engine")
        eventually(functools.partial(late, handle))
    assert publisher.stats()["arena_leases_expired_total"] == 5
    reader.close()
    publisher.close()


def test_a_stalled_reader_gets_an_error(publisher: SharedPublisher, reader: ArenaReader, clock: Clock) -> None:
    handle = publisher.publish(rows(), b"", "engine")
    clock.now = 60
    assert publisher.stats()["arena_leases_expired_total"] == 1
    with pytest.raises(Unavailable, match="given up") as error:
        reader.read(handle)
    assert error.value.retry_after == 1


def test_a_full_arena_and_a_picture_too_large_are_told_apart(publisher: SharedPublisher, reader: ArenaReader) -> None:
    publisher.publish(rows(num_tokens=32), b"", "engine")
    with pytest.raises(Overloaded):
        publisher.publish(rows(), b"", "engine")
    with pytest.raises(PictureError):
        publisher.publish(rows(num_tokens=33), b"", "engine")
    assert publisher.stats()["arena_refusals_total"] == 1


@pytest.mark.usefixtures("reader")
def test_tensors_that_are_no_rows_are_refused(publisher: SharedPublisher) -> None:
    with pytest.raises(EngineError):
        publisher.publish(torch.zeros(4, dtype=torch.float64), b"", "engine")


@pytest.mark.usefixtures("reader")
def test_failed_writing_loses_no_block(publisher: SharedPublisher) -> None:
    class Failing(torch.Tensor):
        def numpy(self, *, force: bool = False) -> object:
            raise MemoryError

    with pytest.raises(MemoryError):
        publisher.publish(rows().as_subclass(Failing), b"", "engine")
    assert publisher.stats()["arena_blocks_free"] == 8


def test_handles_that_make_no_sense_are_refused(publisher: SharedPublisher, reader: ArenaReader) -> None:
    handle = publisher.publish(rows(), b"", "engine")
    for change in ({"offset": 9}, {"generation": 2**64 - 1}, {"num_tokens": 5}, {"num_tokens": 2**40}, {"offset": 1}):
        with pytest.raises(Unavailable):
            reader.read(msgspec.structs.replace(handle, **change))
    for change in ({"dtype": "int8"}, {"num_tokens": -1}):
        with pytest.raises(EngineError):
            reader.read(msgspec.structs.replace(handle, **change))


def test_gpu_memory_is_refused_by_an_encoder_that_has_none(publisher: SharedPublisher) -> None:
    with pytest.raises(Unavailable, match="no GPU memory"):
        attach(publisher.offer.address, "engine", "cuda-ipc", CPU)
    assert publisher.stats()["arena_readers"] == 0


def test_after_closing_the_rest_can_be_read_and_nothing_is_published(
    publisher: SharedPublisher, reader: ArenaReader
) -> None:
    handle = publisher.publish(rows(3), b"", "engine")
    assert not reader.closed
    publisher.close()
    publisher.close()
    assert reader.closed
    assert torch.equal(reader.read(handle), rows(3))
    reader.release(handle)
    with pytest.raises(Unavailable):
        publisher.publish(rows(), b"", "engine")
    publisher.release(handle.lease)
    assert publisher.stats()["arena_leases"] == 0
    reader.close()
    with pytest.raises(Unavailable, match="not attached"):
        reader.read(handle)


def test_attaching_where_nobody_listens_says_where(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"nobody\.sock"):
        attach(str(tmp_path / "nobody.sock"), "engine", "arena", CPU)


def test_releasing_never_waits_for_an_encoder_that_does_not_listen(
    publisher: SharedPublisher, reader: ArenaReader, eventually: Eventually
) -> None:
    handle = publisher.publish(rows(), b"", "engine")
    stop, stopped = threading.Event(), threading.Event()
    in_time: list[bool] = []
    give_back = publisher.give_back

    def stall(name: str, lease: int) -> None:
        stopped.set()
        in_time.append(stop.wait(20))
        stop.set()
        give_back(name, lease)

    publisher.give_back = stall  # type: ignore[method-assign]
    other = EmbeddingHandle(
        arena="encoder", offset=0, generation=1, num_tokens=1, hidden_size=1, dtype="float32", digest=b"", lease=2**62
    )
    reader.release(other)
    assert stopped.wait(60)
    num_releases = 2 * MAX_UNSENT_BYTES // 20
    for _ in range(num_releases):
        reader.release(other)
    stop.set()
    publisher.give_back = give_back  # type: ignore[method-assign]

    def released() -> bool:
        reader.release(handle)
        return publisher.stats()["arena_leases"] == 0

    eventually(released)
    assert in_time[0]


def test_attaching_and_detaching_leaves_no_descriptor(tmp_path: Path, eventually: Eventually) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # What earlier tests left may go now, and not while descriptors are counted.
    before = descriptors()
    publisher = SharedPublisher(SETTINGS, "encoder", str(tmp_path / "arena.sock"), CPU)
    started = descriptors()
    for number in range(50):
        reader = attach(publisher.offer.address, f"engine {number}", "arena", CPU)
        publisher.publish(rows(), b"", f"engine {number}")
        reader.close()
        with pytest.raises(Unavailable):
            attach(publisher.offer.address, "engine", "cuda-ipc", CPU)
    del reader
    eventually(lambda: descriptors() <= started)
    assert publisher.stats()["arena_blocks_free"] == 8
    publisher.close()
    del publisher
    assert descriptors() == before


def test_a_gpu_memory_handle_of_another_size_is_refused() -> None:
    with pytest.raises(Unavailable, match="5 bytes"):
        CudaReader(CudaExport(memory=b"short", event=b""), 4096, torch.device("cuda", 0))
