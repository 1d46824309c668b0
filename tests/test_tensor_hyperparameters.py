"""Hyperparameters that are tensors: a number for every weight counts in everything, and is cut with the weights."""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import expfam_poco as poco
from expfam_poco.checks.suite import LAWS
from expfam_poco.engine import backend as backends
from expfam_poco.families import ProductFamily

COUNT = 1500
WIDTHS = torch.where(torch.arange(COUNT) < 700, 0.07, 0.02)


class Log(NamedTuple):
    log: Tensor


@dataclass(frozen=True)
class RelativeWidth(poco.ExponentialFamily):
    """log θ ~ N(width² λ, width²)."""

    width: Any = 0.05
    Statistics = Log
    support = constraints.positive
    domain: ClassVar = {"log": constraints.real}

    def statistics(self, theta):
        return Log(theta.log())

    def log_base_measure(self, theta):
        return -theta.log() - 0.5 * (theta.log() / self.width) ** 2

    def log_partition(self, nat):
        size = torch.as_tensor(self.width * math.sqrt(2.0 * math.pi))
        return 0.5 * (self.width * nat.log) ** 2 + size.log()

    def sample(self, state, noise):
        return torch.exp(self.width**2 * state.log + self.width * noise)

    def centred_at(self, theta, precision=None):
        return Log(theta.log() / self.width**2)

    def point(self, state):
        return torch.exp(self.width**2 * state.log)


@dataclass(frozen=True)
class Rows(poco.ExponentialFamily):
    """Rows ~ N(λ / precision, 1 / precision), the precision of every row its own, the shift of all."""

    precision: Any = 1.0
    shift: Any = 0.0
    event_dim: ClassVar = 1
    per_weight: ClassVar = ("precision",)
    domain: ClassVar = {"theta": constraints.real_vector}

    def _column(self, like):
        return torch.as_tensor(self.precision, dtype=like.dtype).unsqueeze(-1)

    def statistics(self, theta):
        return self.Mean(theta - self.shift)

    def log_base_measure(self, theta):
        size = self._column(theta)
        density = -0.5 * size * (theta - self.shift) ** 2 + 0.5 * torch.log(size / (2.0 * math.pi))
        return density.sum(-1)

    def expected_log_base_measure(self, state):
        size = self._column(state.theta)
        return (-0.5 * (state.theta**2 / size + 1.0) + 0.5 * torch.log(size / (2.0 * math.pi))).sum(-1)

    def log_partition(self, nat):
        return (0.5 * nat.theta**2 / self._column(nat.theta)).sum(-1)

    def sample(self, state, noise):
        size = self._column(noise)
        return self.shift + state.theta / size + noise * size.rsqrt()

    def centred_at(self, theta, precision=None):
        return self.State((theta - self.shift) * self._column(theta))

    def point(self, state):
        return self.shift + state.theta / self._column(state.theta)

    def variance(self, state):
        return 1.0 / self._column(state.theta).expand_as(state.theta)


def trained(family: poco.ExponentialFamily, backend: str = "auto") -> tuple[Tensor, poco.PosteriorCorrected]:
    shape = (COUNT, 3) if family.event_dim else (COUNT,)
    weight, other = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.zeros(40))
    both = ProductFamily({"weight": family, "*": "diagonal_gaussian"})
    optimizer = poco.PosteriorCorrected(
        [("weight", weight), ("other", other)], both, lr=1e-3, ess=100.0, weight_decay=0.01, momentum=0.9, seed=0,
        backend=backend, max_grad_norm=1e4,
    )  # fmt: skip

    def loss() -> Tensor:
        return ((weight - 2.0) ** 2).sum() + (other - 1.0).square().sum()

    for number in range(4):
        if number == 1:
            optimizer.refresh([loss, loss])
        optimizer.step(loss)
    return weight.detach(), optimizer


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_every_weight_is_stepped_with_its_own_number(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TILES, "eager", 512)
    found, _ = trained(RelativeWidth(WIDTHS), backend)
    for width, where in ((0.07, WIDTHS > 0.05), (0.02, WIDTHS < 0.05)):
        literal, _ = trained(RelativeWidth(width))
        torch.testing.assert_close(found[where], literal[where], rtol=1e-5, atol=0.0)
    assert not torch.allclose(found[:700], found[-700:], rtol=1e-4)


def test_rows_are_stepped_with_their_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TILES, "eager", 512)
    sizes, shift = 1.0 / WIDTHS, torch.tensor([0.5, 0.0, 1.0])
    found, _ = trained(Rows(sizes, shift), "eager")
    for number in (0, COUNT - 1):
        literal, _ = trained(Rows(float(sizes[number]), shift))
        torch.testing.assert_close(found[number], literal[number], rtol=1e-5, atol=0.0)


def test_a_compiled_kernel_serves_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the compiler's front end."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(backends, "_COMPILED", {})

    def steps(values: Tensor, backend: str) -> Tensor:
        weight = torch.nn.Parameter(torch.ones(COUNT))
        optimizer = poco.PosteriorCorrected(
            [("w", weight)], RelativeWidth(values), lr=1e-3, ess=100.0, alpha=0.0, seed=0, backend=backend
        )
        for _ in range(2):
            optimizer.step(lambda: ((weight - 2.0) ** 2).sum())
        return weight.detach()

    found = steps(WIDTHS, "compiled")
    kernels = len(backends._COMPILED)
    again = steps(WIDTHS.flip(0), "compiled")
    assert len(backends._COMPILED) == kernels > 0
    torch.testing.assert_close(found, steps(WIDTHS, "auto"), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(again, steps(WIDTHS.flip(0), "auto"), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "family",
    [RelativeWidth(torch.tensor([0.05, 0.1, 0.3])), Rows(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0, -1.0]))],
    ids=repr,
)
def test_the_laws_hold(family: poco.ExponentialFamily) -> None:
    report = poco.check_family(family, dtypes=(torch.float64,))
    assert report.passed and len(report.laws) == len(LAWS)


