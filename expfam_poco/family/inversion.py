r"""Draws by inversion: θ with F_λ(θ) = u, and how they move with λ.

A family whose distribution function F is known draws θ = F⁻¹(u) from uniform noise, so that one noise serves two
posteriors. Where F⁻¹ has no closed form, `increasing_root` finds it, and `implicit` gives the draw its derivative by
the implicit function theorem (Figurnov et al. 2018): from F_λ(θ(λ, u)) = u follows

    ∂θ/∂λ = − (∂F_λ(θ)/∂λ) / f_λ(θ)

Both have no control flow that depends on data, so they run inside compiled kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    iterations: int,
) -> Tensor:
    """x in [low, high] with f(x) = 0, entry by entry: Newton steps, and the bracket's middle where one leaves it.

    Args:
        function: x → (f(x), f′(x)) for an increasing f; only the sign of f needs to be right far from the root.
        start: first guess.
        low: where f < 0.
        high: where f > 0.
        iterations: how many; each needs one evaluation of `function`.

    Example:
        >>> import torch
        >>> from expfam_poco.family.inversion import increasing_root
        >>> two = torch.tensor(2.0, dtype=torch.float64)
        >>> increasing_root(lambda x: (x * x - 2.0, 2.0 * x), two, 0.0 * two, two, iterations=8)
        tensor(1.4142, dtype=torch.float64)
    """
    x = start
    for _ in range(iterations):
        value, slope = function(x)
        low, high = torch.where(value < 0.0, x, low), torch.where(value < 0.0, high, x)
        newton = x - value / slope
        inside = (newton >= low) & (newton <= high)  # a step of less than one rounding stays, too
        x = torch.where(value == 0.0, x, torch.where(inside, newton, 0.5 * (low + high)))
    return x


def implicit(theta: Tensor, distribution: Tensor, density: Tensor) -> Tensor:
    """The draw θ, whose derivative is −(∂F/∂λ)/f (first derivatives only).

    Args:
        theta: the draws; their own derivatives are dropped.
        distribution: F_λ(θ) at these draws held fixed, differentiable in λ.
        density: f_λ(θ).

    Example:
        >>> import torch
        >>> from expfam_poco.family.inversion import implicit
        >>> rate = torch.tensor(2.0, requires_grad=True)  # F = 1 − exp(−rate θ), so θ = −log(1−u)/rate
        >>> theta = implicit(torch.tensor(0.5), -torch.expm1(-rate * 0.5), rate * torch.exp(-rate * 0.5))
        >>> torch.autograd.grad(theta, rate)[0]  # −θ/rate
        tensor(-0.2500)
    """
    return theta.detach() - (distribution - distribution.detach()) / density.detach()


def opaque(name: str) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """Decorator: to a compiler, this function of a parameter and of noise is one operator, `expfam_poco::name`.

    A root's hundreds of operations would take it minutes. The operator has no derivative: for functions that are called
    on detached numbers, as `implicit` wants them.

    Example:
        >>> import torch
        >>> from expfam_poco.family.inversion import opaque
        >>> @opaque("doubled")
        ... def doubled(a, u): return 2.0 * a * u
        >>> doubled(torch.ones(2), torch.ones(3, 1)).shape
        torch.Size([3, 2])
    """

    def decorate(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        operator = torch.library.custom_op(
            f"expfam_poco::{name}", function, mutates_args=(), schema="(Tensor a, Tensor u) -> Tensor"
        )

        @operator.register_fake
        def _(a: Tensor, u: Tensor) -> Tensor:
            return u.new_empty(torch.broadcast_shapes(a.shape, u.shape))

        @functools.wraps(function)
        def call(a: Tensor, u: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                found: Tensor = operator(a, u)
                return found
            return function(a, u)

        return call

    return decorate
