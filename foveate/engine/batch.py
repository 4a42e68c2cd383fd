"""A scheduled step as arrays: which token goes where, what it sees, and which rows are sampled.

Decodes come first, one row each, then the chunks of prompts. A decode's token is on the device since the step before,
whether or not the host has heard of it; a chunk's tokens come from the host. A step with drafts has nothing but
decodes: each newest token, and behind it its drafts as if they were other sequences that read the same blocks. All of
their tokens come from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foveate.engine.rows import Row, Rows
from foveate.engine.sampling import Variant
from foveate.engine.state import state_of
from foveate.engine.step import ScheduledBatch, ScheduledSeq
from foveate.engine.upload import Array, Arrays

Pairs = list[tuple[ScheduledSeq, Row]]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step before it is on the device.

    Attributes:
        embedding: arrays of :class:`foveate.engine.inputs.EmbeddingInputs`.
        forward: arrays of :class:`foveate.engine.inputs.ForwardInputs`.
        sampling: arrays of :class:`foveate.engine.sampling.SamplingInputs`.
        samples: the items whose next token is chosen, in the order of their rows; with drafts, several times.
        order: where the results of each of ``scheduled.sampling`` are among them.
        pictures: (item, its first row, the number of its rows) in the order of ``picture_places``.
        variant: what their sampling needs.
        longest_query: tokens of the longest chunk; 0 if there is none.
        num_blocks: blocks of the longest sequence.
        drafts: arrays of :class:`foveate.engine.verification.DraftInputs`, in a step that has any.
    """

    embedding: Arrays
    forward: Arrays
    sampling: Arrays
    samples: list[ScheduledSeq]
    order: list[int]
    pictures: list[tuple[ScheduledSeq, int, int]]
    variant: Variant
    longest_query: int
    num_blocks: int
    drafts: Arrays | None = None


