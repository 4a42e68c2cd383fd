"""A request's pictures, from URLs to embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from foveate.api.feeding import Take
from foveate.api.files import PictureFile, named
from foveate.api.schema import ChatCompletionRequest, ImageContent
from foveate.api.timing import StageTimes
from foveate.chat.assets import PictureSettings
from foveate.config import MediaSettings
from foveate.errors import InvalidRequest, PictureError
from foveate.media.fetch import MediaFetcher
from foveate.media.slicing import SlicePlan, plan_slices
from foveate.telemetry import Metrics
from foveate.vision.client import PictureRefused, VisionClient
from foveate.vision.digest import digest
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
    """A picture that has a plan, but is not encoded yet.

    Attributes:
        ref: what the request says of it.
        file: the file, which may still be on its way.
        plan: how it is cut.
        digest: what the digest of its embeddings will be, or empty if that is not known.
    """

    ref: PictureRef
    file: PictureFile
    plan: SlicePlan
    digest: bytes = b""


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
        """Fetch all at once, each URL once, and plan their slices as soon as all sizes are known.

        Raises:
            PictureError, FetchError: one cannot be had; the message has its number and ``param`` its path.
        """
        first_of = {ref.url: ref for ref in reversed(refs)}
        # Of several pictures, one can be looked at while another one is fetched.
        several = len(first_of) > 1
        files = {
            url: PictureFile(ref, self._fetcher, times, max_pixels=self._max_pixels, early=several)
            for url, ref in first_of.items()
        }
        try:
            await gather_or_cancel([file.wait_size() for file in files.values()])
        except BaseException:
            for file in files.values():
                file.cancel()
            raise
        pictures = [Picture(ref, files[ref.url], self._plan(ref, files[ref.url])) for ref in refs]
        name = self._vision.encoder_name
        return await asyncio.to_thread(_with_digests, pictures, name) if several and name else pictures

    async def encode(self, pictures: Sequence[Picture], times: StageTimes, take: Take) -> None:
        """Have all encoded, those at once whose files are here, and the others when theirs come.

        Args:
            pictures: what to encode.
            times: where their times go.
            take: see :meth:`foveate.vision.client.VisionClient.encode`.

        Raises:
            PictureError, FetchError: one is broken, or was not fetched; the message has its number and ``param`` its
                path.
            Overloaded, Unavailable, EngineError: the encoder refuses, is away or failed.
        """

        async def encode_some(indices: list[int]) -> None:
            tasks = []
            for index in indices:
                one = pictures[index]
                tasks.append(PictureTask(await one.file.wait(), one.ref.max_slice_nums, one.plan.num_slices))
            await self._encode(tasks, indices, pictures, times, take)

        here = [index for index, one in enumerate(pictures) if one.file.is_here]
        coming = [[index] for index in range(len(pictures)) if index not in here]
        try:
            await gather_or_cancel([encode_some(indices) for indices in [here, *coming] if indices])
        finally:
            for one in pictures:
                one.file.cancel()

    async def _encode(
        self,
        tasks: Sequence[PictureTask],
        indices: Sequence[int],
        pictures: Sequence[Picture],
        times: StageTimes,
        take: Take,
    ) -> None:
        def take_counted(place: int, encoded: Encoded) -> None:
            self._metrics.pictures.labels(str(encoded.cached).lower()).inc()
            times.add_encoding(encoded.timings)
            take(indices[place], encoded)

        try:
            await self._vision.encode(tasks, take_counted)
        except PictureRefused as refused:
            if isinstance(refused.error, PictureError):
                raise named(pictures[indices[refused.index]].ref, refused.error) from refused
            raise refused.error from refused

    def _plan(self, ref: PictureRef, file: PictureFile) -> SlicePlan:
        width, height = file.size
        return plan_slices(
            width,
            height,
            max_slice_nums=ref.max_slice_nums,
            scale_resolution=self._pictures.scale_resolution,
            patch_size=self._pictures.patch_size,
        )


def _with_digests(pictures: Sequence[Picture], name: str) -> list[Picture]:
    """Add the digests of all whose files are here, but for the first one: its embeddings go with the prompt."""
    first, *others = pictures
    return [
        first,
        *(replace(one, digest=digest(one.file.content, one.plan, name)) if one.file.is_here else one for one in others),
    ]


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
