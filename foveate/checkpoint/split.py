"""Splitting a published checkpoint: the language model as a plain Qwen2 checkpoint, the vision part beside it.

No tensor is ever held: their bytes go from file to file a few megabytes at a time, as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foveate.checkpoint.engine import is_engine
from foveate.checkpoint.headers import check
from foveate.checkpoint.layout import layout
from foveate.checkpoint.staging import staged
from foveate.checkpoint.stored import ITEM_BYTES, StoredTensor, stored_tensors
from foveate.checkpoint.write import Entry, Progress, copy_file, plan_shards, write_index, write_json, write_shards
from foveate.errors import CheckpointError

LANGUAGE, VISION = "language", "vision"
PARTS = (LANGUAGE, VISION)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""What may belong to a tokenizer; only the first two have to be there."""
_LANGUAGE_PREFIX = "llm."
_QWEN2_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window", "sliding_window", "max_window_layers",
    "layer_types", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "transformers_version",
)  # fmt: skip
"""What the Qwen2 configuration of transformers knows, and what every configuration has."""
_PLAIN_TOKENIZER = "PreTrainedTokenizerFast"


def split(
    folder: Path, output: Path, *, shard_bytes: int, force: bool = False, progress: Progress | None = None
) -> None:
    """Write ``output/language`` and ``output/vision``.

    The first has the architecture Qwen2ForCausalLM, as transformers and others load it. The second has the tensors
    of encoder and resampler under their published names, with the configuration of the whole. A quantized
    checkpoint's tensors keep their form, and its ``quantization_config`` goes with the language model.

    Args:
        folder: a published checkpoint.
        output: must not be there, unless ``force`` is given and an earlier split made it.
        shard_bytes: most bytes of tensors in a file.
        force: replace the output of an earlier split.
        progress: called with bytes written and bytes in all.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or not one of a supported model.
        ConfigError: the output is there already.
        OutputError: it does not fit the disk, or cannot be written.
    """
    if is_engine(folder):
        raise CheckpointError(f"{folder}: is an engine directory; what is split is the checkpoint it was built from")
    raw = _read_json(folder / "config.json")
    stored = stored_tensors(folder)
    _check(folder, stored)
    parts = {
        LANGUAGE: {name.removeprefix(_LANGUAGE_PREFIX): t for name, t in stored.items() if _is_language(name)},
        VISION: {name: tensor for name, tensor in stored.items() if not _is_language(name)},
    }
    total = sum(tensor.nbytes for tensor in stored.values())
    before = 0
    with staged(output, needed_bytes=total, force=force, ours=_is_split) as staging:
        for part, tensors in parts.items():
            (staging / part).mkdir()
            before += _write_part(staging / part, tensors, shard_bytes, _shifted(progress, before, total))
        _copy_language_files(folder, staging / LANGUAGE, raw)
        for name in ("config.json", "preprocessor_config.json"):
            copy_file(folder / name, staging / VISION / name)


def _is_language(name: str) -> bool:
    return name.startswith(_LANGUAGE_PREFIX)


def _is_split(folder: Path) -> bool:
    """Whether a folder is what this module writes, and nothing else."""
    return {path.name for path in folder.iterdir()} == set(PARTS) and all(
        (folder / part / "config.json").is_file() for part in PARTS
    )


def _check(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint with something missing or unknown: what loads the parts may only warn of it."""
    expected = layout(folder)
    check(folder, expected.config.model_type, stored, expected.expected)


def _write_part(folder: Path, tensors: Mapping[str, StoredTensor], shard_bytes: int, progress: Progress | None) -> int:
    """Write a part's tensors in the order in which they are stored; return their bytes."""
    # Those with the largest elements first, so that every tensor begins where it can be mapped.
    ordered = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype])
    entries = [Entry(name, tensors[name].dtype, tensors[name].shape) for name in ordered]
    shards = plan_shards(entries, stem="model", shard_bytes=shard_bytes)
    write_shards(folder, shards, ((name, tensors[name].chunks()) for name in ordered), progress)
    write_index(folder / "model.safetensors.index.json", shards)
    return sum(entry.nbytes for entry in entries)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Count one part's bytes as some of the whole."""
    if progress is None:
        return None
    report: Callable[[int, int], None] = progress
    return lambda done, _: report(before + done, total)


def _copy_language_files(folder: Path, language: Path, raw: dict[str, Any]) -> None:
    write_json(language / "config.json", qwen2_config(raw))
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (folder / name).is_file() and name != "tokenizer_config.json":
            copy_file(folder / name, language / name)
    write_json(language / "tokenizer_config.json", _plain_tokenizer(_read_json(folder / "tokenizer_config.json")))


def qwen2_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Take what belongs to the language model from the configuration of the whole."""
    config = {key: raw[key] for key in _QWEN2_KEYS if key in raw}
    config |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }
    if isinstance(quantization := raw.get("quantization_config"), dict):
        config["quantization_config"] = {key: _without_prefix(value) for key, value in quantization.items()}
    return config


def _without_prefix(value: Any) -> Any:
    """Rename the modules that a quantization's settings name; those of the vision part are not there any more."""
    if isinstance(value, str):
        return value.removeprefix(_LANGUAGE_PREFIX)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        kept = [_without_prefix(item) for item in value if not item.startswith(("vpm", "resampler"))]
        return kept or None
    return value


def _plain_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Name a class that needs no remote code: it reads ``tokenizer.json``, which says everything."""
    if config.pop("auto_map", None) is not None:
        config["tokenizer_class"] = _PLAIN_TOKENIZER
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content
