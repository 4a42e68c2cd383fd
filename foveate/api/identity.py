"""What this server is: its version, and a name for everything that an answer depends on."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata

from foveate.chat.assets import ModelAssets


@cache
def version() -> str:
    """Return the installed package's version, or ``0+unknown`` in a tree that was never installed."""
    try:
        return metadata.version("foveate")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def fingerprint(model_name: str, assets: ModelAssets) -> str:
    """Return OpenAI's ``system_fingerprint``: the same as long as version and model are."""
    facts = f"{version()} {model_name} {assets.vocab_size} {assets.hidden_size} {assets.generation}"
    return f"fv_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
