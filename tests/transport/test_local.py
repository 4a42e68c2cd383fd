"""Leases on embeddings of the same process."""

import pytest
import torch
from clock import Clock

from foveate.errors import EngineError, Unavailable
from foveate.transport.handle import EmbeddingSource, Publisher
from foveate.transport.inline import to_inline
from foveate.transport.local import LocalArena


@pytest.fixture
def arena(clock: Clock) -> LocalArena:
    return LocalArena("here", lease_seconds=10, clock=clock)


def test_a_reader_gets_what_was_published(arena: LocalArena) -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    handle = arena.publish(rows, b"digest")
    assert (handle.num_tokens, handle.hidden_size, handle.dtype, handle.digest) == (3, 2, "float32", b"digest")
    assert torch.equal(arena.read(handle), rows)


def test_a_released_lease_is_over_and_releasing_again_is_nothing(arena: LocalArena) -> None:
    first, second = (arena.publish(torch.zeros(1, 1), b"") for _ in range(2))
    arena.release(first)
    arena.release(first)
    with pytest.raises(Unavailable):
        arena.read(first)
    assert arena.num_leases == 1
    arena.read(second)


def test_the_encoder_releases_by_number(arena: LocalArena) -> None:
    handle = arena.publish(torch.zeros(1, 1), b"")
    arena.release(handle.lease)
    arena.release(handle.lease)
    assert arena.num_leases == 0
    assert arena.stats()["local_leases_released_total"] == 1


def test_a_late_reader_gets_an_error_and_the_memory_comes_back(arena: LocalArena, clock: Clock) -> None:
    handle = arena.publish(torch.zeros(1, 1), b"")
    clock.now = 10.5
    with pytest.raises(Unavailable):
        arena.read(handle)
    arena.publish(torch.zeros(1, 1), b"")
    assert arena.num_leases == 1
    assert arena.stats()["local_leases_expired_total"] == 1


def test_another_arena_s_handle_is_refused(arena: LocalArena) -> None:
    other = LocalArena("there").publish(torch.zeros(1, 1), b"")
    arena.publish(torch.ones(1, 1), b"")
    with pytest.raises(Unavailable):
        arena.read(other)
    arena.release(other)
    assert arena.num_leases == 1


def test_inline_rows_are_not_its_own(arena: LocalArena) -> None:
    arena.publish(torch.ones(1, 1), b"")
    embeddings = to_inline(torch.ones(1, 1), b"")
    with pytest.raises(Unavailable):
        arena.read(embeddings)
    arena.release(embeddings)
    assert arena.num_leases == 1


def test_what_is_no_row_is_refused(arena: LocalArena) -> None:
    with pytest.raises(EngineError):
        arena.publish(torch.zeros(3), b"")


def test_it_is_both_ends(arena: LocalArena) -> None:
    publisher: Publisher = arena
    source: EmbeddingSource = arena
    handle = publisher.publish(torch.ones(1, 1), b"", "local")
    assert (publisher.offer.arena, publisher.offer.address, publisher.offer.device) == ("here", "", "cpu")
    assert source.read(handle).nbytes < publisher.largest
    publisher.close()
