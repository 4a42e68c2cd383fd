"""What the API process and the vision encoder say to each other, as msgpack over ZeroMQ."""

from __future__ import annotations

import msgspec

from foveate.transport.handle import EmbeddingHandle


class Encode(msgspec.Struct, frozen=True, kw_only=True, tag="encode"):
    """Encode one picture, given as a file's bytes (JPEG, PNG, WebP, GIF, BMP, TIFF ...)."""

    request_id: str
    data: bytes
    max_slice_nums: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for this picture any more; a handle that is already out is released."""

    request_id: str


VisionRequest = Encode | Cancel


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag="encoded"):
    """The picture's embeddings can be read. ``cached`` says that they were there already."""

    request_id: str
    handle: EmbeddingHandle
    cached: bool


class EncodeFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The picture has no embeddings; ``code`` is one of :mod:`foveate.errors`."""

    request_id: str
    code: str | None
    message: str
    status: int
    retry_after: float | None = None


VisionReply = Encoded | EncodeFailed
