"""Which latent sites are conjugate, found out by solving for them.

A site is conjugate where the log joint, as a function of it, is ⟨c, T⟩ + log h with the same c whatever the other
latents are. Then a regression on the statistics at a few draws finds c, the member λ = c of its family is its exact
posterior, and the gradient of log p(x, θ) − log q(θ) vanishes at one draw more. No distribution of the model is looked
at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.errors import NonFiniteError
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.registry import resolve_family
from expfam_poco.integrations.pyro.reading import Latent
from expfam_poco.integrations.pyro.sites import Kept, Part, families_of, groups_of, keep, kind_of, parts_of
from expfam_poco.optim.optimizer import PosteriorCorrected
from expfam_poco.rule.estimators import available

AUTO = "auto"
JOINT = "full_gaussian"
OWN = {"positive": "gamma", "unit": "beta", "simplex": "dirichlet"}  # by what `kind_of` a support says
SPARE = 2  # draws beyond those that determine a natural gradient

MakeClosure = Callable[[list[Kept]], Callable[[], Tensor]]


def automatic(latents: Sequence[Latent], closure_of: MakeClosure) -> list[ExponentialFamily]:
    """Every site's family: one with its support where the site is conjugate, else a Gaussian over all that are not.

    Args:
        latents: the sites.
        closure_of: gives ℓ as a function of nothing, at the weights of sites that are kept.
    """
    families = families_of(latents, JOINT)
    for number, latent in enumerate(latents):
        own = OWN.get(kind_of(latent.support))
        if own is None:
            continue
        tried = [*families[:number], resolve_family(own), *families[number + 1 :]]
        kept = keep(latents, tried)
        if is_conjugate(kept, number, closure_of(kept)):
            families[number] = tried[number]
    return families


def can_be_solved(part: Part) -> bool:
    """Whether natural gradients of this part can be a regression on its statistics."""
    return "regression" in available(part.family)


def draws_for(part: Part) -> int:
    """How many draws a regression of this part is given."""
    return part.family.least_draws(part.shape) + SPARE


def is_conjugate(kept: Sequence[Kept], number: int, closure: Callable[[], Tensor]) -> bool:
    """Whether a site's exact posterior is in its family; its weight, and no other, is moved."""
    site = kept[number]
    (part,) = [part for part in parts_of(kept) if part.sites[0] is site]
    groups: list[dict[str, Any]] = [
        {**group, "lr": 1.0, "curvature": "regression"}
        if group["family"] == site.family
        else {**group, "lr": 0.0, "curvature": "reparam"}
        for group in groups_of(kept)
    ]
    settings: dict[str, Any] = {"alpha": 0.0, "retraction": "plain", "mc_samples": draws_for(part), "seed": 0}
    optimizer = PosteriorCorrected(groups, site.family, 1.0, 1.0, **settings)
    try:
        optimizer.step(closure)
    except (ValueError, NonFiniteError):
        return False  # no member of the family is its posterior
    state = optimizer.posterior_states()[part.name]
    with optimizer.sampled(seed=1), torch.enable_grad():
        (gradient,) = torch.autograd.grad(closure(), [site.weight])
        theta = site.weight.detach().clone()
    prior = part.family.centred_at(part.family.reference_like(theta), 0.0)
    own = part.family.log_ratio_gradient(state, prior, theta[None])[0]
    left = gradient + own
    if kind_of(site.latent.support) == "simplex":
        left = left - left.mean(-1, keepdim=True)  # on the simplex a slope has no part along (1, …, 1)
    scale = float(gradient.abs().max() + own.abs().max())
    return float(left.abs().max()) <= 10.0 * torch.finfo(theta.dtype).eps ** 0.5 * scale
