"""The sizes of a decoder that is measured or tuned."""

from __future__ import annotations

from pathlib import Path

from foveate.deploy.resolve import PRESETS
from foveate.errors import ConfigError
from foveate.kernels.triton.tuning_search import Product
from foveate.models.config import LanguageConfig, ModelConfig


def language_config(config: str) -> LanguageConfig:
    """Read a preset's decoder, or that of a folder with a config.json.

    Raises:
        ConfigError: it is neither.
        CheckpointError: the file is malformed.
    """
    for folder in (PRESETS / config, Path(config).expanduser()):
        if (folder / "config.json").is_file():
            return ModelConfig.from_folder(folder).language
    raise ConfigError(f"--config: got {config!r}, expected a preset or a folder with a config.json")


def products(config: LanguageConfig, quantization: str) -> dict[str, Product]:
    """Return a decoder's products, by the names of its layers."""
    hidden, size = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return {
        "qkv": Product(quantization, heads * config.head_dim, hidden),
        "o": Product(quantization, hidden, config.num_attention_heads * config.head_dim),
        "gate_up_silu": Product(f"{quantization}_silu", 2 * size, hidden),
        "down": Product(quantization, hidden, size),
        "lm_head": Product(quantization, config.vocab_size, hidden),
    }
