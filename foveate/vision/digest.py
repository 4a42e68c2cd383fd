"""The names of pictures' embeddings: known to whoever has the file, before anything is decoded."""

from __future__ import annotations

import hashlib

from foveate.media.slicing import SlicePlan


def encoder_name(identity: str, dtype: str) -> str:
    """Name an encoder in digests: its weights (see :mod:`foveate.checkpoint.identity`) and the type of its rows."""
    return f"{identity} {dtype}"


def digest(data: bytes, plan: SlicePlan, encoder: str) -> bytes:
    """Name what the encoder will see before it is decoded: SHA-256 over file, slicing and the encoder's name.

    Args:
        data: the picture's file. The same file always has the same pixels; the other way round this does not hold.
        plan: what becomes of it.
        encoder: names the weights and their type.
    """
    hashed = hashlib.sha256(f"{plan} {encoder} ".encode())
    hashed.update(data)
    return hashed.digest()
