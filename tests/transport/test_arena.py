"""The writer's end of shared memory: room, leases, refusals."""

import fcntl
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
from clock import Clock

from foveate.errors import Overloaded, PictureError, Unavailable
from foveate.transport.arena import Allocation, Arena
from foveate.transport.layout import Layout
from foveate.transport.view import ArenaView

BLOCK = 4096
LAYOUT = Layout(block_bytes=BLOCK, num_blocks=4)


@pytest.fixture
def arena(clock: Clock) -> Arena:
    arena = Arena("test", LAYOUT, lease_seconds=10, wait_seconds=0, clock=clock)
    arena.add_reader("engine")
    return arena


def fill(arena: Arena, allocation: Allocation, value: int) -> None:
    start = allocation.start * BLOCK
    arena.data[start : start + allocation.num_bytes] = value


def publish(arena: Arena, num_bytes: int, value: int = 1, reader: str = "engine") -> tuple[Allocation, int]:
    allocation = arena.allocate(num_bytes, reader)
    fill(arena, allocation, value)
    return allocation, arena.publish(allocation)


def check(view: ArenaView, allocation: Allocation) -> None:
    view.check(allocation.start, allocation.num_bytes, allocation.generation)


def test_a_reader_finds_what_was_published_and_not_before(arena: Arena) -> None:
    view = ArenaView(arena.fd, LAYOUT)
    allocation = arena.allocate(2 * BLOCK - 5, "engine")
    fill(arena, allocation, 7)
    with pytest.raises(Unavailable):
        check(view, allocation)
    arena.publish(allocation)
    check(view, allocation)
    start = allocation.start * BLOCK
    assert (view.data[start : start + allocation.num_bytes] == 7).all()


def test_readers_can_neither_write_nor_resize(arena: Arena) -> None:
    view = ArenaView(arena.fd, LAYOUT)
    assert not view.data.flags.writeable
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, LAYOUT.file_bytes)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(arena.fd, 0)
    assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    # The same user may open the file again, but not to write to it.
    again = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(again, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(again, 0)
    os.close(again)


@pytest.mark.parametrize("sealed", [False, True])
def test_memory_that_could_kill_its_reader_is_not_mapped(sealed: bool) -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LAYOUT.file_bytes - (4096 if sealed else 0))
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(Unavailable, match="layout" if sealed else "sealed"):
        ArenaView(fd, LAYOUT)
    os.close(fd)


def test_released_blocks_are_used_again_and_the_late_reader_notices(arena: Arena) -> None:
    view = ArenaView(arena.fd, LAYOUT)
    first, lease = publish(arena, 4 * BLOCK)
    check(view, first)
    arena.release(lease)
    with pytest.raises(Unavailable, match="given up"):
        check(view, first)
    second, _ = publish(arena, 4 * BLOCK)
    assert second.start == first.start
    with pytest.raises(Unavailable, match="given up"):
        check(view, first)
    check(view, second)


def test_a_handle_that_reaches_beyond_its_own_blocks_is_refused(arena: Arena) -> None:
    view = ArenaView(arena.fd, LAYOUT)
    first, _ = publish(arena, BLOCK)
    publish(arena, BLOCK)
    with pytest.raises(Unavailable):
        view.check(first.start, 2 * BLOCK, first.generation)


@pytest.mark.parametrize(
    ("start", "num_bytes", "generation"),
    [
        (-1, 1, 1),
        (4, 1, 1),
        (3, 2 * BLOCK, 1),
        (0, 5 * BLOCK, 1),
        (2**63, 1, 1),
        (0, 2**80, 1),
        (0, 1, -1),
        (0, 1, 2**63),
    ],
)
def test_a_handle_that_was_never_valid_is_refused(arena: Arena, start: int, num_bytes: int, generation: int) -> None:
    view = ArenaView(arena.fd, LAYOUT)
    publish(arena, BLOCK)
    with pytest.raises(Unavailable, match="4 blocks"):
        view.check(start, num_bytes, generation)


def test_a_full_arena_refuses_and_says_when_to_come_again(arena: Arena) -> None:
    publish(arena, 3 * BLOCK)
    with pytest.raises(Overloaded, match="no room") as refusal:
        arena.allocate(2 * BLOCK, "engine")
    assert refusal.value.retry_after == 1
    assert arena.stats()["refusals_total"] == 1
    publish(arena, BLOCK)


def test_a_picture_larger_than_the_arena_is_refused_at_once(arena: Arena) -> None:
    with pytest.raises(PictureError, match=str(4 * BLOCK)):
        arena.allocate(4 * BLOCK + 1, "engine")


def test_leases_end_by_time_oldest_first(arena: Arena, clock: Clock) -> None:
    assert arena.expire() is None
    publish(arena, BLOCK)
    clock.now += 4
    publish(arena, BLOCK)
    assert arena.expire() == 6
    clock.now += 6
    assert arena.expire() == 4
    assert (arena.stats()["leases"], arena.stats()["leases_expired_total"]) == (1, 1)
    clock.now += 4
    publish(arena, 4 * BLOCK)  # makes room by itself
    assert arena.stats()["leases_expired_total"] == 2


