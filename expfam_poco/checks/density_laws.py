"""The laws of an exponential family as a set of densities: what it declares, its coordinates, samples and values.

Every law is a generator of findings about one `Specimen`; `checks` runs them in the order of `LAWS` here and in
`learning_laws`, from the elementary to what rests on it, so that the first law to fail is the one to look at.
A law yields a string to remark on what it could not test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.checks.references import Reference, unseen
from expfam_poco.checks.specimens import (
    DRAWS,
    MORE_SAMPLES,
    SAMPLES,
    SIGMAS,
    SLACK,
    Finding,
    Specimen,
    Unverified,
    holds,
    size_of,
)
from expfam_poco.family import quadrature, supports
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.derived import _flatten, fisher
from expfam_poco.rule.estimators import available

Findings = Iterator[Finding | str]


class Law(NamedTuple):
    """A law's name, its test, what to look at when it fails, and whether the laws after it rest on it."""

    name: str
    test: Callable[[Specimen], Findings]
    hint: str
    essential: bool = False


def declarations(s: Specimen) -> Findings:
    """Class attributes fit together."""
    family = s.family
    for name, kind in (("Nat", family.Nat), ("Mean", family.Mean)):
        same = kind._fields == family.Statistics._fields
        yield holds(f"{name} has the fields {kind._fields}, T has {family.Statistics._fields}", same)
    dims = family.statistic_dims
    yield holds(
        f"statistic_dims={dims} does not give one number for each field of T", len(dims) == len(family.Nat._fields)
    )
    yield from _statistic_shapes(s)
    strangers = sorted(set(family.domain) - set(family.State._fields))
    yield holds(f"domain constrains {strangers}, which State does not have", not strangers)
    strangers = sorted(set(family.momentum_block) - set(family.Site._fields))
    yield holds(f"momentum_block names {strangers}, which Site does not have", not strangers)
    kinds = ("none", "diagonal", "dense", "pairs")
    yield holds(f"curvature={family.curvature!r} is none of {kinds}", family.curvature in kinds)
    fitting = sorted(available(family))
    yield holds(
        f"default_estimator={family.default_estimator!r} is none of {fitting}", family.default_estimator in fitting
    )


def _statistic_shapes(s: Specimen) -> Findings:
    """What T gives for one tensor, against `event_dim` and `statistic_dims`."""
    family = s.family
    theta = family.reference_like(torch.zeros(s.shape, dtype=s.dtype, device=s.device))
    statistics = family.statistics(theta)
    yield holds(f"statistics gives {type(statistics).__name__} instead of Mean", isinstance(statistics, family.Mean))
    shapes = [tuple(value.shape) for value in statistics]
    fitting = tuple(len(shape) - len(s.batch) for shape in shapes)
    for name, shape in zip(family.Mean._fields, shapes, strict=True):
        yield holds(
            f"statistics: field {name!r} has shape {shape} for θ of shape {tuple(s.shape)}, of which the last "
            f"{family.event_dim} axes are one weight (event_dim)",
            shape[: len(s.batch)] == tuple(s.batch),
        )
    yield holds(
        f"statistic_dims={family.statistic_dims}, but of T's fields {fitting} axes belong to one weight: declare "
        f"statistic_dims = {fitting}",
        family.statistic_dims == fitting,
    )


def centred_at(s: Specimen) -> Findings:
    """Members centred in the support lie in the domain, with finite A and one value per weight."""
    family = s.family
    statistics = family.statistics(s.support_points(2))
    for name, value, dims in zip(family.Mean._fields, statistics, family.statistic_dims, strict=True):
        batch = value.shape[: value.ndim - dims]
        yield holds(f"statistics: field {name!r} has batch shape {tuple(batch)} instead of {(2, *s.batch)}",
                    batch == (2, *s.batch))  # fmt: skip
    for state, nat in zip(s.states, s.nats, strict=True):
        inside = family.in_domain(state)
        yield holds("in_domain does not give one boolean", isinstance(inside, Tensor) and inside.shape == ())
        yield holds("centred_at leaves the domain", inside)
        yield holds("centred_at and from_nat give something else than a State", isinstance(state, family.State))
        partition = family.log_partition(nat)
        yield s.shaped("log_partition", partition, s.batch)
        yield holds("log_partition is not finite at a state in the domain", torch.isfinite(partition).all())


