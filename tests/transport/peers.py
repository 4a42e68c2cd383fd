"""What the other processes of these tests do: encoders and engines that can be killed."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from foveate.config import TransportSettings
from foveate.errors import FoveateError
from foveate.transport.inline import to_inline
from foveate.transport.memory import Reader
from foveate.transport.publisher import SharedPublisher
from foveate.transport.reader import attach

CPU = torch.device("cpu")
HIDDEN_SIZE = 1024


def rows_of(seed: int, num_tokens: int) -> torch.Tensor:
    """Rows of which no other seed has even one element."""
    return (torch.arange(num_tokens * HIDDEN_SIZE) % 8 + 8 * seed).float().reshape(num_tokens, HIDDEN_SIZE)


def start(target: Any, *args: Any) -> tuple[BaseProcess, Connection]:
    """Start a process with its end of a pipe, and wait until it says that it is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *args), daemon=True)
    process.start()
    there.close()
    if not here.poll(120):
        raise TimeoutError("a process did not start")
    assert here.recv() == "ready"
    return process, here


class Stalling:
    """An engine's memory that sometimes stops in the middle of a copy, longer than a lease lasts."""

    def __init__(self, memory: Reader, seconds: float, seed: int) -> None:
        self.outlives_writer = memory.outlives_writer
        self.copied: torch.Tensor | None = None
        self._memory = memory
        self._seconds = seconds
        self._random = random.Random(seed)

    def copy(self, start: int, num_bytes: int) -> torch.Tensor:
        half = num_bytes // 2
        first = self._memory.copy(start, half)
        if self._random.random() < 0.15:
            time.sleep(self._seconds * self._random.uniform(1, 3))
        self.copied = torch.cat([first, self._memory.copy(start + half, num_bytes - half)])
        return self.copied

    def close(self) -> None:
        self._memory.close()


def stalling_engine(pipe: Connection, address: str, name: str, stall_seconds: float) -> None:
    """Read what the pipe names, and answer each time what came of it.

    The answers: ``ok``; ``late`` (refused before the copy); ``stalled`` (refused after it, though the bytes were still
    the right ones); ``torn`` (refused after it, and some bytes were somebody else's); ``wrong`` (not refused and not
    its own bytes, which must never be).
    """
    torch.set_num_threads(1)
    reader = attach(address, name, "arena", CPU)
    stalling = Stalling(reader.memory, stall_seconds, len(name))
    reader.memory = stalling
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        handle, seed, releases = task
        expected = rows_of(seed, handle.num_tokens)
        stalling.copied = None
        try:
            rows = reader.read(handle)
            result = "ok" if torch.equal(rows, expected) else "wrong"
        except FoveateError:
            result = "late"
            if stalling.copied is not None:
                same = torch.equal(stalling.copied, expected.view(-1).view(torch.uint8))
                result = "stalled" if same else "torn"
        if releases:
            reader.release(handle)
        pipe.send(result)
    reader.close()


def idle_engine(pipe: Connection, address: str, name: str) -> None:
    """Attach and do nothing."""
    reader = attach(address, name, "arena", CPU)
    pipe.send("ready")
    pipe.recv()
    reader.close()


def encoder(pipe: Connection, address: str, name: str, settings: TransportSettings, device: str) -> None:
    """Publish the rows that the pipe asks for: (seed, num_tokens, dtype, reader), inline ones for no reader."""
    torch.set_num_threads(1)
    publisher = SharedPublisher(settings, name, address, torch.device(device))
    pipe.send("ready")
    pipe.send(publisher.offer)
    while (task := pipe.recv()) is not None:
        if task == "stats":
            pipe.send(publisher.stats())
            continue
        seed, num_tokens, dtype, reader = task
        rows = rows_of(seed, num_tokens).to(device, getattr(torch, dtype))
        pipe.send(publisher.publish(rows, b"", reader) if reader else to_inline(rows, b""))
    publisher.close()
