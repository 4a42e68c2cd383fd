"""``python -m foveate.api.reference > docs/api.md``: the page about the API, made from the types that do the work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel

from foveate import errors
from foveate.api import completion, schema
from foveate.api.errors import ErrorBody, ErrorDetail
from foveate.media.image import FORMATS
from foveate.telemetry import STAGES

ENDPOINTS = (
    ("POST /v1/chat/completions", True, "Answer a conversation, in one piece or as a stream of events."),
    ("GET /v1/models", True, "List the models that requests may name."),
    ("GET /v1/models/{model_id}", True, "Describe one model."),
    ("GET /health", False, "200: this process lives."),
    (
        "GET /ready",
        False,
        "200: requests are answered (`ready`, or `degraded` while pictures may not be); 503: not yet.",
    ),
    ("GET /version", False, "Foveate's version and the model's name."),
    ("GET /metrics", True, "Counters and times in Prometheus' format."),
    ("GET /status", True, "What is served, how it is, and the latest errors, in JSON."),
    ("GET /openapi.json", False, "This page for programs: OpenAPI 3.1."),
    ("GET /docs", False, "The same for people."),
    ("GET /", False, "The dashboard: a page that reads `/metrics` and `/status`, with the key that is typed into it."),
    ("GET /ui", False, "With `--ui`: the web chat, which asks its visitor for the key."),
)
"""Every route: its method and path, whether it wants the key, if there is one, and what it does."""

REFUSED = {
    "OpenAI": ("moderation", "prompt_cache_key", "prompt_cache_retention"),
    "vLLM": (
        "add_generation_prompt", "allowed_token_ids", "bad_words", "best_of", "chat_template", "chat_template_kwargs",
        "continue_final_message", "documents", "echo", "guided_choice", "guided_json", "guided_regex",
        "include_stop_str_in_output", "length_penalty", "mm_processor_kwargs", "priority", "prompt_logprobs",
        "spaces_between_special_tokens", "structured_outputs", "truncate_prompt_tokens", "use_beam_search",
    ),
}  # fmt: skip
"""Fields that clients of other servers may miss, by whose they are; a test sends each of them."""

PARTS = ("input_audio", "file", "refusal", "video_url")
ROLES = ("tool", "function")

INTRODUCTION = """\
# API

<!-- Made by `make docs-reference` from foveate/api/schema.py and its neighbours: change it there. -->

Requests and answers are OpenAI's. Every field that is understood is on this page; any other one is refused with
status 400 and an error that names it. Nothing is silently ignored. `null` counts as absent everywhere. Types are
strict: `"5"` is no number.

## Endpoints

"""

KEYS = """
With `--api-key` the marked ones want the header `Authorization: Bearer KEY`. Without a key, a server that listens on
loopback answers to `localhost` and loopback addresses only, so that no web page can reach it under another name
(403).

Bodies are JSON, with `Content-Type: application/json`, not compressed (415), of at most `max_body_bytes` (413). Every
answer has `X-Request-Id`: the client's own, if it sent a plain one, or a new one; the logs have it too. 503 comes
with `Retry-After`.

## The request
"""

PICTURES = """
A picture's `url` is a `data:` URL with or without base64, or one that the server fetches: `https:`, `http:`, or
`file:` inside `--allowed-media-path`. Files are {formats}; of an animation the first frame counts. Pictures come from
the user only. One of no more pixels than 448×448 is seen as a whole; a larger one as a whole and in up to
`max_slice_nums` slices. The whole and each slice take as many tokens as the model has queries (64), and two around
them. Private addresses, sizes and times are limited: [security](security.md).
"""

REFUSALS = """
## What is refused

Fields that are known, and not supported. They take the values that ask for nothing:

"""

ANSWER = """
## The answer

With `"stream": true` the answer is a row of server-sent events, each a `ChatCompletionChunk`, and `[DONE]` at the
end. An error after the first event is an event of its own, with `error` as below, and the last one.
"""

TIMINGS = """
### timings

With `"timings": true` the answer (of a stream, the last event) has the seconds of each stage that there was, and
`total`. Of a stage that several pictures go through, the longest counts: {stages}. Stages of different pictures
overlap, so their sum may be more than `total`.
"""

ERRORS = """
## Errors

The body is `{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`. `message` is for people, `param` is
the field's path (`messages[0].content[1].image_url.url`), or null. OpenAI's clients make exceptions of it.

