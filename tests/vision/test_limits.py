"""Places, rooms and leases, each alone."""

from __future__ import annotations

import asyncio

import pytest
import torch

from foveate.errors import ConfigError, Overloaded
from foveate.vision.address import TcpAddress, UnixAddress, parse_address
from foveate.vision.cache import EmbeddingCache
from foveate.vision.leases import Leases
from foveate.vision.limits import Admission, Window


async def test_places_go_to_those_who_came_first() -> None:
    admission, order = Admission(1, 10), list[int]()

    async def work(number: int) -> None:
        async with admission.place(1):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(number) for number in range(5)))
    assert order == list(range(5))
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_request_that_finds_a_place_may_be_larger_than_the_queue() -> None:
    admission = Admission(1, 2)
    async with admission.place(64):
        with pytest.raises(Overloaded):
            async with admission.place(3):
                pass
    async with admission.place(64):
        assert admission.refused == 1


async def test_a_window_lets_one_that_is_too_large_go_alone() -> None:
    window, entered = Window(4), list[int]()

    async def enter() -> None:
        for slices in (3, 10, 4, 1):
            await window.acquire(slices)
            entered.append(slices)

    task = asyncio.create_task(enter())
    for before, freed in (([3], 3), ([3, 10], 10), ([3, 10, 4], 4)):
        await asyncio.sleep(0.01)
        assert entered == before
        window.release(freed)
    await task


def test_leases_are_kept_as_long_as_they_can_last() -> None:
    now = 0.0
    leases = Leases(10, clock=lambda: now)
    leases.keep("a", [1, 2])
    leases.keep("b", [])
    leases.keep("a", [3])
    assert len(leases) == 1
    assert leases.take("a") == [1, 2, 3]
    assert leases.take("a") == []
    leases.keep("c", [4])
    now = 5.0
    leases.keep("d", [5])
    now = 11.0
    leases.keep("e", [])
    assert (leases.take("c"), leases.take("d")) == ([], [5])


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
    assert (cache.size, len(cache)) == (80, 2)


@pytest.mark.parametrize("text", ["unix:/run/v.sock", "unix:v.sock", "127.0.0.1:1", "[::1]:65535", "gpu-7.lan:50051"])
def test_an_address_is_written_as_it_is_read(text: str) -> None:
    address = parse_address(text)
    assert str(address) == text
    assert isinstance(address, UnixAddress) is text.startswith("unix:")


def test_loopback() -> None:
    assert all(TcpAddress(host, 1).is_loopback for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(TcpAddress(host, 1).is_loopback for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.org"))


@pytest.mark.parametrize("text", ["", "unix:", "host", ":1", "a b:1", "host:", "host:x", "[::1]", "http://host:1"])
def test_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="expected unix:PATH"):
        parse_address(text)
