"""How far a model may be from its reference, by what its numbers are stored in. Nothing here needs torch."""

from __future__ import annotations

import msgspec

from foveate.quantization.scheme import Quantization


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What is still well.

    Attributes:
        features: of the vision encoder: the greatest difference, relative to the reference (Frobenius norms).
        rows: the same, of what the resampler makes of them.
        kl_divergence: of the distribution of the next token, the greatest mean, in nats.
        agreement: the least share of the answers' tokens that both find most likely.
    """

    features: float
    rows: float
    kl_divergence: float
    agreement: float


_FEATURES = {"float32": 1e-4, "bfloat16": 0.05, "none": 0.0, "int8": 0.06, "fp8": 0.15, "int4": 0.4}
_KL_DIVERGENCE = {"float32": 1e-5, "bfloat16": 0.005, "none": 0.0, "int8": 0.02, "fp8": 0.05, "int4": 0.4}
_AGREEMENT = {"float32": 0.99, "bfloat16": 0.95, "none": 1.0, "int8": 0.95, "fp8": 0.9, "int4": 0.8}


def bounds_for(dtypes: tuple[str, str], quantization: Quantization) -> Bounds:
    """State the bounds for a model and its reference: those of the coarsest numbers that a stage has seen.

    They are about three to ten times what the demo model shows, which is small and loses more than larger ones do. They
    are for trained models: of random weights the best two tokens are often nearly alike, and any rounding decides.

    Args:
        dtypes: what the two compute in.
        quantization: of the one that is verified; the reference is taken for exact.
    """
    language = (*dtypes, quantization.method)
    vision = (*dtypes, quantization.method if quantization.vision else "none")
    features = max(_FEATURES[kind] for kind in vision)
    return Bounds(
        features=features,
        rows=features,
        kl_divergence=max(_KL_DIVERGENCE[kind] for kind in language),
        agreement=min(_AGREEMENT[kind] for kind in language),
    )
