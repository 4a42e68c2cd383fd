"""A request's pictures, from URLs to embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from foveate.api.schema import ChatCompletionRequest, ImageContent
from foveate.api.timing import StageTimes
from foveate.chat.assets import PictureSettings
from foveate.config import MediaSettings
from foveate.errors import FetchError, InvalidRequest, PictureError
from foveate.media.fetch import MediaFetcher
from foveate.media.image import probe
from foveate.media.slicing import SlicePlan, plan_slices
from foveate.telemetry import Metrics
from foveate.vision.client import PictureRefused, VisionClient
from foveate.vision.remote import Encoded, PictureTask

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PictureRef:
    """A picture as a request names it.

    Attributes:
        number: its place among the request's pictures, from 1.
        path: its place in the request, ``messages[0].content[1]``.
        url: where it is.
        max_slice_nums: most slices beside the whole picture; 1 is none.
    """

    number: int
    path: str
    url: str
    max_slice_nums: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is here and has a plan, but is not encoded yet."""

    ref: PictureRef
    data: bytes
    plan: SlicePlan


def find_pictures(request: ChatCompletionRequest, settings: PictureSettings, limit: int) -> list[PictureRef]:
    """List a request's pictures in the order of the conversation.

    Args:
        request: what the client sent.
        settings: how the checkpoint sees pictures.
        limit: most pictures in one request.

    Raises:
        InvalidRequest: there are too many, one is in a message that cannot have any, or its slicing
            contradicts itself or is beyond what the checkpoint does.
    """
    found: list[PictureRef] = []
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content or ()):
            if not isinstance(part, ImageContent):
                continue
            path = f"messages[{i}].content[{j}]"
            if message.role != "user":
                reason = f"'{path}': pictures come from the user, not from the {message.role}."
                raise InvalidRequest(reason, param=path)
            slices = _max_slice_nums(part, path, settings)
            found.append(PictureRef(len(found) + 1, path, part.image_url.url, slices))
    if len(found) > limit:
        reason = f"The request has {len(found)} pictures; this server takes at most {limit}."
        raise InvalidRequest(reason, param="messages")
    return found


def _max_slice_nums(part: ImageContent, path: str, settings: PictureSettings) -> int:
    inner, outer, detail = part.image_url.max_slice_nums, part.max_slice_nums, part.image_url.detail
    if inner is not None and outer not in (None, inner):
        message = f"'{path}.max_slice_nums' is {outer}, but '{path}.image_url.max_slice_nums' is {inner}."
        raise InvalidRequest(message, param=f"{path}.max_slice_nums")
    name = f"{path}.image_url.max_slice_nums" if outer is None else f"{path}.max_slice_nums"
    asked = inner if outer is None else outer
    if asked is not None and asked > settings.max_slice_nums:
        message = f"'{name}' is {asked}; this model cuts a picture into at most {settings.max_slice_nums}."
        raise InvalidRequest(message, param=name)
    if asked is not None and asked > 1 and detail == "low":
        raise InvalidRequest(f"'{name}' is {asked}, but detail 'low' means no slices.", param=name)
    if detail == "low" or not settings.slice_mode:
        return 1
    return settings.max_slice_nums if asked is None else asked


class PictureLoader:
    """Fetches pictures and has them encoded.

    Args:
        settings: what may be fetched, and how much of it.
        pictures: how the checkpoint sees pictures.
        fetcher: where bytes come from.
        vision: where embeddings come from.
        metrics: where times go.
    """

    def __init__(
        self,
        settings: MediaSettings,
        pictures: PictureSettings,
        fetcher: MediaFetcher,
        vision: VisionClient,
        metrics: Metrics,
    ) -> None:
        self._max_pixels = settings.max_image_pixels
        self._pictures = pictures
        self._fetcher = fetcher
        self._vision = vision
        self._metrics = metrics

    async def load(self, refs: Sequence[PictureRef], times: StageTimes) -> list[Picture]:
        """Fetch all at once, each URL once, and plan their slices.

        Raises:
            PictureError, FetchError: one cannot be had; the message has its number and ``param`` its path.
        """
        first_of = {ref.url: ref for ref in reversed(refs)}
        datas = await gather_or_cancel([self._fetch(ref, times) for ref in first_of.values()])
        data_of = dict(zip(first_of, datas, strict=True))
        return [await self._plan(ref, data_of[ref.url]) for ref in refs]

    async def encode(self, pictures: Sequence[Picture], times: StageTimes) -> list[Encoded]:
        """Have all encoded at once. The caller owns the handles; after an error they are released.

        Raises:
            PictureError: one is broken; the message has its number and ``param`` its path.
            Overloaded, Unavailable, EngineError: the encoder refuses, is away or failed.
        """
        if not pictures:
            return []
        tasks = [PictureTask(one.data, one.ref.max_slice_nums, one.plan.num_slices) for one in pictures]
        try:
            encoded = await self._vision.encode(tasks)
        except PictureRefused as refused:
            if isinstance(refused.error, PictureError):
                raise _named(pictures[refused.index].ref, refused.error) from refused
            raise refused.error from refused
        for one in encoded:
            self._metrics.pictures.labels(str(one.cached).lower()).inc()
            times.add_encoding(one.timings)
        return encoded

    async def _fetch(self, ref: PictureRef, times: StageTimes) -> bytes:
        with times.measure("fetch"):
            try:
                return await self._fetcher.fetch(ref.url)
            except (PictureError, FetchError) as error:
                raise _named(ref, error) from error

    async def _plan(self, ref: PictureRef, data: bytes) -> Picture:
        try:
            # A header can be made to take long to read.
            info = await asyncio.to_thread(probe, data, max_pixels=self._max_pixels)
        except PictureError as error:
            raise _named(ref, error) from error
        plan = plan_slices(
            info.width,
            info.height,
            max_slice_nums=ref.max_slice_nums,
            scale_resolution=self._pictures.scale_resolution,
            patch_size=self._pictures.patch_size,
        )
        return Picture(ref, data, plan)


def _named(ref: PictureRef, error: InvalidRequest) -> InvalidRequest:
    """Say which picture it was."""
    return type(error)(f"Picture {ref.number} ({ref.path}): {error.message}", param=ref.path)


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do everything at once; if a part fails or the caller is cancelled, end all."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
