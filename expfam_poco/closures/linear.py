r"""Generalised linear models: a loss of one margin and one target for each example, whose derivatives are closed forms.

With rows x_i, targets y_i and the margin z_i = x_iᵀ θ, a mini-batch B of size |B| has

    ℓ_B(θ)  = (1/|B|) Σ_i ℓ(z_i, y_i)
    ∇ℓ_B(θ) = (1/|B|) Σ_i ℓ′(z_i, y_i) x_i,      ∇²ℓ_B(θ) = (1/|B|) Σ_i ℓ″(z_i, y_i) x_i x_iᵀ

ℓ′ and ℓ″ being derivatives by the margin (McCullagh and Nelder 1989, §2.5, for the canonical links). So a Hessian costs
one product of matrices, and nothing has to be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from expfam_poco import arguments
from expfam_poco.errors import NonFiniteError

ROWS = 2**13  # of all data at a time: their product with the weights ℓ″ should fit the caches


class Measured(NamedTuple):
    """At K values of the weights: the losses (K), gradients (K × d), and Hessians (K × d × d, or diagonals) or None."""

    loss: Tensor
    grad: Tensor
    hessian: Tensor | None


@dataclass(frozen=True)
class Loss:
    """ℓ(z, y) of one margin and its target, entry by entry; ℓ′ and ℓ″ by automatic differentiation.

    Args:
        value: ℓ, a function of two tensors of one shape, made of torch's functions.
    """

    value: Callable[[Tensor, Tensor], Tensor]

    def slope(self, margin: Tensor, target: Tensor) -> Tensor:
        """ℓ′: the derivative by the margin."""
        slope: Tensor = torch.func.grad(lambda z: self.value(z, target).sum())(margin)
        return slope

    def bend(self, margin: Tensor, target: Tensor) -> Tensor:
        """ℓ″."""
        bend: Tensor = torch.func.grad(lambda z: self.slope(z, target).sum())(margin)
        return bend

    def check(self, target: Tensor) -> None:
        """Refuse targets that the loss is not made for."""


class Logistic(Loss):
    """log(1 + eᶻ) − y z, y from 0 to 1: the negative log-likelihood of a Bernoulli variable with the logit z."""

    def slope(self, margin: Tensor, target: Tensor) -> Tensor:
        """σ(z) − y."""
        return torch.sigmoid(margin) - target

    def bend(self, margin: Tensor, target: Tensor) -> Tensor:
        """σ(z) σ(−z)."""
        return torch.sigmoid(margin) * torch.sigmoid(-margin)

    def check(self, target: Tensor) -> None:
        """Labels of −1 and 1 would be taken for probabilities."""
        _between("logistic", target, 0.0, 1.0, "give labels 0 and 1 (of −1 and 1 take (y + 1)/2)")


class Squared(Loss):
    """½ (z − y)²: the negative log-likelihood of N(y | z, 1), less its constant."""

    def slope(self, margin: Tensor, target: Tensor) -> Tensor:
        """z − y."""
        return margin - target

    def bend(self, margin: Tensor, target: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(margin)


class Poisson(Loss):
    """eᶻ − y z: the negative log-likelihood of a count y with the mean eᶻ, less log y!."""

    def slope(self, margin: Tensor, target: Tensor) -> Tensor:
        """eᶻ − y."""
        return margin.exp() - target

    def bend(self, margin: Tensor, target: Tensor) -> Tensor:
        """eᶻ."""
        return margin.exp()

    def check(self, target: Tensor) -> None:
        """Counts are not negative."""
        _between("poisson", target, 0.0, float("inf"), "give counts")


def _between(name: str, target: Tensor, low: float, high: float, remedy: str) -> None:
    outside = target[(target < low) | (target > high)]
    if len(outside):
        raise ValueError(f"y: {float(outside[0]):g} is no target of loss={name!r}; {remedy}.")


LOSSES: dict[str, Loss] = {
    "logistic": Logistic(lambda z, y: functional.softplus(z, threshold=40.0) - y * z),
    "squared": Squared(lambda z, y: 0.5 * (z - y).square()),
    "poisson": Poisson(lambda z, y: z.exp() - y * z),
}


class GeneralisedLinear:
    """The data and the loss of a generalised linear model, for `PosteriorCorrected.inner_loop`.

    The mean loss is (1/N) Σᵢ ℓ(xᵢᵀθ, yᵢ), to which the optimizer adds its prior.

    Args:
        x: N × d, floating point. A column of ones is an intercept.
        y: N targets.
        loss: "logistic" (y in [0, 1]), "squared", "poisson" (log link), or a function ℓ(margin, target) of two tensors
            of one shape that works entry by entry and is twice differentiable.

    Raises:
        TypeError, ValueError: for shapes that do not fit, numbers that are not finite, or targets that the loss is not
            made for.

    Example:
        >>> import torch, expfam_poco as poco
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(500, 4, dtype=torch.float64)
        >>> y = (torch.rand(500) < torch.sigmoid(x.sum(1))).double()
        >>> data = poco.GeneralisedLinear(x, y, "logistic")
        >>> weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        >>> opt = poco.VONPoCo([weight], lr=0.5, ess=500.0, weight_decay=1e-3, hess_init=0.1, noise="zero")
        >>> for epoch in range(8):
        ...     losses = opt.inner_loop(data, torch.randperm(500)[:400].view(4, 100), refresh=True)
        >>> slope = torch.autograd.functional.jacobian(data.mean_loss, weight) + 1e-3 * weight
        >>> bool(slope.abs().max() < 1e-9)
        True
    """

    def __init__(self, x: Tensor, y: Tensor, loss: str | Callable[[Tensor, Tensor], Tensor] = "logistic") -> None:
        arguments.instance("x", x, Tensor, "give a tensor, N × d")
        arguments.instance("y", y, Tensor, "give a tensor of N targets")
        if x.ndim != 2 or not x.is_floating_point() or not x.numel():
            raise ValueError(f"x: {x.dtype} of shape {tuple(x.shape)}; give a floating-point tensor, N × d.")
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"y: shape {tuple(y.shape)}; give one target for each of the {len(x)} rows of x (several classes have "
                "several margins, which inner loops do not do)."
            )
        if not callable(loss):
            arguments.choice("loss", loss, tuple(LOSSES), f"choose one of {', '.join(LOSSES)}, or give a function")
        self.x, self.y = x.detach().contiguous(), y.detach().to(x.dtype)
        for name, value in (("x", self.x), ("y", self.y)):
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"{name}: not all of it is finite; leave such examples out.")
        self.loss = _by_entries(Loss(loss), self.y) if callable(loss) else LOSSES[loss]
        self.loss.check(self.y)

    def __len__(self) -> int:
        """N."""
        return len(self.x)

    def mean_loss(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """(1/|B|) Σ ℓ(xᵢᵀθ, yᵢ) over some rows (None: all), for closures of ordinary steps.

        Args:
            weight: θ, d entries in any shape.
            rows: their numbers.
        """
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        return self.loss.value(x @ weight.flatten(), y).mean()

    def measure_all(self, theta: Tensor, curvature: str) -> Measured:
        """`measure` of all data, some rows at a time."""
        total: Measured | None = None
        for x, y in zip(self.x.split(ROWS), self.y.split(ROWS), strict=True):
            share = len(x) / len(self)
            part = measure(self.loss, theta, x, y, curvature)
            part = Measured(*[None if value is None else share * value for value in part])  # type: ignore[arg-type]
            total = part if total is None else _sum(total, part)
        assert total is not None
        return total


def _by_entries(loss: Loss, y: Tensor) -> Loss:
    """Refuse a loss that does not work entry by entry: a mean of them would be divided twice."""
    target = y[:1].expand(1, 2)
    margin = torch.zeros_like(target)
    with torch.no_grad():
        value = loss.value(margin, target)
        other = loss.value(margin + margin.new_tensor([0.0, 0.5]), target)
    if not isinstance(value, Tensor) or value.shape != target.shape or value[0, 0] != other[0, 0]:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss: for margins of shape {tuple(target.shape)} it gives {shape}, or one entry depends on another; give "
            "ℓ entry by entry (of torch's losses with reduction='none'), the mean is taken here."
        )
    return loss


def _sum(a: Measured, b: Measured) -> Measured:
    both = None if a.hessian is None or b.hessian is None else a.hessian + b.hessian
    return Measured(a.loss + b.loss, a.grad + b.grad, both)


def measure(loss: Loss, theta: Tensor, x: Tensor, y: Tensor, curvature: str) -> Measured:
    """Mean loss, gradient and Hessian at K values of the weights.

    Args:
        loss: ℓ.
        theta: K × d.
        x: B × d.
        y: B.
        curvature: "none", "diagonal" or "dense".
    """
    margin = _margins(theta, x)
    y = y.expand_as(margin)
    slope = loss.slope(margin, y) / len(x)
    hessian: Any = None
    if curvature != "none":
        bend = loss.bend(margin, y) / len(x)
        hessian = _weighted(bend, x.square()) if curvature == "diagonal" else x.mT @ (bend.unsqueeze(-1) * x)
    return Measured(loss.value(margin, y).mean(-1), _weighted(slope, x), hessian)


def _margins(theta: Tensor, x: Tensor) -> Tensor:
    """K × B; compiled as a sum of products, which becomes one loop with what follows it, and no call of a library."""
    if torch.compiler.is_compiling():
        return (theta.unsqueeze(-2) * x).sum(-1)
    return theta @ x.mT


def _weighted(values: Tensor, x: Tensor) -> Tensor:
    """Σ_i values_ki x_i, K × d."""
    if torch.compiler.is_compiling():
        return (values.unsqueeze(-1) * x).sum(-2)
    return values @ x
