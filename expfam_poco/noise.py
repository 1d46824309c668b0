"""Noise that is looked up, not drawn: the public names of `expfam_poco.family.noise`, for families of one's own."""

from expfam_poco.family.noise import (
    Address,
    NoiseKey,
    address_of,
    noise,
    philox,
    quantile,
    reflect,
    tiled,
    tiles_of,
    traced,
    words,
)

__all__ = [
    "Address",
    "NoiseKey",
    "address_of",
    "noise",
    "philox",
    "quantile",
    "reflect",
    "tiled",
    "tiles_of",
    "traced",
    "words",
]
