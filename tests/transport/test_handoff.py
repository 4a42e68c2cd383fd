"""The hand-off between real processes: under pressure, and when they are killed."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from peers import CPU, HIDDEN_SIZE, encoder, idle_engine, rows_of, stalling_engine, start

from foveate.config import TransportSettings
from foveate.errors import Overloaded, Unavailable
from foveate.transport.publisher import SharedPublisher
from foveate.transport.sources import Sources

Eventually = Callable[[Callable[[], bool]], None]
SETTINGS = TransportSettings(arena_bytes=8 * 4096, arena_block_bytes=4096, arena_wait_seconds=0)
LEASE_SECONDS = 0.03
MOST_PICTURES = 20_000


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_readers_that_stall_get_their_own_bytes_or_an_error(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"lease_seconds": LEASE_SECONDS, "arena_wait_seconds": 60})
    publisher = SharedPublisher(settings, "encoder", str(tmp_path / "arena.sock"), CPU)
    names = [f"engine {'i' * number}" for number in range(1, 4)]
    peers = {name: start(stalling_engine, publisher.offer.address, name, LEASE_SECONDS) for name in names}
    pipes = {pipe: name for name, (_, pipe) in peers.items()}
    results: Counter[str] = Counter()
    idle = list(pipes)
    for seed in range(MOST_PICTURES):
        if not idle:
            idle = list(wait(list(pipes), 60))
            results.update(pipe.recv() for pipe in idle)
            assert results["wrong"] == 0
        pipe = idle.pop()
        num_tokens = seed % 3 + 1
        handle = publisher.publish(rows_of(seed, num_tokens), b"", pipes[pipe])
        pipe.send((handle, seed, seed % 4 > 0))
        if results["torn"] >= 5 and results["ok"] >= 300:
            break
    for process, pipe in peers.values():
        pipe.send(None)
        while process.is_alive():
            process.join(0.01)
            while pipe.poll():
                try:
                    results[pipe.recv()] += 1
                except EOFError:
                    break
    assert results["wrong"] == 0
    assert results["torn"] >= 5
    assert results["ok"] >= 300
    stats = publisher.stats()
    assert sum(results.values()) == stats["arena_published_total"]
    assert (stats["arena_leases"], stats["arena_blocks_longest_free"]) == (0, 8)
    publisher.close()


def test_a_killed_engine_s_leases_end_at_once(tmp_path: Path, eventually: Eventually) -> None:
    publisher = SharedPublisher(SETTINGS, "encoder", str(tmp_path / "arena.sock"), CPU)
    process, _ = start(idle_engine, publisher.offer.address, "engine")
    for seed in range(2):
        publisher.publish(rows_of(seed, 4), b"", "engine")
    with pytest.raises(Overloaded):
        publisher.publish(rows_of(0, 1), b"", "engine")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: publisher.stats()["arena_leases"] == 0)
    stats = publisher.stats()
    assert (stats["arena_leases_died_total"], stats["arena_readers"], stats["arena_blocks_free"]) == (2, 0, 8)
    with pytest.raises(Unavailable):
        publisher.publish(rows_of(0, 1), b"", "engine")
    process.join()
    publisher.close()


def test_a_killed_encoder_leaves_nothing_but_what_it_published(tmp_path: Path, eventually: Eventually) -> None:
    before = shared_memory()
    address = str(tmp_path / "arena.sock")
    process, pipe = start(encoder, address, "first", SETTINGS, "cpu")
    offer = pipe.recv()
    sources = Sources(CPU)
    transport, reader = sources.attach(offer)
    assert transport == "arena"
    pipe.send((7, 3, "bfloat16", reader))
    handle = pipe.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert shared_memory() == before
    eventually(lambda: sources.stats()["attached_arena"] == 0)
    assert torch.equal(sources.read(handle), rows_of(7, 3).bfloat16())
    sources.release(handle)
    sources.release(handle)

    # The next one takes its place, and the engine reads from both.
    process, pipe = start(encoder, address, "second", SETTINGS, "cpu")
    transport, reader = sources.attach(pipe.recv())
    assert transport == "arena"
    pipe.send((8, 2, "float32", reader))
    assert torch.equal(sources.read(pipe.recv()), rows_of(8, 2))
    assert torch.equal(sources.read(handle), rows_of(7, 3).bfloat16())
    pipe.send(None)
    process.join()
    sources.close()
    assert not os.path.exists(address)
    assert shared_memory() == before


def test_all_ways_give_the_same_bits(tmp_path: Path) -> None:
    process, pipe = start(encoder, str(tmp_path / "arena.sock"), "encoder", TransportSettings(), "cpu")
    sources = Sources(CPU)
    _, reader = sources.attach(pipe.recv())
    for dtype in ("float32", "bfloat16", "float16"):
        for to in (reader, ""):
            pipe.send((3, 5, dtype, to))
            rows = sources.read(pipe.recv())
            assert rows.shape == (5, HIDDEN_SIZE)
            assert torch.equal(rows, rows_of(3, 5).to(getattr(torch, dtype)))
    pipe.send(None)
    process.join()
    sources.close()