"""


def page() -> str:
    """Return the whole page as Markdown."""
    return "".join(_parts())


def _parts() -> Iterator[str]:
    yield INTRODUCTION
    rows: list[tuple[str, ...]] = [(f"`{route}`", "yes" if keyed else "", text) for route, keyed, text in ENDPOINTS]
    yield _table(("endpoint", "key", ""), rows) + KEYS
    for model in _models():
        yield f"\n### {model.__name__}\n\n{_paragraph(model.__doc__)}\n\n"
        yield _table(("field", "value", "meaning"), list(_understood(model)))
        if model is schema.ImageUrl:
            yield PICTURES.format(formats=_list(FORMATS))
    yield REFUSALS
    rows = [row for model in _models() for row in _refused(model)]
    yield _table(("where", "field", "values that pass"), rows)
    yield "\nEverything else is an unknown field, or a value that is not listed. These are, too:\n\n"
    for origin, names in REFUSED.items():
        yield f"- fields of {origin}'s: {_list(names)}\n"
    yield f"- parts of a message's content: {_list(PARTS)}\n- roles: {_list(ROLES)}\n"
    yield ANSWER
    for struct in _structs():
        yield f"\n### {struct.__name__}\n\n{_paragraph(struct.__doc__)}\n\n"
        yield _table(("field", "value"), list(_answered(struct)))
    yield TIMINGS.format(stages=_list(STAGES)) + ERRORS
    yield _table(("status", "type", "code", "when"), [*_errors(), *OTHER_ERRORS])


def _models() -> tuple[type[BaseModel], ...]:
    return (
        schema.ChatCompletionRequest, schema.SystemMessage, schema.UserMessage, schema.AssistantMessage,
        schema.TextContent, schema.ImageContent, schema.ImageUrl, schema.StreamOptions, schema.ResponseFormat,
    )  # fmt: skip


def _structs() -> tuple[type[msgspec.Struct], ...]:
    return (
        completion.ChatCompletion, completion.Choice, completion.Message, completion.ChatCompletionChunk,
        completion.ChunkChoice, completion.Delta, completion.Usage, completion.PromptTokensDetails,
        completion.SeenPicture,
        completion.Logprobs, completion.ContentLogprob, completion.TopLogprob, completion.ModelList, completion.Model,
        ErrorBody, ErrorDetail,
    )  # fmt: skip


def neutral_values(model: type[BaseModel], field: str) -> tuple[object, ...] | None:
    """Return the values that a field takes which is not supported; None if it is."""
    for one in model.model_fields[field].metadata:
        if isinstance(function := getattr(one, "func", None), schema.Only):
            return function.neutral
    return None


def _understood(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    described = model.model_json_schema(ref_template="{model}")
    required = described.get("required", ())
    for name, field in described["properties"].items():
        # What the answer's form may be is the same as what passes.
        if neutral_values(model, name) is None or model is schema.ResponseFormat:
            mark = " (required)" if name in required else ""
            # null counts as absent, which is said once for the whole page.
            options = [one for one in field.get("anyOf", ()) if one.get("type") != "null"]
            value = _type({**field, "anyOf": options})
            yield f"`{name}`{mark}", value, field.get("description", "")


def _refused(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name in model.model_fields:
        neutral = neutral_values(model, name)
        if neutral is not None and model is not schema.ResponseFormat:
            passing = [f"`{json.dumps(value)}`" for value in (None, *neutral)]
            yield f"{model.__name__}", f"`{name}`", ", ".join(passing)


def _answered(struct: type[msgspec.Struct]) -> Iterator[tuple[str, ...]]:
    _, components = msgspec.json.schema_components([struct], ref_template="{name}")
    described = components[struct.__name__]
    for name, field in described["properties"].items():
        yield f"`{name}`", _type(field)


def _type(field: Mapping[str, Any]) -> str:
    """Say in words what JSON Schema says of a value."""
    if "$ref" in field:
        return _link(field["$ref"])
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(option) for option in options)
    if "const" in field or "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    match field.get("type"):
        case "array":
            if several := field.get("prefixItems"):
                return f"[{', '.join(_type(one) for one in several)}]"
            number = f", at most {field['maxItems']}" if "maxItems" in field else ""
            return f"list of {_type(field['items'])}{number}"
        case "object":
            values = field.get("additionalProperties")
            return f"object of {_type(values)}" if isinstance(values, Mapping) and values else "object"
        case "boolean":
            return "`true`, `false`"
        case str() as kind:
            return kind + _bounds(field)
        case _:
            return "anything"


def _bounds(field: Mapping[str, Any]) -> str:
    least = field.get("minimum", field.get("minLength"))
    most = field.get("maximum", field.get("maxLength"))
    if "exclusiveMaximum" in field:
        most = f"2^{field['exclusiveMaximum'].bit_length() - 1} - 1"
        least = f"-2^{(-least).bit_length() - 1}" if least is not None and least < -(2**31) else least
    unit = " characters" if "maxLength" in field else ""
    if least is not None and most is not None:
        return f", {least} to {most}{unit}"
    if "minLength" in field:
        return ", not empty"
    return "" if least is None else f", at least {least}"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


OTHER_ERRORS = (
    ("403", "`invalid_request_error`", "`host_not_allowed`", "Without a key: the `Host` header is not this machine's."),
    ("404", "`invalid_request_error`", "`unknown_url`", "There is nothing at this path."),
    ("405", "`invalid_request_error`", "`method_not_allowed`", "Another method is needed."),
    ("415", "`invalid_request_error`", "`unsupported_media_type`", "The body is not JSON, or is compressed."),
    ("500", "`server_error`", "`internal_error`", "A bug; the log has the rest under the request id in the message."),
)
"""What never became an exception of the tree."""


def _errors() -> Iterator[tuple[str, ...]]:
    on_the_wire = [kind for kind in _tree(errors.FoveateError) if kind.status != 500 or kind is errors.EngineError]
    for kind in sorted(on_the_wire, key=lambda kind: kind.status):
        code = f"`{kind.code}`" if kind.code else "null"
        yield str(kind.status), f"`{kind.type}`", code, _paragraph(kind.__doc__)


def _tree(kind: type[errors.FoveateError]) -> Iterator[type[errors.FoveateError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _tree(child)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *rows))


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


if __name__ == "__main__":
    print(page(), end="")
