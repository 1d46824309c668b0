"""How local latents follow the others: a posterior q(θ) Π q(u_i | θ) whose conditional means are linear in θ.

A posterior of independent parts is too narrow where local latents u_i are coupled to the others, θ, and natural
gradients then find its optimum by turns: with u_i ~ N(θ, τ²) in a few 1/τ² steps. So the rule is given

    z_i = u_i − C_i θ + o_i,        q = q(θ) Π_i q(z_i),

in place of u_i: a shear, whose Jacobian is 1. A Gaussian joint density with the precisions D_i of u_i and B_i between
u_i and θ is met exactly by C_i = −D_i⁻¹ B_i, and its optimum then found in one step. There R_i = ∂²ℓ/∂z_i ∂θ
vanishes, so at the k-th look at a row, at the posterior's means, with the larger of q's precision and ∂²ℓ/∂z_i² for D_i
(the first may not have arrived, the second need not be positive),

    C_i ← C_i + w ΔC_i,   ΔC_i = −D_i⁻¹ R_i,   o_i ← o_i + w ΔC_i E[θ],   w = 2/(k + 1),

which leaves E[u_i] where it is. (Structured posteriors: Hoffman and Blei, Structured stochastic variational inference,
AISTATS 2015; regressions for the means: Salimans and Knowles, Bayesian Analysis 8, 2013, section 7.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.integrations.pyro.sites import Kept, Part

MOST = 64  # entries of θ; more would take as many products, and numbers for every local latent
OFTEN = 16  # a row is looked at after 1, 2, 4, 8, 16 visits and then after so many more

Weights = dict[str, Tensor]
# ℓ at leaves: weights of sites by name, of local ones the batch's rows.
Evaluate = Callable[[Weights], Tensor]


class Slope(NamedTuple):
    """Of one local site: C (rows × … × entries of θ), o (rows × …), and how often rows were visited and looked at."""

    coefficients: Tensor
    offset: Tensor
    visits: Tensor
    looks: Tensor


class Slopes:
    """The slopes of all local latents that are kept as real numbers, on the latents outside of subsampled plates.

    Args:
        kept: the model's latent sites.
        parts: of the posterior.

    Attributes:
        values: a `Slope` for each of these local sites; replaced as a whole, never written into.
        frozen: whether they stay as they are: for a posterior that has become a prior, or a snapshot.
    """

    def __init__(self, kept: Sequence[Kept], parts: Sequence[Part]) -> None:
        self._outer = [site for site in kept if site.latent.plate is None and site.transform is not None]
        self._parts = {site.name: part for part in parts for site in part.sites}
        count = sum(site.weight.numel() for site in self._outer)
        local = [site for site in kept if site.latent.plate is not None and _is_normal(site)]
        self._local = {site.name: site for site in local} if 0 < count <= MOST else {}
        self.frozen = False
        self.values: dict[str, Slope] = {}
        for name, site in self._local.items():
            zeros = torch.zeros_like(site.weight, requires_grad=False)
            counts = torch.zeros(len(zeros), dtype=torch.long, device=zeros.device)
            self.values[name] = Slope(zeros.new_zeros(*zeros.shape, count), zeros, counts, counts)

    def moved(self, weights: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None) -> Weights:
        """u from z, of all sites.

        Args:
            weights: z, after any axes of draws.
            rows: of plates, where local weights are of these only.
        """
        found = dict(weights)
        if not self.values:
            return found
        draws = weights[self._outer[0].name].ndim - self._outer[0].weight.ndim
        outer = [weights[site.name] for site in self._outer]
        theta = torch.cat([weight.reshape(*weight.shape[:draws], -1) for weight in outer], -1)
        for name, slope in self.values.items():
            coefficients, offset = self._of(name, slope, rows)
            shift = theta.to(coefficients) @ coefficients.flatten(0, -2).T
            found[name] = weights[name] + shift.reshape(shift.shape[:-1] + offset.shape) - offset
        return found

    def freeze(self) -> None:
        """Leave the slopes as they are from now on.

        Warns:
            UserWarning: where rows have not been looked at, and so stay independent of θ.
        """
        for name, slope in () if self.frozen else self.values.items():
            fresh = int((slope.looks == 0).sum())
            if fresh:
                warnings.warn(
                    f"site {name!r}: {fresh} of {len(slope.looks)} rows have not been stepped yet and stay independent "
                    "of the other sites from now on, whose posterior is too narrow then; step through all rows before "
                    "refresh() or next_data().",
                    UserWarning,
                    stacklevel=3,
                )
        self.frozen = True

    def follow(self, evaluate: Evaluate, states: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """Count a batch's visit of its rows, and look at them where it is time.

        Args:
            evaluate: the batch's loss.
            states: of the posterior's parts.
            rows: of the batch.
        """
        if self.frozen or not self.values:
            return
        due, values = False, dict(self.values)
        for name, slope in values.items():
            own = rows[str(self._local[name].latent.plate)]
            visits = slope.visits.index_add(0, own, torch.ones_like(own))
            values[name] = slope._replace(visits=visits)
            seen = visits[own]
            due = due or bool((((seen & (seen - 1)) == 0) | (seen % OFTEN == 0)).any())
        self.values = values
        if due:
            self._look(evaluate, states, rows)

    def _look(self, evaluate: Evaluate, states: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        outer = {site.name: site.weight.detach().clone().requires_grad_() for site in self._outer}
        local = {
            name: site.weight.detach()[rows[str(site.latent.plate)]].clone().requires_grad_()
            for name, site in self._local.items()
        }
        leaves = [*outer.values(), *local.values()]
        with torch.enable_grad():
            loss = evaluate({**outer, **local})
            grads: Sequence[Tensor | None] = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            firsts = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, leaves, strict=True)]
            gradient = torch.cat([g.reshape(-1) for g in firsts[: len(outer)]])
            total = torch.stack([g.sum() for g in firsts[len(outer) :]]).sum()
        if not gradient.requires_grad or not total.requires_grad:
            return
        each = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
        ends = list(local.values())
        crossed: Sequence[Tensor | None] = torch.autograd.grad(
            gradient, ends, each, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        curved: Sequence[Tensor | None] = torch.autograd.grad(
            total, ends, allow_unused=True
        )  # the diagonal, as far as rows are independent
        mean = torch.cat([weight.detach().reshape(-1) for weight in outer.values()])
        for (name, site), cross, curvature in zip(self._local.items(), crossed, curved, strict=True):
            if cross is None or curvature is None:
                continue
            own = rows[str(site.latent.plate)]
            precision = torch.maximum(
                1.0 / self._parts[name].family.variance(states[name])[own], curvature / site.count(rows)
            )
            self._correct(site, -cross.movedim(0, -1) / site.count(rows) / precision.unsqueeze(-1), mean.to(cross), own)

    def _correct(self, site: Kept, change: Tensor, mean: Tensor, own: Tensor) -> None:
        """C and o of a batch's rows, by ΔC."""
        slope = self.values[site.name]
        if not bool(torch.isfinite(change).all()):
            return
        looks = slope.looks.index_add(0, own, torch.ones_like(own))
        weight = (2.0 / (looks[own] + 1.0)).to(change.dtype)
        change = change * weight.reshape(-1, *(1,) * (change.ndim - 1))
        coefficients, offset = slope.coefficients.clone(), slope.offset.clone()
        coefficients[own] += change
        offset[own] += change @ mean
        self.values = {**self.values, site.name: Slope(coefficients, offset, slope.visits, looks)}

    def marginal(self, name: str, states: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of every weight u of a local site; None for a site that has no slope.

        E[u_i] = E[z_i] + C_i E[θ] − o_i,        var u_i = var z_i + C_i cov(θ) C_iᵀ
        """
        if name not in self.values:
            return None
        own, slope = self._parts[name].family, self.values[name]
        mean, variance = own.point(states[name]) - slope.offset, own.variance(states[name])
        columns = slope.coefficients.split([site.weight.numel() for site in self._outer], -1)
        by_site = {site.name: column for site, column in zip(self._outer, columns, strict=True)}
        for part in {self._parts[site.name].name: self._parts[site.name] for site in self._outer}.values():
            coefficients = torch.cat([by_site[site.name] for site in part.sites], -1)  # as the part has them
            state = states[part.name]
            mean = mean + coefficients @ part.family.point(state).reshape(-1).to(mean.dtype)
            variance = variance + _spread(part, state, coefficients)
        return mean, variance.sqrt()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors."""
        return {"values": {name: slope._asdict() for name, slope in self.values.items()}, "frozen": self.frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.values = {name: Slope(**slope) for name, slope in state["values"].items()}
        self.frozen = bool(state["frozen"])

    def _of(self, name: str, slope: Slope, rows: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        if rows is None:
            return slope.coefficients, slope.offset
        own = rows[str(self._local[name].latent.plate)]
        return slope.coefficients[own], slope.offset[own]


def _is_normal(site: Kept) -> bool:
    """Whether the weights of a site are real numbers, each with a normal distribution of its own."""
    return site.transform is not None and site.family.curvature == "diagonal" and site.family.noise_kind == "normal"


def _spread(part: Part, state: Any, coefficients: Tensor) -> Tensor:
    """C cov C ᵀ of every weight, for the entries of θ that one part of the posterior has."""
    q = part.family.distribution(state)
    while isinstance(q, torch.distributions.Independent):
        q = q.base_dist
    if isinstance(q, torch.distributions.MultivariateNormal):
        return ((coefficients @ q.scale_tril.to(coefficients.dtype)) ** 2).sum(-1)
    spread = (coefficients**2) @ q.variance.reshape(-1).to(coefficients.dtype)
    if isinstance(q, torch.distributions.LowRankMultivariateNormal):
        factor = q.cov_factor.to(coefficients.dtype)
        spread = ((coefficients @ factor) ** 2).sum(-1) + (coefficients**2) @ q.cov_diag.to(coefficients.dtype)
    return spread
