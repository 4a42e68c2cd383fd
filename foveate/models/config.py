"""The architecture of a checkpoint, as its ``config.json`` states it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import CheckpointError
from foveate.quantization.published import PublishedQuantization, read_quantization


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """A Qwen2 decoder. Sizes are in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A SigLIP encoder for pictures of any aspect ratio. ``image_size`` and ``patch_size`` are in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int

    @property
    def patches_per_side(self) -> int:
        """Position buckets along each side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The whole model: encoder, resampler with ``query_num`` queries, decoder.

    ``published`` says how the weights of a quantized checkpoint are packed; None if they are plain.
    """

    language: LanguageConfig
    vision: VisionConfig
    query_num: int
    model_type: str
    published: PublishedQuantization | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json``.

        Raises:
            CheckpointError: the file is missing or malformed, a key is missing or has the wrong type, or it asks for
                something that is not implemented. The message names the file and the key.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: is not JSON ({error})") from error
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str) -> ModelConfig:
        """Take the fields of a parsed ``config.json``; ``source`` names it in errors (see :meth:`from_folder`)."""
        _refuse(raw, source)
        vision = _Fields(_Fields(raw, source).take("vision_config", dict), f"{source}: vision_config")
        fields = _Fields(raw, source)
        packed = raw.get("quantization_config")
        config = cls(
            language=LanguageConfig(
                **{name: fields.take(name, int) for name in _LANGUAGE_SIZES},
                rms_norm_eps=fields.take("rms_norm_eps", float),
                rope_theta=fields.take("rope_theta", float),
                tie_word_embeddings=fields.take("tie_word_embeddings", bool, default=False),
            ),
            vision=VisionConfig(**{name: vision.take(name, int) for name in _VISION_SIZES}),
            query_num=fields.take("query_num", int),
            model_type=fields.take("model_type", str),
            published=None if packed is None else read_quantization(packed, f"{source}: quantization_config"),
        )
        _check_divisible(config, source)
        return config


_LANGUAGE_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
)  # fmt: skip
# What other configurations of these classes can ask for and this implementation does not do.
_UNSUPPORTED = {
    "use_sliding_window": False,
    "drop_vision_last_layer": False,
    "hidden_act": "silu",
    "rope_scaling": None,
}


@dataclass(frozen=True, slots=True)
class _Fields:
    raw: dict[str, Any]
    source: str

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.raw.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.source}: {key} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if wrong or (isinstance(value, int) and kind is int and value < 1):
            expected = "a positive integer" if kind is int else kind.__name__
            raise CheckpointError(f"{self.source}: {key} is {value!r}, expected {expected}")
        return value


def _refuse(raw: dict[str, Any], source: str) -> None:
    for key, supported in _UNSUPPORTED.items():
        if raw.get(key, supported) != supported:
            raise CheckpointError(f"{source}: {key} is {raw[key]!r}, and only {supported!r} is supported")


def _check_divisible(config: ModelConfig, source: str) -> None:
    language, vision = config.language, config.vision
    for name, size, parts in (
        ("hidden_size / num_attention_heads", language.hidden_size, language.num_attention_heads),
        (
            "num_attention_heads / num_key_value_heads",
            language.num_attention_heads,
            language.num_key_value_heads,
        ),
        ("vision hidden_size / num_attention_heads", vision.hidden_size, vision.num_attention_heads),
        ("hidden_size / 128 (heads of the resampler)", language.hidden_size, 128),
    ):
        if size % parts:
            raise CheckpointError(f"{source}: {name} is {size} / {parts}, which is not a whole number")
