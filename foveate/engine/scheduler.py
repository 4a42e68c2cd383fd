"""Decides, step by step, which tokens of which sequences the model runs.

A step has one budget of tokens. Running sequences use it first, in the order of their admission, then new
ones, first come first served; a prompt that does not fit into what is left is prefilled in chunks. The code
leans on three invariants:

* Only the last running sequence can be in the middle of its prompt: it took all that was left, so nobody
  was admitted after it. The others need one token each, and are fewer than the budget's tokens. So every
  running sequence is part of every step.
* A sequence gets the blocks of all its known tokens when it is admitted. So only one that generates can
  lack a block later, and only for its next token.
* Full blocks are registered for sharing while the step that computes them is scheduled, so sequences of one
  step share as well (the runner writes a layer's keys and values of the whole step before it reads any).
  Nothing may come between :meth:`Scheduler.schedule` and :meth:`Scheduler.update`, or
  :meth:`Scheduler.rollback` if the step failed: else a hash could lead to a block that was never written.
  This is enforced.

Two policies say when a sequence is admitted. ``guaranteed_no_evict`` wants all blocks that it can ever
need, beside what the running ones can still come to need. ``max_utilization`` wants blocks for the tokens
it has now and one more for everybody; when a running sequence still comes to lack one, whoever was admitted
last gives up its own, waits at the head of the queue and is computed again, with the tokens that it has
generated. The oldest never gives up its blocks, so there is always progress.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from foveate.config import EngineSettings
from foveate.engine.blocks import BlockAllocator
from foveate.engine.messages import FinishReason, Stats
from foveate.engine.sequence import Sequence, SequenceStatus
from foveate.errors import ContextLengthExceeded, EngineError, Overloaded

RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """One sequence's part in a step: tokens ``[start, start + num_tokens)`` of its ``token_ids``.

    Attributes:
        samples: whether the last of them is the newest token, so that the step chooses the next one.
        registered: blocks that this part fills and that the prefix cache now knows.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    registered: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """What one step runs."""

    items: tuple[ScheduledSeq, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(item.num_tokens for item in self.items)

    @property
    def sampling(self) -> list[ScheduledSeq]:
        """The items whose next token the step chooses, in order."""
        return [item for item in self.items if item.samples]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a step chose for one sequence.

    With the ``finish_reason`` ``"stop"``, ``token_id`` ended the answer and is no part of it.
    """

    seq: Sequence
    token_id: int
    finish_reason: FinishReason | None


class Scheduler:
    """Owns the queue, the running sequences and the KV blocks of one engine.

    Args:
        settings: limits and policy.
        num_blocks: KV blocks of the cache.
        max_seq_len: most tokens of a prompt and its answer together.

    Attributes:
        waiting: sequences that wait, the next one first. Look, but do not touch.
        running: sequences that hold blocks, in the order of their admission. Look, but do not touch.
        allocator: the KV blocks.
    """

    def __init__(self, settings: EngineSettings, *, num_blocks: int, max_seq_len: int) -> None:
        caching = settings.enable_prefix_caching
        self.allocator = BlockAllocator(num_blocks, settings.block_size, enable_prefix_caching=caching)
        self.max_batch_size = settings.max_batch_size
        self.max_num_tokens = settings.max_num_tokens
        self.max_queue_size = settings.max_queue_size
        self.max_input_len = min(settings.max_input_len or max_seq_len, max_seq_len - 1)
        self.max_image_tokens = min(settings.max_image_tokens or self.max_input_len, self.max_input_len)
        self.guaranteed = settings.scheduler_policy == "guaranteed_no_evict"
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._in_flight: ScheduledBatch | None = None
        self._steps = self._preemptions = self._finished = self._aborted = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether :meth:`schedule` would return a step."""
        return bool(self.waiting or self.running)

    def add(self, *seqs: Sequence) -> None:
        """Queue the sequences of a request: all of them, or with an error none.

        Raises:
            ContextLengthExceeded: a sequence can never fit.
            Overloaded: too many sequences wait already.
        """
        for seq in seqs:
            self._validate(seq)
        if len(self.waiting) + len(seqs) > self.max_queue_size:
            message = f"{len(self.waiting)} sequences wait already, and at most {self.max_queue_size} may"
            raise Overloaded(message, retry_after=RETRY_AFTER_SECONDS)
        self.waiting.extend(seqs)

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step, or None if there is nothing to do.

        The step must be run at once and then given to :meth:`update`, or to :meth:`rollback` if it failed.

        Raises:
            EngineError: the step before is still open.
        """
        self._expect_no_step("schedule another")
        self._make_room()
        items: list[ScheduledSeq] = []
        budget = self.max_num_tokens
        for seq in self.running:
            items.append(self._chunk(seq, budget))
            budget -= items[-1].num_tokens
        # Whoever just lost its blocks cannot be admitted: it needs all that it freed, and one is gone.
        while budget and (admitted := self._admit_next()) is not None:
            items.append(self._chunk(admitted, budget))
            budget -= items[-1].num_tokens
        self._in_flight = ScheduledBatch(tuple(items)) if items else None
        return self._in_flight

    def update(self, batch: ScheduledBatch, sampled: list[int]) -> list[SampledToken]:
        """Take in the results of a step that has run, and free the sequences that it finished.

        Args:
            batch: the step.
            sampled: the chosen tokens' ids, one for each of ``batch.sampling``, in order.

        Raises:
            EngineError: this is not the open step, or there are too few or too many tokens.
        """
        sampling = batch.sampling
        self._expect_step(batch)
        if len(sampled) != len(sampling):
            raise EngineError(f"the step chose {len(sampled)} tokens for {len(sampling)} sequences")
        self._in_flight = None
        self._steps += 1
        for item in batch.items:
            item.seq.num_computed_tokens = item.start + item.num_tokens
        pairs = zip(sampling, sampled, strict=True)
        results = [self._take_token(item.seq, token_id) for item, token_id in pairs]
        self._drop_finished()
        return results

    def rollback(self, batch: ScheduledBatch) -> list[Sequence]:
        """Give up a step that raised: end all of its sequences and return them.

        What the step should have written may not be there, so the prefix cache forgets it.

        Raises:
            EngineError: this is not the open step.
        """
        self._expect_step(batch)
        self._in_flight = None
        for item in batch.items:
            self.allocator.forget(item.registered)
        return self._abort([item.seq for item in batch.items])

    def abort(self, request_id: str, index: int | None = None) -> list[Sequence]:
        """End a request's sequences, or the one with this index, wherever they stand; return them.

        Their blocks are free at once. Unknown ids are no error: the request may just have finished.

        Raises:
            EngineError: a step is open.
        """
        self._expect_no_step("abort")
        seqs = [seq for seq in (*self.running, *self.waiting) if seq.request_id == request_id]
        return self._abort([seq for seq in seqs if index is None or seq.index == index])

    def stats(self) -> Stats:
        """Return a snapshot. Prompt and cached tokens count once a sequence, when it is first admitted."""
        return Stats(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            free_blocks=self.allocator.num_free,
            cached_blocks=self.allocator.num_cached,
            total_blocks=self.allocator.num_blocks,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            finished=self._finished,
            aborted=self._aborted,
        )

    def check(self) -> None:
        """Verify every invariant; cheap enough to call whenever the engine is idle.

        Raises:
            EngineError: one does not hold; the message says which.
        """
        self.allocator.check(seq.block_table for seq in self.running)
        for seq in self.waiting:
            if seq.status is not SequenceStatus.WAITING or seq.block_table or seq.num_computed_tokens:
                raise EngineError(f"{seq} waits, but has the state of one that runs")
        for seq in self.running:
            if seq.status is not SequenceStatus.RUNNING:
                raise EngineError(f"{seq} is among the running, but does not say so")
            for block, block_hash in zip(seq.block_table, self._hashes(seq), strict=False):
                if self.allocator.hash_of(block) not in (None, block_hash):
                    raise EngineError(f"{seq} holds block {block}, which is registered for other contents")
        for seq in self.running[:-1] if self._in_flight is None else []:
            if seq.num_computed_tokens != seq.num_tokens - 1:
                raise EngineError(f"{seq} is not the last admitted, but in the middle of its prompt")
        promised = sum(self._promised(seq, len(seq.block_table)) for seq in self.running)
        if self.guaranteed and promised > self.allocator.num_free:
            raise EngineError(f"{promised} blocks are promised, but {self.allocator.num_free} are free")

    def _make_room(self) -> None:
        """Give every running sequence the block of its next token, if need be at the cost of the youngest."""
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            if self.allocator.extend(seq.block_table, seq.num_tokens):
                position += 1
            else:  # The last one: it has no part in this step yet, and may be this very sequence.
                self._preempt(self.running.pop())

    def _preempt(self, seq: Sequence) -> None:
        self.allocator.free(seq.block_table)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self._preemptions += 1

    def _admit_next(self) -> Sequence | None:
        """Admit the head of the queue, if there is a place and there are blocks. Nobody overtakes it."""
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return None
        seq = self.waiting[0]
        allocator = self.allocator
        # The newest token is always computed, as its logits are wanted: its block is not part of a hit.
        hit = allocator.match_prefix(self._hashes(seq)[: (seq.num_tokens - 1) // allocator.block_size])
        num_blocks = allocator.blocks_for(seq.num_tokens)
        spare = self._promised(seq, num_blocks)
        spare += sum(self._promised(other, len(other.block_table)) for other in self.running)
        table = allocator.allocate(hit, num_blocks - len(hit), spare=spare)
        if table is None:
            return None
        seq.block_table = table
        seq.num_computed_tokens = len(hit) * allocator.block_size
        seq.status = SequenceStatus.RUNNING
        self.running.append(self.waiting.popleft())
        if not seq.num_preemptions:
            seq.num_cached_tokens = seq.num_computed_tokens
            self._prompt_tokens += seq.num_prompt_tokens
            self._cached_tokens += seq.num_cached_tokens
        return seq

    def _chunk(self, seq: Sequence, budget: int) -> ScheduledSeq:
        """Plan as many of a sequence's tokens as the budget allows; register the blocks that they fill."""
        start = seq.num_computed_tokens
        end = min(seq.num_tokens, start + budget)
        hashes, size = self._hashes(seq), self.allocator.block_size
        registered = tuple(
            seq.block_table[index]
            for index in range(start // size, min(end // size, len(hashes)))
            if self.allocator.register(seq.block_table[index], hashes[index])
        )
        return ScheduledSeq(seq, start, end - start, end == seq.num_tokens, registered)

    def _validate(self, seq: Sequence) -> None:
        if seq.num_prompt_tokens > self.max_input_len:
            message = f"the prompt has {seq.num_prompt_tokens} tokens"
            raise ContextLengthExceeded(f"{message}, but at most {self.max_input_len} are allowed")
        if self._most_blocks(seq) > self.allocator.num_blocks:
            capacity = self.allocator.num_blocks * self.allocator.block_size
            message = f"prompt ({seq.num_prompt_tokens} tokens) and answer may take {seq.max_len} tokens"
            raise ContextLengthExceeded(f"{message}, but the KV cache holds {capacity}")

    def _most_blocks(self, seq: Sequence) -> int:
        """Blocks for a sequence at its longest. Its very last token is chosen, but never run."""
        return self.allocator.blocks_for(seq.max_len - 1)

    def _promised(self, seq: Sequence, num_blocks: int) -> int:
        """Free blocks to keep for a sequence that has ``num_blocks``: all it can ever need, or just the next.

        Without the next one, whoever is admitted last would often be preempted at once.
        """
        more = self._most_blocks(seq) - num_blocks
        return more if self.guaranteed else min(more, 1)

    def _hashes(self, seq: Sequence) -> list[bytes]:
        return seq.block_hashes(self.allocator.block_size) if self.allocator.enable_prefix_caching else []

    def _take_token(self, seq: Sequence, token_id: int) -> SampledToken:
        reason = seq.check_stop(token_id)
        if reason != "stop":
            seq.append(token_id)
            self._generated_tokens += 1
        if reason is not None:
            self._finish(seq, reason)
            self._finished += 1
        return SampledToken(seq, token_id, reason)

    def _abort(self, seqs: list[Sequence]) -> list[Sequence]:
        for seq in seqs:
            self._finish(seq, "abort")
            self._aborted += 1
        self._drop_finished()
        return seqs

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self.allocator.free(seq.block_table)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def _drop_finished(self) -> None:
        self.running = [seq for seq in self.running if seq.status is not SequenceStatus.FINISHED]
        self.waiting = deque(seq for seq in self.waiting if seq.status is not SequenceStatus.FINISHED)

    def _expect_step(self, batch: ScheduledBatch) -> None:
        if batch is not self._in_flight:
            raise EngineError("this step is not the open one")

    def _expect_no_step(self, action: str) -> None:
        if self._in_flight is not None:
            raise EngineError(f"cannot {action} while a step is open")