def noise(s: Specimen) -> Findings:
    """Noise is K × P, a function of its key alone, and `reflect` is an involution that keeps its distribution."""
    family = s.family
    count = 2000 if s.sampling else 8
    first = s.noise(count, SAMPLES)
    yield s.shaped("noise", first, (count, *s.shape, *family.noise_dims))
    yield holds("noise is not finite", torch.isfinite(first).all())
    kept = first.clone()
    try:
        family.sample(s.states[-2], first)
    except Exception as error:
        shape, dims = tuple(first.shape), family.noise_dims
        sentence = f"sample fails ({error}) for noise of shape {shape}, K × P × noise_dims, with noise_dims = {dims}"
        yield holds(sentence, False)
        return
    yield holds("noise is changed in place by sample", torch.equal(first, kept))
    yield holds("noise changes when asked for again", torch.equal(kept, s.noise(count, SAMPLES)))
    yield holds("noise is the same at every step", not torch.equal(kept, s.noise(count, SAMPLES, 1)))
    later = family.noise(s.shape, 2, s.key(SAMPLES).at(draw=3), dtype=s.dtype, device=s.device)
    yield holds("noise of a draw depends on how many are asked for", torch.equal(later, first[3:5]))
    mirrored = family.reflect(first)
    yield s.near("reflect twice", family.reflect(mirrored), first, SLACK * s.eps * (1.0 + size_of(first)))
    neutral = family.neutral_noise(s.support_points(1)[0])
    yield s.near("neutral_noise is its own mirror image", family.reflect(neutral), neutral, SLACK * s.eps)
    if s.sampling:
        other = s.noise(count, MORE_SAMPLES)
        for power in (1, 2):
            difference = mirrored**power - other**power
            yield s.sampled(f"moment {power} of reflected against other noise", difference, 0.0)


def samples(s: Specimen) -> Findings:
    """Samples are K × P, a function of state and noise alone, in the support, and distributed as h exp⟨λ, T⟩."""
    family = s.family
    for number, state in enumerate(s.states):
        epsilon = s.noise(8, SAMPLES, number)
        theta = family.sample(state, epsilon)
        yield s.shaped("sample", theta, (8, *s.shape))
        again = family.sample(state, epsilon)
        kind = f"sample gives {theta.dtype} for a state and noise of {s.dtype}; make new tensors with their dtype"
        yield holds(kind, theta.dtype == s.dtype)
        yield holds("sample changes when called again with the same noise", torch.equal(theta, again))
        if not s.sampling:
            continue
        theta = s.draws(number)
        yield holds("samples are not finite", torch.isfinite(theta).all())
        inside = family.support.check(theta).all() & family.distribution(state).support.check(theta).all()
        yield holds("samples lie outside the support", inside)
        reference = s.represented(number)
        if reference is None:
            yield Unverified("samples: E_q[T] is known from samples alone for this support")
            continue
        mean, error = expectation(s, reference)
        for name, value, centre, bound in zip(family.Mean._fields, family.statistics(theta), mean, error, strict=True):
            yield s.sampled(f"E[{name}] of samples against the density h exp⟨λ, T⟩", value, centre, allowed=bound)


def expectation(s: Specimen, reference: Reference) -> tuple[Any, Any]:
    """E_q[T] from weighted points, which does not use A(λ), and how far it may be off."""
    weight = torch.softmax(reference.log_weight, 0)
    statistics = s.family.statistics(reference.theta)
    means, errors = [], []
    for value, dims in zip(statistics, s.family.statistic_dims, strict=True):
        share = weight.reshape(*weight.shape, *(1,) * dims)
        value = torch.where(share > 0.0, value, 0.0)  # far out, where nothing lies, T may overflow
        mean = (share * value).sum(0)
        if reference.exact:
            spread = (value.amax(0) - value.amin(0)) * unseen(reference)
        else:
            spread = SIGMAS * (share * (value - mean)).square().sum(0).sqrt()
        means.append(mean)
        errors.append(spread + SLACK * s.eps * value.abs().amax(0))
    return s.family.Mean(*means), s.family.Mean(*errors)


def gradient_of_log_partition(s: Specimen) -> Findings:
    """∇A(λ) = to_mean(λ) = E_q[T]."""
    family = s.family
    for number, nat in enumerate(s.nats):
        slope = torch.func.grad(lambda value: family.log_partition(value).sum())(nat)
        mean, tolerances = s.rounded(family.to_mean, nat)
        yield s.near("to_mean against ∇A by autograd", mean, slope, tolerances)
        if not s.sampling:
            continue
        deviations = s.deviations(number)
        statistics = family.statistics(s.draws(number))
        for name, value, m, spread in zip(family.Mean._fields, statistics, mean, deviations, strict=True):
            yield s.sampled(f"μ of {name} against E_q[T] by sampling", value, m, spread=spread)
        reference = s.represented(number)
        if reference is not None:
            for name, m, centre, bound in zip(family.Mean._fields, mean, *expectation(s, reference), strict=True):
                error = SIGMAS * size_of((m - centre) / bound)
                yield Finding(f"μ of {name} against E[T] of the density h exp⟨λ, T⟩ (standard errors)", error, SIGMAS)


