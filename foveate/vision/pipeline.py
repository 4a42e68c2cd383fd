"""From a picture's file to its embeddings: decode and cut in a pool, encode together what waits together.

Threads, and what each one owns: the event loop owns requests, the batcher and every decision; a pool decodes and cuts;
one thread runs the model, a step at a time. They hand work on by queues and by callbacks of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from foveate.chat.pieces import PictureSettings
from foveate.config import Settings
from foveate.errors import EngineError, FoveateError, InvalidRequest, PictureError, Unavailable
from foveate.kernels.memory import is_out_of_memory, make_room, wait_idly
from foveate.media.image import decode, probe
from foveate.media.slicing import SlicePlan, plan_slices
from foveate.vision.batcher import Batcher
from foveate.vision.cache import EmbeddingCache
from foveate.vision.digest import digest
from foveate.vision.encoder import VisionEncoder, slices_of
from foveate.vision.prepare import cut
from foveate.vision.sharing import Embedded, Share, Shares, Timings, Waiter

logger = logging.getLogger(__name__)

Step = list[tuple[Share, int]]


class Pipeline:
    """Encodes the pictures of all requests. All methods but :meth:`stop` are for the thread of the event loop.

    Args:
        encoder: the model.
        pictures: how the checkpoint cuts pictures.
        settings: limits.
        name: of the encoder in every digest; see :func:`foveate.vision.digest.encoder_name`.
        max_patches: patches of the largest step that is ever run.
    """

    def __init__(
        self, encoder: VisionEncoder, pictures: PictureSettings, settings: Settings, name: str, max_patches: int
    ) -> None:
        self.failure: FoveateError | None = None
        """Why the encoder is beyond repair, if it is."""
        self.window_slices = 2 * max(settings.vision.vision_batch_size, pictures.max_slice_nums + 1)
        """Slices of one request that are worked on: while one step is encoded, the next one is prepared."""
        self._encoder = encoder
        self._pictures = pictures
        self._settings = settings
        self._name = name
        self._cores = len(os.sched_getaffinity(0))
        self._cache = EmbeddingCache(settings.vision.embedding_cache_bytes)
        self._shares = Shares(self._cache)
        self._batcher: Batcher[Share] = Batcher(
            settings.vision.vision_batch_size, max_patches, usual_patches=encoder.step_patches
        )
        self._counts: Counter[str] = Counter()
        self._seconds = Timings()
        self._last_batch = 0
        self._running: Step = []
        # None ends the thread that reads it.
        self._steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        threads = settings.vision.preprocess_threads or self._cores
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")
        self._thread = threading.Thread(target=self._encode_steps, name="encode", daemon=True)

    def start(self, on_failure: Callable[[], None]) -> None:
        """Begin to encode; ``on_failure`` is called when the encoder is beyond repair."""
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._thread.start()

    def stop(self, deadline_seconds: float) -> bool:
        """End all threads, as soon as what they are in the middle of is done; say whether they made it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._steps.put(None)
        self._thread.join(deadline_seconds)
        return not self._thread.is_alive()

    async def plan(self, files: Sequence[tuple[bytes, int]], largest: int | None) -> list[SlicePlan | FoveateError]:
        """Plan pictures from their headers, or say why one is refused, before anything is decoded.

        Args:
            files: each picture's file, and most slices beside the whole picture.
            largest: bytes of embeddings that can be handed over, if there is a limit.
        """

        def plan_or_error(data: bytes, max_slice_nums: int) -> SlicePlan | FoveateError:
            try:
                return self._plan(data, max_slice_nums, largest)
            except FoveateError as error:
                return error

        # In the pool: a header can be made to take long to read.
        return await self._loop.run_in_executor(self._pool, lambda: [plan_or_error(*file) for file in files])

    async def embed(self, request: Hashable, data: bytes, plan: SlicePlan, *, arrived: float) -> Embedded:
        """Encode a picture, or find that it was; cancelling the task gives up what has not begun.

        Args:
            request: whose turn it is; the pictures of one request are encoded in order.
            data: the picture's file.
            plan: what :meth:`plan` said.
            arrived: when the request came, on the monotonic clock.

        Raises:
            PictureError: the picture is broken.
            EngineError, Unavailable: the encoder failed.
        """
        if self.failure is not None:
            raise self.failure
        waiter = Waiter(request, self._loop.create_future(), arrived=arrived)
        preparing = self._pool.submit(self._prepare, waiter, data, plan)
        try:
            rows = await waiter.rows
        finally:
            preparing.cancel()
            self._shares.leave(waiter)
            self._unqueue(waiter)
        return Embedded(rows, waiter.digest, waiter.cached, waiter.timings)

    def stats(self) -> dict[str, float]:
        """Numbers for monitoring; those that end in ``_total`` only grow."""
        counts, steps = self._counts, self._counts["batches"]
        return {
            "slices_waiting": self._batcher.num_slices,
            "slices_running": len(self._running),
            "shares": len(self._shares),
            "cache_bytes": self._cache.size,
            "cache_capacity_bytes": self._cache.capacity,
            "cache_entries": len(self._cache),
            "cache_hits_total": self._shares.hits,
            "cache_misses_total": self._shares.misses,
            "shared_total": self._shares.joined,
            "slices_total": counts["slices"],
            "patches_total": counts["patches"],
            "batches_total": steps,
            "failed_batches_total": counts["failed_batches"],
            "last_batch_slices": self._last_batch,
            "mean_batch_slices": counts["slices"] / steps if steps else 0.0,
            **{f"{stage}_seconds_total": seconds for stage, seconds in asdict(self._seconds).items()},
        }

    def count(self, timings: Timings) -> None:
        """Add a picture's times to the sums."""
        for stage, seconds in asdict(timings).items():
            setattr(self._seconds, stage, getattr(self._seconds, stage) + seconds)

    # In the pool.

    def _plan(self, data: bytes, max_slice_nums: int, largest: int | None) -> SlicePlan:
        most = self._pictures.max_slice_nums
        if not 1 <= max_slice_nums <= most:
            raise InvalidRequest(f"max_slice_nums is {max_slice_nums}; for this model it is from 1 to {most}")
        info = probe(data, max_pixels=self._settings.media.max_image_pixels)
        plan = plan_slices(
            info.width,
            info.height,
            max_slice_nums=max_slice_nums,
            scale_resolution=self._pictures.scale_resolution,
            patch_size=self._pictures.patch_size,
        )
        size, limit = f"the picture of {info.width}×{info.height} pixels", self._batcher.max_patches
        if (patches := max(_patches(plan))) > limit:
            raise PictureError(f"{size} needs {patches} patches in one slice; this encoder has memory for {limit}")
        if largest is not None and (needed := plan.num_slices * self._encoder.slice_bytes) > largest:
            raise PictureError(
                f"{size} needs {needed} bytes of embeddings for its {plan.num_slices} slices; at most {largest} can "
                "be handed over"
            )
        return plan

    def _prepare(self, waiter: Waiter, data: bytes, plan: SlicePlan) -> None:
        """From a file's bytes to slices, if it is the first time that the picture is seen."""
        try:
            began = time.monotonic()
            waiter.digest = digest(data, plan, self._name)
            waiter.timings.decode = time.monotonic() - began
            claimed = self._shares.claim(waiter.digest, _patches(plan), waiter)
            if claimed is None:
                return
            found, first = claimed
            if not isinstance(found, Share):
                self._post(self._resolve, waiter, found)
            elif not first:
                self._post(self._join, waiter, found)
            else:
                began = time.monotonic()
                picture = decode(data, max_pixels=self._settings.media.max_image_pixels)
                decoded = time.monotonic()
                slices = slices_of(cut(picture, plan, self._encoder))
                waiter.timings.decode += decoded - began
                waiter.timings.slice = time.monotonic() - decoded
                self._post(self._ready, found, slices)
        except FoveateError as error:
            self._post(self._fail, waiter, error)
        except Exception:
            logger.exception("a picture could not be prepared")
            self._post(self._fail, waiter, EngineError("the picture could not be prepared; see the encoder's log"))

    def _keep(self, name: bytes, rows: Tensor) -> None:
        # What hands the rows over copies them at the same time, and must not queue up behind this.
        with self._encoder.own_copies():
            rows = rows.cpu()
        self._cache.put(name, rows)

    # In the encoder's thread.

    def _encode_steps(self) -> None:
        # PyTorch counts threads for each thread that calls it.
        torch.set_num_threads(self._settings.model.threads or self._cores)
        while step := wait_idly(self._steps):
            began = time.monotonic()
            error: FoveateError | None = None
            too_much = False
            try:
                self._encode(step)
            except Exception as caught:
                logger.exception("encoding failed")
                too_much = is_out_of_memory(caught)
                error = EngineError("the picture could not be encoded; see the encoder's log")
                if isinstance(caught, torch.AcceleratorError) and not too_much:
                    # The device answers every further call of this process with the same error.
                    self.failure = error = Unavailable(f"the vision encoder's device failed: {caught}", retry_after=2)
            if too_much:
                error = make_room(self._encoder.device)
            self._post(self._step_done, step, began, error)

    def _encode(self, step: Step) -> None:
        slices, into = [], []
        for share, number in step:
            assert share.slices is not None, "only pictures that were prepared are queued"
            if share.rows is None:
                share.rows = self._encoder.empty(len(share.patches))
            slices.append(share.slices[number])
            into.append(share.rows[number])
        self._encoder.encode_slices(slices, into)

    # In the event loop.

    def _post(self, callback: Callable[..., Any], *args: Any) -> None:
        # When the loop is gone, so is everybody who waited.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _ready(self, share: Share, slices: list[Any]) -> None:
        share.slices = slices
        # Whoever claims it from now on comes by itself, after this.
        for waiter in list(share.waiters):
            self._join(waiter, share)

    def _join(self, waiter: Waiter, share: Share) -> None:
        """Give a waiter its place in the batcher, or the rows if they are there; before the pixels are, nothing."""
        if waiter.closed or waiter.queued or waiter.rows.done():
            return
        if share.done and share.rows is not None:
            waiter.cached = True
            self._resolve(waiter, share.rows.flatten(0, 1))
        elif share.slices is not None:
            waiter.queued = True
            self._batcher.add(share, waiter.request)
            self._next_step()

    def _unqueue(self, waiter: Waiter) -> None:
        if waiter.queued and waiter.share is not None:
            waiter.queued = False
            self._batcher.remove(waiter.share, waiter.request)

    def _next_step(self) -> None:
        if not self._running and self.failure is None and (step := self._batcher.next_step()):
            self._running = step
            self._last_batch = len(step)
            self._counts.update(batches=1, slices=len(step), patches=sum(share.patches[i] for share, i in step))
            self._steps.put(step)

    def _step_done(self, step: Step, began: float, error: FoveateError | None) -> None:
        self._running = []
        for share, _ in step:
            share.began = share.began or began
            share.ended = time.monotonic()
        if error is None:
            for share in self._batcher.finish(step):
                self._finished(share)
        else:
            self._counts["failed_batches"] += 1
            for share in dict.fromkeys(share for share, _ in step):
                self._refuse(self._shares.end(share), error)
        if self.failure is not None:
            self._on_failure()
        self._next_step()

    def _finished(self, share: Share) -> None:
        assert share.rows is not None, "a finished picture has rows"
        share.slices = None
        rows = share.rows.flatten(0, 1)
        for waiter in list(share.waiters):
            self._resolve(waiter, rows)
        # Until the cache has it, the share answers those who come.
        kept = self._loop.run_in_executor(None, self._keep, share.digest, rows)
        kept.add_done_callback(lambda _: self._shares.end(share))

    def _resolve(self, waiter: Waiter, rows: Tensor) -> None:
        if waiter.rows.done():
            return
        timings, share, now = waiter.timings, waiter.share, time.monotonic()
        if share is not None and not waiter.cached:
            timings.encode = max(0.0, share.ended - max(share.began, waiter.arrived))
        timings.queue = max(0.0, now - waiter.arrived - timings.decode - timings.slice - timings.encode)
        waiter.rows.set_result(rows)

    def _fail(self, waiter: Waiter, error: FoveateError) -> None:
        # If it was the first of several, none of the others has the pixels.
        self._refuse([waiter, *(self._shares.end(waiter.share) if waiter.share is not None else ())], error)

    def _refuse(self, waiters: Iterable[Waiter], error: FoveateError) -> None:
        for waiter in waiters:
            self._unqueue(waiter)
            if not waiter.rows.done():
                waiter.rows.set_exception(error)


def _patches(plan: SlicePlan) -> list[int]:
    return [rows * columns for rows, columns in plan.tgt_sizes]
