r"""What a correction is: an object, as a family is.

A correction changes what a natural gradient is made of, and nothing else of the Bayesian learning rule. It says

    where       at which posterior a mini-batch is evaluated first               λ̃ (default: λ itself)
    reference   at which second posterior the same batch and noise are seen      λ_ref, or None: no second evaluation
    correct     what both natural gradients are made into                        ĝ, and its anchor term

and what it remembers for that: its `Memory`, a NamedTuple of States, Sites or tensors with one value per weight. The
memory begins with `begin`, is made by a mega-batch (`after_refresh`), and may follow every step (`after_step`).

All methods are pure functions of tensors. They see a whole block, or a tile of one in a compiled kernel, and cannot
tell which. Checkpoints, the variance meter and the passes over large models work from the memory alone, so that a
correction of one's own needs no other file (docs/add-a-correction.md).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from expfam_poco.correction.worth import BatchLaw, Law
from expfam_poco.family import fields

if TYPE_CHECKING:
    from expfam_poco.correction.alpha import Pace
    from expfam_poco.family.base import ExponentialFamily


class Corrected(NamedTuple):
    """A corrected natural gradient: `site` without the anchor term, and the `anchor` term (None: none)."""

    site: Any
    anchor: Any

    def total(self) -> Any:
        """The site with its anchor term."""
        return self.site if self.anchor is None else fields.add(self.site, self.anchor)


class Averaging(NamedTuple):
    """How a mega-batch's mean joins the old one: ρ as a Site of numbers, re-anchoring, and the anchor term's weight."""

    rho: Any
    reanchor: bool
    anchor_weight: float


class Nothing(NamedTuple):
    """The memory of a correction that keeps none."""


@dataclass(frozen=True)
class Correction(ABC):
    """The base of all corrections; as it is, it corrects nothing.

    Class attributes:

    * `Memory`: a NamedTuple whose fields are States, Sites or tensors with the weights' axes.
    * `evaluations`, `refresh_evaluations`: gradient evaluations of a mini-batch in a corrected step, and of each chunk
      in a refresh (0: it is never refreshed).
    * `unbiased`: whether the corrected natural gradient's mean over mini-batches is the plain one's, for a memory that
      a refresh on all data has made.
    * `neutral`: the values of its own settings with which, at α = 0, it is the plain rule.
    * `exact_at_reference`: whether the corrected natural gradient has no variance over mini-batches where λ is λ_ref
      (with α = 1 and one noise for both).

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> plain = poco.correction.Correction()
        >>> opt = poco.PosteriorCorrected([weight], "diagonal_gaussian", 0.1, 8.0, correction=plain)
        >>> _ = opt.step(lambda: weight.square().sum())
    """

    Memory: ClassVar[type[Any]] = Nothing
    evaluations: ClassVar[int] = 1
    refresh_evaluations: ClassVar[int] = 0
    neutral: ClassVar[Mapping[str, Any]] = {}
    unbiased: ClassVar[bool] = True
    exact_at_reference: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A law is of the class that states it: what a subclass changes, its noise may not outlive."""
        super().__init_subclass__(**kwargs)
        if "law" not in vars(cls):
            cls.law = Correction.law  # type: ignore[method-assign]

    def begin(self, family: ExponentialFamily, state: Any) -> Any:
        """The memory before the first step, or None: only a refresh makes one.

        It is no reference yet: `reference` is asked from the step on that follows an `after_step` or `after_refresh`.
        """
        return None

    def where(self, family: ExponentialFamily, state: Any, memory: Any, share: Any) -> Any:
        """λ̃, the State at which the mini-batch is evaluated first.

        Args:
            family: the exponential family.
            state: λ.
            memory: the correction's memory.
            share: w_t, the share that this step's natural gradient will have in the momentum's average:
                (1 − β₁)/(1 − β₁ᵗ), 1 without momentum.
        """
        return state

    def reference(self, memory: Any) -> Any:
        """λ_ref, the State of the second evaluation, or None."""
        return None

    def mean(self, memory: Any) -> Any:
        """The Site that the mini-batch's natural gradient at λ_ref is compared with, or None."""
        return None

    def correct(
        self,
        family: ExponentialFamily,
        site: Any,
        site_ref: Any,
        state: Any,
        memory: Any,
        *,
        alpha: Any,
        anchor_weight: float,
    ) -> Corrected:
        """The corrected natural gradient at `state`; asked only where there was a second evaluation.

        Args:
            family: the exponential family.
            site: the natural gradient of the mini-batch at λ.
            site_ref: the same mini-batch's, with the same noise, at λ_ref.
            state: λ.
            memory: the correction's memory.
            alpha: α as a Site of numbers.
            anchor_weight: weight of the anchor term, 1 for the exact one.
        """
        return Corrected(site, None)

    def after_refresh(self, family: ExponentialFamily, memory: Any, posterior: Any, site: Any, how: Averaging) -> Any:
        """The memory after a mega-batch with the mean natural gradient `site` at `posterior`.

        Args:
            family: the exponential family.
            memory: the old memory, or None.
            posterior: λ, which later steps do not change (a copy, where they work in place).
            site: the mega-batch's mean natural gradient at λ.
            how: what the group says of averages.
        """
        return memory

    def after_step(self, family: ExponentialFamily, memory: Any, before: Any, after: Any, found: Corrected) -> Any:
        """The memory after a step from `before` to `after` along `found`."""
        return memory

    def law(self, alpha: float, beta: float, pace: Pace, batches: float) -> Law | None:
        """The noise that it leaves and what it costs, from which its worth is foretold (`correction.worth`).

        Args:
            alpha: α of the momentum block, above 0 where there is a reference.
            beta: β₁ of the momentum.
            pace: how often it is refreshed, and from how many mini-batches.
            batches: N_b of the data, infinite where none comes twice.

        Returns:
            the plain rule's where nothing is evaluated elsewhere; else None, for a correction that states no law.
        """
        return None if self.compares or self.moves else BatchLaw()

    @property
    def follows_steps(self) -> bool:
        """Whether steps change the memory."""
        return type(self).after_step is not Correction.after_step

    @property
    def compares(self) -> bool:
        """Whether mini-batches are evaluated a second time, at a reference."""
        return type(self).reference is not Correction.reference

    @property
    def moves(self) -> bool:
        """Whether mini-batches are evaluated elsewhere than at λ."""
        return type(self).where is not Correction.where
