"""Reading a request's body: no more of it than allowed, and only as what a web page cannot send elsewhere."""

from __future__ import annotations

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from foveate.api.errors import invalid_request
from foveate.api.schema import ChatCompletionRequest
from foveate.errors import InvalidRequest, RequestTooLarge

MAX_VALUES = 200_000
"""Values in one body: a small number of bytes each, but a large object."""


async def read_chat_request(http: Request, limit: int) -> ChatCompletionRequest:
    """Read and check a request.

    Args:
        http: the request, whose body nobody has read yet.
        limit: most bytes.

    Raises:
        HTTPException: the body is not declared to be plain JSON (status 415).
        RequestTooLarge: there are more bytes than allowed.
        InvalidRequest: it is not JSON, or not a request; ``param`` is the field's path.
    """
    _check_headers(http, limit)
    body = await _read(http, limit)
    # Base64 has no commas, so this costs nobody who sends pictures.
    if body.count(b",") > MAX_VALUES:
        raise InvalidRequest(f"The body has more than {MAX_VALUES} values.")
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        # Without its cause: the body, which may be large, hangs on it.
        raise invalid_request(error) from None


def _check_headers(http: Request, limit: int) -> None:
    """Refuse what can be refused before the body is read."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page can send anything else to any address, without asking it first.
        raise HTTPException(415, "The body must be JSON, with the header 'Content-Type: application/json'.")
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "A compressed body is not supported.")
    length = http.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)


async def _read(http: Request, limit: int) -> bytearray:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return body


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the {limit} bytes that this server reads.")
