"""Every leafwise family is stepped span by span, by kernels that know nothing of it, to the same numbers as whole."""

import functools
import math
from typing import Any

import pytest
import torch
from family_cases import event_of, weights_in

import expfam_poco as poco
from expfam_poco.engine import backend as backends

FAMILIES = [name for name in poco.families_available() if name not in ("product",)]
LEAFWISE = [
    name
    for name in FAMILIES
    if not poco.resolve_family(name).joint and not poco.resolve_family(name).curved
    and poco.resolve_family(name).default_estimator != "score"
]  # fmt: skip


def trained(
    family: poco.ExponentialFamily, backend: str, steps: int = 6, sizes: tuple[int, ...] = (1700, 30)
) -> tuple[list[torch.Tensor], list[float]]:
    """A large and a small tensor after steps with momentum, a refresh every third, and an averaged q_out."""
    torch.manual_seed(0)
    event = event_of(family)
    rows = [max(20, size // math.prod(event)) for size in sizes]
    params = [torch.nn.Parameter(weights_in(family, 0.5 * torch.randn(count, *event))) for count in rows]
    targets = [weights_in(family, 0.5 * torch.randn(p.shape)) for p in params]
    optimizer = poco.PosteriorCorrected(
        params, family, lr=0.02, ess=50.0, weight_decay=0.1, momentum=0.9, alpha=0.7, rho=0.3, seed=0, backend=backend
    )

    def loss() -> Any:
        parts = [1.0 - torch.cos(p - target) for p, target in zip(params, targets, strict=True)]
        return sum(part.flatten(1).sum(-1).mean() if event else part.mean() for part in parts)

    losses = []
    for number in range(steps):
        if number % 3 == 0:
            optimizer.refresh([loss, loss])
        losses.append(float(optimizer.step(loss)))
    return [p.detach().clone() for p in params], losses


@pytest.mark.parametrize("name", LEAFWISE)
def test_spans_and_buckets_give_the_same_numbers_as_whole_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = poco.resolve_family(name)
    whole, losses = trained(family, "auto")
    monkeypatch.setitem(backends.TILES, "eager", 512)  # several tiles, the last one shorter
    parts, again = trained(family, "eager")
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx(again, rel=1e-4)
    assert all(math.isfinite(loss) for loss in losses)
    if family.support is not torch.distributions.constraints.real:
        assert all(bool(family.support.check(value).all()) for value in parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LEAFWISE) - {"bernoulli", "diagonal_gaussian", "isotropic_gaussian"}))
def test_kernels_of_every_family_are_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled backend, with the compiler's front end alone: it refuses what depends on data or leaves torch.

    `test_backends` compiles those left out here to the end.
    """
    family = poco.resolve_family(name)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(backends, "_COMPILED", {})
    whole, losses = trained(family, "auto", 2, (300,))
    parts, again = trained(family, "compiled", 2, (300,))
    assert losses == pytest.approx(again, rel=1e-4)
    for one, other in zip(whole, parts, strict=True):
        if family.levels is None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        else:
            assert (one != other).float().mean() < 0.01  # a level between two that are as likely may be either
