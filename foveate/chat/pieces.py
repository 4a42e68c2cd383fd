"""What a rendered conversation is made of, and what becomes of it: pieces, then a prompt.

Pieces keep apart what a template may say and what a user may say. A special token is live only in
:class:`TemplateText`; the same characters in :class:`UserText` are just characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
Token = Annotated[str, msgspec.Meta(min_length=1)]
Channels = tuple[float, float, float]


class PicturePlan(Protocol):
    """What a prompt must know of a slice plan (:class:`foveate.media.slicing.SlicePlan` is one)."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Columns and rows of slices, or None if the picture is only seen whole."""
        ...


class PictureSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a checkpoint sees pictures: its ``preprocessor_config.json``, where every key is required.

    Attributes:
        max_slice_nums: most slices of one picture, beside the whole picture.
        scale_resolution: side of the square whose area a slice has, in pixels.
        patch_size: side of a patch, in pixels.
        query_num: tokens of one slice (``image_feature_size`` in the file).
        use_image_id: whether a picture is preceded by its number in the conversation.
        slice_mode: False means that pictures are never cut, whatever ``max_slice_nums`` says.
        im_start, im_end: special tokens around the tokens of a whole picture.
        slice_start, slice_end: special tokens around the tokens of a slice.
        unk: the special token that stands for one row of embeddings.
        im_id_start, im_id_end: special tokens around a picture's number.
        norm_mean, norm_std: what is subtracted from the red, green and blue of a pixel between 0 and 1, and
            what the rest is then divided by.
    """

    max_slice_nums: PositiveInt
    scale_resolution: PositiveInt
    patch_size: PositiveInt
    query_num: PositiveInt = msgspec.field(name="image_feature_size")
    use_image_id: bool
    slice_mode: bool
    im_start: Token
    im_end: Token
    slice_start: Token
    slice_end: Token
    unk: Token
    im_id_start: Token
    im_id_end: Token
    norm_mean: Channels
    norm_std: Channels


@dataclass(frozen=True, slots=True)
class TemplateText:
    """Text that the server wrote: special tokens in it are special."""

    text: str


@dataclass(frozen=True, slots=True)
class UserText:
    """Text that a client wrote: nothing in it is special."""

    text: str


@dataclass(frozen=True, slots=True)
class SliceSlot:
    """Room for one slice's embeddings: ``token``, repeated ``num_tokens`` times.

    ``picture`` is the picture's number in the conversation, from 0.
    """

    picture: int
    token: str
    num_tokens: int


Piece = TemplateText | UserText | SliceSlot


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the engine takes it.

    Attributes:
        token_ids: the whole prompt.
        image_ranges: for each picture, the (start, length) in ``token_ids`` of each of its slices, in the
            order of the rows of its embeddings: the whole picture first, then its slices row by row.
    """

    token_ids: list[int]
    image_ranges: list[list[tuple[int, int]]]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the prompt that stand for rows of pictures' embeddings."""
        return sum(length for ranges in self.image_ranges for _, length in ranges)


def picture_pieces(picture: int, plan: PicturePlan, settings: PictureSettings) -> list[Piece]:
    """Write out the place of one picture in a prompt.

    Args:
        picture: the picture's number in the conversation, from 0.
        plan: how it is cut.
        settings: the checkpoint's tokens and sizes.
    """
    slot = SliceSlot(picture, settings.unk, settings.query_num)
    number = f"{settings.im_id_start}{picture}{settings.im_id_end}" if settings.use_image_id else ""
    pieces: list[Piece] = [TemplateText(number + settings.im_start), slot, TemplateText(settings.im_end)]
    if plan.grid is None:
        return pieces
    columns, rows = plan.grid
    for row in range(rows):
        # Only rows of slices are set apart; the first one follows the whole picture directly.
        if row > 0:
            pieces.append(TemplateText("\n"))
        for _ in range(columns):
            pieces += [TemplateText(settings.slice_start), slot, TemplateText(settings.slice_end)]
    return pieces
