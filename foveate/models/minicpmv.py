"""MiniCPM-V-2_6: its parts, and where each tensor of a published checkpoint goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from foveate.models.config import LanguageConfig, ModelConfig, VisionConfig
from foveate.models.packing import Packing
from foveate.models.qwen2 import Qwen2
from foveate.models.resampler import Resampler
from foveate.models.siglip import SiglipEncoder
from foveate.quantization.layers import replace_linears
from foveate.quantization.scheme import Quantization


class VisionTower(nn.Module):
    """What looks at pictures: encoder and resampler."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = SiglipEncoder(config.vision)
        self.resampler = Resampler(config.query_num, config.language.hidden_size, config.vision.hidden_size)

    def forward(self, pixels: Tensor, packing: Packing) -> Tensor:
        """Turn packed slices, [patches, 3 * patch_size**2] and normalized, into [slices, query_num, hidden_size]."""
        features = self.encoder(pixels, packing.tgt_sizes, packing)
        embeddings: Tensor = self.resampler(features, packing.tgt_sizes, packing)
        return embeddings


class MiniCPMV(nn.Module):
    """The whole model. The engine uses ``language``, the vision encoder ``vision``; they meet in embeddings only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.language = Qwen2(config.language)

    def linears(self, *, vision: bool) -> list[str]:
        """Name the linear layers that can be quantized: the decoder's and its head, and the encoder layers' if wanted.

        The embeddings of tokens, patches and positions stay as they are, and so does the resampler.
        """
        places = ("language.", "vision.encoder.layers.") if vision else ("language.",)
        return [
            name for name, module in self.named_modules() if isinstance(module, nn.Linear) and name.startswith(places)
        ]

    def quantize(self, quantization: Quantization) -> None:
        """Put empty quantized layers in the place of linear ones.

        Raises:
            ConfigError: what is to be kept is no layer of this model, or the groups' size is impossible.
        """
        replace_linears(self, self.linears(vision=quantization.vision), quantization)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tensor of the checkpoint goes.

    Attributes:
        parameter: the module's parameter, by its full name.
        shape: the tensor's shape in the checkpoint.
        start: first row of the parameter that it fills, where several tensors share one.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0


def checkpoint_tensors(config: ModelConfig) -> dict[str, Destination]:
    """Map the name of every tensor of a published checkpoint to its destination; there are no others."""
    return {
        **_language(config.language),
        **_vision(config.vision),
        **_resampler(config.query_num, config.language.hidden_size, config.vision.hidden_size),
    }


def _language(config: LanguageConfig) -> dict[str, Destination]:
    hidden, inner = config.hidden_size, config.intermediate_size
    kv_size = config.num_key_value_heads * config.head_dim
    ours, theirs = "language", "llm.model"
    tensors = {
        f"{theirs}.embed_tokens.weight": Destination(f"{ours}.embed_tokens.weight", (config.vocab_size, hidden)),
        f"{theirs}.norm.weight": Destination(f"{ours}.norm.weight", (hidden,)),
    }
    if not config.tie_word_embeddings:
        tensors["llm.lm_head.weight"] = Destination(f"{ours}.lm_head.weight", (config.vocab_size, hidden))
    for index in range(config.num_hidden_layers):
        source, target = f"{theirs}.layers.{index}", f"{ours}.layers.{index}"
        for name, rows, start in (("q", hidden, 0), ("k", kv_size, hidden), ("v", kv_size, hidden + kv_size)):
            attention = f"{source}.self_attn.{name}_proj"
            tensors[f"{attention}.weight"] = Destination(f"{target}.qkv_proj.weight", (rows, hidden), start)
            tensors[f"{attention}.bias"] = Destination(f"{target}.qkv_proj.bias", (rows,), start)
        for name, start in (("gate", 0), ("up", inner)):
            fused = Destination(f"{target}.gate_up_proj.weight", (inner, hidden), start)
            tensors[f"{source}.mlp.{name}_proj.weight"] = fused
        tensors[f"{source}.self_attn.o_proj.weight"] = Destination(f"{target}.o_proj.weight", (hidden, hidden))
        tensors[f"{source}.mlp.down_proj.weight"] = Destination(f"{target}.down_proj.weight", (hidden, inner))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{source}.{norm}.weight"] = Destination(f"{target}.{norm}.weight", (hidden,))
    return tensors


def _linear(source: str, target: str, rows: int, columns: int, start: int = 0) -> dict[str, Destination]:
    return {
        f"{source}.weight": Destination(f"{target}.weight", (rows, columns), start),
        f"{source}.bias": Destination(f"{target}.bias", (rows,), start),
    }


def _layer_norm(source: str, target: str, size: int) -> dict[str, Destination]:
    return {f"{source}.{part}": Destination(f"{target}.{part}", (size,)) for part in ("weight", "bias")}


def _vision(config: VisionConfig) -> dict[str, Destination]:
    hidden, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    ours, theirs = "vision.encoder", "vpm"
    embeddings = f"{theirs}.embeddings"
    tensors = {
        f"{embeddings}.patch_embedding.weight": Destination(
            f"{ours}.patch_embedding.weight", (hidden, 3, patch, patch)
        ),
        f"{embeddings}.patch_embedding.bias": Destination(f"{ours}.patch_embedding.bias", (hidden,)),
        f"{embeddings}.position_embedding.weight": Destination(
            f"{ours}.position_embedding.weight", (config.patches_per_side**2, hidden)
        ),
        **_layer_norm(f"{theirs}.post_layernorm", f"{ours}.post_layernorm", hidden),
    }
    for index in range(config.num_hidden_layers):
        source, target = f"{theirs}.encoder.layers.{index}", f"{ours}.layers.{index}"
        for place, name in enumerate("qkv"):
            tensors |= _linear(f"{source}.self_attn.{name}_proj", f"{target}.qkv_proj", hidden, hidden, place * hidden)
        tensors |= _linear(f"{source}.self_attn.out_proj", f"{target}.out_proj", hidden, hidden)
        tensors |= _linear(f"{source}.mlp.fc1", f"{target}.fc1", inner, hidden)
        tensors |= _linear(f"{source}.mlp.fc2", f"{target}.fc2", hidden, inner)
        for norm in ("layer_norm1", "layer_norm2"):
            tensors |= _layer_norm(f"{source}.{norm}", f"{target}.{norm}", hidden)
    return tensors


def _resampler(query_num: int, hidden: int, vision_hidden: int) -> dict[str, Destination]:
    ours, theirs = "vision.resampler", "resampler"
    tensors = {
        f"{theirs}.query": Destination(f"{ours}.query", (query_num, hidden)),
        f"{theirs}.proj": Destination(f"{ours}.proj", (hidden, hidden)),
        f"{theirs}.attn.in_proj_weight": Destination(f"{ours}.in_proj_weight", (3 * hidden, hidden)),
        f"{theirs}.attn.in_proj_bias": Destination(f"{ours}.in_proj_bias", (3 * hidden,)),
        **_linear(f"{theirs}.attn.out_proj", f"{ours}.out_proj", hidden, hidden),
    }
    if vision_hidden != hidden:
        tensors[f"{theirs}.kv_proj.weight"] = Destination(f"{ours}.kv_proj.weight", (hidden, vision_hidden))
    for norm in ("ln_q", "ln_kv", "ln_post"):
        tensors |= _layer_norm(f"{theirs}.{norm}", f"{ours}.{norm}", hidden)
    return tensors