def round_trips(s: Specimen) -> Findings:
    """Chart → λ → chart is the identity, for states and for sites."""
    family = s.family
    if not family.curved:
        own = family.centred_at(s.support_points(1)[0])
        back, tolerances = s.rounded(lambda state: family.from_nat(family.to_nat(state)), own)
        yield s.near("from_nat(to_nat(state)) against state", back, own, tolerances)
    for number, (state, nat) in enumerate(zip(s.states, s.nats, strict=True)):
        site = s.direction(number)
        if not family.curved:
            back, tolerances = s.rounded(lambda value: family.to_nat(family.from_nat(value)), nat)
            yield s.near("to_nat(from_nat(λ)) against λ", back, nat, tolerances)
            back, tolerances = s.rounded(
                lambda value, at: family.site_to_nat(family.site_from_nat(value, at), at), site, state
            )
            yield s.near("site_to_nat(site_from_nat(c)) against c", back, site, tolerances)
        chart, tolerances = s.rounded(family.site_from_nat, site, state)
        again = family.site_from_nat(family.site_to_nat(family.site_from_nat(site, state), state), state)
        yield s.near("site_from_nat(site_to_nat(site)) against site", again, chart, tolerances)


def to_natural(s: Specimen) -> Findings:
    """λ → μ → λ is the identity, as exactly as the Fisher matrix lets an error of one eps in μ through."""
    family = s.family
    for nat in s.nats:
        mean = family.to_mean(nat)
        matrix, target = fisher(family, nat), _flatten(family, mean)[0]
        amplified = size_of(torch.linalg.pinv(matrix, hermitian=True)) * (1.0 + size_of(target))
        size = size_of(_flatten(family, nat)[0])
        tolerance = 4.0 * SLACK * s.eps * (amplified * matrix.shape[-1] + size)
        if tolerance <= 0.1 * (1.0 + size):
            yield s.near("to_natural(to_mean(λ)) against λ", family.to_natural(mean), nat, tolerance)


def log_prob(s: Specimen) -> Findings:
    """q integrates to one, and its score is the gradient of log q and has mean zero."""
    family = s.family
    for number, (state, nat) in enumerate(zip(s.states, s.nats, strict=True)):
        theta = s.draws(number) if s.sampling else family.sample(state, s.noise(8, SAMPLES, number))
        few = theta[:8]
        density = family.log_prob(state, few)
        yield s.shaped("log_prob", density, (8, *s.batch))
        defined = family.log_base_measure(few) + family.inner(nat, family.statistics(few)) - family.log_partition(nat)
        tolerance = SLACK * s.eps * (1.0 + _largest_term(s, number, few))
        yield s.near("log_prob against log h + ⟨λ, T⟩ − A", density, defined, tolerance)
        if not family.curved:
            slope = torch.func.grad(lambda v: family.log_prob(family.from_nat(v), few).sum())(nat)  # noqa: B023
            score, tolerances = s.rounded(lambda at: family.score(at, few), state)  # noqa: B023
            terms = [SLACK * s.eps * size_of(value) for value in family.statistics(few)]
            total = [8.0 * (a + b) for a, b in zip(tolerances, terms, strict=True)]
            yield s.near("score against the gradient of log_prob", tuple(v.sum(0) for v in score), slope, total)
        if not s.sampling:
            continue
        deviations = s.deviations(number)
        reference = s.represented(number)
        if reference is None:
            yield Unverified("log_prob: its integral is not computed for this support")
        elif reference.exact:
            mass = reference.log_weight.exp().sum(0)
            yield s.near("sum of exp(log_prob) against 1", mass, torch.ones_like(mass), unseen(reference))
        else:
            yield s.sampled("integral of exp(log_prob) against 1", reference.log_weight.exp(), 1.0)
        for value, spread in zip(family.score(state, theta), deviations, strict=True):
            yield s.sampled("E_q of the score against 0", value, torch.zeros_like(spread), spread=spread)


