"""Latent sites as parameters: in which space a site is kept, by which family, and what its density becomes there.

A family of unbounded weights keeps a site as u, θ = t(u) with t = `biject_to(support)`, of which the density has the
factor |det ∂t/∂u|. A family with the site's own support keeps θ itself. The rule's prior is p₀ ∝ h, the base measure
(λ₀ = 0), until a posterior takes its place; so the loss of a site is

    ℓ = −log p(x, t(u)) − log |det ∂t/∂u| + log h(u),        ess = 1,

and h ∝ 1 for Gaussians. With a posterior as prior the latent sites' own densities, Jacobians and h fall away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from expfam_poco.arguments import shown
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.registry import resolve_family
from expfam_poco.integrations.pyro.reading import Latent

LOCAL = "diagonal_gaussian"  # of local sites, where the family is one of all weights together
_KINDS = {
    "positive": (constraints.positive, constraints.nonnegative),
    "unit": (constraints.unit_interval, constraints.interval(0.0, 1.0)),
    "simplex": (constraints.simplex,),
    "real": (constraints.real, constraints.real_vector),
}


@dataclass(frozen=True)
class Kept:
    """A latent site as a parameter.

    Attributes:
        latent: the site.
        family: of its weights.
        weight: the parameter, in the family's space; of a local site the rows come first.
        transform: from the family's space to the site's; None where they are one.
    """

    latent: Latent
    family: ExponentialFamily
    weight: nn.Parameter
    transform: Any

    @property
    def name(self) -> str:
        """The site's."""
        return self.latent.name

    def laid(self, weight: Tensor) -> Tensor:
        """The weight with its axes as the site has them, after any axes of draws."""
        draws = weight.ndim - self.weight.ndim
        return weight if self.latent.plate is None else weight.movedim(draws, draws + self.latent.axis)

    def of_rows(self, weight: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """What a batch with these rows uses of the weight."""
        return weight if self.latent.plate is None else weight[rows[self.latent.plate]]

    def count(self, rows: Mapping[str, Tensor]) -> float:
        """How many rows of the whole each of the batch's stands for."""
        return 1.0 if self.latent.plate is None else len(self.weight) / len(rows[self.latent.plate])

    def value(self, weight: Tensor) -> Tensor:
        """θ = t(u), in the site's own space."""
        value: Tensor = weight if self.transform is None else self.transform(weight)
        return value

    def log_density_factor(self, weight: Tensor, value: Tensor) -> Tensor | None:
        """log |det ∂t/∂u| − log h(u), summed; None where it is a constant."""
        if self.transform is None:
            return -self.family.log_base_measure(weight).sum()
        if _is_real(self.latent.support):
            return None
        factor: Tensor = self.transform.log_abs_det_jacobian(weight, value).sum()
        return factor

    def site_log_density(self, weight: Tensor, value: Tensor) -> Tensor:
        """log |det ∂u/∂θ| for each of the site's draws, as the density of a guide's site has it."""
        dims = self.latent.event_dim
        if self.transform is None:
            return value.new_zeros(value.shape[: value.ndim - dims])
        jacobian: Tensor = -self.transform.log_abs_det_jacobian(weight, value)
        rightmost = jacobian.ndim - value.ndim + dims
        return jacobian.flatten(-rightmost).sum(-1) if rightmost > 0 else jacobian


def families_of(latents: Sequence[Latent], choice: Any) -> list[ExponentialFamily]:
    """Every site's family.

    Args:
        latents: the sites.
        choice: a family or its name for all (local sites have independent rows, and so not a joint one, but `LOCAL`),
            or a mapping from patterns of names to families, the first match wins.

    Raises:
        ValueError: for a site that no pattern matches.
    """
    if not isinstance(choice, Mapping):
        every = resolve_family(choice)
        by_row = resolve_family(LOCAL) if every.joint else every
        return [every if latent.plate is None else by_row for latent in latents]
    found = {pattern: resolve_family(family) for pattern, family in choice.items()}
    families = []
    for latent in latents:
        family = next((found[pattern] for pattern in found if fnmatchcase(latent.name, pattern)), None)
        if family is None:
            raise ValueError(
                f"family={shown(dict(choice))}: no pattern matches the site {latent.name!r}; add one, '*' matches "
                "every name."
            )
        families.append(family)
    return families


def keep(latents: Sequence[Latent], families: Sequence[ExponentialFamily]) -> list[Kept]:
    """Make a parameter of every latent site.

    Raises:
        ValueError: for a support that neither the site's family nor a bijection has.
    """
    return [_keep(latent, family) for latent, family in zip(latents, families, strict=True)]


def kind_of(support: Any) -> str:
    """Which kind of support it is: "positive", "unit", "simplex", "real", or "other"."""
    bare = support
    while isinstance(bare, constraints.independent):
        bare = bare.base_constraint
    bounds = (type(bare).__name__, getattr(bare, "lower_bound", None), getattr(bare, "upper_bound", None))
    for kind, members in _KINDS.items():
        for member in members:
            while isinstance(member, constraints.independent):
                member = member.base_constraint
            known = (type(member).__name__, getattr(member, "lower_bound", None), getattr(member, "upper_bound", None))
            if _same(bounds, known):
                return kind
    return "other"


def _same(one: tuple[str, Any, Any], other: tuple[str, Any, Any]) -> bool:
    if one[0] != other[0]:
        return False
    return all(_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def _equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return bool(torch.as_tensor(one == other).all())


def _is_real(support: Any) -> bool:
    return kind_of(support) == "real"


def _keep(latent: Latent, family: ExponentialFamily) -> Kept:
    if family.levels is not None:
        raise ValueError(
            f"family={type(family).__name__} for the site {latent.name!r}: its weights have a few levels; choose a "
            "family of real, positive or bounded ones."
        )
    if _is_real(family.support):
        transform = _bijection(latent)
        start = transform.inv(latent.value)
    elif kind_of(family.support) == kind_of(latent.support) != "other":
        transform, start = None, latent.value
    else:
        raise ValueError(
            f"family={type(family).__name__} for the site {latent.name!r}: the family's support is {family.support}, "
            f"the site's {latent.support}; choose a family with that support, or a Gaussian, which takes every one."
        )
    if not bool(torch.isfinite(start).all()):
        raise ValueError(
            f"init: it puts the site {latent.name!r} on the border of its support, {latent.support}; give init= "
            "another function of pyro.infer.autoguide.initialization, such as init_to_feasible."
        )
    if latent.plate is not None:
        start = start.movedim(latent.axis, 0)
    return Kept(latent, family, nn.Parameter(start.clone(memory_format=torch.contiguous_format)), transform)


def _bijection(latent: Latent) -> Any:
    try:
        return biject_to(latent.support)
    except NotImplementedError:
        raise ValueError(
            f"site {latent.name!r}: nothing maps real numbers one to one onto its support, {latent.support}; "
            "reparameterise the model, or give the site a family with that support."
        ) from None


def groups_of(kept: Sequence[Kept]) -> list[dict[str, Any]]:
    """Parameter groups: the sites of one family together, which a joint one sees as one vector; local ones by plate."""
    groups: list[dict[str, Any]] = []
    for site in kept:
        for group in groups:
            if group["family"] == site.family and group["plate"] == site.latent.plate:
                group["params"].append((site.name, site.weight))
                break
        else:
            own = {"family": site.family, "plate": site.latent.plate}
            groups.append({"params": [(site.name, site.weight)], **own})
    return groups


@dataclass(frozen=True)
class Part:
    """What has one posterior: a latent site, or all sites of a joint family, side by side in one vector.

    Attributes:
        name: under which the optimizer has its posterior.
        family: of it.
        sites: whose weights it is about.
        shape: of what the family sees.
    """

    name: str
    family: ExponentialFamily
    sites: tuple[Kept, ...]
    shape: torch.Size

    def split(self, theta: Tensor) -> list[Tensor]:
        """draws × shape → one tensor for each site, draws × the shape of its weight; no or several axes of draws."""
        if not self.family.joint:
            return [theta]
        parts = theta.split([site.weight.numel() for site in self.sites], -1)
        batch = theta.shape[:-1]
        return [part.reshape(batch + site.weight.shape) for part, site in zip(parts, self.sites, strict=True)]

    def gather(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The family's tensor of weights by site name."""
        if not self.family.joint:
            return weights[self.sites[0].name]
        return torch.cat([weights[site.name].reshape(-1) for site in self.sites])


def parts_of(kept: Sequence[Kept]) -> list[Part]:
    """The parts of the posterior that an optimizer with `groups_of(kept)` has."""
    known = {site.name: site for site in kept}
    parts = []
    for number, group in enumerate(groups_of(kept)):
        family, sites = group["family"], [known[name] for name, _ in group["params"]]
        if family.joint:
            size = sum(site.weight.numel() for site in sites)
            parts.append(Part(f"group{number}", family, tuple(sites), torch.Size([size])))
            continue
        for site in sites:
            shape = site.weight.shape
            parts.append(Part(site.name, family.for_shape(shape), (site,), shape))
    return parts
