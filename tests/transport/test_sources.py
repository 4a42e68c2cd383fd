"""Which way embeddings take, and what happens to those of encoders that are gone."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from clock import Clock

from foveate.config import TransportSettings
from foveate.errors import EngineError, Unavailable
from foveate.transport.handle import Offer
from foveate.transport.inline import to_inline
from foveate.transport.local import LocalArena
from foveate.transport.publisher import SharedPublisher
from foveate.transport.sources import Sources

Eventually = Callable[[Callable[[], bool]], None]
CPU = torch.device("cpu")
ROWS = torch.arange(12.0).reshape(3, 4)
SETTINGS = TransportSettings(arena_bytes=4 * 4096, arena_block_bytes=4096, lease_seconds=60)


@pytest.fixture
def local() -> LocalArena:
    return LocalArena("local")


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[SharedPublisher]:
    publisher = SharedPublisher(SETTINGS, "encoder", str(tmp_path / "arena.sock"), CPU)
    yield publisher
    publisher.close()


@pytest.fixture
def sources(local: LocalArena, clock: Clock) -> Iterator[Sources]:
    sources = Sources(CPU, local, clock=clock)
    yield sources
    sources.close()


def test_rows_of_the_same_process_are_handed_over(sources: Sources, local: LocalArena) -> None:
    transport, reader = sources.attach(local.offer)
    assert transport == "local"
    handle = local.publish(ROWS, b"", reader)
    assert sources.read(handle) is ROWS
    sources.release(handle)
    sources.release(handle)
    assert local.num_leases == 0


def test_the_same_host_shares_memory(sources: Sources, publisher: SharedPublisher, eventually: Eventually) -> None:
    transport, reader = sources.attach(publisher.offer)
    assert transport == "arena"
    handle = publisher.publish(ROWS, b"", reader)
    assert torch.equal(sources.read(handle), ROWS)
    sources.release(handle)
    sources.release(handle)
    eventually(lambda: publisher.stats()["arena_leases"] == 0)


def test_another_host_sends_bytes(sources: Sources, publisher: SharedPublisher) -> None:
    offer = msgspec.structs.replace(publisher.offer, host="elsewhere")
    assert sources.attach(offer) == ("inline", "")
    embeddings = to_inline(ROWS, b"")
    assert torch.equal(sources.read(embeddings), ROWS)
    sources.release(embeddings)


def test_a_socket_that_cannot_be_reached_means_bytes(
    sources: Sources, publisher: SharedPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    offer = msgspec.structs.replace(publisher.offer, address="/nowhere/arena.sock")
    with caplog.at_level(logging.INFO):
        assert sources.attach(offer) == ("inline", "")
    assert "/nowhere/arena.sock" in caplog.text
    assert "embeddings of encoder come by inline" in caplog.text


@pytest.mark.parametrize(
    ("transport", "change", "words"),
    [
        ("local", {}, "not in the engine's process"),
        ("arena", {"host": "elsewhere"}, "another host"),
        ("arena", {"address": ""}, "shares no memory"),
        ("arena", {"address": "/nowhere"}, "/nowhere"),
        ("cuda-ipc", {"host": "elsewhere"}, "another host"),
        ("cuda-ipc", {}, "engine on cpu"),
        ("cuda-ipc", {"device": "cuda:GPU-1"}, "on cuda:GPU-1 and the engine on cpu"),
        ("pigeon", {}, "no such transport"),
    ],
)
def test_a_forced_transport_that_is_impossible_says_why(
    sources: Sources, publisher: SharedPublisher, transport: str, change: dict[str, str], words: str
) -> None:
    with pytest.raises(Unavailable, match=words):
        sources.attach(msgspec.structs.replace(publisher.offer, **change), transport)
    assert not any(value for key, value in sources.stats().items() if key.startswith("attached"))


@pytest.mark.parametrize("transport", ["arena", "inline"])
def test_a_forced_transport_is_taken(sources: Sources, publisher: SharedPublisher, transport: str) -> None:
    assert sources.attach(publisher.offer, transport)[0] == transport
    assert sources.stats()[f"attached_{transport}"] == 1


def test_a_local_arena_can_be_read_as_bytes_too(sources: Sources, local: LocalArena) -> None:
    assert sources.attach(local.offer, "inline") == ("inline", "")


def test_another_process_s_local_arena_is_not_ours(sources: Sources) -> None:
    offer = Offer(arena="local", address="", host="elsewhere", device="cpu")
    assert sources.attach(offer) == ("inline", "")


def test_attaching_twice_changes_nothing(sources: Sources, publisher: SharedPublisher) -> None:
    first = sources.attach(publisher.offer)
    assert sources.attach(publisher.offer) == sources.attach(publisher.offer, "inline") == first
    assert publisher.stats()["arena_readers"] == 1


def test_several_encoders_are_kept_apart(sources: Sources, publisher: SharedPublisher, local: LocalArena) -> None:
    second = SharedPublisher(SETTINGS, "second", publisher.offer.address + "2", CPU)
    handles = []
    for value, encoder in enumerate((publisher, second, local)):
        _, reader = sources.attach(encoder.offer)
        handles.append(encoder.publish(ROWS + value, b"", reader))
    for value, handle in enumerate(handles):
        assert torch.equal(sources.read(handle), ROWS + value)
    stats = sources.stats()
    assert (stats["attached_arena"], stats["attached_local"], stats["attached_inline"]) == (2, 1, 0)
    assert (stats["reads_arena_total"], stats["reads_local_total"], stats["reads_failed_total"]) == (2, 1, 0)
    second.close()


def test_detaching_ends_leases_and_reading(
    sources: Sources, publisher: SharedPublisher, eventually: Eventually
) -> None:
    _, reader = sources.attach(publisher.offer)
    handle = publisher.publish(ROWS, b"", reader)
    sources.detach("encoder")
    sources.detach("encoder")
    with pytest.raises(Unavailable, match="encoder of a picture is not attached"):
        sources.read(handle)
    sources.release(handle)
    eventually(lambda: publisher.stats()["arena_leases_died_total"] == 1)
    assert sources.stats()["reads_failed_total"] == 1


def test_inline_rows_of_the_wrong_size_are_refused(sources: Sources) -> None:
    with pytest.raises(EngineError, match="48 bytes"):
        sources.read(msgspec.structs.replace(to_inline(ROWS, b""), num_tokens=9))


def test_what_a_dead_encoder_published_can_be_read_until_nobody_can_want_it(
    sources: Sources, publisher: SharedPublisher, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    _, reader = sources.attach(publisher.offer)
    handle = publisher.publish(ROWS, b"", reader)
    publisher.close()
    clock.now = 2
    assert torch.equal(sources.read(handle), ROWS)
    assert "the encoder of encoder is gone" in caplog.text
    assert sources.stats()["attached_arena"] == 0
    clock.now = 62
    assert torch.equal(sources.read(handle), ROWS)
    clock.now = 63.5
    with pytest.raises(Unavailable, match="not attached"):
        sources.read(handle)


def test_attaching_to_a_dead_encoder_keeps_what_it_left(
    sources: Sources, publisher: SharedPublisher, clock: Clock
) -> None:
    _, reader = sources.attach(publisher.offer)
    handle = publisher.publish(ROWS, b"", reader)
    publisher.close()
    with pytest.raises(Unavailable):
        sources.attach(publisher.offer, "arena")
    assert sources.attach(publisher.offer) == ("inline", "")
    assert torch.equal(sources.read(handle), ROWS)
    clock.now = 2
    sources.stats()
    clock.now = 70
    with pytest.raises(Unavailable):
        sources.read(handle)
    assert sources.stats()["attached_inline"] == 1


def test_a_reader_that_was_cut_off_attaches_again(
    sources: Sources, publisher: SharedPublisher, eventually: Eventually
) -> None:
    _, first = sources.attach(publisher.offer)
    old = publisher.publish(ROWS, b"", first)
    (connection,) = sources._readers.values()
    assert connection._socket is not None
    connection._socket.send(b"\xff\xff\xff\xff")  # nonsense, so the lender hangs up
    eventually(lambda: connection.closed)
    transport, second = sources.attach(publisher.offer)
    assert transport == "arena"
    assert second != first
    with pytest.raises(Unavailable, match="given up"):
        sources.read(old)
    assert torch.equal(sources.read(publisher.publish(ROWS, b"", second)), ROWS)