def distribution(s: Specimen) -> Findings:
    """What `distribution` gives is a Pyro distribution with the family's density, shapes, support and samples."""
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    family = s.family
    for number, state in enumerate(s.states):
        q = family.distribution(state)
        yield holds("distribution does not give a pyro.distributions object", isinstance(q, TorchDistributionMixin))
        shapes = f"batch_shape {tuple(q.batch_shape)} and event_shape {tuple(q.event_shape)}"
        yield holds(f"distribution has {shapes} instead of () and {tuple(s.shape)}",
                    q.batch_shape == () and q.event_shape == s.shape)  # fmt: skip
        for sample_shape in ((), (4,), (2, 3)):
            torch.manual_seed(s.seed)
            theta = q.sample(torch.Size(sample_shape))
            yield s.shaped("distribution.sample", theta, (*sample_shape, *s.shape))
            yield holds("samples of distribution lie outside the support", family.support.check(theta).all())
            each = family.log_prob(state, theta)
            total = each.reshape(*sample_shape, -1).sum(-1)
            yield s.shaped("distribution.log_prob", q.log_prob(theta), sample_shape)
            tolerance = s.eps * SLACK * len(each.reshape(-1)) * (1.0 + _largest_term(s, number, theta))
            yield s.near("distribution.log_prob against the family's", q.log_prob(theta), total, tolerance)
        if s.sampling:
            torch.manual_seed(s.seed)
            theta = q.sample(torch.Size([DRAWS]))
            mean, deviations = family.to_mean(s.nats[number]), s.deviations(number)
            for value, m, spread in zip(family.statistics(theta), mean, deviations, strict=True):
                yield s.sampled("E[T] of distribution.sample against μ", value, m, spread=spread)


def _largest_term(s: Specimen, number: int, theta: Tensor | None) -> float:
    """The largest of the terms log h, ⟨λ, T⟩ entry by entry, and A, of which log_prob (its mean if no θ) is the sum."""
    f, nat, state = s.family, s.nats[number], s.states[number]
    values = f.to_mean(nat) if theta is None else f.statistics(theta)
    entries = _flatten(f, nat)[0].shape[-1]
    products = [entries * size_of(v * t) for v, t in zip(nat, values, strict=True)]
    base = f.expected_log_base_measure(state) if theta is None else f.log_base_measure(theta)
    return sum(products) + size_of(base) + size_of(f.log_partition(nat))


def entropy(s: Specimen) -> Findings:
    """Entropy = −E_q[log q]."""
    for number, state in enumerate(s.states):
        value = s.family.entropy(state)
        yield s.shaped("entropy", value, s.batch)
        nat, tolerance = s.nats[number], SLACK * s.eps * (1.0 + _largest_term(s, number, None))
        linear = s.family.inner(nat, s.family.to_mean(nat))
        defined = s.family.log_partition(nat) - linear - s.family.expected_log_base_measure(state)
        yield s.near("entropy against A − ⟨λ, μ⟩ − E_q[log h]", value, defined, tolerance)
        if s.sampling:

            def surprise(theta: Tensor, at: Any = state) -> Tensor:
                return -s.family.log_prob(at, theta)

            yield s.averaged("entropy against −E_q[log q]", number, surprise, value, allowed=_by_draws(s, number))


def _by_draws(s: Specimen, number: int) -> Tensor | float:
    """How far an entropy may be off whose E_q[log h] is a mean over draws."""
    family = s.family
    base = ExponentialFamily.log_base_measure, ExponentialFamily.expected_log_base_measure
    written, own = (getattr(type(family), f.__name__) is not f for f in base)
    if not written or own or type(family).entropy is not ExponentialFamily.entropy or quadrature.is_known(family):
        return 0.0
    return SIGMAS * family.log_base_measure(s.draws(number)).std(0) / supports.DRAWS**0.5


def kl(s: Specimen) -> Findings:
    """KL(q ‖ p) ≥ 0, = 0 at q = p, and = E_q[log q − log p]."""
    family = s.family
    for number, (state, prior) in enumerate(s.pairs()):
        value = family.kl(state, prior)
        yield s.shaped("kl", value, s.batch)
        after = (number + 1) % len(s.states)
        size = _largest_term(s, number, None) + _largest_term(s, after, None)
        cross = [size_of(v * m) for v, m in zip(s.nats[after], family.to_mean(s.nats[number]), strict=True)]
        tolerance = SLACK * s.eps * (1.0 + size + sum(cross))
        yield s.near("kl at equality against 0", family.kl(state, state), torch.zeros_like(value), tolerance)
        yield Finding("how far kl falls below 0", max(0.0, -float(value.min())), tolerance)
        if s.sampling:

            def ratio(theta: Tensor, at: Any = state, to: Any = prior) -> Tensor:
                return family.log_prob(at, theta) - family.log_prob(to, theta)

            yield s.averaged("kl against E_q[log q − log p]", number, ratio, value)


