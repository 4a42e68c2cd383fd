"""A scheduler with a fake model, whose answers depend on what the KV cache really holds.

The fake model writes a record for every token that a step runs into the slot that the block table names,
then reads the whole context back through the table. A block that is shared wrongly, lost, reused too
early or never written shows as a wrong context at once.

Like a device it runs steps in the order in which they were launched, and knows the tokens that it chose before
the scheduler does; unlike one it can put a step off until somebody asks for its results.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, Literal

from foveate.config import EngineSettings
from foveate.engine.messages import SamplingParams
from foveate.engine.scheduler import Scheduler
from foveate.engine.sequence import ImageSpan, Sequence, SequenceStatus
from foveate.engine.step import SampledToken, ScheduledBatch
from foveate.errors import Unavailable

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


Fault = Literal["launch", "end"]


class Engine:
    """A scheduler with the fake model, watched: every promise of the scheduler is asserted at every step.

    With ``late``, a step runs when its results are wanted, otherwise when it is launched.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        depth: int = 0,
        late: bool = False,
        choose: Choose = next_token,
        **engine_settings: Any,
    ) -> None:
        self.settings = EngineSettings.model_validate({"block_size": 4, **engine_settings})
        self.block_size = self.settings.tokens_per_block(on_gpu=False)
        self.scheduler = Scheduler(
            self.settings, num_blocks=num_blocks, block_size=self.block_size, max_seq_len=MAX_SEQ_LEN, depth=depth
        )
        self.model = FakeModel(self.block_size, choose)
        self.late = late
        self.open: deque[tuple[ScheduledBatch, list[Part], Callable[[], list[int]]]] = deque()
        self.ran: set[Sequence] = set()
        self.added: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.sent: dict[Sequence, list[int]] = {}
        self.ended: dict[Sequence, str] = {}

    def add(self, *seqs: Sequence) -> None:
        self.scheduler.add(*seqs)
        self.added += seqs
        self.sent.update({seq: [] for seq in seqs})

    def step(self, *, fault: Fault | None = None) -> ScheduledBatch | None:
        """Launch a step and end the oldest if enough are open, as the engine's core does; return what was launched."""
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        assert (batch is not None or bool(self.open)) == had_work, "there is work, so there is a step"
        ran, self.ran = self.ran, {item.seq for item in batch.items if item.samples} if batch else set()
        if batch is not None:
            self._watch(batch, ran)
            self.scheduler.check()
            self.open.append((batch, self.model.parts(batch), self.model.launch(batch)))
            if fault == "launch":
                self._fail(len(self.open) - 1)
                return batch
            if not self.late:
                self.open[-1][-1]()
        if self.open and (batch is None or len(self.open) > self.scheduler.depth):
            if fault == "end":
                self._fail(0)
            else:
                self._end_step()
        self.scheduler.check()
        return batch

    def _end_step(self) -> None:
        batch, _, run = self.open.popleft()
        expected = [item.seq for item in batch.sampling if item.seq not in self.ended]
        results = self.scheduler.update(batch, run())
        assert [seq for seq, _ in groupby(results, lambda result: result.seq)] == expected
        self._collect(results)

    def _fail(self, first: int) -> None:
        """Have an open step fail, and with it those behind it; those before it have run."""
        for _, _, run in list(self.open)[:first]:
            run()
        failed = list(self.open)[first:]
        for _, parts, _ in failed:
            self.model.fail(parts)
        ended = self.scheduler.rollback(failed[0][0])
        seqs = {item.seq for batch, _, _ in failed for item in batch.items}
        assert set(ended) == {seq for seq in seqs if seq not in self.ended}
        self._end(ended)
        self.open = deque(list(self.open)[:first])
        self.scheduler.check()

    def abort(self, name: str, index: int | None = None) -> None:
        self._end(self.scheduler.abort(name, index))
        self.scheduler.check()

    def supply(self, seq: Sequence, number: int, digest: bytes | None = None) -> None:
        """Bring the rows of a missing picture; what was not expected, where that comes too late, ends the request."""
        try:
            seq.supply(number, seq.images[number].digest or b"late" if digest is None else digest)
        except Unavailable:
            self.abort(seq.request_id)
        self.scheduler.check()

    def finish(self) -> None:
        """Run until idle, in a bounded number of steps; everybody was served and nothing is left.

        Pictures that are missing come when nothing else is left to do.
        """
        limit = 60 * (1 + len(self.added)) * MAX_SEQ_LEN
        while self.scheduler.has_work or self.scheduler.running or self.scheduler.waiting:
            limit -= 1
            assert limit, "no progress"
            if not self.scheduler.has_work:
                seq = [*self.scheduler.waiting, *self.scheduler.running][-1]
                self.supply(seq, max(seq.missing))
            self.step()
        assert not self.open
        for seq in self.added:
            assert seq.num_pending == 0
            assert seq.status is SequenceStatus.FINISHED
            assert self.ended[seq] == seq.finish_reason
            assert self.sent[seq] == seq.output_token_ids
            if seq.finish_reason != "abort":
                assert (seq.output_token_ids, seq.finish_reason) == answer_alone(seq, self.model.choose)
        stats = self.scheduler.stats()
        assert stats.free_blocks == stats.total_blocks
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.finished + stats.aborted == len(self.added)
        assert stats.prompt_tokens == sum(seq.num_prompt_tokens for seq in self.admitted)
        assert stats.cached_tokens == sum(seq.num_cached_tokens for seq in self.admitted)
        assert stats.generated_tokens == sum(len(tokens) for tokens in self.sent.values())

    def _watch(self, batch: ScheduledBatch, ran: set[Sequence]) -> None:
        assert 0 < batch.num_tokens <= self.settings.max_num_tokens
        assert len(batch.items) <= self.settings.max_batch_size
        most = self.settings.max_mixed_tokens
        if most and any(item.seq in ran for item in batch.items):
            of_prompts = sum(item.num_tokens for item in batch.items if item.num_tokens > 1 and not item.drafts)
            assert of_prompts <= max(1, most - self.settings.max_batch_size)
        seqs = [item.seq for item in batch.items]
        assert seqs == [seq for seq in self.scheduler.running if seq in seqs]
        for seq in self.scheduler.running:
            at_its_end = seq.num_pending and seq.num_placed == seq.max_len
            assert seq in seqs or at_its_end or seq.stalled, "somebody is left out"
        preempted = set(self.scheduler.waiting) & set(self.admitted)
        assert all(seq.num_preemptions and not seq.block_table for seq in preempted)
        for item in batch.items:
            assert item.num_tokens >= 1
            assert item.start + item.num_tokens - len(item.drafts) == item.seq.num_computed_tokens
            assert item.seq.num_placed + len(item.drafts) <= item.seq.max_len
            assert item.samples == (item.seq.num_computed_tokens == item.seq.num_placed - item.samples)
            assert item.seq.num_pending <= 1 + self.scheduler.depth
            if item.seq not in self.admitted:
                assert item.start == item.seq.num_cached_tokens < item.seq.num_prompt_tokens
                self.admitted.append(item.seq)
        # First come, first served: whoever was never admitted is behind all who were, or came before its pictures.
        admitted = [seq for seq in self.admitted if not seq.came_early]
        order = [seq for seq in self.added if not seq.came_early and (seq in admitted or seq not in self.ended)]
        assert order[: len(admitted)] == admitted

    def _collect(self, results: list[SampledToken]) -> None:
        for result in results:
            assert result.seq not in self.ended, "a sequence that has ended goes on"
            if result.finish_reason != "stop":
                self.sent[result.seq].append(result.token_id)
            if result.finish_reason is not None:
                self._end([result.seq])

    def _end(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            assert seq not in self.ended, "a sequence ends twice"
            assert seq.finish_reason is not None
            assert seq.block_table == []
            self.ended[seq] = seq.finish_reason
