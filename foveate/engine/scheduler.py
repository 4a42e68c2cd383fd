"""Decides, step by step, which tokens of which sequences the model runs.

A step has one budget of tokens. Every running sequence is sure of one; what is left is for prompts that go on, in the
order of their admission, then for new ones, first come first served. A prompt that does not fit is prefilled in chunks.
Where answers go on, prompts get less: a step with few tokens takes little longer than one that only decodes, since the
weights have to be read anyway (the chunked prefill of Sarathi, Agrawal et al., 2023).

A prompt may come before the rows of its pictures: it is prefilled as far as the first one that is missing, and *stalls*
there until that is supplied. It keeps its blocks as long as nobody needs them.

Steps may overlap: with a ``depth`` of 1, the next step is scheduled while one is still *open*, that is, before
anybody knows the tokens that it chooses. They have their places already (:attr:`Sequence.num_placed`), and the
runner has them on the device. A sequence that turns out to have ended has a part in one more step, whose token
for it is dropped. Aborts and preemptions need not wait for open steps either.

With speculation (:mod:`foveate.engine.speculation`), a step of nothing but decodes runs guesses behind the newest
tokens. How many tokens it brings is known only when it has ended, and guesses need the newest tokens: so no step is
scheduled behind an open one that has drafts, nor while anybody has guesses. Nobody loses a block to a guess.

The code leans on these invariants:

* Only the last running sequence, and those that came before their pictures, can be in the middle of their prompts: the
  last one took all that was left, so nobody was admitted after it. So every running sequence is part of every step,
  unless it is stalled or an open step is sure to choose its last token.
* A sequence gets the blocks of all its known tokens when it is admitted. So only one that generates can
  lack a block later, and only for its next token.
* Steps run in the order in which they were scheduled. So blocks can be freed while an open step still writes
  to them: whoever gets them is part of a later step, and writes before it reads.
* Others share a block as soon as the step that fills it is scheduled (:mod:`foveate.engine.kv_manager`). If a step
  fails, it is given up together with all that were scheduled after it (:meth:`Scheduler.rollback`): else a hash could
  lead to a block that was never written.

When a running sequence lacks a block, which only ``max_utilization`` lets happen, whoever was admitted last gives up
its own, waits at the head of the queue and is computed again, with the tokens that it has generated. The oldest of
those that are not stalled never does, so there is always progress. The stalled ones give up theirs first, and with both
policies to whoever would be admitted, and wait for their pictures at the head of the queue; others overtake them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from itertools import islice, zip_longest

from foveate.config import EngineSettings
from foveate.engine.blocks import BlockAllocator
from foveate.engine.kv_manager import KVManager
from foveate.engine.messages import FinishReason, Stats
from foveate.engine.sequence import Sequence, SequenceStatus
from foveate.engine.speculation import Speculation, can_draft
from foveate.engine.step import Counts, SampledToken, ScheduledBatch, ScheduledSeq
from foveate.engine.waiting import WaitingQueue
from foveate.errors import EngineError


class Scheduler:
    """Owns the queue, the running sequences and the KV blocks of one engine.

    Args:
        settings: limits and policy.
        num_blocks: KV blocks of the cache.
        block_size: tokens of a block.
        max_seq_len: most tokens of a prompt and its answer together.
        mixed_tokens: tokens of a step where answers go on, a full batch's included; None: as many as in any step.
        depth: steps that may be open when another one is scheduled: 0 or 1.

    Attributes:
        waiting: sequences that wait. Look, but do not touch.
        running: sequences that hold blocks, in the order of their admission. Look, but do not touch.
        allocator: the KV blocks.
    """

    def __init__(
        self, settings: EngineSettings, *, num_blocks: int, block_size: int, max_seq_len: int,
        mixed_tokens: int | None = None, depth: int = 0,
    ) -> None:  # fmt: skip
        caching = settings.enable_prefix_caching
        self.allocator = BlockAllocator(num_blocks, block_size, enable_prefix_caching=caching)
        self.max_batch_size = settings.max_batch_size
        self.max_num_tokens = settings.max_num_tokens
        self._most_mixed = max(mixed_tokens - settings.max_batch_size, 1) if mixed_tokens else settings.max_num_tokens
        self.max_input_len = min(settings.max_input_len or max_seq_len, max_seq_len - 1)
        self.max_image_tokens = min(settings.max_image_tokens or self.max_input_len, self.max_input_len)
        self._kv = KVManager(self.allocator, guaranteed=settings.scheduler_policy == "guaranteed_no_evict")
        self.waiting = WaitingQueue(settings.max_queue_size, self.max_input_len, self._kv)
        self.running: list[Sequence] = []
        self.depth = depth
        self._open: deque[ScheduledBatch] = deque()
        self._speculation = Speculation(settings, self.allocator)
        self._counts = Counts()

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do: a step to schedule, or one to wait for."""
        can_go_on = self._open or any(not seq.stalled for seq in self.running)
        return bool(can_go_on) or self.waiting.next() is not None

    def add(self, *seqs: Sequence) -> None:
        """Queue the sequences of a request: all of them, or with an error none.

        Raises:
            ContextLengthExceeded: a sequence can never fit.
            Overloaded: too many sequences wait already.
        """
        self.waiting.add(*seqs)

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step, or None if there is nothing to do, or nothing until an open step ends.

        The step must be run behind those that are open, and then given to :meth:`update`, or to :meth:`rollback` if
        it failed.

        Raises:
            EngineError: too many steps are open.
        """
        if len(self._open) > self.depth:
            raise EngineError(f"cannot schedule another step while {len(self._open)} are open")
        if self._open and self._speculation.awaits(self._open, self._going()):
            return None
        self._make_room()
        items: list[ScheduledSeq] = []
        going = self._going()
        can_have_drafts = not self._open and can_draft(going)
        stalled = [seq for seq in self.running if seq.stalled]
        budget = self._budget(going)
        for seq in going:
            items.append(self._chunk(seq, 1 + budget))
            budget -= items[-1].num_tokens - 1
        # Whoever just lost its blocks is hardly ever admitted here: it needs what it freed, and some is gone.
        while budget and (admitted := self._admit_next(stalled)) is not None:
            items.append(self._chunk(admitted, budget))
            budget -= items[-1].num_tokens
            can_have_drafts = False
        if not items:
            return None
        if can_have_drafts:
            items = self._speculation.with_drafts(items)
        batch = ScheduledBatch(tuple(items))
        self._open.append(batch)
        return batch

    def update(self, batch: ScheduledBatch, sampled: list[int]) -> list[SampledToken]:
        """Take in the results of the oldest open step, and free the sequences that it finished.

        Args:
            batch: the step.
            sampled: the chosen tokens' ids, ``num_choices`` for each of ``batch.sampling``, in order.

        Returns:
            the tokens of all sequences that had not ended before, in the same order; those behind a wrong draft, or
            behind a sequence's end, are left out

        Raises:
            EngineError: this is not the oldest open step, or there are too few or too many tokens.
        """
        sampling = batch.sampling
        if not self._open or batch is not self._open[0]:
            raise EngineError("this step is not the oldest open one")
        if len(sampled) != sum(item.num_choices for item in sampling):
            raise EngineError(f"the step chose {len(sampled)} tokens for {len(sampling)} sequences")
        self._open.popleft()
        self._counts.steps += 1
        results: list[SampledToken] = []
        chosen = iter(sampled)
        for item in sampling:
            token_ids = list(islice(chosen, item.num_choices))
            item.seq.num_pending -= 1
            if item.seq.status is not SequenceStatus.FINISHED:
                results += self._take_tokens(item, token_ids)
        self._drop_finished()
        return results

    def rollback(self, batch: ScheduledBatch) -> list[Sequence]:
        """Give up a step that failed, and those after it: end all of their sequences and return them.

        What the steps should have written may not be there, so the prefix cache forgets it.

        Raises:
            EngineError: the step is not open.
        """
        if not self.is_open(batch):
            raise EngineError("this step is not open")
        failed: dict[Sequence, None] = {}
        while self.is_open(batch):
            for item in self._open.pop().items:
                self.allocator.forget(item.filled)
                item.seq.num_pending -= item.samples
                failed[item.seq] = None
        return self._abort([seq for seq in failed if seq.status is not SequenceStatus.FINISHED])

    def is_open(self, batch: ScheduledBatch) -> bool:
        """Whether a step is neither over nor given up."""
        return batch in self._open

    def abort(self, request_id: str, index: int | None = None) -> list[Sequence]:
        """End a request's sequences, or the one with this index, wherever they stand; return them.

        Their blocks are free at once. Unknown ids are no error: the request may just have finished.
        """
        return self._abort([seq for seq in self.find(request_id) if index is None or seq.index == index])

    def find(self, request_id: str) -> list[Sequence]:
        """Return the sequences of a request that have not ended."""
        return [seq for seq in (*self.running, *self.waiting) if seq.request_id == request_id]

    def stats(self) -> Stats:
        """Return a snapshot."""
        return Stats(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            free_blocks=self.allocator.num_free,
            cached_blocks=self.allocator.num_cached,
            total_blocks=self.allocator.num_blocks,
            draft_tokens=self._speculation.num_drafts,
            accepted_tokens=self._speculation.num_accepted,
            **asdict(self._counts),
        )

    def check(self) -> None:
        """Verify every invariant; cheap enough to call whenever the engine is idle.

        Raises:
            EngineError: one does not hold; the message says which.
        """
        self._kv.check(self.running)
        self.waiting.check()
        for seq in self.running:
            if seq.status is not SequenceStatus.RUNNING:
                raise EngineError(f"{seq} is among the running, but does not say so")
        for seq in self.running[:-1]:
            if seq.num_computed_tokens != seq.num_placed - 1 and not seq.came_early:
                raise EngineError(f"{seq} is not the last admitted, but in the middle of its prompt")

    def _make_room(self) -> None:
        """Give every running sequence the block of its next token, if need be at the cost of the youngest."""
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            if not self._goes_on(seq) or self._kv.extend(seq):
                position += 1
            else:
                position -= self._preempt_one() < position

    def _preempt_one(self) -> int:
        """Take the blocks of the youngest that is stalled, or else of the youngest, and return its place."""
        places = range(len(self.running))
        place = next((place for place in reversed(places) if self.running[place].stalled), places[-1])
        self._preempt(self.running.pop(place))
        return place

    def _preempt(self, seq: Sequence) -> None:
        self._kv.take_back(seq)
        seq.is_decoding = False
        seq.num_preemptions += 1
        seq.parked = bool(seq.missing)
        seq.status = SequenceStatus.WAITING
        self.waiting.put_back(seq)
        self._counts.preemptions += 1

    def _admit_next(self, stalled: list[Sequence]) -> Sequence | None:
        """Admit the first in the queue that can start, if need be at the cost of stalled ones. Nobody overtakes it."""
        seq = self.waiting.next()
        # One with a token on its way was just preempted: the host must know that to have it computed again.
        if seq is None or seq.num_pending:
            return None
        while len(self.running) >= self.max_batch_size or not self._kv.start(seq, self.running):
            if not stalled:
                return None
            self.running.remove(stalled[-1])
            self._preempt(stalled.pop())
        seq.status = SequenceStatus.RUNNING
        self.waiting.remove(seq)
        self.running.append(seq)
        if not seq.num_preemptions:
            seq.num_cached_tokens = seq.num_computed_tokens
            self._counts.prompt_tokens += seq.num_prompt_tokens
            self._counts.cached_tokens += seq.num_cached_tokens
        return seq

    def _budget(self, going: list[Sequence]) -> int:
        """Return the tokens of the next step, beside one for each of those who go on."""
        left = self.max_num_tokens - len(going)
        prompts = sum(not seq.is_decoding for seq in going)
        if prompts == len(going):
            return left
        return min(left, max(self._most_mixed - prompts, 0))

    def _going(self) -> list[Sequence]:
        """Return those who run and need another step that can be run now."""
        return [seq for seq in self.running if self._goes_on(seq)]

    def _goes_on(self, seq: Sequence) -> bool:
        """Whether a sequence needs another step that can be run now: its very last token is never run."""
        return seq.num_placed < seq.max_len and not seq.stalled

    def _chunk(self, seq: Sequence, budget: int) -> ScheduledSeq:
        """Plan as many of a sequence's tokens as the budget allows; register the blocks that they fill."""
        start, size = seq.num_computed_tokens, self.allocator.block_size
        end = min(seq.computable(start), start + budget)
        samples = end == seq.num_placed
        seq.num_computed_tokens = end
        seq.num_pending += samples
        seq.is_decoding |= samples
        self._kv.register(seq)
        return ScheduledSeq(seq, start, end - start, samples, tuple(seq.block_table[start // size : end // size]))

    def _take_tokens(self, item: ScheduledSeq, token_ids: list[int]) -> list[SampledToken]:
        """Take what a step chose, as long as it ran the right tokens."""
        results: list[SampledToken] = []
        for token_id, draft in zip_longest(token_ids, item.drafts):
            if results:  # The draft before this was right, and so are its keys and values.
                item.seq.num_computed_tokens += 1
                self._kv.register(item.seq)
            results.append(self._take_token(item.seq, token_id))
            if token_id != draft or results[-1].finish_reason is not None:
                break
        self._speculation.note(item, len(results) - 1)
        return results

    def _take_token(self, seq: Sequence, token_id: int) -> SampledToken:
        reason = seq.check_stop(token_id)
        if reason != "stop":
            seq.append(token_id)
            self._counts.generated_tokens += 1
        if reason is not None:
            self._finish(seq, reason)
            self._counts.finished += 1
        elif seq.num_pending:
            self._kv.register(seq)  # The next step is open already, and may fill a block whose last token this is.
        return SampledToken(seq, token_id, reason)

    def _abort(self, seqs: list[Sequence]) -> list[Sequence]:
        for seq in seqs:
            self._finish(seq, "abort")
            self._counts.aborted += 1
        self._drop_finished()
        return seqs

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self.allocator.free(seq.block_table)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        self._speculation.forget(seq)

    def _drop_finished(self) -> None:
        self.running = [seq for seq in self.running if seq.status is not SequenceStatus.FINISHED]
        self.waiting.drop_finished()
