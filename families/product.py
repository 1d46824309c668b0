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
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Draws
from expfam_poco.family.noise import NoiseKey
from expfam_poco.family.registry import resolve_family

from .gaussian.gaussian import DiagonalGaussian


class Part(NamedTuple):
    """The parameters whose names match `pattern`: their family, and hyperparameters of their group."""

    pattern: str
    family: ExponentialFamily
    settings: dict[str, Any]


def _parted(name: str, *takes: str, gives: str) -> Any:
    """A method that every part does for itself: what kinds of arguments it takes, and what it gives."""

    def method(self: ProductFamily, *arguments: Any, **choices: Any) -> Any:
        arguments = (*arguments, *(None,) * (len(takes) - len(arguments)))
        own = zip(
            self._flat(), *(self._take(kind, value) for kind, value in zip(takes, arguments, strict=True)), strict=True
        )
        return self._give(gives, [getattr(family, name)(*rest, **choices) for (family, _), *rest in own])

    method.__name__, method.__doc__ = name, f"Part by part, as `ExponentialFamily.{name}`."
    return method


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

    # ---- part by part ----------------------------------------------------------------------------------------

    statistics = _parted("statistics", "theta", gives="Mean")
    sample = _parted("sample", "State", "noise", gives="theta")
    centred_at = _parted("centred_at", "theta", "number", gives="State")
    to_mean = _parted("to_mean", "Nat", gives="Mean")
    to_natural = _parted("to_natural", "Mean", gives="Nat")
    to_nat = _parted("to_nat", "State", gives="Nat")
    from_nat = _parted("from_nat", "Nat", gives="State")
    site_to_nat = _parted("site_to_nat", "Site", "State", gives="Nat")
    site_from_nat = _parted("site_from_nat", "Nat", "State", gives="Site")
    reanchor = _parted("reanchor", "Site", "State", "State", gives="Site")
    reflect = _parted("reflect", "noise", gives="noise")
    neutral_noise = _parted("neutral_noise", "theta", gives="noise")
    point = _parted("point", "State", gives="theta")
    recentre = _parted("recentre", "State", "theta", gives="State")
    reference_like = _parted("reference_like", "theta", gives="theta")
    middle = _parted("middle", "Mean", gives="theta")
    distributions = _parted("distribution", "State", gives="list")
    natural_gradient = _parted("natural_gradient", "State", "draws", gives="Site")
    score_natural_gradient = _parted("score_natural_gradient", "State", "draws", gives="Site")
    regressed_natural_gradient = _parted("regressed_natural_gradient", "State", "draws", gives="Site")
    log_ratio_gradient = _parted("log_ratio_gradient", "State", "State", "theta", gives="theta")
    kl_gradient = _parted("kl_gradient", "State", "State", gives="Site")
    retract = _parted("retract", "State", "Site", "Site", gives="State")
    extrapolate = _parted("extrapolate", "State", "State", "number", gives="State")
    fisher_vector_product = _parted("fisher_vector_product", "Nat", "Nat", gives="Nat")
    fisher_solve = _parted("fisher_solve", "Nat", "Nat", gives="Nat")
    in_domain = _parted("in_domain", "State", gives="all")
    # Sums over all weights:
    log_partition = _parted("log_partition", "Nat", gives="sum")
    log_base_measure = _parted("log_base_measure", "theta", gives="sum")
    expected_log_base_measure = _parted("expected_log_base_measure", "State", gives="sum")
    entropy = _parted("entropy", "State", gives="sum")
    kl = _parted("kl", "State", "State", gives="sum")
    log_prob = _parted("log_prob", "State", "theta", gives="sum")
    log_ratio = _parted("log_ratio", "State", "State", "theta", gives="sum")

    def _take(self, kind: str, value: Any) -> list[Any]:
        """An argument of this kind, as the parts have it."""
        if kind in ("theta", "number"):
            return self._cut(value)
        if kind == "noise":
            return self._noises(value)
        if kind == "draws":
            first, second = value.pairs or (None, None)
            each = map(self._cut, (value.theta, value.grad, value.hessian, first, second))
            pieces = zip(self._noises(value.noise), *each, strict=True)
            return [Draws(e, t, value.loss, g, h, None if a is None else (a, b)) for e, t, g, h, a, b in pieces]
        return self._values(kind, value)

    def _give(self, kind: str, values: list[Any]) -> Any:
        """The parts' results of this kind, as one."""
        if kind in ("Nat", "Mean", "State", "Site"):
            return self._join(kind, values)
        whole = {
            "theta": lambda: torch.cat(values, -1),
            "noise": lambda: self._padded(values),
            "sum": lambda: torch.stack([value.sum(-1) for value in values]).sum(0),
            "all": lambda: torch.stack(values).all(),
            "list": lambda: values,
        }
        return whole[kind]()

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

    def distribution(self, state: Any) -> Any:
        """The parts' distributions, side by side."""
        from .product_distribution import ProductDistribution

        return ProductDistribution(self, state, self.distributions(state))


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
