"""What the engine derives for a family from its log-partition function and a differentiable sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family import fields
from expfam_poco.family.domains import Directed

if TYPE_CHECKING:
    from expfam_poco.family.base import ExponentialFamily
    from expfam_poco.family.draws import Draws

Call = TypeVar("Call", bound=Callable[..., Any])
PATIENCE, STALLED = 6, 0.01  # Newton steps without progress, and the share of √tolerance that does then
RUNGS = 4  # shorter steps that `retracted` tries, each an eighth of the one before


def differentiating(function: Call) -> Call:
    """Run with gradients enabled, whatever surrounds it; the values carry a graph only where the caller wants one.

    Nested derivatives are not the same under `torch.no_grad`: torch chooses another formula for the derivative of
    `slogdet` there, and its second derivative is NaN (torch 2.13). The optimizer runs under `no_grad`.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return function(*arguments, **named)
        with torch.enable_grad():
            value = function(*arguments, **named)
        return value.detach() if isinstance(value, Tensor) else fields.map_fields(torch.detach, value)

    return run  # type: ignore[return-value]


@differentiating
def fisher(family: ExponentialFamily, nat: Any) -> Tensor:
    """F(λ) = ∇²A(λ) as one k × k block per weight (batch × k × k), k the number of statistics' entries.

    Computed by differentiating `log_partition` twice; blocks of different weights do not interact.
    """
    flat, shapes = _flatten(family, nat)

    def log_partition(vector: Tensor) -> Tensor:
        return family.log_partition(_unflatten(family, vector, shapes)).sum()

    # One derivative of all weights' gradients for each statistic, and no `vmap` over weights, which would take the
    # family's own tensors, with a number for every weight, for those of one.
    _, pull, *_ = torch.func.vjp(torch.func.grad(log_partition), flat)
    count = flat.shape[-1]
    if count == 1:
        return torch.as_tensor(pull(torch.ones_like(flat))[0].unsqueeze(-1))
    basis = torch.eye(count, dtype=flat.dtype, device=flat.device).reshape(count, *(1,) * (flat.ndim - 1), count)
    rows = torch.func.vmap(lambda row: pull(row.expand(flat.shape))[0])(basis)
    return rows.movedim(0, -2)


@differentiating
def gradient_of_log_partition(family: ExponentialFamily, nat: Any) -> Any:
    """μ = ∇A(λ)."""
    return family.Mean(*torch.func.grad(lambda value: family.log_partition(value).sum())(nat))


@differentiating
def fisher_vector_product(family: ExponentialFamily, nat: Any, vector: Any) -> Any:
    """∇²A(λ) v, by differentiating ⟨∇A(λ), v⟩."""

    def slope(value: Any) -> Tensor:
        mean = torch.func.grad(lambda inner: family.log_partition(inner).sum())(value)
        return torch.stack([(m * v).sum() for m, v in zip(mean, vector, strict=True)]).sum()

    return family.Nat(*torch.func.grad(slope)(nat))


def variance(family: ExponentialFamily, state: Any) -> Tensor:
    """The entries of the Fisher matrix's diagonal that belong to the statistic θ."""
    nat = family.to_nat(state)
    if "theta" not in nat._fields:
        raise NotImplementedError(f"{type(family).__name__} has no statistic named theta; average samples.")
    _, shapes = _flatten(family, nat)
    return torch.as_tensor(_unflatten(family, fisher(family, nat).diagonal(dim1=-2, dim2=-1), shapes).theta)


def fisher_solve(family: ExponentialFamily, nat: Any, gradient: Any) -> Any:
    """F(λ)⁻¹ g: a gradient in λ becomes a natural gradient (PC Eq. 5). A division when k = 1."""
    vector, shapes = _flatten(family, gradient)
    matrix = fisher(family, nat)
    if vector.shape[-1] == 1:
        solved = vector / matrix[..., 0]
    else:
        solved = _solved(family, matrix, vector)
    return _unflatten(family, solved, shapes)


