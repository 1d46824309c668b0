"""The laws of natural gradients without noise where none is needed: the posterior's own site, and regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expfam_poco.checks.density_laws import Findings
from expfam_poco.checks.learning_laws import ESS, GROUPS, draws_at, estimate
from expfam_poco.checks.specimens import SAMPLES, SIGMAS, SLACK, STEPS, Finding, Specimen, size_of, standard_errors
from expfam_poco.family import fields
from expfam_poco.family.derived import _flatten
from expfam_poco.family.draws import Estimator
from expfam_poco.rule import own_site as rule
from expfam_poco.rule.estimators import available

FEW, EXACT = 16, 1e-8


def own_site(s: Specimen) -> Findings:
    """With the own site log p₀/q / N is estimated by (λ₀ − λ)/N whatever the noise, and ⟨c, T⟩ by c in the mean."""
    if not s.sampling:
        return
    family = s.family
    for number, (state, prior) in enumerate(zip(s.states[:3], s.states[1:4], strict=True)):
        if number == 0 and family.default_estimator == "reparam":
            yield _slope_of_log_prob(s, state, prior)
        own = rule.own_site(family, state, prior, ESS)
        for name, estimator in available(family).items():
            if not estimator.compares and estimator.needs != "variations":
                site = _with_own_site(s, estimator, state, prior, own, number)
                allowed = [_exact(s) * (1.0 + size_of(value)) for value in own]
                yield s.near(f"{name!r} of log p₀/q / N against (λ₀ − λ)/N", site, own, allowed)
    yield _unbiased(s)


def _exact(s: Specimen) -> float:
    """How far what is exact may be off, against the numbers that it is the difference of."""
    return max(EXACT, SLACK * torch.finfo(s.dtype).eps)


def _slope_of_log_prob(s: Specimen, state: Any, prior: Any) -> Finding:
    theta = s.draws(0)[:4]

    def slope(q: Any, p: Any, at: Tensor) -> Tensor:
        family = s.family
        gradient: Tensor = torch.func.grad(lambda x: (family.log_prob(q, x) - family.log_prob(p, x)).sum())(at)
        return gradient

    found, tolerances = s.rounded(s.family.log_ratio_gradient, state, prior, theta)
    expected, more = s.rounded(slope, state, prior, theta)
    allowed = [a + b for a, b in zip(tolerances, more, strict=True)]
    return s.near("log_ratio_gradient against the slope of log_prob", found, expected, allowed)


def _with_own_site(s: Specimen, estimator: Estimator, state: Any, prior: Any, own: Any, number: int) -> Any:
    """The estimate from four draws; a measured curvature, which stays as it is, is taken for right."""
    family = s.family

    def loss(theta: Tensor) -> Tensor:
        return -family.log_ratio(state, prior, theta).reshape(len(theta), -1).sum(-1) / ESS

    draws = draws_at(s, estimator, state, s.noise(4, STEPS, 700 + number), loss, number)
    site = rule.natural_gradient(estimator, family, state, prior, ESS, draws)
    if draws.hessian is None and draws.pairs is None:
        return site
    kept = family.per_block(1.0, 0.0)
    return fields.add(fields.weigh(site, kept), fields.weigh(own, family.per_block(0.0, 1.0)))


def _unbiased(s: Specimen) -> Finding:
    """The mean with the own site of another prior against the mean without, for the same draws."""
    family, state, prior = s.family, s.states[0], s.states[2]
    estimator, c = available(family)[family.default_estimator], s.direction(720)

    def loss(theta: Tensor) -> Tensor:
        return family.inner(c, family.statistics(theta)).reshape(len(theta), -1).sum(-1)

    rows = []
    for group, epsilon in enumerate(s.noise(GROUPS * FEW, SAMPLES, 720).split(FEW)):
        draws = draws_at(s, estimator, state, epsilon, loss, group)
        site = rule.natural_gradient(estimator, family, state, prior, ESS, draws)
        if not estimator.unbiased:  # its own bias of the own site is taken out
            zero = rule.residual(family, state, prior, ESS, draws._replace(grad=0.0 * draws.require_grad()))
            of_own = estimator.natural_gradient(family, state, zero)
            plain = estimator.natural_gradient(family, state, draws)
            own = rule.own_site(family, state, prior, ESS)
            site = fields.subtract(site, fields.add(fields.add(plain, of_own), own))
        rows.append(torch.cat([value.reshape(-1) for value in family.site_to_nat(site, state)]))
    expected = torch.cat([value.reshape(-1) for value in s.seen(c, state)])
    if not estimator.unbiased:
        return Finding("the estimate with the own site is not linear in the loss", size_of(torch.stack(rows)), EXACT)
    own = fields.map_fields(size_of, rule.own_site(family, state, prior, ESS))
    error = standard_errors(torch.stack(rows), expected, allowed=_exact(s) * (1.0 + max(own)))
    return Finding("mean estimate of ∇̃⟨c, T⟩ with the own site against c (standard errors)", error, SIGMAS)


def regression(s: Specimen) -> Findings:
    """Regression gives ∇̃⟨c, T⟩ = c from a few draws, whatever they are: for all weights, or for one from losses."""
    if not s.sampling:
        return
    for name, estimator in available(s.family).items():
        if not estimator.compares:
            continue
        for number, state in enumerate(s.states[:3]):
            c = s.direction(740 + number)
            epsilon = s.noise(estimator.least_draws(s.family, s.shape) + 2, STEPS, 740 + number)
            alone = estimator.needs == "loss"
            if alone:
                c = _of_first_weight(s, c)
            site = s.family.site_to_nat(estimate(s, estimator, state, epsilon, c), state)
            values = _flatten(s.family, s.family.statistics(s.family.sample(state, epsilon)))[0]
            off = _flatten(s.family, fields.subtract(site, c))[0]
            if alone:  # where the draws of a discrete weight are alike, c cannot be told from their losses
                off, values = off.reshape(-1, off.shape[-1])[0], values.reshape(len(values), -1, off.shape[-1])[:, 0]
            error = (off * (values - values.mean(0))).sum(-1)
            scale = size_of(values - values.mean(0)) * max(map(size_of, c))
            allowed = _exact(s) * (1.0 + scale)
            yield Finding(f"⟨ĉ − c, T⟩ by {name!r} at its {len(epsilon)} draws", size_of(error), allowed)


def _of_first_weight(s: Specimen, c: Any) -> Any:
    """c for the first weight, 0 for the others."""
    first = torch.zeros(s.batch.numel(), dtype=s.dtype, device=s.device)
    first[0] = 1.0

    def cut(value: Tensor) -> Tensor:
        return value * first.reshape((*s.batch, *(1,) * (value.ndim - len(s.batch))))

    return fields.map_fields(cut, c)
