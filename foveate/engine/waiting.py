"""The queue of an engine: who may wait, and who is next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from foveate.engine.kv_manager import KVManager
from foveate.engine.sequence import Sequence, SequenceStatus
from foveate.errors import ContextLengthExceeded, EngineError, Overloaded

RETRY_AFTER_SECONDS = 1.0


class WaitingQueue:
    """Sequences without blocks, the next one first.

    Args:
        max_size: how many may wait when others are added.
        max_input_len: most tokens of a prompt.
        kv: says what there are blocks for.
    """

    def __init__(self, max_size: int, max_input_len: int, kv: KVManager) -> None:
        self._max_size, self._max_input_len, self._kv = max_size, max_input_len, kv
        self._seqs: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs)

    def add(self, *seqs: Sequence) -> None:
        """Queue the sequences of a request: all of them, or with an error none.

        Raises:
            ContextLengthExceeded: a sequence can never fit.
            Overloaded: too many sequences wait already.
        """
        for seq in seqs:
            self._validate(seq)
        if len(self) + len(seqs) > self._max_size:
            message = f"{len(self)} sequences wait already, and at most {self._max_size} may"
            raise Overloaded(message, retry_after=RETRY_AFTER_SECONDS)
        self._seqs.extend(seqs)

    def put_back(self, seq: Sequence) -> None:
        """Queue a sequence that lost its blocks, before all others."""
        self._seqs.appendleft(seq)

    def next(self) -> Sequence | None:
        """Return the first sequence of which something can be computed, if there is one."""
        return next((seq for seq in self._seqs if self._can_start(seq)), None)

    def remove(self, seq: Sequence) -> None:
        """Let a sequence go that was admitted."""
        self._seqs.remove(seq)

    def drop_finished(self) -> None:
        """Let those go that have ended."""
        self._seqs = deque(seq for seq in self._seqs if seq.status is not SequenceStatus.FINISHED)

    def check(self) -> None:
        """Verify that nobody here has anything.

        Raises:
            EngineError: somebody has.
        """
        for seq in self._seqs:
            if seq.status is not SequenceStatus.WAITING or seq.block_table or seq.num_computed_tokens:
                raise EngineError(f"{seq} waits, but has the state of one that runs")

    def _can_start(self, seq: Sequence) -> bool:
        if not seq.missing:
            return True
        start = self._kv.num_cached_tokens(seq)
        return not seq.parked and seq.computable(start) > start

    def _validate(self, seq: Sequence) -> None:
        if seq.num_prompt_tokens > self._max_input_len:
            message = f"the prompt has {seq.num_prompt_tokens} tokens"
            raise ContextLengthExceeded(f"{message}, but at most {self._max_input_len} are allowed")
        if not self._kv.can_ever_hold(seq):
            capacity = self._kv.allocator.num_blocks * self._kv.allocator.block_size
            message = f"prompt ({seq.num_prompt_tokens} tokens) and answer may take {seq.max_len} tokens"
            raise ContextLengthExceeded(f"{message}, but the KV cache holds {capacity}")