def _solved(family: ExponentialFamily, matrix: Tensor, vector: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.linalg.solve(matrix, vector)
    try:
        return torch.linalg.solve(matrix, vector)
    except torch.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(
            f"{type(family).__name__}: its Fisher matrix is singular. Either its statistics are not minimal, some "
            "being sums of others and constants: drop those, or write fisher_solve; or the posterior has become too "
            f"narrow for {matrix.dtype}: lower lr, or use float64 parameters."
        ) from error


@differentiating
def pathwise_natural_gradient(family: ExponentialFamily, state: Any, draws: Draws) -> Any:
    """F(λ)⁻¹ (1/K) Σ_k (∂θ_k/∂λ)ᵀ ∇ℓ(θ_k) with θ_k = sample(λ, ε_k), as a site at `state`."""
    nat = family.to_nat(state)
    _, pullback, *_ = torch.func.vjp(lambda value: family.sample(family.from_nat(value), draws.noise), nat)
    (gradient,) = pullback(draws.require_grad() / draws.noise.shape[0])
    return family.site_from_nat(family.Site(*family.fisher_solve(nat, gradient)), state)


@differentiating
def log_ratio_gradient(family: ExponentialFamily, state: Any, prior: Any, theta: Tensor) -> Tensor:
    """∇_θ log q(θ)/p₀(θ)."""
    return torch.as_tensor(torch.func.grad(lambda value: family.log_ratio(state, prior, value).sum())(theta))


def leave_one_out(loss: Tensor) -> Tensor:
    """ℓ_k − mean_{j≠k} ℓ_j for every one of K ≥ 2 draws; they sum to zero."""
    count = loss.shape[0]
    return (loss - loss.mean()) * (count / (count - 1))


def score_natural_gradient(family: ExponentialFamily, state: Any, draws: Draws) -> Any:
    """F(λ)⁻¹ (1/K) Σ_k (ℓ_k − mean_{j≠k} ℓ_j) (T(θ_k) − μ): unbiased, needs losses only and K ≥ 2."""
    advantage = leave_one_out(draws.loss)
    nat = family.to_nat(state)

    def average(value: Tensor) -> Tensor:
        weights = advantage.to(value.dtype).reshape(-1, *(1,) * (value.ndim - 1))
        return (weights * value).mean(0)

    gradient = family.Nat(*fields.map_fields(average, family.score(state, draws.theta)))
    return family.site_from_nat(family.Site(*family.fisher_solve(nat, gradient)), state)


def bounded_step(value: Tensor, step: Tensor, bound: constraints.Constraint, *, plain: bool) -> Tensor:
    r"""`value + step`, or where not `plain` the same to first order without leaving the bound.

    With the slack s > 0 to a bound and d the displacement:

    * one-sided: s ← s + d + d²/(2s) ≥ s/2 for every d inward or outward;
    * an interval: d ← d s/(s + 2|d|) with s the slack on the side to which d points, which uses at most s/2;
    * positive definite matrices: S ← S + D + ½ D S⁻¹ D = ½ S + ½ (S + D) S⁻¹ (S + D) ≥ ½ S. With S = L Lᵀ and
      L Y = D the last term is ½ Yᵀ Y.

    * directed vectors (of the sphere): a step d < 0 along λ leaves it half of its length, by d s/(s + 2|d|) with
      s = |λ|, and the part across is free, so that no step, however long, turns it by a right angle.

    All leave half of the slack at least, and differ from `value + step` by O(d²). Other constraints are stepped
    linearly: `retracted` then shortens what leaves them.
    """
    while isinstance(bound, constraints.independent):
        bound = bound.base_constraint
    if plain:
        return value + step
    if isinstance(bound, type(constraints.positive_definite)):
        step = 0.5 * (step + step.mT)
        root = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(value).L, step, upper=False)
        return value + step + 0.5 * (root.mT @ root)
    if isinstance(bound, Directed):
        return turned(value, step)
    lower = getattr(bound, "lower_bound", None)
    upper = getattr(bound, "upper_bound", None)
    if lower is None and upper is None:
        return value + step
    if lower is not None and upper is not None:
        slack = torch.where(step < 0.0, value - lower, upper - value)
        return value + step * (slack / (slack + 2.0 * step.abs()).clamp_min(torch.finfo(value.dtype).tiny))
    edge: Any = lower if lower is not None else upper
    return value + step + 0.5 * step * step / (value - edge)


def turned(value: Tensor, step: Tensor) -> Tensor:
    """A vector after a step that does not reverse it; one of length 0 goes anywhere."""
    length = value.square().sum(-1, keepdim=True).sqrt()
    known = length > torch.finfo(value.dtype).tiny ** 0.5
    safe = torch.where(known, length, 1.0)
    along = (value * step).sum(-1, keepdim=True) / safe
    short = along.clamp_max(0.0)  # outward the step is plain: there is no bound
    excess = torch.where(known, short * safe / (safe - 2.0 * short) - short, 0.0)
    return value + step + excess * value / safe


