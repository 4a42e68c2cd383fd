"""What this server is: its version, and a name for everything that an answer depends on."""

from __future__ import annotations

import hashlib

from foveate.chat.assets import ModelAssets
from foveate.version import version


def fingerprint(model_name: str, assets: ModelAssets) -> str:
    """Return OpenAI's ``system_fingerprint``: the same as long as version and model are."""
    facts = f"{version()} {model_name} {assets.vocab_size} {assets.hidden_size} {assets.generation}"
    return f"fv_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