def build(scheduled: ScheduledBatch, rows: Rows, block_size: int) -> Batch:
    """Lay out a step, and bring what ``rows`` keeps up to date."""
    pairs = list(zip(scheduled.items, rows.assign(scheduled.items), strict=True))
    if scheduled.has_drafts:
        return _with_drafts(pairs, rows, block_size)
    decodes = [pair for pair in pairs if pair[1].has_token]
    chunks = [pair for pair in pairs if not pair[1].has_token]
    embedding, forward = _decodes(decodes, rows, block_size)
    samples, longest_query, longest = decodes, 0, forward["lengths"].max(initial=0)
    pictures: list[tuple[ScheduledSeq, int, int]] = []
    if chunks:
        samples = decodes + [pair for pair in chunks if pair[0].samples]
        embedding |= _tables(embedding, chunks, rows)
        embedding["token_ids"] = np.array([i for item, _ in chunks for i in _token_ids(item)], np.int64)
        forward |= _chunks(forward, chunks, len(decodes), block_size)
        pictures = _pictures(embedding, chunks, len(decodes))
        longest_query = max(item.num_tokens for item, _ in chunks)
        longest = max(longest, forward["key_lengths"].max())
    for item, row in samples:
        if item.seq.sampling.min_tokens:
            rows.mask_ends(item, row)
        row.has_token = True
    place = {id(item): index for index, (item, _) in enumerate(samples)}
    return Batch(
        embedding=embedding,
        forward=forward,
        sampling=_sampling(samples, rows),
        samples=[item for item, _ in samples],
        order=[place[id(item)] for item in scheduled.sampling],
        pictures=pictures,
        variant=rows.variant([row for _, row in samples]),
        longest_query=longest_query,
        num_blocks=int(-(-longest // block_size)),
    )


def idle_decodes(size: int, rows: Rows) -> tuple[Arrays, Arrays, Arrays]:
    """Return the arrays (embedding, forward, sampling) of ``size`` decodes that change nothing, as a batch has them."""
    indices, none = np.full(size, rows.padding, np.int64), np.zeros(size, np.int32)
    return (
        {"table_places": indices * rows.longest, "table_blocks": none},
        {
            "rows": indices,
            "lengths": none,
            "positions": np.zeros(size, np.int64),
            "slots": np.full(size, -1, np.int64),
        },
        {"rows": indices, "positions": np.zeros(size, np.int64)} | rows.parameters(indices),
    )


def idle_drafts(first: int, size: int) -> Arrays:
    """Return the arrays of drafts of ``size`` decodes that change nothing, behind ``first`` rows."""
    return {"token_ids": np.zeros(size, np.int64), "first": np.arange(first, first + size)}


def no_chunks() -> Arrays:
    """Return the forward arrays of a step without any token."""
    names = {"rows": np.int64, "lengths": np.int32, "positions": np.int64, "slots": np.int64}
    names |= {"chunk_rows": np.int64, "key_lengths": np.int32, "sampled": np.int64}
    empty: Arrays = {name: np.zeros(0, dtype) for name, dtype in names.items()}
    return empty | {"query_offsets": np.zeros(1, np.int32)}


def fill_up(forward: Arrays, num_decodes: int, num_tokens: int, rows: Rows) -> Arrays:
    """Fill up the forward arrays of a step with chunks, with what changes nothing.

    Args:
        forward: of a batch with chunks.
        num_decodes: decodes that there shall be, and chunks, and samples. Those that are not there have no token.
        num_tokens: tokens that there shall be, behind those that there are.
        rows: for a row that is nobody's.
    """

    def extended(name: str, length: int, filling: int) -> Array:
        array = forward[name]
        filled = np.full(length, filling, array.dtype)
        filled[: len(array)] = array
        return filled

    return {
        "rows": extended("rows", num_decodes, rows.padding),
        "lengths": extended("lengths", num_decodes, 0),
        "positions": extended("positions", num_tokens, 0),
        "slots": extended("slots", num_tokens, -1),
        "chunk_rows": extended("chunk_rows", num_decodes, rows.padding),
        "query_offsets": extended("query_offsets", num_decodes + 1, len(forward["positions"])),
        "key_lengths": extended("key_lengths", num_decodes, 0),
        "sampled": extended("sampled", num_decodes, 0),
    }


def _with_drafts(pairs: Pairs, rows: Rows, block_size: int) -> Batch:
    """Lay out a step with drafts, in the order of its items."""
    decodes = [pair for pair in pairs for _ in range(pair[0].num_tokens)]
    offsets = np.concatenate([np.arange(item.num_tokens) for item, _ in pairs])
    for item, row in pairs:
        assert row.has_token
        if item.seq.sampling.min_tokens:
            rows.mask_ends(item, row)
    embedding, forward = _decodes(decodes, rows, block_size, offsets)
    token_ids = [token for item, _ in pairs for token in (item.seq.token_ids[item.start], *item.drafts)]
    sampling = _sampling(decodes, rows) | {"positions": forward["positions"] + 1}
    return Batch(
        embedding=embedding,
        forward=forward,
        sampling=sampling,
        samples=[item for item, _ in decodes],
        order=list(range(len(decodes))),
        pictures=[],
        variant=rows.variant([row for _, row in pairs]),
        longest_query=0,
        num_blocks=int(-(-forward["lengths"].max() // block_size)),
        drafts={"token_ids": np.array(token_ids, np.int64), "first": np.arange(len(decodes)) - offsets},
    )


def _decodes(decodes: Pairs, rows: Rows, block_size: int, offsets: Array | int = 0) -> tuple[Arrays, Arrays]:
    """Lay out a row for each, which runs the token so far behind the item's start."""
    positions = np.array([item.start for item, _ in decodes], np.int64) + offsets
    indices = np.array([row.index for _, row in decodes], np.int64)
    places = zip(decodes, (positions // block_size).tolist(), strict=True)
    blocks = np.array([item.seq.block_table[place] for (item, _), place in places], np.int32)
    embedding: Arrays = {"table_places": indices * rows.longest + positions // block_size, "table_blocks": blocks}
    forward: Arrays = {
        "rows": indices,
        "lengths": (positions + 1).astype(np.int32),
        "positions": positions,
        "slots": blocks.astype(np.int64) * block_size + positions % block_size,
    }
    return embedding, forward


def _chunks(forward: Arrays, chunks: Pairs, first: int, block_size: int) -> Arrays:
    """Put the chunks' tokens behind those of ``first`` decodes."""
    items = [item for item, _ in chunks]
    positions, slots = [forward["positions"]], [forward["slots"]]
    for item in items:
        table, places = np.array(item.seq.block_table, np.int64), np.arange(item.start, item.start + item.num_tokens)
        positions.append(places)
        slots.append(table[places // block_size] * block_size + places % block_size)
    ends = np.cumsum([item.num_tokens for item in items], dtype=np.int32)
    sampled = [first + end - 1 for item, end in zip(items, ends.tolist(), strict=True) if item.samples]
    return {
        "positions": np.concatenate(positions),
        "slots": np.concatenate(slots),
        "chunk_rows": np.array([row.index for _, row in chunks], np.int64),
        "query_offsets": np.concatenate((np.zeros(1, np.int32), ends)) + np.int32(first),
        "key_lengths": np.array([item.start + item.num_tokens for item in items], np.int32),
        "sampled": np.array([*range(first), *sampled], np.int64),
    }


def _tables(embedding: Arrays, chunks: Pairs, rows: Rows) -> Arrays:
    """Add whole block tables of the sequences that are new."""
    places, blocks = [embedding["table_places"]], [embedding["table_blocks"]]
    for item, row in chunks:
        if not row.has_table:
            row.has_table = True
            blocks.append(np.array(item.seq.block_table, np.int32))
            places.append(row.index * rows.longest + np.arange(len(item.seq.block_table)))
    return {"table_places": np.concatenate(places), "table_blocks": np.concatenate(blocks)}


def _pictures(embedding: Arrays, chunks: Pairs, token: int) -> list[tuple[ScheduledSeq, int, int]]:
    """Add where pictures' rows go; the first chunk begins at ``token``."""
    found, places = [], []
    for item, _ in chunks:
        positions = state_of(item.seq).image_positions
        first, last = np.searchsorted(positions, (item.start, item.start + item.num_tokens)).tolist()
        if first < last:
            found.append((item, first, last - first))
            places.append(positions[first:last] - item.start + token)
        token += item.num_tokens
    if places:
        embedding["picture_places"] = np.concatenate(places)
    return found


def _token_ids(item: ScheduledSeq) -> list[int]:
    return item.seq.token_ids[item.start : item.start + item.num_tokens]


def _sampling(samples: Pairs, rows: Rows) -> Arrays:
    indices = np.array([row.index for _, row in samples], np.int64)
    ends = np.array([item.start + item.num_tokens for item, _ in samples], np.int64)
    return {"rows": indices, "positions": ends} | rows.parameters(indices)
