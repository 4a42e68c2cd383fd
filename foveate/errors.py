"""One tree of exceptions, translated once at each edge.

Every class knows the HTTP status and the OpenAI error type under which a client sees it, and the gRPC code under
which another service sees it::

    FoveateError                    500  server_error
      InvalidRequest                400  invalid_request_error
        ContextLengthExceeded       400  context_length_exceeded
        PictureError                400  invalid_image
        FetchError                  400  image_unreachable
      Unauthorized                  401  invalid_api_key
      ModelNotFound                 404  model_not_found
      RequestTooLarge               413  request_too_large
      Overloaded                    503  overloaded          (with Retry-After)
      Unavailable                   503  unavailable         (with Retry-After)
      EngineError                   500  engine_error
      ConfigError                   never on a wire: the command ends with exit code 2
      CheckpointError               never on a wire: the command ends with exit code 3
"""

from __future__ import annotations

from typing import ClassVar


class FoveateError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: what is wrong, in words for the person at the other end.
        param: the field of the request that is at fault, as a path (``messages[0].content[1]``).
        retry_after: seconds after which trying again makes sense.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    exit_status: ClassVar[int] = 1
    grpc: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(FoveateError):
    """The request itself is wrong: repeating it cannot help."""

    status, type, grpc = 400, "invalid_request_error", "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit: the message names both numbers."""

    code = "context_length_exceeded"


class PictureError(InvalidRequest):
    """A picture is broken, empty, truncated, too large, or not a picture."""

    code = "invalid_image"


class FetchError(InvalidRequest):
    """A picture's URL could not be fetched, or may not be."""

    code = "image_unreachable"


class Unauthorized(FoveateError):
    """The request lacks the server's API key, or brings another one."""

    status, type, code, grpc = 401, "invalid_request_error", "invalid_api_key", "UNAUTHENTICATED"


class ModelNotFound(FoveateError):
    """The request names a model that is not served here."""

    status, type, code, grpc = 404, "invalid_request_error", "model_not_found", "NOT_FOUND"


class RequestTooLarge(FoveateError):
    """The request's body is larger than the server reads."""

    status, type, code, grpc = 413, "invalid_request_error", "request_too_large", "RESOURCE_EXHAUSTED"


class Overloaded(FoveateError):
    """A bounded queue is full; trying again later can help."""

    status, type, code, grpc = 503, "server_error", "overloaded", "RESOURCE_EXHAUSTED"


class Unavailable(FoveateError):
    """A part of the service is not up (yet, or any more)."""

    status, type, code, grpc = 503, "server_error", "unavailable", "UNAVAILABLE"


class EngineError(FoveateError):
    """The engine failed while it worked on a request."""

    code = "engine_error"


class ConfigError(FoveateError):
    """A setting is unknown, of the wrong type, or impossible together with another."""

    code, grpc, exit_status = "config_error", "FAILED_PRECONDITION", 2


class CheckpointError(FoveateError):
    """A checkpoint is incomplete, misshapen, or not one that this project serves."""

    code, grpc, exit_status = "checkpoint_error", "FAILED_PRECONDITION", 3


BY_CODE: dict[str, type[FoveateError]] = {}


def _index(cls: type[FoveateError]) -> None:
    for child in cls.__subclasses__():
        if child.code is not None:
            BY_CODE[child.code] = child
        _index(child)


_index(FoveateError)


def from_wire(code: str | None, message: str, *, status: int = 500, retry_after: float | None = None) -> FoveateError:
    """Rebuild the error that another process reported.

    A code that this version does not know becomes an :class:`InvalidRequest` for a 4xx status and an
    :class:`EngineError` otherwise, so that a newer peer's errors keep their meaning.
    """
    cls = BY_CODE.get(code or "", InvalidRequest if 400 <= status < 500 else EngineError)
    return cls(message, retry_after=retry_after)
