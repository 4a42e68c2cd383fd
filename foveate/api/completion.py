"""What ``POST /v1/chat/completions`` answers, as OpenAI defines it.

These are msgspec structs and no pydantic models because one is encoded for every token of every stream.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Reason = Literal["stop", "length"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens: those a prefix hit supplied, and those that are pictures."""

    cached_tokens: int
    image_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Counts of tokens. With ``n`` answers the prompt counts once, the answers all."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a place. ``bytes`` is UTF-8, or a piece of it."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct, frozen=True):
    """The token that was chosen, and the most likely ones, best first."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probabilities, one entry a token."""

    content: list[ContentLogprob]
    refusal: None = None


class Message(msgspec.Struct, frozen=True):
    """A whole answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    """One of the ``n`` answers."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Reason


class SeenPicture(msgspec.Struct, frozen=True):
    """How one of the request's pictures was seen.

    ``width`` and ``height`` are the file's, in pixels. ``slices`` counts the overview too; ``grid`` has the columns and
    rows of the others, and is null if there are none. ``tokens`` are those of all slices together. ``cached`` says
    whether its embeddings were there already.
    """

    width: int
    height: int
    slices: int
    grid: tuple[int, int] | None
    tokens: int
    cached: bool


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request that does not stream.

    ``created`` is in Unix seconds. Only if the request asked for ``timings``, they are here, in seconds, and
    ``pictures``, in the order of the conversation.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    timings: dict[str, float] | UnsetType = UNSET
    pictures: list[SeenPicture] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What an event adds. The first one of each answer has the role and no text."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """The piece of one of the ``n`` answers that an event carries."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Reason | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream. If the request asked for ``usage``, it is null until the last event.

    ``timings`` and ``pictures``, if asked for, are in the last event.
    """

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    timings: dict[str, float] | UnsetType = UNSET
    pictures: list[SeenPicture] | UnsetType = UNSET


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that requests may name, and the limits it is served with (null until the engine is ready)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "foveate"
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that requests may name."""

    object: Literal["list"] = "list"
    data: list[Model]