def fisher_information(s: Specimen) -> Findings:
    """∇²A(λ) = Cov[T]: symmetric, positive definite along the values of T, equal to fisher_vector_product."""
    family = s.family
    if family.curved:
        yield "fisher: that of the ambient family, which has laws of its own"
        return
    for number, nat in enumerate(s.nats):
        (matrix,), (tolerance,) = s.rounded(lambda value: fisher(family, value), nat)
        yield s.near("∇²A against its transpose", matrix.mT, matrix, tolerance)
        if number == 0 and s.sampling:
            statistics = _flatten(family, family.statistics(s.draws(number)[:64]))[0]
            yield from _minimal(statistics.movedim(0, -2), matrix, family)
        vector = s.direction(number)
        product, tolerances = s.rounded(family.fisher_vector_product, nat, vector)
        product = family.Nat(*product)
        flat = _flatten(family, vector)[0]
        expected = (matrix @ flat.unsqueeze(-1)).squeeze(-1)
        slack = max(tolerances) + tolerance * matrix.shape[-1] * size_of(flat)
        yield s.near("fisher_vector_product against ∇²A v", _flatten(family, product)[0], expected, slack)
        solved, tolerances = s.rounded(family.fisher_solve, nat, product)
        yield s.near("fisher_solve(λ, F v) against v", solved, vector, tolerances)
        if not s.sampling:
            continue
        mean = _flatten(family, family.to_mean(nat))[0]

        def products(theta: Tensor, mean: Tensor = mean) -> Tensor:
            deviation = _flatten(family, family.statistics(theta))[0] - mean
            return deviation.unsqueeze(-1) * deviation.unsqueeze(-2)

        yield s.averaged("∇²A against Cov[T]", number, products, matrix)


def _minimal(statistics: Tensor, matrix: Tensor, family: ExponentialFamily) -> Findings:
    """No combination of the statistics is constant, and the Fisher matrix is positive along all that vary."""
    scale = statistics.abs().amax(-2, keepdim=True)
    scale = torch.where(scale > 0.0, scale, 1.0)  # a rare value's indicator may be 0 in all draws
    centred = (statistics - statistics.mean(-2, keepdim=True)) / scale
    rounding = 1e3 * torch.finfo(statistics.dtype).eps
    ranks = [int(torch.linalg.matrix_rank(value, rtol=rounding).min()) for value in (statistics / scale, centred)]
    yield holds(
        f"the statistics are not minimal ({ranks[0]} are independent, only {ranks[1]} up to constants)",
        ranks[0] == ranks[1],
    )
    solves = type(family).fisher_solve is not ExponentialFamily.fisher_solve
    entries = statistics.shape[-1]
    enough = solves or family.levels is not None or family.support.is_discrete or ranks[1] == entries
    yield holds(
        f"the statistics are not minimal: of {entries} entries only {ranks[1]} are independent, and the Fisher matrix "
        "is singular; drop the others, or write fisher_solve",
        enough,
    )
    if ranks[1] == 0:
        yield Unverified("all draws of a member were one value, which says nothing of ∇²A; see to centred_at")
        return
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[..., : ranks[1], :] / scale
    values = torch.linalg.eigvalsh(basis @ matrix @ basis.mT)
    ratio = float((values[..., 0] / values[..., -1]).min())
    yield holds(f"∇²A is not positive definite (smallest over largest eigenvalue {ratio:.3g})", ratio > 0.0)


def point(s: Specimen) -> Findings:
    """The point is a possible weight, and recentre moves it where it is told."""
    family = s.family
    every = torch.stack([family.point(state) for state in s.states])
    apart = bool((every != every[:1]).any()) or every[0].numel() == 0
    fixed = family.fixed_point
    yield holds(
        "point is the same for every member: an optimizer would put it in place of the model's weights "
        "(declare fixed_point = True, and it refuses weights elsewhere)",
        apart or fixed,
    )
    yield holds("fixed_point is declared, but points differ", not (fixed and apart))
    for number, (state, other) in enumerate(s.pairs()):
        here, there = family.point(state), family.point(other)
        yield s.shaped("point", here, s.shape)
        draws = family.sample(state, s.noise(200, SAMPLES, number))
        inside = family.support.check(here).all() | bool(_between(here, draws))
        yield holds("point lies neither in the support nor among samples", inside)
        moved = family.recentre(state, there)
        yield holds("recentre leaves the domain", family.in_domain(moved))
        tolerances = s.rounded(lambda at, to: family.point(family.recentre(at, to)), state, there)[1]
        yield s.near("point(recentre(state, θ)) against θ", family.point(moved), there, tolerances)


def _between(value: Tensor, draws: Tensor) -> Tensor:
    return ((value >= draws.amin(0)) & (value <= draws.amax(0))).all()
