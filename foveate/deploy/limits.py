"""What an engine directory was built for: the defaults of the engine's limits, and the most that may be asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from foveate.checkpoint.engine import MANIFEST, is_engine, read_manifest
from foveate.config import Settings
from foveate.deploy.fields import Flag, flags
from foveate.errors import ConfigError

FIELDS = ("max_batch_size", "max_input_len", "max_image_tokens", "max_seq_len", "max_num_tokens")


def within_limits(settings: Settings, folder: Path, name: Callable[[Flag], str] = lambda flag: flag.name) -> Settings:
    """Fill in an engine directory's limits where nothing was asked for; any other folder changes nothing.

    What is filled in does not count as set: doing it again with another folder is right.

    Args:
        settings: validated ones.
        folder: the model's.
        name: says what to call a setting in an error.

    Raises:
        ConfigError: more was asked for than the directory was built for. The message has a line for each.
        CheckpointError: its manifest cannot be read.
    """
    if settings.model.load_format == "dummy" or not is_engine(folder):
        return settings
    limits = read_manifest(folder).limits
    engine = settings.engine
    asked = {field: value for field in FIELDS if field in engine.model_fields_set and (value := getattr(engine, field))}
    problems = [
        f"{name(flag)}: got {asked[flag.field]}, and {folder / MANIFEST} was built for at most {most}"
        for flag in flags()
        if flag.field in asked and asked[flag.field] > (most := getattr(limits, flag.field))
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    max_seq_len = asked.get("max_seq_len", limits.max_seq_len)
    max_num_tokens = asked.get("max_num_tokens", limits.max_num_tokens)
    max_input_len = asked.get("max_input_len", min(limits.max_input_len, max_seq_len - 1) or None)
    # What was not asked for gives way to what was.
    defaults = {
        "max_batch_size": min(limits.max_batch_size, max_num_tokens),
        "max_input_len": max_input_len,
        "max_image_tokens": min(limits.max_image_tokens, max_input_len or limits.max_image_tokens),
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
    }
    limited = engine.model_copy(update={**defaults, **asked})
    limited.model_fields_set.intersection_update(engine.model_fields_set)
    return settings.model_copy(update={"engine": limited})
