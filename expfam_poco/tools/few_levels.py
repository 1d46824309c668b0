"""Defaults of weights that take one of a few evenly spaced values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from expfam_poco import arguments
from expfam_poco.family.registry import get_family
from expfam_poco.optim.choices import SIGNS_LR, OwnRateScale

# The best of benchmarks/binary_defaults.py on validation images, ternary and 4 bits together.
SHARP, REACH, KL_WEIGHT = 64.0, 0.03, 1e-4


def few_levels(
    levels: Sequence[float], *, sharp: float = SHARP, reach: float = REACH, kl_weight: float = KL_WEIGHT
) -> dict[str, Any]:
    r"""What a group of weights of few evenly spaced levels has with an own rate for every weight (`BayesBiNN`).

    K levels at distance g (in units of half their range) begin as a Gaussian's weights on the grid, of precision s (the
    family's strength), so that the log-odds of neighbours change by s g² over a gap; s = `sharp`/g². A step

        λ_k ← λ_k − r (l_k − l₀) ĝ / rms,     rms² = mean of (l_k − l₀)² over k > 0

    moves the Gaussian's mean by r/(s · rms): r = `reach` · s · rms, so that at the default lr it is `reach` in units of
    half the range, as of a latent weight by Adam.

    Args:
        levels: two or more, evenly spaced.
        sharp: s g².
        reach: of a step at the default lr.
        kl_weight: T.

    Raises:
        ValueError: if they are not.

    Example:
        >>> from expfam_poco.tools.few_levels import few_levels
        >>> few_levels((-1.0, 0.0, 1.0))["family"].strength
        64.0
    """
    family: Any = get_family("categorical")
    values = family(levels=tuple(levels)).levels  # refuses what is no increasing sequence
    count, gap = len(values), 2.0 / (len(values) - 1)
    span = values[-1] - values[0]
    if any(abs((b - a) * (count - 1) - span) > 1e-4 * span for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"levels={arguments.shown(levels)}: they must be evenly spaced; for others give "
            'binary={"family": Categorical(levels, strength=…), "lr": …}.'
        )
    strength = sharp / gap**2
    rms = math.sqrt(sum((gap * k) ** 2 for k in range(1, count)) / (count - 1))
    member = family(levels=values, strength=strength)
    scale = OwnRateScale(reach * strength * rms / SIGNS_LR)
    return {"family": member, "lr_convention": scale, "kl_weight": OwnRateScale(kl_weight)}
