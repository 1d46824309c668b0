"""Corrections that break a law each, in the way in which one goes wrong: (the correction, the first law to fail)."""

from typing import Any, ClassVar, NamedTuple

import torch

from expfam_poco.correction import Corrected, Outer, Recursive, Snapshot, Transported
from expfam_poco.family import fields


class Free(Snapshot):
    """Its second evaluation is not declared."""

    evaluations: ClassVar[int] = 1


class Normed(NamedTuple):
    posterior: Any
    site: Any
    norm: torch.Tensor


class OneNumber(Snapshot):
    """A number for the whole tensor, which no part of it could keep."""

    Memory: ClassVar[type[Any]] = Normed

    def after_refresh(self, family, memory, posterior, site, how):
        return Normed(posterior, site, site[0].square().sum().sqrt())


class Unbegun(Recursive):
    """A memory begun with nonsense, which would poison moving averages."""

    def begin(self, family, state):
        begun = super().begin(family, state)
        return begun._replace(site=fields.scale(begun.site, torch.inf))


class Wrapped(NamedTuple):
    outer: Outer


class Nested(Snapshot):
    """A memory of memories."""

    Memory: ClassVar[type[Any]] = Wrapped

    def reference(self, memory):
        return memory.outer.posterior

    def mean(self, memory):
        return memory.outer.site

    def correct(self, family, site, site_ref, state, memory, **choices):
        return super().correct(family, site, site_ref, state, memory.outer, **choices)

    def after_refresh(self, family, memory, posterior, site, how):
        return Wrapped(super().after_refresh(family, None, posterior, site, how))


class InPlace(Snapshot):
    """Works in its inputs."""

    def correct(self, family, site, site_ref, state, memory, **choices):
        found = super().correct(family, site, site_ref, state, memory, **choices)
        for part, value in zip(site, found.site, strict=True):
            part.copy_(value)
        return Corrected(site, found.anchor)


class Forgetful(Snapshot):
    """Gives something else each time."""

    def correct(self, family, site, site_ref, state, memory, **choices):
        found = super().correct(family, site, site_ref, state, memory, **choices)
        return found._replace(site=fields.map_fields(lambda v: v + torch.randn_like(v), found.site))


class Normalised(Snapshot):
    """Scales the whole tensor by its norm."""

    def correct(self, family, site, site_ref, state, memory, *, alpha, anchor_weight):
        size = 1.0 + sum(v.square().sum() for v in site_ref)
        weights = family.Site(*(a / size for a in alpha))
        return super().correct(family, site, site_ref, state, memory, alpha=weights, anchor_weight=anchor_weight)


class Deciding(Snapshot):
    """Corrects where a number is positive, by an `if`."""

    def correct(self, family, site, site_ref, state, memory, **choices):
        found = super().correct(family, site, site_ref, state, memory, **choices)
        return found if (found.site[0].abs() >= 0.0).all() else Corrected(site, None)


class Outside(Transported):
    """Evaluates at what is no member."""

    def where(self, family, state, memory, share):
        return fields.map_fields(lambda v: v / 0.0, state)


class WrongSign(Snapshot):
    """Adds what it should take away."""

    def correct(self, family, site, site_ref, state, memory, *, alpha, anchor_weight):
        weights = family.Site(*(-0.5 * a for a in alpha))
        found = super().correct(family, site, site_ref, state, memory, alpha=weights, anchor_weight=anchor_weight)
        return found._replace(site=fields.add(found.site, fields.scale(site_ref, 0.1)))


class HalfMean(Snapshot):
    """Remembers half of the mega-batch's mean."""

    def after_refresh(self, family, memory, posterior, site, how):
        return super().after_refresh(family, memory, posterior, fields.scale(site, 0.5), how)


class HalfCorrected(Snapshot):
    """Corrects half, and claims to leave no variance."""

    def correct(self, family, site, site_ref, state, memory, *, alpha, anchor_weight):
        weights = fields.scale(alpha, 0.5)
        return super().correct(family, site, site_ref, state, memory, alpha=weights, anchor_weight=anchor_weight)


class Eager(Transported):
    """Moves whatever γ and α are."""

    def where(self, family, state, memory, share):
        return family.extrapolate(state, memory.posterior, 0.5)


class Rounding(Snapshot):
    """Goes another way round, so that α = 0 costs a digit."""

    def correct(self, family, site, site_ref, state, memory, **choices):
        found = super().correct(family, site, site_ref, state, memory, **choices)
        return found._replace(site=fields.map_fields(lambda v: (v + 1.0) - 1.0, found.site))


class Unanchored(Snapshot):
    """Uses a site of one posterior at another as it is."""

    def correct(self, family, site, site_ref, state, memory, *, alpha, anchor_weight):
        return super().correct(family, site, site_ref, state, memory, alpha=alpha, anchor_weight=0.0)


BROKEN = [
    (Free(), "declarations"),
    (OneNumber(), "memory"),
    (Unbegun(), "memory"),
    (Nested(), "checkpoint"),
    (InPlace(), "pure"),
    (Forgetful(), "pure"),
    (Normalised(), "tiles"),
    (Deciding(), "traces"),
    (Outside(), "members"),
    (WrongSign(), "unbiased"),
    (HalfMean(), "unbiased"),
    (HalfCorrected(), "zero_variance"),
    (Eager(), "neutral"),
    (Rounding(), "neutral"),
    (Unanchored(), "chart"),
]
