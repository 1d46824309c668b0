"""What a family computes in closed form is what the engine would derive for it from A, T, h and its samples.

`automatic(family)` is the same family with every derived map taken back to the base class's default. Both are compared
in float64 at the members on which the laws are tested, for every registered family, in everything it overrides.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import expfam_poco as poco
from expfam_poco.checks import suite
from expfam_poco.checks.specimens import SIGMAS, Specimen, as_fields, standard_errors
from expfam_poco.family import ExponentialFamily
from expfam_poco.family.derived import fisher

DERIVED = (
    "to_mean to_natural natural_gradient score_natural_gradient kl_gradient log_prob entropy kl score "
    "fisher_vector_product fisher_solve inner in_domain"
).split()
# They divide by the Fisher matrix, which is singular where T has an entry twice (θθᵀ of a dense Gaussian).
NEED_MINIMAL = {"to_natural", "natural_gradient", "score_natural_gradient", "fisher_solve"}
DRAWS = 2000


def automatic(family: ExponentialFamily) -> ExponentialFamily:
    """The family with the base class's defaults for everything that is derived."""
    own = type(family)
    names = [*DERIVED]
    if own.log_base_measure is ExponentialFamily.log_base_measure:
        names.append("expected_log_base_measure")
    if own.to_nat is ExponentialFamily.to_nat:  # the default retraction is one of natural coordinates
        names.append("retract")
    defaults = {name: vars(ExponentialFamily)[name] for name in names}
    settings = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    return type(f"Automatic{own.__name__}", (own,), defaults)(**settings)


def overridden(family: ExponentialFamily) -> list[str]:
    """The derived maps that the family has of its own."""
    names = [*DERIVED, "expected_log_base_measure", "retract"]
    defaults = type(automatic(family))
    return [name for name in names if getattr(type(family), name) is not getattr(defaults, name)]


def specimen_of(name: str) -> Specimen:
    family = poco.resolve_family(name)
    shape = suite.default_shape(family)
    fitted = family if family.joint else family.for_shape(shape)
    return Specimen(fitted, shape, torch.float64, torch.device("cpu"), 5).with_members()


def pairs() -> Iterator[Any]:
    for name in poco.families_available():
        if poco.get_family(name).curved:
            continue  # its natural gradient is a projection, which no default computes
        matrices = max(poco.get_family(name).statistic_dims) > poco.get_family(name).event_dim
        redundant = NEED_MINIMAL if matrices else set()
        methods = [method for method in overridden(poco.resolve_family(name)) if method not in redundant]
        yield from ((name, method) for method in methods)


def calls(s: Specimen, number: int) -> dict[str, Callable[[ExponentialFamily], Any]]:
    """Every derived map at one member, with equal arguments for whichever family is given."""
    state, prior = s.states[number], s.states[(number + 1) % len(s.states)]
    nat, c = s.nats[number], s.direction(number)
    theta, mean = s.family.sample(state, s.noise(8, 2, number)), s.family.to_mean(nat)
    site = s.family.site_from_nat(s.family.Site(*c), state)
    draws = measured(s, number, 8)
    return {
        "to_mean": lambda f: f.to_mean(nat),
        "to_natural": lambda f: f.to_natural(mean),
        "natural_gradient": lambda f: f.natural_gradient(state, draws),
        "score_natural_gradient": lambda f: f.score_natural_gradient(state, draws),
        "kl_gradient": lambda f: f.kl_gradient(state, prior),
        "log_prob": lambda f: f.log_prob(state, theta),
        "entropy": lambda f: f.entropy(state),
        "kl": lambda f: f.kl(state, prior),
        "score": lambda f: f.score(state, theta),
        "fisher_vector_product": lambda f: f.fisher_vector_product(nat, c),
        "fisher_solve": lambda f: f.fisher_solve(nat, c),
        "inner": lambda f: f.inner(nat, mean),
        "in_domain": lambda f: f.in_domain(state).double(),
        "expected_log_base_measure": lambda f: f.expected_log_base_measure(state),
        "retract": lambda f: f.retract(state, site, f.per_block(0.1, 0.2), clip_radius=0.7),
    }


