r"""A reference from elsewhere: the posterior of another run, of another task, of other data.

    ĝ = ∇̃L_B(λ) − α [ ∇̃L_B(λ_out) − ḡ_out ],      ḡ_out = −∇̃KL(q_out ‖ p₀) / N

At a fixed point of the Bayesian learning rule ∇̃KL(q ‖ p₀) + N ∇̃L(λ) = 0, so that a trained posterior knows the mean
natural gradient of the data that it was trained on (PC Eq. 9, §3.1), and no mega-batch is ever evaluated.

The corrected gradient's mean over mini-batches is ∇̃L(λ) − α [∇̃L(λ_out) − ḡ_out]. It is unbiased as far as the stored
site is the present data's own natural gradient at λ_out; where q_out has seen other data, the bracket is what it brings
along: the wish in knowledge transfer, and the price in variance reduction.

Source: *SVRG and Beyond via Posterior Correction*, §3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expfam_poco.correction.snapshot import Snapshot


@dataclass(frozen=True)
class Stored(Snapshot):
    """`Snapshot` with a q_out that is given (`optimizer.set_outer`) and never refreshed.

    Example:
        >>> import expfam_poco as poco
        >>> poco.correction.Stored().refresh_evaluations
        0
    """

    refresh_evaluations: ClassVar[int] = 0
