"""What runs again as a whole: CUDA graphs, and what they have in common with whatever stands in for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

_capturing = threading.Lock()
"""Held during a capture: another one must not wait for the device meanwhile, nor share the generators' state."""


class Recorder(Protocol):
    """Makes something that runs again what has run once."""

    def record(self, run: Callable[[], T], warm_up: Callable[[], object]) -> tuple[Callable[[], None], T]:
        """Return what repeats ``run``, and its result, which every repetition overwrites.

        Before it is recorded, ``warm_up`` has to launch every kernel that it launches.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs. They share their memory, since they run one after another.

    Args:
        device: where.
        stream: the stream, not the default one, that replays them too. What is captured there waits for nothing else on
            the device, and PyTorch keeps the memory it has. Without one, a stream of their own; every capture waits for
            the device then, and gives back what memory nobody uses.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._among_others = stream is not None
        self._stream = torch.cuda.Stream(device) if stream is None else stream

    def record(self, run: Callable[[], T], warm_up: Callable[[], object]) -> tuple[Callable[[], None], T]:
        """Capture what ``run`` launches; it must neither wait for the device nor ask it for anything."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Once outside: kernels are compiled and libraries get their work space at their first use.
            warm_up()
        graph = torch.cuda.CUDAGraph()
        with _capturing, self._capture(graph):
            result = run()
        current.wait_stream(self._stream)
        return graph.replay, result

    @contextmanager
    def _capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Other threads of the process go on with what a capture forbids its own.
        mode = "thread_local"
        if not self._among_others:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                yield
            return
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode=mode)
            try:
                yield
            except BaseException:
                # The capture must end, and the first error says more than what ending it says.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
