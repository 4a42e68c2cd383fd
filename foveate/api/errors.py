"""Errors as a client sees them: OpenAI's shape, whatever went wrong and wherever."""

from __future__ import annotations

import http
import logging
import math
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from foveate.api.incidents import note
from foveate.errors import FoveateError, InvalidRequest, Overloaded, Unauthorized, Unavailable
from foveate.telemetry import request_id

logger = logging.getLogger(__name__)

_RETRY_AFTER = 1.0
"""Seconds to wait where the refusing part named no time of its own."""
_MAX_MESSAGE = 1000
_MAX_PATH_PART = 64


class ErrorDetail(msgspec.Struct, frozen=True):
    """What OpenAI's clients read from an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class HungUp(Exception):
    """The client closed the connection before it had its answer."""


def error_body(error: FoveateError) -> ErrorBody:
    """Say what went wrong in OpenAI's shape."""
    return ErrorBody(ErrorDetail(error.message[:_MAX_MESSAGE], error.type, error.param, error.code))


def error_response(error: FoveateError) -> Response:
    """Make the whole answer, with the headers that its status asks for."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | Unavailable) or error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after or _RETRY_AFTER))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), error.status, headers)


def internal_error() -> ErrorBody:
    """What a client learns about a bug: the id under which the log has the rest."""
    message = f"Internal error. The server's log has it under the request id {request_id.get()}."
    return ErrorBody(ErrorDetail(message, "server_error", None, "internal_error"))


def refusal(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    """Refuse what never became a request of ours, so that no error of the tree stands for it."""
    body = ErrorBody(ErrorDetail(message, "invalid_request_error", None, code))
    return json_response(body, status, headers)


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Encode anything msgspec knows as an answer."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Translate the first thing that pydantic found, with the field's path."""
    detail = error.errors(include_url=False, include_input=False)[0]
    context: dict[str, Any] = detail.get("ctx", {})
    path = context.get("param") or field_path(detail["loc"])
    message = detail["msg"]
    match detail["type"]:
        case "json_invalid":
            return InvalidRequest(f"The body is not valid JSON: {context['error']}.")
        case "extra_forbidden":
            message = f"Unknown field '{path}': it is not supported by this server."
        case "missing":
            message = f"'{path}' is required."
        case "union_tag_invalid":
            # The union's path is its parent's; the tag is what is wrong.
            tag = str(context["discriminator"]).strip("'")
            path = f"{path}.{tag}"
            found = str(context["tag"])[:_MAX_PATH_PART]
            message = f"'{path}' is '{found}', which is not supported: use {context['expected_tags']}."
        case "union_tag_not_found":
            path = f"{path}.{str(context['discriminator']).strip(chr(39))}"
            message = f"'{path}' is required."
        case "unsupported":
            message = f"'{path}' {message}."
        case _:
            message = f"'{path}': {message}." if path else f"{message}."
    return InvalidRequest(message, param=path or None)


def field_path(location: tuple[int | str, ...]) -> str:
    """Write a location as ``messages[0].content[1].text``.

    Every list of objects in the schema is a tagged union, so a name after an index is the tag and no field.
    """
    path = ""
    after_index = False
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not after_index:
            path += f".{part[:_MAX_PATH_PART]}" if path else part[:_MAX_PATH_PART]
        after_index = isinstance(part, int)
    return path


async def handle_foveate_error(request: Request, error: Exception) -> Response:
    """Answer an error that was raised on purpose, and note it for the operator."""
    assert isinstance(error, FoveateError)
    note(request.scope, error)
    if error.status >= 500:
        logger.warning("%s: %s", type(error).__name__, error.message)
    return error_response(error)


async def handle_http_error(request: Request, error: Exception) -> Response:
    """Answer what the web framework refuses: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:_MAX_MESSAGE]}"
    message, code = str(error.detail), http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        message, code = f"There is nothing at {where}.", "unknown_url"
    elif error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"This method is not allowed here: {where}."
    return refusal(error.status_code, message, code, dict(error.headers or {}))


async def handle_hang_up(request: Request, error: Exception) -> Response:
    """End the request of a client that went away: nobody reads this, but the log and the metrics count it."""
    return Response(status_code=499)
