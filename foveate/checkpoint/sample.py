"""What two models are compared on: prompts with pictures, before any model. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class SamplePicture:
    """A picture as the encoder takes it.

    Attributes:
        pixels: float32 [patches, 3 * patch_size**2], normalized, all slices one after another.
        tgt_sizes: (rows, columns) of each slice in patches, the source first.
    """

    pixels: npt.NDArray[np.float32]
    tgt_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation up to where its answer begins.

    Attributes:
        name: what to call it.
        token_ids: the prompt.
        image_positions: where in it the rows of the pictures' embeddings go, in their order.
        pictures: as the encoder takes them.
    """

    name: str
    token_ids: tuple[int, ...]
    image_positions: tuple[int, ...]
    pictures: tuple[SamplePicture, ...]


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The samples of one checkpoint: the same conversations, by its own tokenizer, template and preprocessor."""

    samples: tuple[Sample, ...]
    eos_token_ids: frozenset[int]
