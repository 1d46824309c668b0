r"""The product of families: each parameter of a model has the family that its name chooses.

    q(θ) = Π_i q_i(θ_i),   T(θ) = (T_1(θ_1), …, T_k(θ_k)),   A(λ) = Σ_i A_i(λ_i)

A product of exponential families is one: its statistics stand side by side, and since A is a sum, the Fisher matrix
is block-diagonal, and every map of the Bayesian learning rule acts part by part. Given to an optimizer it is
therefore *split* into one ordinary parameter group for each part, so that every part keeps its own estimator, rates
and kernels. As a family of its own (for laws and pure functions) it sees one flat vector, `sizes` numbers a part.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from math import inf, prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.estimators import Draws
from expfam_poco.family import ExponentialFamily
from expfam_poco.noise import NoiseKey
from expfam_poco.registry import resolve_family

from .gaussian import DiagonalGaussian


class Part(NamedTuple):
    """The parameters whose names match `pattern`: their family, and hyperparameters of their group."""

    pattern: str
    family: ExponentialFamily
    settings: dict[str, Any]


@dataclass(frozen=True)
class ProductFamily(ExponentialFamily):
    """Every parameter with the family that its name chooses: shell-style patterns, the first that matches wins.

    Args:
        parts: pattern → family (an instance, class or registered name), or (family, {"lr": …}) with the
            hyperparameters that this part's group has of its own.
        sizes: the number of entries of each part, where the product is used as a family of flat vectors; not needed
            in an optimizer, nor with a single part.

    Raises:
        TypeError: for parts that are no mapping, or what is no family.
        ValueError: for no parts, an unknown name, or sizes that are not one positive integer a part.

    Example:
        >>> import torch, expfam_poco as poco
        >>> from expfam_poco.families import ProductFamily
        >>> model = torch.nn.BatchNorm1d(3)
        >>> family = ProductFamily({"*bias": "isotropic_gaussian", "*": ("diagonal_gaussian", {"lr": 0.01})})
        >>> opt = poco.PosteriorCorrected(model.named_parameters(), family, lr=0.1, ess=10)
        >>> [(group["param_names"], group["family"], group["lr"]) for group in opt.param_groups]
        [(['bias'], IsotropicGaussian(precision=1.0), 0.1), (['weight'], DiagonalGaussian(), 0.01)]
    """

    parts: Mapping[str, Any] = field(default_factory=lambda: {"*": DiagonalGaussian()}, hash=False)
    sizes: Sequence[int] | None = field(default=None, hash=False)

    joint: ClassVar[bool] = True
    event_dim: ClassVar[int] = 1
    _parts: ClassVar[tuple[Part, ...]] = ()  # of an instance, as all that _describe declares

    def __post_init__(self) -> None:
        """Resolve the parts; where they can be seen as one flat vector, make the types of its values."""
        if not isinstance(self.parts, Mapping):
            raise TypeError(f"parts={self.parts!r}: give a mapping from patterns of names to families.")
        if not self.parts:
            raise ValueError("parts={}: a product needs at least one part; '*' matches every name.")
        self._set("_parts", tuple(_part(pattern, value) for pattern, value in self.parts.items()))
        sizes = self.sizes
        if sizes is not None:
            whole = all(isinstance(size, int) and size > 0 for size in sizes)
            if len(sizes) != len(self.parts) or not whole:
                raise ValueError(
                    f"sizes={tuple(sizes)}: give one positive integer for each of {len(self.parts)} parts."
                )
        elif len(self.parts) > 1:
            return  # no flat vector without sizes
        if self._unfit() is None:
            self._describe()

    def __reduce__(self) -> Any:
        """Copies and pickles are made anew, since the types of the values are made for each product."""
        return type(self), (self.parts, self.sizes)

    # ---- in an optimizer -------------------------------------------------------------------------------------

    def parts_of(self, names: Sequence[str] | None) -> list[tuple[ExponentialFamily, dict[str, Any], list[int]]]:
        """Each part that some name matches: its family, its hyperparameters, and which names it has.

        Raises:
            ValueError: without names, or for a name that no pattern matches.
        """
        if names is None:
            raise ValueError(
                "params: a ProductFamily chooses families by the names of parameters; give model.named_parameters()."
            )
        chosen: dict[int, list[int]] = {number: [] for number in range(len(self._parts))}
        for index, name in enumerate(names):
            fitting = [number for number, part in enumerate(self._parts) if fnmatchcase(name, part.pattern)]
            if not fitting:
                patterns = ", ".join(repr(part.pattern) for part in self._parts)
                raise ValueError(
                    f"params: no pattern of the ProductFamily matches {name!r} (there are {patterns}); add one, or "
                    "'*' for all others."
                )
            chosen[fitting[0]].append(index)
        return [(self._parts[n].family, dict(self._parts[n].settings), found) for n, found in chosen.items() if found]

    # ---- as one flat vector ----------------------------------------------------------------------------------

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _unfit(self) -> str | None:
        """Why the parts are no flat vector, if they are not."""
        for part in self._parts:
            family, name = part.family, type(part.family).__name__
            if family.joint or family.event_dim or any(family.statistic_dims):
                return f"{part.pattern!r} is a {name}, whose weights are not one number each"
            if family.default_estimator != "reparam":
                return f"{part.pattern!r} is a {name}, whose estimator is {family.default_estimator!r}"
        return None

    def _describe(self) -> None:
        """The types, constraints and declarations of the flat vector, as attributes of this instance."""
        families = [part.family for part in self._parts]
        labels = tuple(_labels([part.pattern for part in self._parts]))
        for kind in ("Nat", "Mean", "State", "Site"):
            names = [f"{label}_{name}" for label, f in zip(labels, families, strict=True) for name in _kind(f, kind)]
            self._set(kind, _type(f"Product{kind}", tuple(names)))
        self._set("Statistics", self.Mean)
        self._set("statistic_dims", (1,) * len(self.Nat._fields))
        pairs = list(zip(labels, families, strict=True))
        self._set("momentum_block", tuple(f"{label}_{name}" for label, f in pairs for name in f.momentum_block))
        self._set("domain", {f"{label}_{name}": each for label, f in pairs for name, each in f.domain.items()})
        supports = [family.support for family in families]
        if self.sizes is not None and len(supports) > 1:
            self._set("support", constraints.independent(constraints.cat(supports, -1, list(self.sizes)), 1))
        else:
            self._set("support", constraints.independent(supports[0], 1))
        widest = max(prod(family.noise_dims) for family in families)
        self._set("noise_dims", (widest,) if any(family.noise_dims for family in families) else ())
        kept = any(family.curvature != "none" for family in families)
        self._set("curvature", "diagonal" if kept else "none")

    def _flat(self) -> tuple[tuple[ExponentialFamily, int | None], ...]:
        """The parts' families and sizes; an error where the product is no family of flat vectors."""
        reason = self._unfit()
        if reason is not None:
            raise ValueError(f"parts: {reason}, so this product works in optimizers only, not as one flat vector.")
        if self.sizes is None and len(self._parts) > 1:
            raise ValueError("sizes=None: as a family of one flat vector the product needs the size of each part.")
        sizes: Sequence[int | None] = self.sizes or (None,)
        return tuple((part.family, size) for part, size in zip(self._parts, sizes, strict=True))

    def _cut(self, value: Any, axis: int = -1) -> list[Any]:
        """A tensor's pieces along the axis of the weights; what is no tensor of weights goes to every part."""
        parts = self._flat()
        if not isinstance(value, Tensor) or value.ndim < -axis:
            return [value] * len(parts)
        length = value.shape[axis]
        sizes = [length if size is None else size for _, size in parts]
        if sum(sizes) != length:
            raise ValueError(f"theta has {length} entries, but sizes={tuple(sizes)} make {sum(sizes)}; change one.")
        return list(value.split(sizes, axis))

    def _values(self, kind: str, values: Sequence[Any]) -> list[Any]:
        """A product's `Nat`, `Mean`, `State` or `Site` (or rates in its order) as those of the parts."""
        made, start = [], 0
        for family, _ in self._flat():
            stop = start + len(_kind(family, kind))
            made.append(getattr(family, kind)(*values[start:stop]))
            start = stop
        return made

    def _join(self, kind: str, values: Sequence[Any]) -> Any:
        """The inverse of `_values`."""
        return getattr(self, kind)(*(each for value in values for each in value))

    def _each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """The function of every part's family and arguments."""
        return [function(family, *rest) for (family, _), *rest in zip(self._flat(), *arguments, strict=True)]

    def _noises(self, noise: Tensor) -> list[Tensor]:
        """The parts' noises: of the widest noise an entry has, each takes what it needs."""
        if not self.noise_dims:
            return self._cut(noise)

        def taken(family: ExponentialFamily, part: Tensor) -> Tensor:
            return part[..., : prod(family.noise_dims)].reshape(*part.shape[:-1], *family.noise_dims)

        return self._each(taken, self._cut(noise, -2))

    def _padded(self, noises: Sequence[Tensor]) -> Tensor:
        """The inverse of `_noises`, with zeros where an entry needs less than the widest."""
        if not self.noise_dims:
            return torch.cat(list(noises), -1)

        def wide(family: ExponentialFamily, part: Tensor) -> Tensor:
            flat = part.reshape(*part.shape[: part.ndim - len(family.noise_dims)], -1)
            return torch.nn.functional.pad(flat, (0, self.noise_dims[0] - flat.shape[-1]))

        return torch.cat(self._each(wide, noises), -2)

    # ---- what defines the family -----------------------------------------------------------------------------

    def statistics(self, theta: Tensor) -> Any:
        """Those of the parts, side by side."""
        return self._join("Mean", self._each(lambda f, t: f.statistics(t), self._cut(theta)))

    def log_partition(self, nat: Any) -> Tensor:
        """Σ A_i(λ_i)."""
        return self._total(self._each(lambda f, n: f.log_partition(n), self._values("Nat", nat)))

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        """Each part's own."""
        parts = self._each(lambda f, s, e: f.sample(s, e), self._values("State", state), self._noises(noise))
        return torch.cat(parts, -1)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Any:
        """Each part's own."""
        return self._join(
            "State", self._each(lambda f, t, p: f.centred_at(t, p), self._cut(theta), self._cut(precision))
        )

    def log_base_measure(self, theta: Tensor) -> Tensor:
        """Σ log h_i."""
        return self._total(self._each(lambda f, t: f.log_base_measure(t), self._cut(theta)))

    def expected_log_base_measure(self, state: Any) -> Tensor:
        """Σ E[log h_i]."""
        return self._total(self._each(lambda f, s: f.expected_log_base_measure(s), self._values("State", state)))

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum over the weights of all parts."""
        return torch.stack([value.sum(-1) for value in values]).sum(0)

    # ---- coordinates -----------------------------------------------------------------------------------------

    def to_mean(self, nat: Any) -> Any:
        """Each part's own."""
        return self._join("Mean", self._each(lambda f, n: f.to_mean(n), self._values("Nat", nat)))

    def to_natural(self, mean: Any) -> Any:
        """Each part's own."""
        return self._join("Nat", self._each(lambda f, m: f.to_natural(m), self._values("Mean", mean)))

    def to_nat(self, state: Any) -> Any:
        """Each part's own."""
        return self._join("Nat", self._each(lambda f, s: f.to_nat(s), self._values("State", state)))

    def from_nat(self, nat: Any) -> Any:
        """Each part's own."""
        return self._join("State", self._each(lambda f, n: f.from_nat(n), self._values("Nat", nat)))

    def site_to_nat(self, site: Any, state: Any) -> Any:
        """Each part's own."""
        sites, states = self._values("Site", site), self._values("State", state)
        return self._join("Nat", self._each(lambda f, g, s: f.site_to_nat(g, s), sites, states))

    def site_from_nat(self, site: Any, state: Any) -> Any:
        """Each part's own."""
        sites, states = self._values("Nat", site), self._values("State", state)
        return self._join("Site", self._each(lambda f, g, s: f.site_from_nat(g, s), sites, states))

    def reanchor(self, site: Any, state_from: Any, state_to: Any) -> Any:
        """Each part's own."""
        sites = self._values("Site", site)
        ends = self._values("State", state_from), self._values("State", state_to)
        return self._join("Site", self._each(lambda f, g, a, b: f.reanchor(g, a, b), sites, *ends))

    # ---- noise and points ------------------------------------------------------------------------------------

    def noise(
        self,
        shape: torch.Size | tuple[int, ...],
        draws: int,
        key: NoiseKey,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Each part's own, from elements of the key's own, so that no two weights share a number."""
        made, start = [], 0
        for family, size in self._flat():
            own = (*shape[:-1], shape[-1] if size is None else size)
            at = key.at(offset=key.offset + start)
            made.append(family.noise(own, draws, at, dtype=dtype, device=device))
            start += prod((*own, *family.noise_dims))
        return self._padded(made)

    def reflect(self, noise: Tensor) -> Tensor:
        """Each part's own."""
        return self._padded(self._each(lambda f, e: f.reflect(e), self._noises(noise)))

    def neutral_noise(self, like: Tensor) -> Tensor:
        """Each part's own."""
        return self._padded(self._each(lambda f, t: f.neutral_noise(t), self._cut(like)))

    def point(self, state: Any) -> Tensor:
        """Each part's own."""
        return torch.cat(self._each(lambda f, s: f.point(s), self._values("State", state)), -1)

    def recentre(self, state: Any, theta: Tensor) -> Any:
        """Each part's own."""
        states = self._values("State", state)
        return self._join("State", self._each(lambda f, s, t: f.recentre(s, t), states, self._cut(theta)))

    def reference_like(self, like: Tensor) -> Tensor:
        """Each part's own."""
        return torch.cat(self._each(lambda f, t: f.reference_like(t), self._cut(like)), -1)

    def middle(self, statistics: Any) -> Tensor:
        """Each part's own."""
        return torch.cat(self._each(lambda f, m: f.middle(m), self._values("Mean", statistics)), -1)

    def distributions(self, state: Any) -> list[Any]:
        """The parts' distributions."""
        return self._each(lambda f, s: f.distribution(s), self._values("State", state))

    def distribution(self, state: Any) -> Any:
        """The parts' distributions, side by side."""
        from .product_distribution import ProductDistribution

        return ProductDistribution(self, state)

    # ---- the Bayesian learning rule --------------------------------------------------------------------------

    def _draws(self, draws: Draws) -> list[Draws]:
        """The parts' measurements: the loss is common, the rest is theirs."""
        curvature = self._cut(draws.curvature)
        pieces = zip(self._noises(draws.noise), self._cut(draws.theta), self._cut(draws.grad), curvature, strict=True)
        return [Draws(noise, theta, draws.loss, grad, own) for noise, theta, grad, own in pieces]

    def natural_gradient(self, state: Any, draws: Draws) -> Any:
        """Each part's own."""
        states = self._values("State", state)
        return self._join("Site", self._each(lambda f, s, d: f.natural_gradient(s, d), states, self._draws(draws)))

    def score_natural_gradient(self, state: Any, draws: Draws) -> Any:
        """Each part's own, all from the common loss."""
        states = self._values("State", state)
        sites = self._each(lambda f, s, d: f.score_natural_gradient(s, d), states, self._draws(draws))
        return self._join("Site", sites)

    def kl_gradient(self, state: Any, prior: Any) -> Any:
        """Each part's own."""
        pairs = self._values("State", state), self._values("State", prior)
        return self._join("Site", self._each(lambda f, s, p: f.kl_gradient(s, p), *pairs))

    def retract(
        self, state: Any, direction: Any, rates: Any, *, variant: str = "second_order", clip_radius: float = inf
    ) -> Any:
        """Each part's own."""
        values = (self._values("State", state), self._values("Site", direction), self._values("Site", rates))

        def moved(family: ExponentialFamily, *own: Any) -> Any:
            return family.retract(*own, variant=variant, clip_radius=clip_radius)

        return self._join("State", self._each(moved, *values))

    def in_domain(self, state: Any) -> Tensor:
        """Every part is in its own."""
        return torch.stack(self._each(lambda f, s: f.in_domain(s), self._values("State", state))).all()

    # ---- values ----------------------------------------------------------------------------------------------

    def entropy(self, state: Any) -> Tensor:
        """The sum of the parts'."""
        return self._total(self._each(lambda f, s: f.entropy(s), self._values("State", state)))

    def kl(self, state: Any, prior: Any) -> Tensor:
        """The sum of the parts'."""
        pairs = self._values("State", state), self._values("State", prior)
        return self._total(self._each(lambda f, s, p: f.kl(s, p), *pairs))

    def log_prob(self, state: Any, theta: Tensor) -> Tensor:
        """The sum of the parts'."""
        values = self._values("State", state), self._cut(theta)
        return self._total(self._each(lambda f, s, t: f.log_prob(s, t), *values))

    def fisher_vector_product(self, nat: Any, vector: Any) -> Any:
        """Each part's own."""
        values = self._values("Nat", nat), self._values("Nat", vector)
        return self._join("Nat", self._each(lambda f, n, v: f.fisher_vector_product(n, v), *values))

    def fisher_solve(self, nat: Any, vector: Any) -> Any:
        """Each part's own."""
        values = self._values("Nat", nat), self._values("Nat", vector)
        return self._join("Nat", self._each(lambda f, n, v: f.fisher_solve(n, v), *values))


def _part(pattern: str, value: Any) -> Part:
    """A pattern with its family, and the hyperparameters if there are any."""
    family, settings = value if isinstance(value, tuple) else (value, {})
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"parts[{pattern!r}]: {settings!r} are no hyperparameters; give a dictionary such as {{'lr': 0.1}}."
        )
    return Part(str(pattern), resolve_family(family), dict(settings))


def _kind(family: ExponentialFamily, kind: str) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(family, kind)._fields
    return names


def _labels(patterns: Sequence[str]) -> list[str]:
    """A different identifier for every pattern, made of its letters."""
    labels: list[str] = []
    for number, pattern in enumerate(patterns):
        label = re.sub(r"\W+", "_", pattern, flags=re.ASCII).strip("_")
        label = label if label[:1].isalpha() else f"part{number}{label and '_'}{label}"
        labels.append(label if label not in labels else f"{label}_{number}")
    return labels


@cache
def _type(name: str, names: tuple[str, ...]) -> Any:
    """One type for equal fields, so that the values of equal products have equal types."""
    return namedtuple(name, names)
