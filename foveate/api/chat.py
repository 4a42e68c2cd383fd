"""From a chat request to the engine's chunks: pictures, prompt, limits, sampling, in that order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from foveate.api.completion import SeenPicture
from foveate.api.feeding import Take, feeding, not_ready
from foveate.api.pictures import Picture, PictureLoader, find_pictures
from foveate.api.sampling import sampling_params
from foveate.api.schema import ChatCompletionRequest, ImageContent
from foveate.api.timing import StageTimes
from foveate.chat.assets import ModelAssets
from foveate.chat.pieces import Prompt
from foveate.chat.template import Message, PicturePart, TextPart
from foveate.config import MediaSettings, SamplingSettings
from foveate.engine.client import EngineClient
from foveate.engine.messages import Chunk, Generate, Ready, SamplingParams
from foveate.errors import ContextLengthExceeded, ModelNotFound
from foveate.media.fetch import MediaFetcher
from foveate.media.slicing import SlicePlan
from foveate.telemetry import Metrics
from foveate.vision.client import VisionClient
from foveate.vision.remote import Encoded

_INLINE_CHARACTERS = 4096
"""Longer conversations are tokenized in a thread, so that streams go on meanwhile."""


@dataclass(frozen=True, slots=True)
class PlannedChat:
    """A request that is known to fit, before anything expensive was done for it.

    It does not keep the request, whose pictures may take many megabytes for as long as the answer streams.

    Attributes:
        id: names it to the engine and to the client.
        prompt: the tokens, with room for the pictures.
        pictures: in the order of the prompt; emptied once they are encoded. Their files may still be on their way.
        plans: how each picture is cut, and its file's width and height, in the same order.
        cached: of each picture that is encoded, by its place, whether its embeddings were there already.
        sampling: how tokens are chosen.
        stops: texts that end an answer.
        skip_special_tokens: whether special tokens are left out of the answer's text.
        n: how many answers.
        arrived: when it came, on the clock of :func:`time.perf_counter`.
        times: where its time goes.
        tell_times: whether the answer says so, and how the pictures were seen.
    """

    id: str
    prompt: Prompt
    pictures: list[Picture]
    sampling: SamplingParams
    stops: Sequence[str]
    skip_special_tokens: bool
    n: int
    arrived: float
    times: StageTimes
    tell_times: bool
    plans: Sequence[tuple[SlicePlan, tuple[int, int]]] = ()
    cached: dict[int, bool] = field(default_factory=dict)

    def seen_pictures(self) -> list[SeenPicture]:
        """Say how each picture was cut, and what it took of the prompt."""
        return [
            SeenPicture(
                *size,
                slices=plan.num_slices,
                grid=plan.grid,
                tokens=sum(length for _, length in ranges),
                cached=self.cached.get(place, False),
            )
            for place, ((plan, size), ranges) in enumerate(zip(self.plans, self.prompt.image_ranges, strict=True))
        ]


class ChatService:
    """Plans chats and runs them.

    Args:
        assets: the checkpoint's tokenizer, template and defaults.
        model_name: the name that requests must use.
        media: limits on pictures.
        sampling: what the server takes where a request does not say.
        engine: where tokens come from.
        vision: where pictures are encoded.
        fetcher: where pictures are fetched.
        metrics: where counts and times go.
    """

    def __init__(
        self,
        assets: ModelAssets,
        model_name: str,
        media: MediaSettings,
        sampling: SamplingSettings,
        *,
        engine: EngineClient,
        vision: VisionClient,
        fetcher: MediaFetcher,
        metrics: Metrics,
    ) -> None:
        self.assets = assets
        self.model_name = model_name
        self.engine = engine
        self.metrics = metrics
        self._sampling = sampling
        self._max_images = media.max_images_per_request
        self._loader = PictureLoader(media, assets.pictures, fetcher, vision, metrics)
        tokenizer = assets.tokenizer
        self._longest_token = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))

    async def plan(self, request: ChatCompletionRequest, arrived: float) -> PlannedChat:
        """Fetch the pictures, write the prompt, and check that everything fits.

        Raises:
            Unavailable: the engine is not ready.
            ModelNotFound: the request is for another model.
            InvalidRequest: it cannot be answered; see its subclasses.
        """
        if request.model != self.model_name:
            raise unknown_model(request.model, self.model_name)
        limits = self.engine.ready
        if limits is None:
            raise not_ready()
        times = StageTimes(self.metrics)
        refs = find_pictures(request, self.assets.pictures, self._max_images)
        self._check_text_length(request, limits)
        pictures = await self._loader.load(refs, times)
        prompt = await self._write_prompt(request, pictures)
        sampling = sampling_params(
            request,
            self._sampling,
            self.assets.generation,
            max_tokens=answer_limit(prompt, request, limits, self._sampling.max_tokens),
            vocab_size=self.assets.vocab_size,
        )
        return PlannedChat(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            prompt=prompt,
            pictures=pictures,
            sampling=sampling,
            stops=request.stop or (),
            skip_special_tokens=request.skip_special_tokens is not False,
            n=request.n or 1,
            arrived=arrived,
            times=times,
            tell_times=request.timings is True,
            plans=[(one.plan, one.file.size) for one in pictures],
        )

    async def run(self, chat: PlannedChat) -> AsyncGenerator[Chunk, None]:
        """Encode the pictures and generate, as soon as the first one is encoded; closing this early aborts both.

        Raises:
            FoveateError: as the encoder and the engine say.
        """
        places = [(ranges, one.digest) for ranges, one in zip(chat.prompt.image_ranges, chat.pictures, strict=True)]
        async with feeding(self.engine, chat.id, places, functools.partial(self._encode, chat)) as slots:
            # Nothing is awaited from here until the engine owns the handles; but it may have died meanwhile.
            generate = Generate(
                request_id=chat.id,
                prompt_token_ids=chat.prompt.token_ids,
                sampling=chat.sampling,
                images=slots,
                n=chat.n,
            )
            async with contextlib.aclosing(self.engine.generate(generate)) as chunks:
                async for chunk in chunks:
                    if chunk.times is not None:
                        chat.times.add_first_token(chunk.times, pictures=bool(slots))
                    yield chunk

    async def _encode(self, chat: PlannedChat, take: Take) -> None:
        def take_noted(place: int, encoded: Encoded) -> None:
            chat.cached[place] = encoded.cached
            take(place, encoded)

        await self._loader.encode(chat.pictures, chat.times, take_noted)
        chat.pictures.clear()

    def _check_text_length(self, request: ChatCompletionRequest, limits: Ready) -> None:
        """Refuse what is too long whatever its tokens are, because finding them would take long."""
        parts = (part for message in request.messages for part in message.content or ())
        size = sum(len(part.text) for part in parts if part.type == "text")
        at_least = size // self._longest_token
        if at_least > limits.max_input_len:
            raise _too_long(f"at least {at_least}", limits)

    async def _write_prompt(self, request: ChatCompletionRequest, pictures: Sequence[Picture]) -> Prompt:
        remaining = iter(pictures)
        length = 0
        messages: list[Message] = []
        for message in request.messages:
            parts: list[TextPart | PicturePart] = []
            for part in message.content or ():
                if isinstance(part, ImageContent):
                    parts.append(PicturePart(next(remaining).plan))
                else:
                    parts.append(TextPart(part.text))
                    length += len(part.text)
            messages.append(Message("system" if message.role == "developer" else message.role, parts))
        if length > _INLINE_CHARACTERS:
            return await asyncio.to_thread(self._tokenize, messages)
        return self._tokenize(messages)

    def _tokenize(self, messages: Sequence[Message]) -> Prompt:
        pieces = self.assets.template.render(messages, self.assets.pictures)
        return self.assets.tokenizer.encode_prompt(pieces)


def answer_limit(prompt: Prompt, request: ChatCompletionRequest, limits: Ready, default: int | None) -> int:
    """Return how many tokens an answer may have: what was asked for, or else the default, as far as it fits.

    Args:
        prompt: what comes before it.
        request: what the client sent.
        limits: what the engine takes.
        default: tokens of an answer for which nothing was asked; None is all that fits.

    Raises:
        ContextLengthExceeded: the prompt, or the prompt with what was asked for, does not fit.
    """
    length = len(prompt.token_ids)
    if length > limits.max_input_len:
        raise _too_long(f"{length} (of these, {prompt.num_image_tokens} for pictures)", limits)
    if prompt.num_image_tokens > limits.max_image_tokens:
        raise ContextLengthExceeded(
            f"The prompt's pictures have {prompt.num_image_tokens} tokens; this server takes at most "
            f"{limits.max_image_tokens}: send fewer pictures, or ask for less of them (detail, max_slice_nums).",
            param="messages",
        )
    asked, room = request.answer_limit, limits.max_seq_len - length
    if room < 1:
        raise _too_long(str(length), limits)
    if asked is not None and asked > room:
        raise ContextLengthExceeded(
            f"The prompt's {length} tokens and the {asked} tokens asked for are {length + asked} together; "
            f"this server takes at most {limits.max_seq_len}, so at most {room} can be asked for.",
            param="max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
        )
    if asked is not None:
        return asked
    return room if default is None else min(room, max(default, request.min_tokens or 0))


def unknown_model(asked: str, served: str) -> ModelNotFound:
    """Say which model there is."""
    return ModelNotFound(f"The model {asked[:200]!r} does not exist; this server has {served!r}.", param="model")


def _too_long(length: str, limits: Ready) -> ContextLengthExceeded:
    message = f"The prompt has {length} tokens; this server takes at most {limits.max_input_len}."
    return ContextLengthExceeded(message, param="messages")