def test_a_dead_reader_s_leases_end_and_others_stay(arena: Arena) -> None:
    arena.add_reader("other")
    publish(arena, BLOCK)
    publish(arena, BLOCK, reader="other")
    arena.remove_reader("engine")
    arena.remove_reader("engine")
    stats = arena.stats()
    assert (stats["leases"], stats["leases_died_total"], stats["blocks_free"], stats["readers"]) == (1, 1, 3, 1)
    with pytest.raises(Unavailable, match="engine"):
        arena.allocate(1, "engine")


@pytest.mark.parametrize("comes_back", [False, True])
def test_what_is_written_for_a_reader_that_dies_is_not_lost(arena: Arena, comes_back: bool) -> None:
    allocation = arena.allocate(BLOCK, "engine")
    arena.remove_reader("engine")
    if comes_back:
        arena.add_reader("engine")  # another one, with the same name
    with pytest.raises(Unavailable, match="engine"):
        arena.publish(allocation)
    assert arena.stats()["blocks_free"] == 4


def test_failed_writing_gives_the_blocks_back_once(arena: Arena) -> None:
    allocation = arena.allocate(BLOCK, "engine")
    assert arena.stats()["blocks_writing"] == 1
    arena.abandon(allocation)
    arena.abandon(allocation)
    assert (arena.stats()["blocks_free"], arena.stats()["blocks_writing"]) == (4, 0)


def test_a_lease_ends_once_and_only_for_its_own_reader(arena: Arena) -> None:
    arena.add_reader("other")
    _, lease = publish(arena, BLOCK)
    arena.release(lease, "other")
    assert arena.stats()["leases"] == 1
    arena.release(lease, "engine")
    arena.release(lease, "engine")
    assert (arena.stats()["leases"], arena.stats()["leases_released_total"]) == (0, 1)


def test_two_living_readers_never_share_a_name(arena: Arena) -> None:
    with pytest.raises(Unavailable, match="already"):
        arena.add_reader("engine")


def waiting(arena: Arena, num_bytes: int) -> tuple[threading.Thread, list[object]]:
    """Start to allocate in a thread."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(arena.allocate(num_bytes, "engine"))
        except (Overloaded, Unavailable) as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


@pytest.mark.parametrize("end", ["release", "death", "time", "close"])
def test_who_waits_for_room_is_woken(end: str) -> None:
    arena = Arena("test", LAYOUT, lease_seconds=0.2 if end == "time" else 600, wait_seconds=600)
    arena.add_reader("engine")
    arena.add_reader("other")
    _, lease = publish(arena, 4 * BLOCK, reader="other")
    thread, results = waiting(arena, BLOCK)
    actions: dict[str, Callable[[], None]] = {
        "release": lambda: arena.release(lease),
        "death": lambda: arena.remove_reader("other"),
        "time": lambda: None,
        "close": arena.close,
    }
    actions[end]()
    thread.join(20)
    assert [type(result) for result in results] == [Unavailable if end == "close" else Allocation]


def test_who_waits_on_behalf_of_a_dead_reader_gives_up() -> None:
    arena = Arena("test", LAYOUT, lease_seconds=600, wait_seconds=600)
    arena.add_reader("engine")
    arena.add_reader("other")
    publish(arena, 4 * BLOCK, reader="other")
    thread, results = waiting(arena, BLOCK)
    arena.remove_reader("engine")
    thread.join(20)
    assert isinstance(results[0], Unavailable)
    assert arena.stats()["refusals_total"] == 0


def test_waiting_is_bounded() -> None:
    arena = Arena("test", LAYOUT, lease_seconds=600, wait_seconds=0.05)
    arena.add_reader("engine")
    publish(arena, 4 * BLOCK)
    with pytest.raises(Overloaded):
        arena.allocate(1, "engine")


def test_a_closed_arena_allocates_nothing_and_stays_readable(arena: Arena) -> None:
    view = ArenaView(arena.fd, LAYOUT)
    published, lease = publish(arena, BLOCK, 9)
    unfinished = arena.allocate(BLOCK, "engine")
    arena.close()
    arena.close()
    with pytest.raises(Unavailable):
        arena.allocate(1, "engine")
    with pytest.raises(Unavailable):
        arena.publish(unfinished)
    arena.release(lease)
    arena.remove_reader("engine")
    check(view, published)
    assert (view.data[published.start * BLOCK :][:BLOCK] == 9).all()


def test_many_threads_lose_no_block() -> None:
    arena = Arena("test", LAYOUT, lease_seconds=600, wait_seconds=60)
    view = ArenaView(arena.fd, LAYOUT)
    wrong: list[int] = []

    def work(number: int) -> None:
        arena.add_reader(f"engine {number}")
        for value in range(100):
            allocation, lease = publish(arena, (value % 4 + 1) * BLOCK, number, f"engine {number}")
            check(view, allocation)
            start = allocation.start * BLOCK
            if not np.array_equal(
                view.data[start : start + allocation.num_bytes], np.full(allocation.num_bytes, number)
            ):
                wrong.append(value)
            arena.release(lease)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = arena.stats()
    assert (stats["blocks_longest_free"], stats["leases_released_total"], stats["published_total"]) == (4, 400, 400)
