"""Runs scheduled steps on the language model, and owns the memory of its keys and values."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from foveate.checkpoint.memory import affordable_blocks
from foveate.checkpoint.plan import machine_of
from foveate.config import EngineSettings
from foveate.engine.batch import Batch, build
from foveate.engine.graphs import MOST_TOKENS, StepGraphs
from foveate.engine.inputs import EmbeddingInputs, ForwardInputs, LayerCache, PagedAttention
from foveate.engine.messages import TokenLogprob
from foveate.engine.rows import Rows
from foveate.engine.sampling import (
    GREEDY,
    WIDTHS,
    Logprobs,
    Sampled,
    SamplingInputs,
    Variant,
    choose,
    to_host,
)
from foveate.engine.sequence import Sequence
from foveate.engine.speculation import most_drafts
from foveate.engine.state import SequenceState, state_of
from foveate.engine.step import ScheduledBatch
from foveate.engine.upload import upload
from foveate.engine.verification import DraftInputs, choose_behind, is_good, keep_newest
from foveate.errors import ConfigError
from foveate.kernels import ops
from foveate.kernels.kv_cache import FP8, KeyOffset
from foveate.kernels.recording import CudaRecorder, Recorder
from foveate.models.qwen2 import Qwen2

_VARIANTS = (GREEDY, Variant(adjusts=True, draws=True, width=min(WIDTHS)))
"""The usual ways of sampling: greedy, and with what a published checkpoint recommends."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way.

    Attributes:
        batch: what runs.
        token_ids: int64 [samples], the chosen tokens, once ``finished`` says so.
        logprobs: for the samples that want them, by their places.
        finished: None on a CPU, where it is over already.
    """

    batch: Batch
    token_ids: Tensor
    logprobs: tuple[Logprobs, dict[int, int]] | None
    finished: torch.cuda.Event | None


class ModelRunner:
    """The language model with its KV cache.

    Args:
        model: on its device.
        settings: limits.
        max_seq_len: most tokens of a sequence.
        reserved_bytes: free memory that belongs to something else: activations, CUDA graphs, the encoder.

    Attributes:
        block_size: tokens of a block of the cache.
        kv_cache: [layers, 2, num_blocks, block_size, kv_heads, head_dim], keys and values of the model's type or as
            ``kv_cache_dtype`` says.
        max_seq_len: what was asked for, or as much of it as the cache holds if the settings leave it open.
        depth: steps that are best left open while another one is launched; see
            :class:`foveate.engine.scheduler.Scheduler`.

    Raises:
        ConfigError: the cache cannot hold a sequence of the length that the settings name.
    """

    def __init__(self, model: Qwen2, settings: EngineSettings, max_seq_len: int, *, reserved_bytes: int = 0) -> None:
        self.model = model
        if model.embed_tokens.weight.device.type == "cpu":
            _store_by_columns(model)
        self.block_size = settings.tokens_per_block(on_gpu=model.embed_tokens.weight.is_cuda)
        self._max_num_tokens = settings.max_num_tokens
        self._most_drafts, self._most_rows = most_drafts(settings), settings.verified_rows()
        weight = model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._rows = Rows(
            settings.max_batch_size, -(-max_seq_len // self.block_size), model.config.vocab_size, self.device
        )
        self._cos_sin = model.rotary_table(max_seq_len)
        # A kernel's grid may depend on the width of the tables; what gathers all of their blocks had better not.
        self._has_kernels = ops.has_kernels(self.device)
        self._graphs: StepGraphs | None = None
        if settings.cuda_graphs and self._has_kernels:
            self.use_graphs(CudaRecorder(self.device))
        self.depth = int(self.device.type == "cuda")
        self._cache_dtype = FP8 if settings.kv_cache_dtype == "fp8" else self.dtype
        offsets = self._offsets()
        # Last, since it takes what is left.
        self.num_blocks, self.kv_cache = self._make_cache(settings, max_seq_len, reserved_bytes)
        self._caches = [
            LayerCache(keys, values, offset) for (keys, values), offset in zip(self.kv_cache, offsets, strict=True)
        ]
        self.max_seq_len = min(max_seq_len, self.num_blocks * self.block_size)

    def _make_cache(self, settings: EngineSettings, max_seq_len: int, reserved_bytes: int) -> tuple[int, Tensor]:
        config = self.model.config
        shape = (self.block_size, config.num_key_value_heads, config.head_dim)
        block_bytes = config.num_hidden_layers * 2 * torch.Size(shape).numel() * self._cache_dtype.itemsize
        num_blocks = settings.num_kv_blocks or self._affordable(settings, max_seq_len, block_bytes, reserved_bytes)
        capacity = num_blocks * self.block_size
        if num_blocks == 0 or (settings.max_seq_len is not None and capacity < max_seq_len):
            raise ConfigError(
                f"max_seq_len: got {max_seq_len}, but the KV cache holds {capacity} tokens; "
                "set a smaller max_seq_len, or give the cache more memory"
            )
        return num_blocks, _zeros((config.num_hidden_layers, 2, num_blocks, *shape), self._cache_dtype, self.device)

    def _offsets(self) -> list[KeyOffset | None]:
        """Return what each layer's keys are stored without: with 8 bits, their biases."""
        layers = range(self.model.config.num_hidden_layers)
        if self._cache_dtype != FP8:
            return [None for _ in layers]
        angles = self.model.rotary_table(self._rows.longest * self.block_size).to(self.dtype)
        return [KeyOffset(self.model.key_bias(layer), angles) for layer in layers]

    def _affordable(self, settings: EngineSettings, max_seq_len: int, block_bytes: int, reserved: int) -> int:
        full_batch = settings.max_batch_size * -(-max_seq_len // self.block_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        machine = machine_of(self.device)
        return affordable_blocks(
            machine.free_bytes - reserved, block_bytes, full_batch, settings.kv_cache_free_mem_fraction,
            is_gpu=machine.is_gpu,
        )  # fmt: skip

    def use_graphs(self, recorder: Recorder) -> None:
        """From now on, replay steps; ``recorder`` makes what is replayed."""
        most, config = self._rows.padding, self.model.config
        self._logits = torch.zeros(max(most, self._most_rows), config.vocab_size, device=self.device)
        tokens = min(most + self._max_num_tokens, MOST_TOKENS)
        x = torch.zeros(tokens, config.hidden_size, dtype=self.dtype, device=self.device)
        self._graphs = StepGraphs(self, self._rows, x, recorder, self._most_rows)

    def warm_up(self) -> None:
        """Launch all kernels of the usual steps that are graphs, with nothing in them."""
        if self._graphs is not None:
            self._graphs.warm_up(_VARIANTS)

    def only_one_layer(self) -> AbstractContextManager[None]:
        """See :class:`foveate.engine.graphs.Steps`."""
        return self.model.only_one_layer()

    def capture(self) -> float:
        """Capture the usual graphs, where graphs are used, and return the seconds that it took."""
        started = time.monotonic()
        if self._graphs is None:
            return 0.0
        self._graphs.capture(_VARIANTS)
        # What the last one took outside of its graph, on a stream that nobody else uses.
        torch.cuda.empty_cache()
        return time.monotonic() - started

    def admit(self, seq: Sequence, state: SequenceState) -> None:
        """Give a sequence its state, before it is scheduled."""
        seq.payload = state

    def run(self, scheduled: ScheduledBatch) -> Sampled:
        """Run one step and wait for it; see :meth:`launch` and :meth:`collect`."""
        return self.collect(self.launch(scheduled))

    @torch.inference_mode()
    def launch(self, scheduled: ScheduledBatch) -> Launched:
        """Have the device run a step, behind those that were launched before. On a GPU nobody waits for it."""
        batch = build(scheduled, self._rows, self.block_size)
        if batch.drafts is not None:
            logits, chosen = self._graphs.verify(batch) if self._graphs else self._verify(batch)
        elif self._graphs and not batch.longest_query:
            logits, chosen = self._graphs.decode(batch)
        else:
            logits, chosen = self._run(batch)
        return Launched(batch, to_host(chosen), self._logprobs(batch, logits, chosen), self._mark())

    def collect(self, launched: Launched) -> Sampled:
        """Wait for a step and read its results.

        Returns:
            ``num_choices`` tokens for each of ``scheduled.sampling``, in order
        """
        if launched.finished is not None:
            launched.finished.synchronize()
        token_ids: list[int] = launched.token_ids.tolist()
        order = launched.batch.order
        logprobs: list[TokenLogprob | None] = [None] * len(order)
        if launched.logprobs is not None:
            found, places = launched.logprobs
            for index, sample in enumerate(order):
                if sample in places:
                    count = launched.batch.samples[sample].seq.sampling.top_logprobs
                    logprobs[index] = found.read(places[sample], token_ids[sample], count)
        return Sampled([token_ids[sample] for sample in order], logprobs)

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a step from its arrays; return logits [samples or more, vocab_size] and chosen tokens [samples]."""
        groups = upload(batch.embedding, batch.forward, batch.sampling, device=self.device)
        embedding, inputs, sampling = EmbeddingInputs(**groups[0]), ForwardInputs(**groups[1]), groups[2]
        x = self._embed(embedding, inputs.rows)
        start = 0
        for item, first, count in batch.pictures:
            assert embedding.picture_places is not None
            rows = state_of(item.seq).embeddings
            assert rows is not None
            places = embedding.picture_places[start : start + count]
            x.index_copy_(0, places, rows[first : first + count].to(x.device, x.dtype))
            start += count
        logits = self._graphs.forward(batch, x) if self._graphs else None
        if logits is None:
            tables = self._rows.tables if self._has_kernels else self._rows.tables[:, : batch.num_blocks]
            hidden = self._layers(x, inputs, self._tables(inputs, tables), batch.longest_query)
            logits = self.model.logits(hidden)
        chosen = self._choose(logits[: len(batch.samples)], SamplingInputs(**sampling), batch.variant)
        return logits, chosen

    def decode(
        self, embedding: EmbeddingInputs, forward: ForwardInputs, sampling: SamplingInputs, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """See :class:`foveate.engine.graphs.Steps`."""
        x, tables = ops.start_decode(
            self._rows.tokens, self._rows.tables, self.model.embed_tokens.weight, forward.rows,
            embedding.table_places, embedding.table_blocks,
        )  # fmt: skip
        scores = self.model.lm_head(self._layers(x, forward, (tables, None), 0))
        logits = self._logits[: len(x)]
        if variant == GREEDY:
            return logits, ops.greedy(scores, sampling.rows, self._rows.tokens, logits)
        return logits, self._choose(logits.copy_(scores), sampling, variant)

    def _verify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a step with drafts from its arrays; return logits [rows, vocab_size] and chosen tokens [rows]."""
        assert batch.drafts is not None
        groups = upload(batch.embedding, batch.forward, batch.sampling, batch.drafts, device=self.device)
        kinds = (EmbeddingInputs, ForwardInputs, SamplingInputs, DraftInputs)
        embedding, forward, sampling, drafts = (kind(**group) for kind, group in zip(kinds, groups, strict=True))
        width = None if self._has_kernels else batch.num_blocks
        return self.verify(embedding, forward, sampling, drafts, batch.variant, width)

    def verify(
        self,
        embedding: EmbeddingInputs,
        forward: ForwardInputs,
        sampling: SamplingInputs,
        drafts: DraftInputs,
        variant: Variant,
        width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`foveate.engine.graphs.Steps`; ``width``: blocks of each table that are looked at."""
        rows = self._rows
        # Not one by one, as decodes do: rows of one sequence read each other's blocks.
        rows.tables.view(-1).index_copy_(0, embedding.table_places, embedding.table_blocks)
        tables = rows.tables[:, :width].index_select(0, forward.rows)
        hidden = self._layers(self.model.embed_tokens(drafts.token_ids), forward, (tables, None), 0, has_drafts=True)
        scores = self.model.lm_head(hidden)
        logits = self._logits[: len(scores)] if self._graphs else scores.new_empty(scores.shape, dtype=torch.float32)
        if variant == GREEDY:
            nobody = torch.full_like(sampling.rows, rows.padding)
            chosen = ops.greedy(scores, nobody, rows.tokens, logits)
            counting = is_good(chosen, drafts)
        else:
            logits.copy_(scores)
            chosen, counting = choose_behind(logits, sampling, drafts, rows.state, variant, self._most_drafts)
        keep_newest(rows.tokens, chosen, counting, sampling, drafts)
        return logits, chosen

    def forward(self, x: Tensor, inputs: ForwardInputs, longest_query: int) -> Tensor:
        """See :class:`foveate.engine.graphs.Steps`."""
        hidden = self._layers(x, inputs, self._tables(inputs, self._rows.tables), longest_query)
        return self._logits[: self._rows.padding].copy_(self.model.lm_head(hidden))

    def _tables(self, inputs: ForwardInputs, tables: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the block tables of decodes and chunks."""
        chunks = None if inputs.chunk_rows is None else tables.index_select(0, inputs.chunk_rows)
        return tables.index_select(0, inputs.rows), chunks

    def _embed(self, inputs: EmbeddingInputs, rows: Tensor) -> Tensor:
        self._rows.tables.view(-1).index_copy_(0, inputs.table_places, inputs.table_blocks)
        ids = self._rows.tokens.index_select(0, rows)
        if inputs.token_ids is not None:
            ids = torch.cat((ids, inputs.token_ids))
        embedded: Tensor = self.model.embed_tokens(ids)
        return embedded

    def _layers(
        self,
        x: Tensor,
        inputs: ForwardInputs,
        tables: tuple[Tensor, Tensor | None],
        longest_query: int,
        *,
        has_drafts: bool = False,
    ) -> Tensor:
        """Return the hidden states of the tokens that are sampled: [samples, hidden]."""
        heads = self.model.config.num_attention_heads
        attention = PagedAttention(inputs, self._caches, tables, self._cos_sin, heads, longest_query, has_drafts)
        hidden = self.model.run(x, attention)
        return hidden if inputs.sampled is None else hidden.index_select(0, inputs.sampled)

    def _choose(self, logits: Tensor, sampling: SamplingInputs, variant: Variant) -> Tensor:
        chosen = choose(logits, sampling, self._rows.state, variant)
        self._rows.tokens.index_copy_(0, sampling.rows, chosen)
        return chosen

    def _logprobs(self, batch: Batch, logits: Tensor, chosen: Tensor) -> tuple[Logprobs, dict[int, int]] | None:
        wanted = [place for place, item in enumerate(batch.samples) if item.seq.sampling.logprobs]
        if not wanted:
            return None
        most = max(batch.samples[place].seq.sampling.top_logprobs for place in wanted)
        [uploaded] = upload({"places": np.array(wanted, np.int64)}, device=self.device)
        return Logprobs(logits, chosen, uploaded["places"], most), {place: index for index, place in enumerate(wanted)}

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a cache. It must hold zeros: attention multiplies by zero what it masks, and 0 · NaN is NaN."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type == "cpu":
        # NumPy leaves the zeroing to the kernel, page by page at first use; torch.zeros would touch gigabytes at start.
        zeros = torch.from_numpy(np.zeros(num_bytes, np.uint8))
    else:
        zeros = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return zeros.view(dtype).view(shape)


def _store_by_columns(model: Qwen2) -> None:
    """Lay out the weights so that a product with few rows reads them in order: on a CPU that is 3 times as fast.

    Only the memory behind them changes: their shapes and values do not. Quantized weights stay as they are: they are
    turned into floats some rows at a time.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not model.embed_tokens.weight:
            module.weight.data = module.weight.data.t().contiguous().t()
