"""One answer in the making: its tokens, where their keys and values lie, and what makes it end.

A sequence also knows the hashes that say which of its KV blocks another sequence may share. The hash of a
block covers everything that its keys and values depend on: the hash of the block before it (and so the
whole prefix), its token ids, and for each position that holds a row of a picture the picture's digest and the
number of that row. All pictures' positions carry the same placeholder id, so token ids alone would let one
picture answer for another.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from dataclasses import InitVar, dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple

from foveate.engine.messages import FinishReason, SamplingParams
from foveate.errors import InvalidRequest, Unavailable

# Parent of a first block: as long as any other parent, so that no two inputs of the hash read alike.
ROOT_HASH = blake2b(b"foveate kv blocks", digest_size=32).digest()


class SequenceStatus(Enum):
    """Where a sequence stands. A preempted one is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one picture's rows stand in the prompt.

    Attributes:
        ranges: (start, length) in tokens, ascending; the picture's rows fill them in order, from row 0.
        digest: names the picture and everything else that its rows depend on; empty while that is not known.
    """

    ranges: list[tuple[int, int]]
    digest: bytes

    @property
    def num_rows(self) -> int:
        """Rows of the picture."""
        return sum(length for _, length in self.ranges)


class _Rows(NamedTuple):
    """One range of a picture: positions [start, end) hold the rows from ``row`` on."""

    start: int
    end: int
    row: int
    digest: bytes


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Sequence:
    """One of the ``n`` answers to a request.

    Args:
        prompt_token_ids: the prompt; copied.
        max_seq_len: most tokens of prompt and answer together.

    Attributes:
        request_id: names the request.
        index: which of the request's ``n`` answers this is.
        sampling: how its tokens are chosen, and how many.
        eos_token_ids: the model's own end tokens.
        images: the prompt's pictures, in order.
        missing: the numbers of those whose rows are not there yet; see :meth:`supply`.
        came_early: whether there were any such pictures at first.
        parked: it lost its blocks when pictures were missing, and waits for the next one.
        payload: whatever the runner keeps here (embeddings, sampling state). Nobody else looks inside. A
            preempted sequence is prefilled again, so its embeddings must stay until it has finished.
        token_ids: the prompt, then the answer so far.
        num_prompt_tokens: tokens of the prompt.
        max_len: most tokens that prompt and answer may have together.
        stop_ids: ids which end the answer: those of the request, and the model's own unless they are ignored.
        block_table: the KV blocks of its tokens, in order. Empty unless it is running.
        num_computed_tokens: how many of its first tokens have their keys and values in those blocks, or get them in a
            step that is open.
        num_pending: tokens that open steps choose for it. They are not in ``token_ids`` yet, but have their places.
        is_decoding: whether a step has chosen a token for it since it was admitted. From then on the runner has its
            newest token and its block table.
        num_offered_blocks: how many of its first blocks were offered to the prefix cache.
        num_cached_tokens: how many of those a prefix hit supplied when the sequence was first admitted.
        num_preemptions: how often it lost its blocks to another sequence.
        status: where it stands.
        finish_reason: why it ended, or None while it has not.

    Raises:
        InvalidRequest: the prompt is empty, no token is wanted, or ranges of pictures are empty, overlap, are
            out of order or outside of the prompt.
    """

    request_id: str
    index: int = 0
    prompt_token_ids: InitVar[list[int]]
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    max_seq_len: InitVar[int]
    images: list[ImageSpan] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)
    payload: object = None

    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_len: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    block_table: list[int] = field(init=False, default_factory=list)
    num_computed_tokens: int = field(init=False, default=0)
    num_pending: int = field(init=False, default=0)
    is_decoding: bool = field(init=False, default=False)
    num_offered_blocks: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    finish_reason: FinishReason | None = field(init=False, default=None)
    came_early: bool = field(init=False)
    parked: bool = field(init=False, default=False)
    _rows: list[_Rows] = field(init=False)
    _block_hashes: list[bytes] = field(init=False, default_factory=list)

    def __post_init__(self, prompt_token_ids: list[int], max_seq_len: int) -> None:
        if not prompt_token_ids:
            raise InvalidRequest("the prompt is empty")
        if self.sampling.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.sampling.max_tokens}")
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_len = min(self.num_prompt_tokens + self.sampling.max_tokens, max_seq_len)
        own_ends = frozenset() if self.sampling.ignore_eos else self.eos_token_ids
        self.stop_ids = own_ends.union(self.sampling.stop_token_ids)
        self.missing = set(self.missing)
        self.came_early = bool(self.missing)
        self._rows = _flatten(self.images, self.num_prompt_tokens)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, index={self.index}, {self.status.value}, "
            f"prompt={self.num_prompt_tokens}, output={self.num_output_tokens}, "
            f"computed={self.num_computed_tokens}, blocks={self.block_table})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt and the answer."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The answer so far, as a new list."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_placed(self) -> int:
        """Tokens that have a place: those known so far, and those that open steps choose."""
        return len(self.token_ids) + self.num_pending

    @property
    def stalled(self) -> bool:
        """Whether nothing of it can be computed before another picture's rows are there."""
        return bool(self.missing) and self.computable(self.num_computed_tokens) <= self.num_computed_tokens

    def computable(self, start: int) -> int:
        """Return how far it can be computed from token ``start`` on: to the first picture that is missing there."""
        for number in sorted(self.missing):
            ranges = self.images[number].ranges
            if sum(ranges[-1]) > start:
                return ranges[0][0]
        return self.num_placed

    def supply(self, number: int, digest: bytes) -> None:
        """Learn that the rows of a missing picture are there, and what they are.

        Raises:
            Unavailable: they are not what was said, and the prefix cache has been asked for that already.
        """
        image = self.images[number]
        if image.digest != digest:
            if image.digest and self.num_computed_tokens > image.ranges[0][0]:
                raise Unavailable("a picture was encoded otherwise than expected", retry_after=1)
            self.images = [*self.images[:number], ImageSpan(image.ranges, digest), *self.images[number + 1 :]]
            self._rows = _flatten(self.images, self.num_prompt_tokens)
            if image.digest:
                self._block_hashes.clear()
        self.missing.discard(number)
        self.parked = False

    def append(self, token_id: int) -> None:
        """Add a token to the answer."""
        self.token_ids.append(token_id)

    def check_stop(self, token_id: int) -> FinishReason | None:
        """Say whether ``token_id`` as the next token ends the answer; ask *before* appending it.

        With ``"stop"`` it is an end token and no part of the answer, with ``"length"`` it is the last token.
        An end token that comes before ``min_tokens`` tokens is a token like any other.
        """
        if token_id in self.stop_ids and self.num_output_tokens >= self.sampling.min_tokens:
            return "stop"
        return "length" if self.num_tokens + 1 >= self.max_len else None

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Return the hashes of all full blocks of ``block_size`` tokens, in order.

        They end before a picture whose digest is not known. Only what was added since the last call is hashed. The
        list is the sequence's own: do not change it, and ask for one block size only.
        """
        hashes = self._block_hashes
        known = self.num_tokens
        if self.missing:
            known = min((rows.start for rows in self._rows if not rows.digest), default=known)
        for index in range(len(hashes), known // block_size):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(self._hash_block(index * block_size, block_size, parent))
        return hashes

    def _hash_block(self, first: int, block_size: int, parent: bytes) -> bytes:
        """Hash the block that starts at token ``first``."""
        # Every field is of fixed length or has its length before it, so no two contents are the same bytes.
        last = first + block_size
        state = blake2b(parent, digest_size=len(ROOT_HASH))
        state.update(array("q", self.token_ids[first:last]))
        for rows in self._rows[bisect_right(self._rows, first, key=lambda rows: rows.end) :]:
            if rows.start >= last:
                break
            start, end = max(rows.start, first), min(rows.end, last)
            row = rows.row + start - rows.start
            state.update(struct.pack("<4q", start - first, end - start, row, len(rows.digest)) + rows.digest)
        return state.digest()


def _flatten(images: list[ImageSpan], num_prompt_tokens: int) -> list[_Rows]:
    """Return the ranges of all pictures in ascending order, each with the number of its first row."""
    flat: list[_Rows] = []
    free_from = 0
    for number, image in enumerate(images):
        row = 0
        for start, length in image.ranges:
            if start < free_from or length < 1 or start + length > num_prompt_tokens:
                raise InvalidRequest(
                    f"picture {number}: its range of {length} tokens from {start} is empty, or not within "
                    f"what is left of the prompt ({free_from} to {num_prompt_tokens})"
                )
            flat.append(_Rows(start, start + length, row, image.digest))
            row += length
            free_from = start + length
    return flat
