"""What steps need beside the weights, worked out from the layers' sizes. Nothing here needs torch.

Each formula counts the tensors that are alive at the step's worst moment. A function's arguments and local variables
live until it returns, so the layers' inputs count as well: see ``Qwen2.run``, ``DecoderLayer``, ``EncoderLayer`` and
``Resampler`` in :mod:`foveate.models`. A test compares them with what a GPU measures.
"""

from __future__ import annotations

from typing import Protocol

from foveate.models.config import LanguageConfig, ModelConfig

MIB = 2**20
ROW_BYTES = 256 * MIB
"""Most bytes of pictures' embeddings that wait on an engine's GPU; those of further requests wait on the host."""
ENCODED_BYTES = 128 * MIB
"""The same for an encoder's GPU, until they are handed over."""
RESIZER_BYTES = 96 * MIB
"""What resizing pictures on a GPU takes."""
GRAPH_BYTES = 8 * MIB
"""More than a CUDA graph of a large model takes, beside the memory that all of them share."""
GRAPH_TOKENS = 1024
"""Tokens of the largest step that is a graph."""

_WORKSPACE_BYTES = 64 * MIB  # cuBLAS and cuBLASLt, 32 each on Hopper, which takes the most.
# As many as a step of usual length has on an H100, and one more for what graphs keep beside activations.
_GRAPH_SLICES = 7
_ROUNDING = 1.03  # Small tensors, and what the allocator rounds up.
_SLAB_ROWS = 4096  # Of a packed weight, unpacked at a time: foveate.kernels.triton.linear.
_SLICE_PATCHES = 33 * 34  # The largest usual slice of 448 by 448 pixels: both sides rounded up.
_DECODE_SIZES, _VERIFY_SIZES, _PROMPT_SIZES = 4, 5, 12  # Sizes of graphs: foveate.engine.graphs.
_VARIANTS = 10  # Ways of sampling, each with graphs of its own once somebody wants it.
_SAMPLING_BYTES = 68
"""Of a token of the vocabulary, where a row wants all of it in order.

The logits, adjusted and tempered (float32); what ``topk`` returns, and the same again to sort it (4 + 8 bytes each);
pairs of indices twice (8), sorted keys (4), and as much of both again for the radix sort.
"""


class Step(Protocol):
    """What a language model's step depends on."""

    @property
    def max_batch_size(self) -> int:
        """Sequences that are sampled."""
        ...

    @property
    def max_num_tokens(self) -> int:
        """Tokens of a step."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Tokens of a sequence."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        ...

    @property
    def verified_rows(self) -> int:
        """Tokens of a step with guesses, each of which is sampled; 0 without."""
        ...

    @property
    def packed_cache(self) -> bool:
        """Whether keys and values have 8 bits."""
        ...

    @property
    def packed(self) -> bool:
        """Whether the language model is quantized."""
        ...

    @property
    def packed_vision(self) -> bool:
        """Whether the encoder is."""
        ...

    @property
    def graphs(self) -> bool:
        """Whether steps are CUDA graphs."""
        ...

    @property
    def kernels(self) -> bool:
        """Whether there are kernels of our own; plain PyTorch needs more."""
        ...


def kv_token_bytes(config: LanguageConfig, item_bytes: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * item_bytes


def language_step_bytes(config: LanguageConfig, step: Step, item_bytes: int) -> int:
    """Estimate the language model's largest step: in the middle of an MLP, or while tokens are sampled.

    Args:
        config: its sizes.
        step: how much there is to do.
        item_bytes: of one element of an activation.
    """
    layers = _layers_bytes(config, step, step.max_num_tokens, item_bytes)
    # What came in and what came out of the layers is there until the step ends.
    outside = 2 * step.max_num_tokens * config.hidden_size * item_bytes
    sampling = _SAMPLING_BYTES * _sampled_rows(step) * config.vocab_size
    return int(_ROUNDING * max(layers, outside + sampling)) + _workspace(step)


def graphs_bytes(config: LanguageConfig, step: Step, item_bytes: int) -> int:
    """Estimate what CUDA graphs take: each one's own, and the activations of the largest, which all of them share."""
    tokens = min(step.max_batch_size + step.max_num_tokens, GRAPH_TOKENS)
    sampling = _SAMPLING_BYTES * _sampled_rows(step) * config.vocab_size
    sizes = _DECODE_SIZES + step.max_batch_size // 8 + (_VERIFY_SIZES if step.verified_rows else 0)
    number = _VARIANTS * sizes + _PROMPT_SIZES
    shared = max(_layers_bytes(config, step, tokens, item_bytes), sampling)
    return number * GRAPH_BYTES + int(_ROUNDING * shared)


