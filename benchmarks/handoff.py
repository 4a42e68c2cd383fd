"""How long a picture's embeddings take from an encoder's process to an engine's, by each transport.

    python benchmarks/handoff.py [--device cpu|cuda] [--pictures N] [--json FILE]

The time begins when the encoder has the rows and ends when the engine has its own copy of them: writing, a message over
ZeroMQ (with the handle, or with the rows themselves), reading. The picture has ten slices of 64 rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import zmq

from foveate.config import TransportSettings
from foveate.transport.handle import Embeddings, Offer
from foveate.transport.inline import to_inline
from foveate.transport.local import LocalArena
from foveate.transport.publisher import SharedPublisher
from foveate.transport.sources import Sources

NUM_TOKENS = 640
SIZES = {"demo": (256, torch.float32), "real": (3584, torch.bfloat16)}
WARM_UP = 20


class Task(msgspec.Struct, frozen=True):
    """Publish one picture of a size for a reader; none means inline."""

    size: str
    reader: str


class Done(msgspec.Struct, frozen=True):
    """The picture, and when the encoder had its rows (seconds of the clock that all processes share)."""

    start: float
    embeddings: Embeddings


class Result(NamedTuple):
    """Milliseconds."""

    size: str
    transport: str
    median: float
    p99: float


def picture(size: str, device: torch.device) -> torch.Tensor:
    """Make rows [640, hidden_size] of random numbers."""
    hidden_size, dtype = SIZES[size]
    return torch.randn(NUM_TOKENS, hidden_size).to(device, dtype)


def encode(pipe: Any, folder: str, device_name: str) -> None:
    """Be the encoder's process."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    publisher = SharedPublisher(TransportSettings(), "encoder", f"{folder}/arena.sock", device)
    rows = {size: picture(size, device) for size in SIZES}
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"ipc://{folder}/control.ipc")
    pipe.send_bytes(msgspec.msgpack.encode(publisher.offer))
    while data := socket.recv():
        task = msgspec.msgpack.decode(data, type=Task)
        start = time.clock_gettime(time.CLOCK_MONOTONIC)
        if task.reader:
            embeddings: Embeddings = publisher.publish(rows[task.size], b"", task.reader)
        else:
            embeddings = to_inline(rows[task.size], b"")
        socket.send(msgspec.msgpack.encode(Done(start, embeddings)), copy=False)
    publisher.close()


@contextmanager
def encoder(device: str) -> Iterator[tuple[Offer, zmq.Socket[bytes]]]:
    """Start the encoder's process; yield its offer and the connection to it."""
    context = multiprocessing.get_context("spawn")
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    with tempfile.TemporaryDirectory() as folder, socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"ipc://{folder}/control.ipc")
        here, there = context.Pipe()
        process = context.Process(target=encode, args=(there, folder, device), daemon=True)
        process.start()
        there.close()
        yield msgspec.msgpack.decode(here.recv_bytes(), type=Offer), socket
        socket.send(b"")
        process.join()


def measure(size: str, transport: str, num_pictures: int, once: Callable[[], float]) -> Result:
    """Repeat, and leave out the first ones, which find cold memory."""
    milliseconds = [1000 * once() for _ in range(WARM_UP + num_pictures)][WARM_UP:]
    p99 = statistics.quantiles(milliseconds, n=100)[98]
    return Result(size, transport, round(statistics.median(milliseconds), 3), round(p99, 3))


def measure_shared(
    size: str, transport: str, device: torch.device, num_pictures: int, offer: Offer, socket: Any
) -> Result:
    """Between two processes."""
    sources = Sources(device)
    _, reader = sources.attach(offer, transport)
    decoder = msgspec.msgpack.Decoder(Done)

    def once() -> float:
        socket.send(msgspec.msgpack.encode(Task(size, reader)))
        done = decoder.decode(socket.recv(copy=False).buffer)
        sources.read(done.embeddings)
        end = time.clock_gettime(time.CLOCK_MONOTONIC)
        sources.release(done.embeddings)
        return end - done.start

    result = measure(size, transport, num_pictures, once)
    sources.close()
    return result


def measure_local(size: str, device: torch.device, num_pictures: int) -> Result:
    """Within one process."""
    arena = LocalArena("local", device=device)
    sources = Sources(device, arena)
    rows = picture(size, device)

    def once() -> float:
        start = time.perf_counter()
        handle = arena.publish(rows, b"")
        sources.read(handle)
        end = time.perf_counter()
        sources.release(handle)
        return end - start

    return measure(size, "local", num_pictures, once)


def run(device_name: str, num_pictures: int) -> list[Result]:
    """Measure every size and transport."""
    device = torch.device(device_name)
    transports = ["arena", "cuda-ipc", "inline"] if device.type == "cuda" else ["arena", "inline"]
    results = []
    with encoder(device_name) as (offer, socket):
        for size in SIZES:
            results.append(measure_local(size, device, num_pictures))
            results += [measure_shared(size, one, device, num_pictures, offer, socket) for one in transports]
    return results


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the encoder and the engine are")
    parser.add_argument("--pictures", type=int, default=300, help="how many are measured for each line")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = run(options.device, options.pictures)
    print(f"{'picture':<24}{'transport':<12}{'median ms':>10}{'p99 ms':>10}")
    for result in results:
        hidden_size, dtype = SIZES[result.size]
        shape = f"{result.size}, {NUM_TOKENS * hidden_size * dtype.itemsize / 2**20:.2f} MiB"
        print(f"{shape:<24}{result.transport:<12}{result.median:>10.3f}{result.p99:>10.3f}")
    if options.json:
        document = {"device": options.device, "pictures": options.pictures, "results": [r._asdict() for r in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
