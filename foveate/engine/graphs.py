"""CUDA graphs: a step that is launched as a whole, instead of some hundred kernels one by one.

A graph reads a step's inputs from the same places every time, and everything else from tensors that stay where they
are. So batches are filled up, to one of a few sizes, with what changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from foveate.engine.batch import Batch, fill_up, idle_decodes, idle_drafts, no_chunks
from foveate.engine.inputs import EmbeddingInputs, ForwardInputs
from foveate.engine.rows import Rows
from foveate.engine.sampling import SamplingInputs, Variant
from foveate.engine.upload import Arrays, upload
from foveate.engine.verification import DraftInputs
from foveate.kernels.recording import Recorder

T = TypeVar("T")
_ROW_BYTES, _TOKEN_BYTES, _BYTES = 256, 16, 4096
"""More than a row's inputs take, a token's, and what lies between them."""
MOST_TOKENS = 1024
"""Of a step with chunks that is a graph, decodes included."""


class Steps(Protocol):
    """What can be recorded: it reads the inputs, and writes its results, where they are every time."""

    def only_one_layer(self) -> AbstractContextManager[None]:
        """Meanwhile leave out what only launches the same kernels again."""
        ...

    def decode(
        self, embedding: EmbeddingInputs, forward: ForwardInputs, sampling: SamplingInputs, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """Return logits [sequences, vocab_size] and the chosen tokens [sequences] of a step that only decodes."""
        ...

    def verify(
        self,
        embedding: EmbeddingInputs,
        forward: ForwardInputs,
        sampling: SamplingInputs,
        drafts: DraftInputs,
        variant: Variant,
    ) -> tuple[Tensor, Tensor]:
        """Return logits [rows, vocab_size] and the chosen tokens [rows] of a step with drafts."""
        ...

    def forward(self, x: Tensor, inputs: ForwardInputs, longest_query: int) -> Tensor:
        """Return the logits [samples, vocab_size] of a step with chunks, from its embeddings [tokens, hidden]."""
        ...


class StepGraphs:
    """The graphs of one runner.

    Steps that only decode are graphs from the newest tokens to the next ones, by size and way of sampling; with drafts
    they are others, of fewer sizes. Those with
    chunks are graphs from the embeddings to the logits, by the number of tokens; with many tokens the device takes
    longer than the host needs to launch, and they need none.

    Args:
        steps: what is recorded.
        rows: of the runner.
        x: [tokens, hidden], where the embeddings of a step with chunks go: those of the decodes, and then of the
            chunks.
        recorder: makes the graphs.
        most_rows: rows of a step with drafts; 0 if there are none.
    """

    def __init__(self, steps: Steps, rows: Rows, x: Tensor, recorder: Recorder, most_rows: int = 0) -> None:
        self._steps, self._rows, self._x, self._recorder = steps, rows, x, recorder
        self._most = rows.padding
        self._decode_sizes = decode_sizes(self._most)
        self._forward_sizes = forward_sizes(self._most, len(x))
        self._verify_sizes = verify_sizes(most_rows)
        size = _ROW_BYTES * max(self._most, most_rows) + _TOKEN_BYTES * len(x) + _BYTES
        self._inputs = torch.zeros(size, dtype=torch.uint8, device=rows.device)
        self._idle = cache(lambda size: idle_decodes(size, rows))
        self._decodes: dict[tuple[int, Variant], tuple[Callable[[], None], tuple[Tensor, Tensor]]] = {}
        self._verifications: dict[tuple[int, Variant], tuple[Callable[[], None], tuple[Tensor, Tensor]]] = {}
        self._forwards: dict[int, tuple[Callable[[], None], Tensor]] = {}

    @torch.inference_mode()
    def warm_up(self, variants: Iterable[Variant]) -> None:
        """Launch all kernels of the usual steps, with nothing in them."""
        with self._steps.only_one_layer():
            for size in self._forward_sizes:
                self._forward_step(size)()
            for variant in variants:
                for size in self._decode_sizes:
                    self._decode_step(size, variant)()
                for size in self._verify_sizes:
                    self._verify_step(size, variant)()

    def capture(self, variants: Iterable[Variant]) -> None:
        """Capture what may be needed, the largest first: the others fit into its memory."""
        for size in reversed(self._forward_sizes):
            self._forward_graph(size)
        for variant in variants:
            for size in reversed(self._decode_sizes):
                self._decode_graph(size, variant)
            for size in reversed(self._verify_sizes):
                self._verify_graph(size, variant)

    def decode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a step that only decodes.

        Returns:
            logits and chosen tokens, of more sequences than there are, until the next step
        """
        number = len(batch.samples)
        size = next(size for size in self._decode_sizes if size >= number)
        replay, results = self._decode_graph(size, batch.variant)
        groups = [batch.embedding, batch.forward, batch.sampling]
        if number < size:
            filling = self._idle(size - number)
            groups = [_joined(group, behind) for group, behind in zip(groups, filling, strict=True)]
        upload(*groups, device=self._rows.device, into=self._inputs)
        replay()
        return results

    def verify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a step with drafts.

        Returns:
            logits and chosen tokens, of more rows than there are, until the next step
        """
        assert batch.drafts is not None
        number = len(batch.samples)
        size = next(size for size in self._verify_sizes if size >= number)
        replay, results = self._verify_graph(size, batch.variant)
        groups = [batch.embedding, batch.forward, batch.sampling, batch.drafts]
        if number < size:
            filling = (*self._idle(size - number), idle_drafts(number, size - number))
            groups = [_joined(group, behind) for group, behind in zip(groups, filling, strict=True)]
        upload(*groups, device=self._rows.device, into=self._inputs)
        replay()
        return results

    def forward(self, batch: Batch, x: Tensor) -> Tensor | None:
        """Run a step with chunks from its embeddings [tokens, hidden].

        Returns:
            logits, of more samples than there are, until the next step; None if there are too many tokens: nothing
            has been done then
        """
        size = next((size for size in self._forward_sizes if size >= len(x)), None)
        if size is None:
            return None
        replay, logits = self._forward_graph(size)
        self._x[: len(x)] = x
        upload(fill_up(batch.forward, self._most, size, self._rows), device=self._rows.device, into=self._inputs)
        replay()
        return logits

    @torch.inference_mode()
    def _decode_graph(self, size: int, variant: Variant) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        found = self._decodes.get((size, variant))
        if found is None:
            found = self._decodes[size, variant] = self._record(self._decode_step(size, variant))
        return found

    @torch.inference_mode()
    def _verify_graph(self, size: int, variant: Variant) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        found = self._verifications.get((size, variant))
        if found is None:
            found = self._verifications[size, variant] = self._record(self._verify_step(size, variant))
        return found

    @torch.inference_mode()
    def _forward_graph(self, size: int) -> tuple[Callable[[], None], Tensor]:
        found = self._forwards.get(size)
        if found is None:
            found = self._forwards[size] = self._record(self._forward_step(size))
        return found

    def _record(self, step: Callable[[], T]) -> tuple[Callable[[], None], T]:
        def warm_up() -> None:
            with self._steps.only_one_layer():
                step()

        return self._recorder.record(step, warm_up)

    def _decode_step(self, size: int, variant: Variant) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return what runs a step that only decodes, with inputs that make it do nothing for now."""
        groups = upload(*self._idle(size), device=self._rows.device, into=self._inputs)
        embedding, forward, sampling = (
            kind(**group) for kind, group in zip((EmbeddingInputs, ForwardInputs, SamplingInputs), groups, strict=True)
        )
        return lambda: self._steps.decode(embedding, forward, sampling, variant)

    def _verify_step(self, size: int, variant: Variant) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return the same for a step with drafts."""
        groups = upload(*self._idle(size), idle_drafts(0, size), device=self._rows.device, into=self._inputs)
        kinds = (EmbeddingInputs, ForwardInputs, SamplingInputs, DraftInputs)
        embedding, forward, sampling, drafts = (kind(**group) for kind, group in zip(kinds, groups, strict=True))
        return lambda: self._steps.verify(embedding, forward, sampling, drafts, variant)

    def _forward_step(self, size: int) -> Callable[[], Tensor]:
        """Return the same for a step with chunks."""
        idle = fill_up(no_chunks(), self._most, size, self._rows)
        [tensors] = upload(idle, device=self._rows.device, into=self._inputs)
        inputs = ForwardInputs(**tensors)
        return lambda: self._steps.forward(self._x[:size], inputs, size)


def decode_sizes(most: int) -> list[int]:
    """Return the sizes of batches that only decode, ascending: 1, 2, 4, multiples of 8, and the largest."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


def verify_sizes(most: int) -> list[int]:
    """Return the numbers of rows of steps with drafts, ascending: few, since a row that is nobody's costs little."""
    return sorted({size for size in (4, 8, 16, 32) if size < most} | {most}) if most else []


def forward_sizes(num_decodes: int, most: int) -> list[int]:
    """Return the numbers of tokens of steps with chunks that are graphs, ascending, with room for a chunk's token.

    Products take as long for any number of rows between two multiples of 128, which is a tile's height.
    """
    sizes = {64, *range(128, MOST_TOKENS + 1, 128)}
    return sorted(size for size in sizes | {min(most, MOST_TOKENS)} if num_decodes < size <= most)


def _joined(arrays: Arrays, filling: Arrays) -> Arrays:
    return {name: np.concatenate((array, filling[name])) for name, array in arrays.items()}
