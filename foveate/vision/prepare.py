"""A picture's patches: what is done for the encoder before it runs."""

from __future__ import annotations

from PIL import Image

from foveate.media.slicing import SlicePlan
from foveate.vision.encoder import VisionEncoder
from foveate.vision.preprocess import Pixels, preprocess


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
