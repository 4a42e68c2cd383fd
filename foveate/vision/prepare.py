"""A picture's name and its patches: what is done for the encoder before it runs."""

from __future__ import annotations

import hashlib

from PIL import Image

from foveate.media.slicing import SlicePlan
from foveate.vision.encoder import VisionEncoder
from foveate.vision.preprocess import Pixels, preprocess


def digest(data: bytes, plan: SlicePlan, encoder: str) -> bytes:
    """Name what the encoder will see before it is decoded: SHA-256 over file, slicing and the encoder's identity.

    Args:
        data: the picture's file. The same file always has the same pixels; the other way round this does not hold.
        plan: what becomes of it.
        encoder: names the weights and their type.
    """
    hashed = hashlib.sha256(f"{plan} {encoder} ".encode())
    hashed.update(data)
    return hashed.digest()


def cut(picture: Image.Image, plan: SlicePlan, encoder: VisionEncoder) -> Pixels:
    """Resize and cut an RGB picture, on the encoder's device if that can.

    Args:
        picture: of the size that was planned for.
        plan: what becomes of it.
        encoder: for which it is.
    """
    if encoder.resizer is not None:
        resizing = encoder.resizer.begin(picture.tobytes(), picture.size, plan)
        if resizing is not None:
            return Pixels(resizing.wait(), plan.tgt_sizes)
    return preprocess(picture, plan, encoder.room)