def tables_bytes(config: LanguageConfig, step: Step, item_bytes: int) -> int:
    """Work out what a runner keeps on the device beside keys and values.

    For each sequence that is counts and biases of the vocabulary and a block table; rotary embeddings for all
    positions, once more in the model's type where 8-bit keys need them; and where CUDA graphs read embeddings and leave
    logits.
    """
    rows = step.max_batch_size + 1
    of_rows = 8 * config.vocab_size + 4 * -(-step.max_seq_len // step.block_size)
    rotary = (4 + step.packed_cache * item_bytes) * config.head_dim * step.max_seq_len
    graphs = 4 * config.vocab_size * max(rows, step.verified_rows) + GRAPH_TOKENS * config.hidden_size * item_bytes
    return rows * of_rows + rotary + graphs


def vision_step_bytes(config: ModelConfig, step: Step, vision_batch_size: int, item_bytes: int) -> int:
    """Estimate the encoder's largest step: in the middle of the encoder's MLP, or in the resampler's attention.

    Args:
        config: the model's sizes.
        step: of it, what says how the encoder computes.
        vision_batch_size: slices in a step, of the largest usual size.
        item_bytes: of one element of an activation.
    """
    vision, hidden = config.vision, config.language.hidden_size
    pixels = 3 * vision.patch_size**2
    # A layer's input and what is to be added, their sums before and after attention, queries, keys and values (3),
    # attended, normalized, and what comes out; inside, the MLP's activation, and without a fused kernel its input.
    inner = 1 if step.kernels and not step.packed_vision else 2
    encoder = (10 + (0 if step.kernels else 4)) * vision.hidden_size + inner * vision.intermediate_size
    # The features; values and keys, before and after their projection.
    resampler = vision.hidden_size + (4 if step.kernels else 5) * hidden
    patches = vision_batch_size * _SLICE_PATCHES * (pixels + max(encoder, resampler))
    # Queries, what they attended to, its projection, and the rows that come out.
    rows = 4 * vision_batch_size * config.query_num * hidden
    return int(_ROUNDING * (patches + rows) * item_bytes) + _workspace(step)


def encoder_bytes(config: ModelConfig, step: Step, vision_batch_size: int, item_bytes: int) -> int:
    """Estimate the encoder's largest step and, beside it, what CUDA graphs of its usual steps keep; as above."""
    largest = vision_step_bytes(config, step, vision_batch_size, item_bytes)
    if not (step.graphs and step.kernels and item_bytes == 2):
        return largest
    return largest + vision_step_bytes(config, step, min(vision_batch_size, _GRAPH_SLICES), item_bytes)


def _layers_bytes(config: LanguageConfig, step: Step, tokens: int, item_bytes: int) -> int:
    """Estimate the worst moment of a decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = hidden + 2 * config.num_key_value_heads * config.head_dim
    # The embeddings; the layer's input, what is to be added, and their sum; what was attended, normalized, added up.
    held = 7 * hidden + qkv
    # Both halves and their product; plain PyTorch also has silu(gate), and scales a packed product in float32.
    wide = 3 if step.kernels else 8 if step.packed else 4
    slab = min(_SLAB_ROWS, hidden) * inner * item_bytes if step.packed else 0
    return max(tokens * (held + wide * inner) * item_bytes, tokens * (held + inner + hidden) * item_bytes + slab)


def _sampled_rows(step: Step) -> int:
    return max(step.max_batch_size, step.verified_rows)


def _workspace(step: Step) -> int:
    return _WORKSPACE_BYTES if step.kernels else 0
