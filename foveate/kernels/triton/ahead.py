"""Compiles kernels before they are needed, on all cores at once.

Triton compiles a kernel when it is first launched, one after the other: some forty variants of a quantized model take
half a minute. Here a dry run first notes what would be launched, a process of its own compiles all of that in parallel,
and the first real launch finds it in Triton's cache on the disk. If any of this fails, kernels are compiled as usual.

That process is a fork, made before there is anything on the device: a new one would import PyTorch again, which takes
as long as compiling does where the disk is slow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key

logger = logging.getLogger(__name__)

Job = dict[str, str]
"""A kernel's ``module`` and ``name``, and its ``variant``, which is Triton's own description."""

_MAX_PROCESSES = 32


@contextmanager
def noted() -> Iterator[list[Job]]:
    """Note the kernels that are launched and not compiled yet, instead of compiling and running them."""
    jobs: dict[str, Job] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        variant = compile["specialization_data"]
        jobs[fn.name + variant] = {"module": fn.module, "name": fn.name, "variant": variant}
        return True

    found: list[Job] = []
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        yield found
    found += jobs.values()


class Compiler:
    """A process that compiles. To be made before anything else runs on the device or in threads: it is a fork."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._child = os.fork()
        if self._child == 0:
            ours.close()
            _run(theirs)
        theirs.close()
        self._wire = ours.makefile("rw")
        ours.close()
        # What is launched here needs it, too.
        threading.Thread(target=triton_key, name="triton-key", daemon=True).start()

    def compile(self, run: Callable[[], object]) -> int:
        """Compile what ``run`` launches, which is called once, without its kernels having any effect.

        Returns:
            the number of variants that were compiled
        """
        try:
            with noted() as jobs:
                run()
            target = triton.runtime.driver.active.get_current_target()
            order = {"target": [target.backend, target.arch, target.warp_size], "jobs": jobs}
            self._wire.write(json.dumps(order) + "\n")
            self._wire.flush()
            return int(self._wire.readline())
        except Exception as error:  # noqa: BLE001 - nothing depends on it; what is really wrong will be seen again
            logger.warning("kernels are compiled when they are needed: %s", error)
            return 0

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._wire.close()
        if self._child:
            os.waitpid(self._child, 0)
            self._child = 0


@dataclass(frozen=True)
class _Target:
    """As much of a device's driver as compiling needs."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0


def _compile_all(jobs: list[Job]) -> int:
    """Compile in as many processes as there are cores; return how many jobs succeeded."""
    count = min(len(jobs), len(os.sched_getaffinity(0)), _MAX_PROCESSES)
    reader, writer = os.pipe()
    children = []
    for first in range(count):
        # This process has no other threads, and no device.
        child = os.fork()
        if child == 0:
            for job in jobs[first::count]:
                os.write(writer, b"." if _compile(job) else b"!")
            os._exit(0)
        children.append(child)
    os.close(writer)
    with os.fdopen(reader, "rb") as marks:
        succeeded = marks.read().count(b".")
    for child in children:
        os.waitpid(child, 0)
    return succeeded


def _compile(job: Job) -> bool:
    try:
        kernel = getattr(import_module(job["module"]), job["name"])
        kernel.preload(job["variant"])
    except Exception as error:  # noqa: BLE001 - whatever it is, the real launch will say it
        print(f"{job['name']}: {error}", file=sys.stderr)
        return False
    return True


def _run(wire: socket.socket) -> NoReturn:
    """Be the process that compiles: read orders, a line of JSON each, and answer each with a number."""
    try:
        # Once for all of those who compile: it is a hash of Triton's library, which is large.
        triton_key()
        with wire.makefile("rw") as lines:
            for line in lines:
                order = json.loads(line)
                triton.runtime.driver.set_active(_Target(GPUTarget(*order["target"])))
                for job in order["jobs"]:
                    import_module(job["module"])
                lines.write(f"{_compile_all(order['jobs'])}\n")
                lines.flush()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other side goes on without
        print(f"compiling ahead: {error}", file=sys.stderr, flush=True)
    # Nothing of the process that this is a copy of is to be ended by it.
    os._exit(0)