def separable(family: ExponentialFamily) -> bool:
    """Whether the domain is known to be a product of intervals: every field of `State` is declared to be in one.

    A field that `domain` leaves out may be bounded together with others, which only A tells.
    """

    def interval(bound: constraints.Constraint | None) -> bool:
        while isinstance(bound, constraints.independent):
            bound = bound.base_constraint
        known = isinstance(bound, type(constraints.real) | Directed) or bound is constraints.real_vector
        return known or hasattr(bound, "lower_bound") or hasattr(bound, "upper_bound")

    return all(interval(family.domain.get(name)) for name in family.State._fields)


def retracted(family: ExponentialFamily, state: Any, step: Any) -> Any:
    r"""The state after a step δ in λ, to first order, kept in the domain of every weight.

    1. In the coordinates in which `domain` is declared, those of the chart χ = from_nat(λ), the step is
       (∂χ/∂λ) δ, and every field takes it by `bounded_step`.
    2. Where fields are not all declared, or have constraints that `bounded_step` does not know, a weight's step is
       shortened to t δ until *twice* of it ends in the domain: declared constraints hold, and A is finite. As the
       set of natural parameters is convex, λ + tδ = ½ λ + ½ (λ + 2tδ) then keeps half of every slack, just as the
       bounded steps do. t = 1 where that is possible; else it starts at ½ min(1, 1/‖δ‖) with the Fisher length
       ‖δ‖² = δᵀ ∇²A(λ) δ: where A is a self-concordant barrier, as −log det is, the ellipsoid ‖δ‖ < 1 lies in the
       domain (Nesterov & Nemirovskii 1994). After `RUNGS` more tries a weight stays where it is.

    Only tensor operations, the same for every weight, so that it compiles; eagerly it ends early where all is well.
    """
    nat = family.to_nat(state)
    chart = step if family._natural_chart else pushed(family.from_nat, nat, family.Nat(*step))

    bounds = [family.domain.get(name, constraints.real) for name in state._fields]

    def moved(factor: Tensor | None = None) -> Any:
        parts = [
            bounded_step(v, d if factor is None else per_weight(factor, d) * d, bound, plain=False)
            for v, d, bound in zip(state, chart, bounds, strict=True)
        ]
        return family.State(*parts)

    if separable(family):
        return moved()
    batch = _flatten(family, nat)[0].shape[:-1]
    one = nat[0].new_ones(batch)

    def safe(factor: Tensor) -> Tensor:
        far = moved(2.0 * factor)
        return inside(family, far, state, batch)

    with torch.no_grad():
        whole = safe(one)
        if not torch.compiler.is_compiling() and _known_to_hold(whole):
            return moved()
        square = family.inner(step, family.fisher_vector_product(nat, family.Nat(*step)))
        length = torch.where(square > 0.0, square, 1.0).sqrt()
        factor = torch.where(whole, one, 0.5 / torch.where(torch.isfinite(length), length.clamp_min(1.0), 1.0))
        for _ in range(RUNGS):
            factor = torch.where(safe(factor), factor, 0.125 * factor)
        factor = torch.where(safe(factor), factor, 0.0 * factor)
    return moved(factor)


@differentiating
def pushed(function: Callable[[Any], Any], at: Any, along: Any) -> Any:
    """J v by two derivatives in reverse: of ⟨Jᵀu, v⟩ in u. Forward ones load a scripted library, which warns."""
    value, pull, *_ = torch.func.vjp(function, at)
    _, push, *_ = torch.func.vjp(lambda u: pull(u)[0], fields.map_fields(torch.zeros_like, value))
    return push(along)[0]


def inside(family: ExponentialFamily, state: Any, present: Any, batch: torch.Size) -> Tensor:
    """Per weight: the fields are finite and satisfy their constraints, and A is finite.

    A is only asked about states that satisfy them (`present` takes the places of others), for it may raise elsewhere.
    """
    ok = torch.ones(batch, dtype=torch.bool, device=state[0].device)
    for name, value in zip(state._fields, state, strict=True):
        ok = ok & _reduced(torch.isfinite(value), len(batch))
        if name in family.domain:
            ok = ok & _reduced(family.domain[name].check(value), len(batch))
    known = family.State(*(torch.where(per_weight(ok, v), v, p) for v, p in zip(state, present, strict=True)))
    return ok & torch.isfinite(family.log_partition(family.to_nat(known)))


def per_weight(factor: Tensor, value: Tensor) -> Tensor:
    """A number for each weight, shaped to multiply a field; a field with fewer axes is the family's constant."""
    return factor.reshape(factor.shape + (1,) * max(0, value.ndim - factor.ndim))


