"""A picture's file on its way: its size is often known before the file is there."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from foveate.api.timing import StageTimes
from foveate.errors import FetchError, InvalidRequest, PictureError
from foveate.media.fetch import MediaFetcher
from foveate.media.image import PictureInfo, probe

_EARLY = ("JPEG", "PNG")
"""Formats whose size stands before the pixels, so that no later byte can change it."""


class Ref(Protocol):
    """A picture as a request names it (:class:`foveate.api.pictures.PictureRef` is one)."""

    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def url(self) -> str: ...  # noqa: D102


class PictureFile:
    """Fetches one file, from now on.

    Args:
        ref: the first picture that it is.
        fetcher: where bytes come from.
        times: where the time goes.
        max_pixels: most pixels that it may have.
        early: whether to look for its size in its first bytes.
    """

    def __init__(self, ref: Ref, fetcher: MediaFetcher, times: StageTimes, *, max_pixels: int, early: bool) -> None:
        self._ref = ref
        self._fetcher = fetcher
        self._times = times
        self._max_pixels = max_pixels
        self._info: asyncio.Future[PictureInfo] = asyncio.get_running_loop().create_future()
        self._looks: set[asyncio.Task[None]] = set()
        self._file = asyncio.create_task(self._fetch(early=early))
        # Whoever planned with it may be gone when it fails.
        self._file.add_done_callback(lambda file: file.cancelled() or file.exception())

    @property
    def is_here(self) -> bool:
        """Whether all of it is."""
        return self._file.done() and not self._file.cancelled() and self._file.exception() is None

    @property
    def content(self) -> bytes:
        """What is in it, once it is here."""
        return self._file.result()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, once they are known."""
        info = self._info.result()
        return info.width, info.height

    async def wait_size(self) -> None:
        """Wait until its size is known.

        Raises:
            PictureError, FetchError: it cannot be had, or is no picture; the message has its number and ``param`` its
                path.
        """
        either: set[asyncio.Future[Any]] = {self._info, self._file}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._info.done():
            self._file.result()

    async def wait(self) -> bytes:
        """Wait until it is here; several may.

        Raises:
            PictureError, FetchError: as :meth:`wait_size`.
        """
        return await asyncio.shield(self._file)

    def cancel(self) -> None:
        """Give up fetching it."""
        self._file.cancel()

    async def _fetch(self, *, early: bool) -> bytes:
        try:
            with self._times.measure("fetch"):
                data = await self._fetcher.fetch(self._ref.url, begun=self._begun if early else None)
            if not self._info.done():
                # A header can be made to take long to read.
                info = await asyncio.to_thread(probe, data, max_pixels=self._max_pixels)
                self._learn(info)
        except (PictureError, FetchError) as error:
            raise named(self._ref, error) from error
        return data

    def _begun(self, first: bytes) -> None:
        if not self._info.done():
            look = asyncio.create_task(self._look(first))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)

    async def _look(self, first: bytes) -> None:
        try:
            info = await asyncio.to_thread(probe, first, max_pixels=self._max_pixels)
        except PictureError:
            return  # Perhaps more is needed; if it is really broken, the whole file tells.
        if info.format in _EARLY:
            self._learn(info)

    def _learn(self, info: PictureInfo) -> None:
        if not self._info.done():
            self._info.set_result(info)


def named(ref: Ref, error: InvalidRequest) -> InvalidRequest:
    """Say which picture it was."""
    return type(error)(f"Picture {ref.number} ({ref.path}): {error.message}", param=ref.path)
