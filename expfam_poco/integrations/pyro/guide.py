"""The posterior as a Pyro guide: sampled site by site, with medians and quantiles, as an `AutoGuide` is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from expfam_poco.arguments import listed, number, whole
from expfam_poco.family.noise import NoiseKey
from expfam_poco.integrations.pyro.sites import Kept, Part
from expfam_poco.integrations.pyro.slopes import Slopes

DRAWS = 4096  # from which quantiles are taken where no formula is known


class NaturalGuide:
    """The posterior of a `NaturalVI`, to be called where Pyro calls a guide: `Predictive(model, guide=vi.guide)`.

    It follows the posterior as it is stepped. In a trace each part of the posterior is one auxiliary site, "_q_…",
    and every latent site a `Delta` with the density of its transform, so that the trace's log density is log q(θ).

    Args:
        parts: of the posterior.
        states: gives the posterior's present states, by the parts' names.
        sizes: of the model's plates, when it is called with the guide's arguments; {} where it cannot be.
        slopes: of local latents on the others.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from expfam_poco.integrations.pyro import NaturalVI
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> vi = NaturalVI(model, seed=0)
        >>> y = torch.tensor([3.0, 4.0, 2.0])
        >>> for step in range(20):
        ...     loss = vi.step(y)
        >>> vi.guide.quantiles([0.05, 0.5, 0.95])["rate"].shape
        torch.Size([3])
        >>> pyro.infer.Predictive(model, guide=vi.guide, num_samples=7)(y)["y"].shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        parts: Sequence[Part],
        states: Callable[[], Mapping[str, Any]],
        sizes: Callable[[tuple[Any, ...], Mapping[str, Any]], Mapping[str, int]],
        slopes: Slopes,
    ) -> None:
        self._parts, self._states, self._sizes, self._slopes = list(parts), states, sizes, slopes

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site, inside plates that have as many rows as the model's with these arguments."""
        found: dict[str, Tensor] = {}
        plates: dict[str, Any] = {}
        local = any(site.latent.plate is not None for part in self._parts for site in part.sites)
        sizes = self._sizes(args, kwargs) if local else {}
        batch, weights = torch.Size(), dict[str, Tensor]()
        for part, q in zip(self._parts, self._distributions(), strict=True):
            drawn = pyro.sample(f"_q_{part.name}", q, infer={"is_auxiliary": True})
            batch = drawn.shape[: drawn.ndim - len(q.event_shape)]
            rows = part.split(drawn.reshape(batch + part.shape))
            weights.update({site.name: row for site, row in zip(part.sites, rows, strict=True)})
        moved = self._slopes.moved(weights)
        for part in self._parts:
            for site in part.sites:
                found[site.name] = _sample_site(site, moved[site.name], batch, plates, sizes)
        return found

    def sample(self, draws: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """Independent draws of every latent site, stacked along a first axis.

        Args:
            draws: how many.
            seed: fixes them; None takes one from torch's generator.
        """
        whole("draws", draws, 1)
        seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        states, weights = self._states(), dict[str, Tensor]()
        with torch.no_grad():
            for position, part in enumerate(self._parts):
                state = states[part.name]
                key = NoiseKey(seed, parameter=position)
                noise = part.family.noise(part.shape, draws, key, dtype=state[0].dtype, device=state[0].device)
                rows = part.split(part.family.sample(state, noise))
                weights.update({site.name: row for site, row in zip(part.sites, rows, strict=True)})
            moved = self._slopes.moved(weights)
            return {s.name: s.value(s.laid(moved[s.name])) for part in self._parts for s in part.sites}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every entry of every latent site."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of every entry of every latent site, stacked along a first axis.

        Exact where a weight's marginal is normal or the monotone image of one number, and the site's transform goes
        entry by entry; else those of some 4,000 draws.

        Args:
            quantiles: numbers between 0 and 1.
            args: the model's, not looked at; nor its keywords.
        """
        remedy = "give a list of numbers between 0 and 1"
        given = listed("quantiles", quantiles, remedy)
        levels = [number("quantiles", level, lambda v: 0.0 < v < 1.0, remedy) for level in given]
        states, found = self._states(), dict[str, Tensor]()
        drawn: dict[str, Tensor] = {}
        with torch.no_grad():
            for part in self._parts:
                rows = self._marginal_quantiles(part, states, levels)
                for position, site in enumerate(part.sites):
                    if rows is not None and (site.transform is None or site.transform.domain.event_dim == 0):
                        found[site.name] = site.value(site.laid(part.split(rows)[position]))
                        continue
                    drawn = drawn or self.sample(DRAWS, seed=0)
                    values = drawn[site.name]
                    found[site.name] = torch.quantile(values, values.new_tensor(levels), dim=0)
        return found

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """q in the families' spaces: a Pyro distribution, or a dictionary of them where the posterior has parts.

        That of local latents which follow the others (see `slopes`) is their marginal one.
        """
        states = self._states()
        found = {part.name: self._marginal(part, states) for part in self._parts}
        return next(iter(found.values())) if len(found) == 1 else found

    def _marginal(self, part: Part, states: Mapping[str, Any]) -> Any:
        known = self._slopes.marginal(part.name, states)
        if known is None:
            return part.family.distribution(states[part.name])
        return dist.Normal(*known).to_event(len(part.shape))

    def _marginal_quantiles(self, part: Part, states: Mapping[str, Any], levels: Sequence[float]) -> Tensor | None:
        known = self._slopes.marginal(part.name, states)
        if known is None:
            return _marginal_quantiles(part, states[part.name], levels)
        mean, deviation = known
        return mean + deviation * torch.special.ndtri(mean.new_tensor(levels)).reshape(-1, *(1,) * mean.ndim)

    def _distributions(self) -> list[Any]:
        states = self._states()
        return [part.family.distribution(states[part.name]) for part in self._parts]


def _marginal_quantiles(part: Part, state: Any, levels: Sequence[float]) -> Tensor | None:
    """Quantiles of every weight, levels × shape, where a formula is known."""
    family = part.family
    at = state[0].new_tensor(levels).reshape(-1, *(1,) * len(part.shape))
    if family.joint or (family.event_dim and family.noise_kind == "normal"):
        q = family.distribution(state)
        while isinstance(q, torch.distributions.Independent):
            q = q.base_dist
        if not isinstance(q, torch.distributions.MultivariateNormal):
            return None
        return q.mean + q.stddev * torch.special.ndtri(at)
    if family.event_dim or family.noise_dims or family.noise_kind == "logistic":
        return None
    noise = torch.special.ndtri(at) if family.noise_kind == "normal" else at
    return family.sample(state, noise.expand(len(levels), *part.shape))


def _sample_site(
    site: Kept, weight: Tensor, batch: torch.Size, plates: dict[str, Any], sizes: Mapping[str, int]
) -> Tensor:
    """The site in its plates, from the weight of `batch` draws (those of plates around the guide)."""
    weight, event = site.laid(weight), site.latent.event_dim
    value = site.value(weight)
    density = _inside(site.site_log_density(weight, value), batch, 0)
    value = _inside(value, batch, event)
    with ExitStack() as stack:
        for name, frame in site.latent.frames.items():
            if name not in plates:
                size = frame.full_size or frame.size
                plates[name] = pyro.plate(name, size, subsample_size=sizes.get(name, size), dim=frame.dim)
            rows = stack.enter_context(plates[name])
            if len(rows) < value.shape[frame.dim - event]:
                value = value.index_select(frame.dim - event, rows)
                density = density.index_select(frame.dim, rows)
        drawn: Tensor = pyro.sample(site.name, dist.Delta(value, density, event_dim=event))
    return drawn


def _inside(value: Tensor, batch: torch.Size, event: int) -> Tensor:
    """Draws × a site's own axes, with the axes of draws left of those of the site's plates.

    Plates around a guide, as those of particles, leave an axis of length 1 for each plate within, the site's place.
    """
    plates = value.ndim - len(batch) - event
    return value.reshape(batch[: max(len(batch) - plates, 0)] + value.shape[len(batch) :])
