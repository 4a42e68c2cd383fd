"""Runs scheduled steps on the language model, and owns the memory of its keys and values."""

from __future__ import annotations

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from foveate.config import EngineSettings
from foveate.engine.batch import Batch, PagedAttention, build
from foveate.engine.sampling import Sampled, prepare, sample
from foveate.engine.scheduler import ScheduledBatch
from foveate.engine.sequence import Sequence
from foveate.engine.state import SequenceState
from foveate.errors import ConfigError
from foveate.models.qwen2 import Qwen2

_CPU_CACHE_BYTES = 4 * 2**30
# Keys and values of this many full batches are plenty. On a CPU more would only displace other programs' memory; on a
# GPU a small model would get millions of blocks, and keeping account of them takes time.
_CPU_CACHE_BATCHES, _GPU_CACHE_BATCHES = 4, 16


class ModelRunner:
    """The language model with its KV cache.

    Args:
        model: on its device.
        settings: limits.
        max_seq_len: most tokens of a sequence.
        reserved_bytes: free memory to leave alone, for activations.

    Attributes:
        max_seq_len: what was asked for, or as much of it as the cache holds if the settings leave it open.

    Raises:
        ConfigError: the cache cannot hold a sequence of the length that the settings name.
    """

    def __init__(self, model: Qwen2, settings: EngineSettings, max_seq_len: int, *, reserved_bytes: int = 0) -> None:
        self.model = model
        if model.embed_tokens.weight.device.type == "cpu":
            _store_by_columns(model)
        self.block_size = settings.block_size
        weight = model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        config = model.config
        shape = (self.block_size, config.num_key_value_heads, config.head_dim)
        block_bytes = config.num_hidden_layers * 2 * torch.Size(shape).numel() * self.dtype.itemsize
        self.num_blocks = settings.num_kv_blocks or self._affordable(settings, max_seq_len, block_bytes, reserved_bytes)
        self.max_seq_len = min(max_seq_len, self.num_blocks * self.block_size)
        if self.num_blocks == 0 or (settings.max_seq_len is not None and self.max_seq_len < max_seq_len):
            raise ConfigError(
                f"max_seq_len: got {max_seq_len}, but the KV cache holds {self.num_blocks * self.block_size} tokens; "
                "set a smaller max_seq_len, or give the cache more memory"
            )
        layout = (config.num_hidden_layers, 2, self.num_blocks, *shape)
        self.kv_cache = _zeros(layout, self.dtype, self.device)

    def _affordable(self, settings: EngineSettings, max_seq_len: int, block_bytes: int, reserved: int) -> int:
        share = settings.kv_cache_free_mem_fraction
        full_batch = settings.max_batch_size * -(-max_seq_len // self.block_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = int((torch.cuda.mem_get_info(self.device)[0] - reserved) * share)
            plenty = _GPU_CACHE_BATCHES * full_batch
        else:
            free = min(int(psutil.virtual_memory().available * share), _CPU_CACHE_BYTES)
            plenty = _CPU_CACHE_BATCHES * full_batch
        return min(max(free, 0) // block_bytes, plenty)

    def admit(self, seq: Sequence, state: SequenceState) -> None:
        """Give a sequence its state, before it is scheduled."""
        prepare(seq, state, self.model.config.vocab_size, self.device)
        seq.payload = state

    @torch.inference_mode()
    def run(self, scheduled: ScheduledBatch) -> Sampled:
        """Run one step.

        Returns:
            a token for each of ``scheduled.sampling``, in order
        """
        batch = build(scheduled, self.block_size, self.device)
        hidden = self._forward(batch)
        if not batch.samples:
            return Sampled([], [])
        logits = self.model.logits(hidden[batch.sample_rows])
        sampled = sample(logits, [item.seq for item in batch.samples])
        return _reordered(sampled, batch, scheduled)

    def _forward(self, batch: Batch) -> Tensor:
        x = self.model.embed_tokens(batch.token_ids)
        for rows, embeddings in batch.pictures:
            x.index_copy_(0, rows, embeddings.to(x.device, x.dtype))
        hidden: Tensor = self.model(x, batch.positions, PagedAttention(batch, self.kv_cache))
        return hidden


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a cache. It must hold zeros: attention multiplies by zero what it masks, and 0 · NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy leaves the zeroing to the kernel, page by page at first use; torch.zeros would touch gigabytes at start.
    return torch.from_numpy(np.zeros(torch.Size(shape).numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _store_by_columns(model: Qwen2) -> None:
    """Lay out the weights so that a product with few rows reads them in order: on a CPU that is 3 times as fast.

    Only the memory behind them changes: their shapes and values do not. Quantized weights stay as they are: they are
    turned into floats some rows at a time.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not model.embed_tokens.weight:
            module.weight.data = module.weight.data.t().contiguous().t()


def _reordered(sampled: Sampled, batch: Batch, scheduled: ScheduledBatch) -> Sampled:
    """Bring the samples from the batch's order, decodes first, into the scheduler's."""
    place = {id(item): index for index, item in enumerate(batch.samples)}
    order = [place[id(item)] for item in scheduled.sampling]
    return Sampled([sampled.token_ids[i] for i in order], [sampled.logprobs[i] for i in order])
