"""What the API process and the engine say to each other, as msgpack over ZeroMQ.

One direction of requests (:class:`Generate`, :class:`AddEmbeddings`, :class:`Abort`, :class:`Attach`,
:class:`GetStats`), one of replies (:class:`Ready`, :class:`Step`, :class:`Attached`, :class:`Stats`). Every request
ends with exactly one terminal reply for each of its ``n`` sequences: a :class:`Chunk` with a ``finish_reason``, or one
:class:`Failure` for the whole request.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from foveate.transport.handle import Embeddings, Offer, Transport

FinishReason = Literal["stop", "length", "abort"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are chosen. The defaults are neutral: plain sampling from the model's distribution.

    ``temperature`` 0 means greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. All penalties act on generated
    tokens only, as the published model's repetition penalty does. ``seed`` None draws a fresh one. Sequence ``i`` of
    ``n`` samples with ``seed + i``.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0


class ImageSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Where one picture's rows go.

    Attributes:
        ranges: (start, length) in the prompt, filled with the rows in order.
        embeddings: the rows, or None if they follow with :class:`AddEmbeddings`.
        digest: what the digest of rows that follow will be, if that is known: then a prefix hit can supply them.
    """

    ranges: list[tuple[int, int]]
    embeddings: Embeddings | None = None
    digest: bytes = b""


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Answer a prompt ``n`` times. The engine releases the handles when it has read them, or refuses.

    The prompt is computed as far as the rows of its pictures are there.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    images: list[ImageSlot] = []
    n: int = 1


class AddEmbeddings(msgspec.Struct, frozen=True, tag="add_embeddings"):
    """The rows of a picture that was announced, by its place among ``images``.

    The engine releases the handle in any case, also if it does not know the request (any more).
    """

    request_id: str
    image: int
    embeddings: Embeddings


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody waits for this request (or one sequence of it, by ``index``) any more. Unknown ids are ignored."""

    request_id: str
    index: int | None = None


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag="attach"):
    """Reach for an encoder's memory, by a :data:`foveate.transport.handle.Transport` or ``auto``."""

    offer: Offer
    transport: str


class GetStats(msgspec.Struct, frozen=True, tag="get_stats"):
    """Ask for a :class:`Stats`."""


Request = Generate | AddEmbeddings | Abort | Attach | GetStats


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one chosen token, and of the most likely ones (descending), before any penalty."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class FirstTokenTimes(msgspec.Struct, frozen=True, array_like=True):
    """Seconds on a request's way to its first token: reading its pictures' rows, waiting, prefilling.

    It waits for admission, and for pictures that come later than the prompt.
    """

    read: float
    wait: float
    prefill: float


class Chunk(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """New tokens of one sequence.

    ``finish_reason`` is None while more follow. ``stop_token`` is the id that ended it, which is never in
    ``token_ids``. ``num_cached_tokens`` counts the prompt tokens whose keys and values a prefix hit supplied. The
    first token of a sequence brings its ``times``.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0
    times: FirstTokenTimes | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The whole request ended with an error; ``code`` is one of :mod:`foveate.errors`."""

    request_id: str
    code: str | None
    message: str
    status: int
    retry_after: float | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Everything that one engine step has to say."""

    chunks: list[Chunk] = []
    failures: list[Failure] = []


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine has loaded its model and answers from now on."""

    max_batch_size: int
    max_input_len: int
    max_image_tokens: int
    max_seq_len: int
    num_blocks: int
    block_size: int
    device: str
    dtype: str
    kv_cache_dtype: str


class Attached(msgspec.Struct, frozen=True, kw_only=True, tag="attached"):
    """How the engine reads an encoder's rows from now on, or why it cannot.

    ``reader`` is the engine's name to the encoder; empty for rows that come inline.
    """

    arena: str
    transport: Transport | None = None
    reader: str = ""
    error: str | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """A snapshot for ``/metrics``. Counters only grow; the others are now."""

    num_waiting: int
    num_running: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int
    finished: int
    aborted: int


Reply = Ready | Step | Attached | Stats
