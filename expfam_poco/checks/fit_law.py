"""The law of the whole distribution: samples against the density, by distribution functions, waves, or values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from expfam_poco.checks.references import Reference
from expfam_poco.checks.specimens import DRAWS, SIGMAS, Finding, Specimen, Unverified, size_of

Findings = Iterator[Finding | str]


def goodness_of_fit(s: Specimen) -> Findings:
    """Samples have the density h exp(⟨λ, T⟩ − A) as a whole: its distribution function, tails and waves.

    In coordinates z in which the support is everything and the draws have mean 0 and covariance I:

    * one number a weight: the largest distance between the distribution function F of the density, by the trapezoid
      rule, and the draws'. By Dvoretzky, Kiefer, Wolfowitz and Massart it exceeds ε with probability 2 exp(−2Kε²) at
      most; SIGMAS standard errors are as unlikely as the normal distribution has them.
    * any weights: E of cos(⟨w, z⟩ + b) and of a smooth step beyond |⟨u, z⟩| = 2.5, for 24 directions and four
      frequencies, over draws and over weighted points (`Reference`), in standard errors of both.
    * finitely many values, or integers: how often each was drawn, in standard errors.
    """
    if not s.sampling:
        return
    for number in range(len(s.states)):
        reference = s.represented(number)
        if reference is None:
            yield Unverified("goodness_of_fit: no coordinates are known for this support; moments alone were compared")
        elif reference.exact:
            yield from _frequencies(s, number, reference)
        else:
            yield from _waves(s, number, reference)
            if s.family.event_dim == 0:
                yield _kolmogorov(s, number, reference)


def _frequencies(s: Specimen, number: int, reference: Reference) -> Findings:
    """How often each value was drawn against its probability."""
    event = tuple(range(-s.family.event_dim, 0)) if s.family.event_dim else ()
    draws, weight = s.draws(number), torch.softmax(reference.log_weight, 0)
    for value, probability in zip(reference.theta, weight, strict=True):
        if float(probability.max()) * DRAWS < 1.0 and float(probability.max()) < reference.missing:
            continue
        hit = draws == value
        hit = hit.all(event) if event else hit
        spread = (probability * (1.0 - probability)).clamp_min(0.0).sqrt()
        allowed = reference.missing * probability
        yield s.sampled("how often a value is drawn", hit.to(s.dtype), probability, spread=spread, allowed=allowed)


def _waves(s: Specimen, number: int, reference: Reference) -> Findings:
    """E of bounded functions by draws and by weighted points."""
    assert reference.coordinates is not None
    lead = 1 + len(s.batch)
    x = reference.transform.inv(s.draws(number))
    x = x.reshape(*x.shape[:lead], -1)
    good = torch.isfinite(x).all(-1, keepdim=True)
    centre = torch.where(good, x, 0.0).mean(0)
    away = torch.where(good, x - centre, 0.0)
    covariance = torch.einsum("n...i,n...j->...ij", away, away) / len(x)
    root, info = torch.linalg.cholesky_ex(covariance)
    if bool(info.any()):
        yield Unverified("goodness_of_fit: the draws fill fewer dimensions than the support")
        return

    def features(points: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(root, (points - centre).unsqueeze(-1), upper=False).squeeze(-1)
        u = s.normal((24, z.shape[-1]), 70)
        u = u / u.square().sum(-1, keepdim=True).sqrt()
        length = (torch.arange(24, dtype=s.dtype, device=s.device) % 4 + 1.0) * 0.75
        along = z @ u.mT
        phase = 2.0 * s.normal((24,), 71)
        tail = torch.sigmoid(6.0 * (along.abs() - 2.5))
        return torch.cat((torch.cos(along * length + phase), tail), -1)

    weight = torch.softmax(reference.log_weight, 0).unsqueeze(-1)
    values = features(torch.where(torch.isfinite(reference.coordinates), reference.coordinates, 0.0))
    mean = (weight * values).sum(0)
    error = SIGMAS * (weight * (values - mean)).square().sum(0).sqrt() + 2.0 * SIGMAS * weight.amax(0)
    drawn = torch.where(good, features(torch.where(good, x, centre)), 1.0)
    yield s.sampled("E of bounded functions: samples against the density h exp⟨λ, T⟩", drawn, mean, allowed=error)


def _kolmogorov(s: Specimen, number: int, reference: Reference) -> Finding:
    """The largest distance between two distribution functions, as so many normal standard errors."""
    assert reference.coordinates is not None
    shape = (-1, *(1,) * len(s.batch))
    x = reference.transform.inv(s.draws(number)).reshape(DRAWS, *s.batch)
    x = torch.nan_to_num(x, posinf=torch.finfo(s.dtype).max, neginf=-torch.finfo(s.dtype).max).sort(0).values
    low, high = torch.quantile(x, 0.25, 0), torch.quantile(x, 0.75, 0)
    t = torch.sinh(torch.linspace(-8.0, 8.0, 2**13 + 1, dtype=s.dtype, device=s.device)).reshape(shape)
    grid = 0.5 * (low + high) + (0.1 * (high - low)).clamp_min(s.eps) * t
    theta = reference.transform(grid.reshape(-1, *s.shape))
    inside = s.family.support.check(theta) & torch.isfinite(theta)
    jacobian = reference.transform.log_abs_det_jacobian(grid, theta)
    theta = torch.where(inside, theta, s.draws(number)[:1])
    density = torch.where(inside, s.family.log_prob(s.states[number], theta) + jacobian, -torch.inf).exp()
    mass = 0.5 * (density[1:] + density[:-1]) * (grid[1:] - grid[:-1])
    whole = torch.cat((torch.zeros_like(mass[:1]), mass.cumsum(0)))
    whole = whole / whole[-1:]
    flat, sizes = x.reshape(DRAWS, -1).mT.contiguous(), grid.reshape(len(grid), -1).mT.contiguous()
    place = torch.searchsorted(sizes, flat).clamp(1, len(grid) - 1)
    left, right = sizes.gather(1, place - 1), sizes.gather(1, place)
    values = whole.reshape(len(grid), -1).mT
    share = ((flat - left) / (right - left)).clamp(0.0, 1.0)
    at = values.gather(1, place - 1) * (1.0 - share) + values.gather(1, place) * share
    steps = torch.arange(DRAWS + 1, dtype=s.dtype, device=s.device) / DRAWS
    distance = torch.maximum((at - steps[:-1]).abs().amax(), (at - steps[1:]).abs().amax())
    what = "largest distance between the distribution functions of samples and density"
    return Finding(what, size_of(distance), math.sqrt((0.5 * SIGMAS**2 + math.log(2.0)) / (2.0 * DRAWS)))
