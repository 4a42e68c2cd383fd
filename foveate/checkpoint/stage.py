"""What a comparison of two models finds. Nothing here needs torch."""

from __future__ import annotations

import msgspec


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """How much two models differ at one place.

    Attributes:
        name: the place.
        values: what was measured.
        measure: which of them has a bound.
        bound: it must not be beyond this: above it, or below it for an agreement.
        ok: whether it is not.
    """

    name: str
    values: dict[str, float]
    measure: str
    bound: float
    ok: bool
