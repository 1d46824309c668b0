"""The loss of a batch at the weights that the parameters hold, and what its evaluations in a step leave behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from expfam_poco.closures.rows import Rows
from expfam_poco.integrations.pyro.params import Params
from expfam_poco.integrations.pyro.reading import Model, Reader
from expfam_poco.integrations.pyro.sites import Kept, Part
from expfam_poco.integrations.pyro.slopes import Slopes


class Losses:
    """ℓ = −log p(x, θ) + log h of batches (see `sites`), as closures; with the evaluations of the present step.

    Before a step the engine looks for modules with buffers in all that a closure holds. It has to find the model, but
    nothing in here, which changes all the time: hence slots, into which it does not look.

    Args:
        reader: of the model.
        kept: its latent sites.
        parts: of the posterior, of which `negative_elbo` takes the density.
        params: the model's `pyro.param`s, whose gradients are taken at each evaluation.
        slopes: of local latents on the others.
    """

    __slots__ = (
        "__weakref__",
        "_in_model",
        "_kept",
        "_parts",
        "_seen",
        "params",
        "reader",
        "rows",
        "slopes",
        "streamed",
    )

    def __init__(
        self, reader: Reader, kept: Sequence[Kept], parts: Sequence[Part], params: Params, slopes: Slopes
    ) -> None:
        self.reader, self.params, self.slopes = reader, params, slopes
        self.streamed = False
        self.rows: Mapping[str, Tensor] = {}
        self._in_model = False
        self._kept, self._parts = list(kept), list(parts)
        self._seen: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def begin(self) -> None:
        """Forget earlier evaluations."""
        self._seen, self._in_model = [], False
        self.params.begin()

    def of(self, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Tensor]:
        """ℓ of a batch, as a function of nothing; all its evaluations see one subsample of every plate."""
        self.reader.next_batch()
        closure = lambda: self.at_weights(model, args, kwargs)  # noqa: E731
        local = [site for site in self._kept if site.latent.plate is not None]
        if not local:
            return closure
        self.rows = self.reader.look(model, args, kwargs)
        return Rows(closure, {site.name: self.rows[str(site.latent.plate)] for site in local})

    def share(self, plate: str | None) -> float:
        """The part of a plate's rows that the batch has."""
        counts = [site.count(self.rows) for site in self._kept if site.latent.plate == plate]
        return 1.0 / counts[0]

    def at_weights(self, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """ℓ of a batch at the weights that the parameters hold."""
        self._in_model = True
        weights = [site.weight for site in self._kept]
        used = {site.name: site.of_rows(site.weight, self.rows) for site in self._kept}
        log_joint, factors = self._densities(used, model, args, kwargs)
        self.params.measure(-log_joint, self.reader.params)
        total = log_joint + factors
        self._seen.append((log_joint.detach(), -total.detach(), [weight.detach().clone() for weight in weights]))
        self._in_model = False
        return -total

    def at_leaves(self, used: Mapping[str, Tensor], model: Model, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """ℓ of a batch at other weights, of local sites its rows', which is no part of a step."""
        log_joint, factors = self._densities(used, model, args, kwargs)
        return -(log_joint + factors)

    def _densities(
        self, used: Mapping[str, Tensor], model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        """log p, and log |det ∂t/∂u| − log h of all sites, at weights of which local sites have the batch's rows."""
        moved = self.slopes.moved(used, self.rows)
        laid = {site.name: site.laid(moved[site.name]) for site in self._kept}
        values = {site.name: site.value(laid[site.name]) for site in self._kept}
        log_joint = self.reader.log_joint(model, values, args, kwargs, prior=not self.streamed)
        factors: Tensor | float = 0.0
        for site in self._kept if not self.streamed else ():
            factor = site.log_density_factor(laid[site.name], values[site.name])
            factors = factors if factor is None else factors + site.count(self.rows) * factor
        return log_joint, factors

    @property
    def is_models_fault(self) -> bool:
        """Whether an error comes from the model: from inside an evaluation, or before the first had ended."""
        return self._in_model or not self._seen

    def mean(self) -> float:
        """ℓ, the mean over the evaluations so far."""
        return sum(float(loss) for _, loss, _ in self._seen) / len(self._seen)

    def negative_elbo(self, states: Mapping[str, Any], priors: Mapping[str, Any], draws: int) -> float:
        """The mean of −log p + log q over the evaluations at q; − log p₀ with it where p₀ is a posterior.

        Args:
            states: of q.
            priors: of p₀, by the same names; empty where it is the base measure.
            draws: how many evaluations there were at q; of each pair, where a step is corrected, the first counts.
        """
        seen = self._seen[:: max(1, len(self._seen) // draws)][:draws]
        total = 0.0
        for log_joint, _, weights in seen:
            named = {site.name: weight for site, weight in zip(self._kept, weights, strict=True)}
            value = -float(log_joint)
            for part in self._parts:
                state = states[part.name]
                theta = part.gather(named).to(state[0].dtype)
                value += self._total(part, part.family.log_prob(state, theta))
                if self.streamed:
                    value -= self._total(part, part.family.log_prob(priors[part.name], theta))
            total += value / len(seen)
        return total

    def _total(self, part: Part, log_density: Tensor) -> float:
        """The sum over a part's weights; of a local one, over the batch's rows, each for as many as it stands for."""
        site = part.sites[0]
        if site.latent.plate is None:
            return float(log_density.sum())
        return site.count(self.rows) * float(log_density[self.rows[site.latent.plate]].sum())
