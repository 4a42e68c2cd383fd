"""Where a sequence's state lies on the device while it has a part in steps: one row of a few tensors.

A sequence gets a row with its first step and keeps it as long as it is part of every step and keeps its blocks; whoever
is not part of a step any more has lost it. Steps run in order, so the next one to have a row may write to it at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
import torch

from foveate.engine.sampling import SamplingState, Variant, needs, together
from foveate.engine.sequence import Sequence
from foveate.engine.state import state_of
from foveate.engine.step import ScheduledSeq
from foveate.engine.upload import Array, Arrays, upload


@dataclass(slots=True)
class Row:
    """One sequence's row.

    Attributes:
        index: which one.
        needs: see :func:`foveate.engine.sampling.needs`.
        num_preemptions: of the sequence when it got the row.
        has_token: whether the newest token of its sequence is on the device.
        has_table: whether the sequence's block table is.
        masks_ends: whether its bias keeps it from ending.
    """

    index: int
    needs: Variant
    num_preemptions: int
    has_token: bool = False
    has_table: bool = False
    masks_ends: bool = False


class Rows:
    """The rows of one runner.

    Args:
        size: sequences that can have a row at once.
        longest: blocks of the longest sequence.
        vocab_size: tokens.
        device: where they are.

    Attributes:
        padding: a row that never belongs to a sequence.
        tokens: int64 [size + 1], the newest token of each sequence.
        tables: int32 [size + 1, longest], block tables.
        state: what sampling keeps, for size + 1 rows.
    """

    def __init__(self, size: int, longest: int, vocab_size: int, device: torch.device) -> None:
        self.padding = size
        self.longest = longest
        self.device = device
        self.tokens = torch.zeros(size + 1, dtype=torch.int64, device=device)
        self.tables = torch.zeros(size + 1, longest, dtype=torch.int32, device=device)
        self.state = SamplingState(
            counts=torch.zeros(size + 1, vocab_size, dtype=torch.int32, device=device),
            bias=torch.zeros(size + 1, vocab_size, device=device),
        )
        self._vocab_size = vocab_size
        self._free = list(reversed(range(size)))
        self._rows: dict[Sequence, Row] = {}
        self._biased: set[int] = set()
        self._parameters: Arrays = {
            "seeds": np.zeros(size + 1, np.int64),
            "top_k": np.zeros(size + 1, np.int32),
            **{name: np.zeros(size + 1, np.float32) for name in ("temperature", "top_p", "min_p")},
            **{name: np.zeros(size + 1, np.float32) for name in ("repetition", "presence", "frequency")},
        }
        self._parameters["repetition"].fill(1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (self.tokens, self.tables, self.state.counts, self.state.bias))

    def assign(self, items: Listing[ScheduledSeq]) -> list[Row]:
        """Give every sequence of a step its row, and return them in the same order."""
        seqs = {item.seq for item in items}
        # Whoever was preempted can be back in the very next step, and has nothing of what the row stands for.
        for seq, row in list(self._rows.items()):
            if seq not in seqs or row.num_preemptions != seq.num_preemptions:
                self._free.append(self._rows.pop(seq).index)
        return [self._rows.get(item.seq) or self._join(item.seq) for item in items]

    def variant(self, rows: Listing[Row]) -> Variant:
        """Return the variant of sampling that does for all of these rows."""
        return together([row.needs for row in rows], self._vocab_size)

    def parameters(self, indices: Array) -> Arrays:
        """Return the sampling parameters of some rows by their names in :class:`SamplingInputs`."""
        return {name: values[indices] for name, values in self._parameters.items()}

    def mask_ends(self, item: ScheduledSeq, row: Row) -> None:
        """Keep a sequence from ending, or let it, before it samples: until it has its minimum of tokens."""
        seq = item.seq
        masks = item.start + item.num_tokens - seq.num_prompt_tokens < seq.sampling.min_tokens and bool(seq.stop_ids)
        if masks != row.masks_ends:
            row.masks_ends = masks
            self._write_bias(seq, row)

    def _join(self, seq: Sequence) -> Row:
        params = seq.sampling
        row = Row(self._free.pop(), needs(params, has_stop_ids=bool(seq.stop_ids)), seq.num_preemptions)
        self._rows[seq] = row
        for name, value in (
            ("seeds", state_of(seq).seed), ("top_k", min(params.top_k, self._vocab_size)),
            ("temperature", params.temperature), ("top_p", params.top_p), ("min_p", params.min_p),
            ("repetition", params.repetition_penalty), ("presence", params.presence_penalty),
            ("frequency", params.frequency_penalty),
        ):  # fmt: skip
            self._parameters[name][row.index] = value
        if row.needs.adjusts:
            self._count_again(seq, row)
        if params.logit_bias or row.index in self._biased:
            self._write_bias(seq, row)
        return row

    def _count_again(self, seq: Sequence, row: Row) -> None:
        """Count what a sequence has generated: nothing, unless it was preempted."""
        counts = self.state.counts[row.index].zero_()
        if seq.num_output_tokens:
            ids, times = np.unique(np.array(seq.output_token_ids, np.int64), return_counts=True)
            [parts] = upload({"ids": ids, "times": times.astype(np.int32)}, device=self.device)
            counts.index_copy_(0, parts["ids"], parts["times"])

    def _write_bias(self, seq: Sequence, row: Row) -> None:
        values = dict(seq.sampling.logit_bias)
        if row.masks_ends:
            values |= dict.fromkeys(seq.stop_ids, -np.inf)
        bias = self.state.bias[row.index].zero_()
        self._biased.discard(row.index)
        if values:
            ids, added = np.array(list(values), np.int64), np.array(list(values.values()), np.float32)
            [parts] = upload({"ids": ids, "values": added}, device=self.device)
            bias.index_copy_(0, parts["ids"], parts["values"])
            self._biased.add(row.index)
