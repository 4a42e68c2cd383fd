"""The requests that ``POST /v1/chat/completions`` understands, as OpenAI defines them.

What is not listed here is refused by name, never ignored. A field that is listed only to say that we do not
support it takes the values that ask for nothing, because clients like to spell out defaults. ``null`` means
absent everywhere. Fields beyond OpenAI's have vLLM's names and meanings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20


class Part(BaseModel):
    """Base of everything a request is made of: strict types, finite numbers, no unknown names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


@dataclass(frozen=True, slots=True)
class Only:
    """The validator of a field that we do not support: only ``null`` and values that ask for nothing pass."""

    neutral: tuple[object, ...] = ()
    reason: str = "is not supported by this server"

    def __call__(self, value: Any) -> Any:
        """Return a value that passes, and refuse any other."""
        # Compared with their types, because True == 1.
        if value is None or any(type(value) is type(other) and value == other for other in self.neutral):
            return value
        raise PydanticCustomError("unsupported", "{reason}", {"reason": self.reason})


def _only(*neutral: object, **more: str) -> BeforeValidator:
    return BeforeValidator(Only(neutral, **more))


def _text_as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of parts")
    return value


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_ids(value: Any) -> Any:
    """JSON's keys are strings: turn them into token ids."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not re.fullmatch(r"[0-9]{1,9}", str(key)):
            raise PydanticCustomError("token_id", 'keys must be token ids, such as "42"')
    return {int(key): bias for key, bias in value.items()}


class ImageUrl(Part):
    """Where a picture is, and how closely to look."""

    url: str = Field(min_length=1, description="A data:, https: or http: URL.")
    detail: Literal["auto", "low", "high"] | None = Field(
        None,
        description="low sees the picture only as a whole; high and auto cut a large one into slices too.",
    )
    max_slice_nums: int | None = Field(None, ge=1, description="Most slices of it; 1 is none.")


class TextContent(Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageContent(Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl
    max_slice_nums: int | None = Field(None, ge=1, description="As in image_url; give it in one place.")


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]
Contents = Annotated[
    list[Content],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_text_as_parts, json_schema_input_type=str | list[Content]),
]
"""Every role parses pictures, so that one in the wrong place is refused as that."""

Unsupported = Annotated[Any, _only()]
NoTools = Annotated[Any, _only([])]
NoChoice = Annotated[Any, _only("none")]
NotStored = Annotated[Any, _only(False, reason="must not be true: this server stores nothing")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SystemMessage(Part):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Contents
    name: Unsupported = None


class UserMessage(Part):
    """What the user says and shows."""

    role: Literal["user"]
    content: Contents
    name: Unsupported = None


class AssistantMessage(Part):
    """An earlier answer, as this server gave it."""

    role: Literal["assistant"]
    content: Contents | None = None
    name: Unsupported = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: NoTools = None
    function_call: Unsupported = None
    tool_calls: NoTools = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Part):
    """What a stream carries beside the answer."""

    include_usage: bool | None = Field(None, description="A last event with the token counts, before [DONE].")


class ResponseFormat(Part):
    """The answer's form."""

    type: Annotated[Literal["text"], _only("text")]


class ChatCompletionRequest(Part):
    """The body of ``POST /v1/chat/completions``."""

    model: str = Field(description="The name that the server serves it under; GET /v1/models says it.")
    messages: list[Message] = Field(min_length=1, fail_fast=True, description="The conversation, oldest first.")

    stream: bool | None = Field(None, description="Answer with server-sent events, one for each piece of text.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Longest answer in tokens; without one, all that fits behind the prompt."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to the same prompt.")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]] | None,
        Field(
            max_length=MAX_STOPS,
            fail_fast=True,
            description=f"Up to {MAX_STOPS} texts of up to 1024 characters that end an answer and are no part of it.",
        ),
        BeforeValidator(_one_as_list, json_schema_input_type=str | list[str] | None),
    ] = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 is exactly greedy.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Keep the likeliest tokens that have this share of the probability."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed draws the same answer.")
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken off the logits of tokens that the answer has already."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="The same, once for each time that the answer has them."
    )
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(description="Token ids, and what is added to their logits, -100 to 100."),
        BeforeValidator(_token_ids, json_schema_input_type=dict[str, float] | None),
    ] = None
    logprobs: bool | None = Field(None, description="Tell the log-probability of each token of the answer.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="And those of so many of the likeliest; needs logprobs."
    )

    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="Keep so many of the likeliest tokens; 0 and -1 are off."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Keep tokens that are at least this share as likely as the likeliest."
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=100,
        description="Divides the positive logits of tokens that the answer has already, multiplies the negative ones.",
    )
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=256, fail_fast=True, description="Tokens that end an answer, beside the model's own."
    )
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="No answer ends before it has so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on behind the model's own end; for measuring.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text, as without it.")
    timings: bool | None = Field(None, description="Say in the answer what each stage took, and how pictures were cut.")

    user: str | None = Field(None, description="Accepted; changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted; changes nothing, as nothing is stored.")
    store: NotStored = None
    response_format: ResponseFormat | None = Field(None, description="Only text.")
    tools: NoTools = None
    tool_choice: NoChoice = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted; changes nothing, as there are no tools.")
    functions: NoTools = None
    function_call: NoChoice = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: NoChoice = None
    verbosity: Annotated[Any, _only("medium")] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _conflict("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise _conflict("stream_options", "stream_options needs stream to be true")
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "top_logprobs needs logprobs to be true")
        limit = self.answer_limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise _conflict("min_tokens", f"min_tokens ({self.min_tokens}) is more than max_tokens ({limit})")
        return self

    @property
    def answer_limit(self) -> int | None:
        """The most tokens that an answer may have, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _conflict(param: str, reason: str) -> PydanticCustomError:
    """Make an error about fields together, which names the one to change."""
    return PydanticCustomError("conflict", "{reason}", {"reason": reason, "param": param})
