"""A model whose answers depend on what the KV cache really holds.

It writes a record for every token that a step runs into the slot that the block table names,
then reads the whole context back through the table. A block that is shared wrongly, lost, reused too
early or never written shows as a wrong context at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from foveate.engine.messages import SamplingParams
from foveate.engine.sequence import ImageSpan, Sequence
from foveate.engine.step import ScheduledBatch

UNK, EOS, VOCAB = 9, 0, 8
MAX_SEQ_LEN = 40
Record = tuple[int, int, int, int]


def sequence(
    name: str,
    tokens: list[int],
    images: list[ImageSpan] | None = None,
    index: int = 0,
    missing: Iterable[int] = (),
    **sampling: Any,
) -> Sequence:
    return Sequence(
        request_id=name,
        index=index,
        prompt_token_ids=tokens,
        sampling=SamplingParams(**{"max_tokens": 4, **sampling}),
        eos_token_ids=frozenset({EOS}),
        max_seq_len=MAX_SEQ_LEN,
        images=images or [],
        missing=set(missing),
    )


def records(tokens: list[int], images: list[ImageSpan]) -> list[Record]:
    """Return (token, position, picture's digest, row) for every token: all that keys and values depend on."""
    result: list[Record] = [(token, position, 0, 0) for position, token in enumerate(tokens)]
    for image in images:
        positions = (start + offset for start, length in image.ranges for offset in range(length))
        for row, position in enumerate(positions):
            result[position] = (tokens[position], position, int.from_bytes(image.digest), row)
    return result


def next_token(context: list[Record]) -> int:
    """Choose a token as a function of nothing but the context, all of it."""
    return hash(tuple(context)) // VOCAB % VOCAB  # The hash of integers is the same in every process.


def repeating_token(context: list[Record]) -> int:
    """Choose a token as a function of the last two, mostly, so that answers repeat themselves for a while."""
    if len(context) % 7 == 0:
        return next_token(context)
    return hash(tuple(token for token, *_ in context[-2:])) // VOCAB % VOCAB


Choose = Callable[[list[Record]], int]


def answer_alone(seq: Sequence, choose: Choose = next_token) -> tuple[list[int], str]:
    """Return the answer and its finish reason, without any scheduler, cache or neighbour."""
    context = records(seq.token_ids[: seq.num_prompt_tokens], seq.images)
    answer: list[int] = []
    ends = set(seq.sampling.stop_token_ids) | (set() if seq.sampling.ignore_eos else {EOS})
    while True:
        token = choose(context)
        if token in ends and len(answer) >= seq.sampling.min_tokens:
            return answer, "stop"
        answer.append(token)
        context.append((token, len(context), 0, 0))
        if len(answer) == seq.sampling.max_tokens or len(context) == MAX_SEQ_LEN:
            return answer, "length"


@dataclass
class Part:
    """What a step needs of a sequence, as it is when the step is launched."""

    seq: Sequence
    start: int
    end: int
    samples: bool
    block_table: list[int]
    known: list[int]
    drafts: list[int]


@dataclass
class FakeModel:
    """A KV cache of records, one a slot, and the newest token of every sequence."""

    block_size: int
    choose: Choose = next_token
    slots: dict[int, Record] = field(default_factory=dict)
    newest: dict[Sequence, int] = field(default_factory=dict)

    def launch(self, batch: ScheduledBatch) -> Callable[[], list[int]]:
        """Return what runs the step, once, and tells the chosen tokens."""
        parts = self.parts(batch)
        return cache(lambda: self.run(parts))

    def parts(self, batch: ScheduledBatch) -> list[Part]:
        for item in batch.items:
            for number in item.seq.missing:
                for start, length in item.seq.images[number].ranges:
                    assert item.start + item.num_tokens <= start or start + length <= item.start, "rows are not there"
        return [
            Part(
                item.seq, item.start, item.start + item.num_tokens, item.samples, list(item.seq.block_table),
                list(item.seq.token_ids), list(item.drafts),
            )
            for item in batch.items
        ]  # fmt: skip

    def slot(self, part: Part, position: int) -> int:
        return part.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def run(self, parts: list[Part]) -> list[int]:
        written: set[int] = set()
        contents = []
        for part in parts:
            tokens = [*part.known, *part.drafts]
            if not part.drafts and part.end == len(part.known) + 1:
                tokens.append(self.newest[part.seq])
            assert part.end <= len(tokens), "a step runs a token that nobody has chosen"
            contents.append(records(tokens, part.seq.images)[: part.end])
            for position in range(part.start, part.end):
                slot = self.slot(part, position)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.slots[slot] = contents[-1][position]
        sampled = []
        for part, own in zip(parts, contents, strict=True):
            context = [self.slots[self.slot(part, position)] for position in range(part.end)]
            assert context == own, f"{part.seq} reads what is not its own"
            if part.samples:
                first = part.end - len(part.drafts)
                chosen = [self.choose(context[:end]) for end in range(first, part.end + 1)]
                good = next((n for n, draft in enumerate(part.drafts) if chosen[n] != draft), len(part.drafts))
                self.newest[part.seq] = chosen[good]
                sampled += chosen
        return sampled

    def fail(self, parts: list[Part]) -> None:
        """Spoil what a step would have written, as a step that raised may have done."""
        for part in parts:
            for position in range(part.start, part.end):
                self.slots[self.slot(part, position)] = (-1, -1, -1, -1)