def _reduced(values: Tensor, dims: int) -> Tensor:
    return values.flatten(dims).all(-1) if values.ndim > dims else values


def _known_to_hold(values: Tensor) -> bool:
    """Whether all hold, where that can be looked at: not for weights that `torch.func.vmap` stands for."""
    try:
        return bool(values.all())
    except RuntimeError:
        return False


def invert_mean(
    family: ExponentialFamily,
    mean: Any,
    *,
    start: Any = None,
    iterations: int = 200,
    tolerance: float | None = None,
) -> Any:
    """Solve ∇A(λ) = μ for all weights at once: Newton steps on the concave ⟨λ, μ⟩ − A(λ), halved until they rise.

    They begin at `start`, a `Nat`; None: at the member in the middle of the support. Where A is a sum with errors of
    its own (`quadrature`), steps end before the residual is one of rounding: `STALLED` of it is enough then.

    Raises:
        ValueError: if some weight has not converged, which means that its μ is outside the mean domain.
    """
    target, shapes = _flatten(family, mean)
    tolerance = tolerance or 200.0 * torch.finfo(target.dtype).eps
    if start is None:
        start = family.to_nat(family.centred_at(family.middle(mean)))
    current, _ = _flatten(family, start)
    least, since = math.inf, 0
    for _ in range(iterations):
        residual = target - _flatten(family, family.to_mean(_unflatten(family, current, shapes)))[0]
        worst = float((residual.abs() / (1.0 + target.abs())).max()) if residual.numel() else 0.0
        since = 0 if worst < 0.5 * least else since + 1
        least = min(least, worst)
        if worst <= tolerance or (since > PATIENCE and worst <= STALLED * tolerance**0.5):
            return _unflatten(family, current, shapes)
        matrix = fisher(family, _unflatten(family, current, shapes))
        step, fault = torch.linalg.solve_ex(matrix, residual)
        if bool(fault.any()):
            break
        current = _ascend(family, current, step, target, shapes)
    raise ValueError(
        f"mean: no natural parameter of {type(family).__name__} was found with this expectation "
        f"(largest remaining error {float(residual.abs().max()):.3g}); give a mean inside the mean domain."
    )


def _ascend(family: ExponentialFamily, current: Tensor, step: Tensor, target: Tensor, shapes: Any) -> Tensor:
    """Per weight, the longest of the halved steps that stays in the domain and does not lower the dual."""

    def dual(vector: Tensor) -> tuple[Tensor, Tensor]:
        linear = vector * target
        partition = family.log_partition(_unflatten(family, vector, shapes)).reshape(linear.shape[:-1])
        value = linear.sum(-1) - partition
        inside = _inside(family, _unflatten(family, vector, shapes)).reshape(value.shape)
        size = linear.abs().sum(-1) + partition.abs()
        return torch.where(inside & torch.isfinite(value), value, value.new_full((), -torch.inf)), size

    best, size = dual(current)
    slack = 4.0 * torch.finfo(best.dtype).eps * size  # of the terms: their sum may be near zero
    length = torch.ones_like(best)
    for _ in range(60):
        worse = dual(current + length.unsqueeze(-1) * step)[0] < best - slack
        if not bool(worse.any()):
            break
        length = torch.where(worse, 0.5 * length, length)
    return current + length.unsqueeze(-1) * step


def _inside(family: ExponentialFamily, nat: Any) -> Tensor:
    """Per weight: the chart's fields satisfy the declared constraints."""
    batch = _flatten(family, nat)[0].shape[:-1]
    ok = torch.ones(batch, dtype=torch.bool, device=nat[0].device)
    state = family.from_nat(nat)
    for name, constraint in family.domain.items():
        ok = ok & _reduced(constraint.check(getattr(state, name)), len(batch))
    return ok


def _flatten(family: ExponentialFamily, values: Any) -> tuple[Tensor, list[torch.Size]]:
    """The fields of one weight side by side (batch × k), and the shapes to undo it."""
    parts, shapes = [], []
    for value, dims in zip(values, family.statistic_dims, strict=True):
        batch, event = value.shape[: value.ndim - dims], value.shape[value.ndim - dims :]
        parts.append(value.reshape(*batch, -1))
        shapes.append(event)
    return torch.cat(parts, -1), shapes


def _unflatten(family: ExponentialFamily, vector: Tensor, shapes: list[torch.Size]) -> Any:
    """The inverse of `_flatten`."""
    parts = vector.split([max(1, shape.numel()) for shape in shapes], -1)
    return family.Nat(*(part.reshape((*vector.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)))