def test_tensors_count_in_comparisons_texts_and_checkpoints() -> None:
    one, same, other = (RelativeWidth(v.clone()) for v in (WIDTHS, WIDTHS, WIDTHS.flip(0)))
    assert one == same and hash(one) == hash(same) and one != other and one != RelativeWidth(0.07)
    assert repr(one).startswith("RelativeWidth(width=tensor([1500], float32, ") and len(repr(one)) < 80
    assert copy.deepcopy(one) == one
    _, optimizer = trained(one)
    saved = optimizer.state_dict()
    trained(same)[1].load_state_dict(saved)
    with pytest.raises(poco.CheckpointError, match="family"):
        trained(other)[1].load_state_dict(saved)


def test_a_tensor_without_axes_is_its_number() -> None:
    assert RelativeWidth(torch.tensor(0.5)) == RelativeWidth(0.5)
    _, optimizer = trained(RelativeWidth(torch.tensor(0.0625)))
    assert 0.0625 in [getattr(group["family"], "width", None) for group in optimizer.param_groups]
    trained(RelativeWidth(0.0625))[1].load_state_dict(optimizer.state_dict())


def test_the_family_keeps_values_of_its_own() -> None:
    values = WIDTHS.clone().requires_grad_()
    family = poco.resolve_family(RelativeWidth(values))
    before = hash(family)
    with torch.no_grad():
        values.mul_(2.0)
    assert hash(family) == before and not family.width.requires_grad  # type: ignore[attr-defined]


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3))

    def optimizer(family: poco.ExponentialFamily) -> poco.PosteriorCorrected:
        made = poco.PosteriorCorrected([("w", weight)], family, lr=0.1, ess=10.0)
        made.step(lambda: weight.sum())
        return made

    with pytest.raises(
        ValueError, match=r"RelativeWidth.width has shape \(2,\), which does not broadcast .* 'w', \(3,\)"
    ):
        optimizer(RelativeWidth(torch.ones(2)))
    with pytest.raises(TypeError, match=r"RelativeWidth.width is a tensor that is .* NaN"):
        optimizer(RelativeWidth(torch.tensor([1.0, math.nan, 1.0])))

    class Keeps(RelativeWidth):
        def __init__(self, width):
            object.__setattr__(self, "width", width)
            object.__setattr__(self, "half", 0.5 * width)

    with pytest.raises(TypeError, match="keeps a tensor 'half' beside its hyperparameters"):
        optimizer(Keeps(torch.ones(3)))
    assert optimizer(RelativeWidth(torch.full((1,), 0.1)))  # one for all


def test_weights_in_double_precision_have_tensors_in_it() -> None:
    weight = torch.nn.Parameter(torch.ones(COUNT, dtype=torch.float64))
    optimizer = poco.PosteriorCorrected([("w", weight)], RelativeWidth(WIDTHS), lr=1e-3, ess=10.0, seed=0)
    optimizer.step(lambda: weight.sum())
    assert optimizer.posterior()["w"].sample().dtype == torch.float64


@pytest.mark.slow
def test_a_float_field_compiles_to_what_the_literal_compiles_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph for the compiler, so that a field costs nothing in a large model's step."""
    graphs: list[list[str]] = []

    def kept(graph: Any, inputs: Any) -> Any:
        graphs[-1].append(graph.print_readable(print_output=False))
        return graph

    class Literal(RelativeWidth):
        """The number in place of the field."""

        def log_partition(self, nat):
            size = torch.as_tensor(0.0625 * math.sqrt(2.0 * math.pi))
            return 0.5 * (0.0625 * nat.log) ** 2 + size.log()

        def sample(self, state, noise):
            return torch.exp(0.0625**2 * state.log + 0.0625 * noise)

        def point(self, state):
            return torch.exp(0.0625**2 * state.log)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=kept))
    monkeypatch.setattr(backends, "_COMPILED", {})
    for family in (Literal(0.0625), RelativeWidth(0.0625)):
        graphs.append([])
        weight = torch.nn.Parameter(torch.ones(COUNT))
        optimizer = poco.PosteriorCorrected(
            [("w", weight)], family, lr=1e-3, ess=100.0, alpha=0.0, seed=0, backend="compiled"
        )
        optimizer.step(lambda w=weight: ((w - 2.0) ** 2).sum())
    literal, field = graphs
    assert len(literal) == len(field) > 0
    for one, other in zip(literal, field, strict=True):
        assert [line.split("#")[0] for line in one.splitlines()] == [line.split("#")[0] for line in other.splitlines()]


def test_an_optimizer_s_family_keeps_a_copy_of_a_tensor_that_was_compared() -> None:
    given = WIDTHS.clone()
    family = RelativeWidth(given)
    assert family == RelativeWidth(given)  # which reads the tensor's values
    weight = torch.nn.Parameter(torch.ones(COUNT))
    optimizer = poco.PosteriorCorrected([("w", weight)], family, lr=1e-3, ess=10.0)
    given.mul_(2.0)
    assert torch.equal(optimizer.param_groups[0]["family"].width, WIDTHS)