def measured(s: Specimen, number: int, count: int) -> poco.Draws:
    """ℓ(θ) = Σ sin(θ) + ½ θ² at draws from a member: smooth, and of no family's statistics."""
    noise = s.noise(count, 2, number)
    theta = s.family.sample(s.states[number], noise)
    loss = (theta.sin() + 0.5 * theta**2).reshape(count, -1).sum(-1)
    return poco.Draws(noise, theta, loss, theta.cos() + theta)


@pytest.mark.parametrize(("name", "method"), list(pairs()))
def test_closed_forms_are_what_the_engine_derives(name: str, method: str) -> None:
    s = specimen_of(name)
    derived = automatic(s.family)
    if method == "natural_gradient" and s.family.default_estimator != "reparam":
        # No pathwise derivative: what the family has is for its own estimators.
        with pytest.raises(ValueError, match="curvature='reparam'"):
            poco.estimators.resolve_estimator("reparam", s.family)
        return
    for number in range(len(s.states)):
        call = calls(s, number)[method]
        ours, expected = as_fields(call(s.family)), as_fields(call(derived))
        if method == "natural_gradient" and not close(ours, expected, s, number):
            same_expectation(s, derived, number)
        else:
            compare(ours, expected, s, number)


def tolerance(s: Specimen, number: int, value: Tensor) -> float:
    """1e-8 of the value, or 1e3 roundings as the Fisher matrix lets them through, whichever is more."""
    spectrum = torch.linalg.eigvalsh(fisher(s.family, s.nats[number]))
    spectrum = spectrum[spectrum > 1e-10 * spectrum.amax()]
    condition = float(spectrum.amax() / spectrum.amin())
    return float(1e-8 + 1e3 * s.eps * condition) * (1e-3 + float(value.abs().max()))


def compare(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], s: Specimen, number: int) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance(s, number, other))


def close(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], s: Specimen, number: int) -> bool:
    try:
        compare(ours, expected, s, number)
    except AssertionError:
        return False
    return True


def same_expectation(s: Specimen, derived: ExponentialFamily, number: int) -> None:
    """Another estimator of the same natural gradient: the mean of the difference over draws is zero."""
    state, all_draws = s.states[number], measured(s, number, DRAWS)
    differences = []
    for k in range(0, DRAWS, 8):
        draws = poco.Draws(*(value[k : k + 8] for value in all_draws[:4]))
        one, other = (f.natural_gradient(state, draws) for f in (s.family, derived))
        differences.append(torch.cat([(a - b).reshape(-1) for a, b in zip(one, other, strict=True)]))
    assert standard_errors(torch.stack(differences), 0.0) <= SIGMAS


def test_the_automatic_version_overrides_nothing() -> None:
    family = automatic(poco.resolve_family("diagonal_gaussian"))
    assert all(getattr(type(family), name) is getattr(ExponentialFamily, name) for name in DERIVED)
    assert not overridden(family)


def test_a_wrong_closed_form_is_found() -> None:
    diagonal = poco.get_family("diagonal_gaussian")

    class Wrong(diagonal):  # type: ignore[misc, valid-type]
        def natural_gradient(self, state, draws):
            site = super().natural_gradient(state, draws)
            return site._replace(curvature=1.05 * site.curvature)

    s = specimen_of("diagonal_gaussian")
    wrong = dataclasses.replace(s, family=Wrong())
    draws = measured(s, 1, 8)
    ours, expected = (f.natural_gradient(s.states[1], draws) for f in (Wrong(), automatic(Wrong())))
    assert not close(ours, expected, s, 1)
    with pytest.raises(AssertionError):
        same_expectation(wrong, automatic(Wrong()), 1)
