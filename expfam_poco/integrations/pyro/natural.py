"""`NaturalVI`: the posterior of a Pyro model by the Bayesian learning rule, stepped as Pyro's `SVI` is.

It holds no mathematics of its own: sites become parameters (`sites`), the trace's log joint their loss (`reading`), and
a `PosteriorCorrected` with ess = 1 and the prior p₀ ∝ h steps them (`rates` says how fast).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from expfam_poco.arguments import function, number, whole
from expfam_poco.errors import NonFiniteError
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.integrations.pyro.guide import NaturalGuide
from expfam_poco.integrations.pyro.params import Params
from expfam_poco.integrations.pyro.rates import Rates
from expfam_poco.integrations.pyro.reading import Model, Reader, first_trace, latents_of
from expfam_poco.integrations.pyro.sites import JOINT, Kept, Part, groups_of, keep, parts_of, values_of
from expfam_poco.optim.optimizer import PosteriorCorrected

LARGEST_HESSIAN = 1000  # weights of which the Hessian's diagonal is computed entry by entry


@dataclass(frozen=True)
class _Made:
    """What is made of the first trace."""

    reader: Reader
    kept: list[Kept]
    parts: list[Part]
    optimizer: PosteriorCorrected
    guide: NaturalGuide


class NaturalVI:
    """Variational inference of a Pyro model by natural gradients; nobody chooses a rate, a prior or a data size.

        q ← the family's member that lowers −ELBO = E_q[log q(θ) − log p(x, θ)],
        λ ← λ − η (λ + ∇_μ E_q[ℓ]),     ℓ = −log p(x, θ) + log h(θ)

    Supports, plates, subsample scales and the prior come from the model's trace at the first step.

    Args:
        model: a Pyro model; all its latent sites are continuous.
        family: of the latents: an `ExponentialFamily` or its registered name for all of them, or a mapping from
            patterns of site names to families. A family of real weights keeps a site in unconstrained space, one with
            the site's support ("gamma", "beta", "dirichlet") in its own; a joint one is over all sites that have it.
        lr: a rate η in (0, 1] for all steps; None: Newton steps at first, then averages (see `Rates`).
        particles: draws of q in a step.
        newton: the most Newton steps at the start; 0 for none.
        curvature: how ∇²ℓ is measured, as in `PosteriorCorrected`; None: exactly, where it is small enough.
        alpha: α of posterior correction, after `refresh`; 0, the default: none.
        noise: as in `PosteriorCorrected`; pairs and repeated evaluations see one subsample of a plate.
        param_optimizer: trains the model's `pyro.param`s: one of `pyro.optim`, or a function from a list of parameters
            to a torch optimizer.
        init: where sites begin, of `pyro.infer.autoguide.initialization`.
        seed: of the draws; None takes one from torch's generator.
        **choices: passed to `PosteriorCorrected`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from expfam_poco.integrations.pyro import NaturalVI
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> vi = NaturalVI(model, seed=0)
        >>> for step in range(3):
        ...     loss = vi.step(torch.tensor([1.0, 2.0, 0.5]))
        >>> vi.guide.get_posterior().mean                    # of precision 1 + 3
        tensor([0.8750])
    """

    def __init__(
        self,
        model: Model,
        family: str | ExponentialFamily | Mapping[str, Any] = JOINT,
        *,
        lr: float | None = None,
        particles: int = 1,
        newton: int = 10,
        curvature: Any = None,
        alpha: Any = 0.0,
        noise: str = "shared",
        param_optimizer: Any = None,
        init: Any = init_to_median,
        seed: int | None = None,
        **choices: Any,
    ) -> None:
        if model is None or not callable(model):
            raise TypeError(f"model={model!r}: give a Pyro model, a function or a PyroModule.")
        function("init", init, "give a function of pyro.infer.autoguide.initialization")
        whole("particles", particles, 1)
        whole("newton", newton, 0)
        for name, why in {
            "ess": "the model's log joint is a sum",
            "prior": "the model has it",
            "weight_decay": "",
        }.items():
            if name in choices:
                raise TypeError(
                    f"{name}={choices[name]!r}: NaturalVI reads it from the model{why and f' ({why})'}; leave it out."
                )
        if lr is not None:
            number("lr", lr, lambda v: 0.0 < v <= 1.0, "give a rate in (0, 1], or None")
        self.model, self.family = model, family
        self._curvature, self._init = curvature, init
        self._choices = {
            "retraction": "plain",
            **choices,
            "alpha": alpha,
            "noise": noise,
            "mc_samples": particles,
            "seed": seed,
        }
        self._rates = Rates(lr, newton if lr is None else 0)
        self._params = Params(param_optimizer)
        self._streamed = False
        self._seen: list[tuple[Tensor, list[Tensor]]] = []
        self._inside = False
        self._pending: Mapping[str, Any] | None = None
        self._ready: _Made | None = None

    # ---- what it is made of ------------------------------------------------------------------------------

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Read the model's sites from a trace with these arguments, as the first step does; once."""
        if self._ready is not None:
            return
        trace = first_trace(self.model, self._init, args, kwargs)
        latents = latents_of(trace)
        kept = keep(latents, self.family)
        groups = [{**group, "curvature": self._curvature_of(group)} for group in groups_of(kept)]
        optimizer = PosteriorCorrected(groups, groups[0]["family"], self._rates.rate(), 1.0, **self._choices)
        parts = parts_of(kept)
        guide = NaturalGuide(parts, optimizer.posterior_states)
        self._ready = _Made(Reader(self.model, trace, latents), kept, parts, optimizer, guide)
        if not _can_start(optimizer):
            self._rates.newton = 0
        if self._pending is not None:
            self._take(self._pending)

    def _curvature_of(self, group: Mapping[str, Any]) -> Any:
        if self._curvature is not None:
            return self._curvature
        family, size = group["family"], sum(weight.numel() for _, weight in group["params"])
        if family.curvature in ("dense", "diagonal"):
            return "exact" if size <= LARGEST_HESSIAN or family.curvature == "dense" else "hutchinson"
        return "hutchinson" if family.curvature == "pairs" else None

    def _made(self) -> _Made:
        if self._ready is None:
            raise RuntimeError(
                "vi.guide: the model's sites are not known yet; call vi.step(batch) or vi.setup(batch) first."
            )
        return self._ready

    @property
    def guide(self) -> NaturalGuide:
        """The posterior, as a guide that follows it."""
        return self._made().guide

    @property
    def optimizer(self) -> PosteriorCorrected:
        """The optimizer of the latents, with `posterior_states()`, `diagnostics()` and all else."""
        return self._made().optimizer

    # ---- steps -------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step with a batch: the model's arguments, as for `SVI.step`.

        Returns:
            an estimate of −ELBO at the posterior before the step, the mean of −log p(x, θ) + log q(θ) over its draws
            (at its mean, in a Newton step): without noise where q is the posterior.
        """
        self.setup(*args, **kwargs)
        optimizer = self.optimizer
        self._made().reader.next_batch()
        closure = self._closure(args, kwargs)
        before = optimizer.posterior_states()
        starting = self._rates.is_starting
        fall = self._newton(closure) if starting else None
        if not starting:
            self._stepped(closure)
        draws = 1 if starting else optimizer.mc_samples * (2 if optimizer.noise == "antithetic" else 1)
        loss = self._negative_elbo(before, draws)
        self._params.step(draws)
        self._rates.stepped(fall)
        return loss

    def refresh(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate a mega-batch, much data or all of it, with which steps are corrected from now on.

        Raises:
            ValueError: with α = 0, for which no step would be.
        """
        self.setup(*args, **kwargs)
        optimizer = self.optimizer
        if all(group["alpha"] == 0.0 for group in optimizer.param_groups):
            raise ValueError("alpha=0.0: no step would be corrected; give NaturalVI(…, alpha=1.0).")
        self._made().reader.next_batch()
        return float(optimizer.refresh([self._closure(args, kwargs)]))

    def next_data(self) -> None:
        """Make the posterior the prior of the data that follow, in place of the model's own prior of its latents.

        From now on the latent sites' own densities are not counted; what the model observes is. Plates may have other
        sizes, unless latent sites are in them.
        """
        made = self._made()
        made.optimizer.next_task()
        made.reader.forget_sizes()
        self._streamed = True
        self._rates.restart()

    def _closure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Tensor]:
        """ℓ of this batch at the weights that the parameters hold."""
        reader, kept = self._made().reader, self._made().kept

        def closure() -> Tensor:
            self._inside = True
            weights = [site.weight for site in kept]
            values = values_of(kept, weights)
            total = reader.log_joint(values, args, kwargs, prior=not self._streamed)
            self._seen.append((total.detach(), [weight.detach().clone() for weight in weights]))
            self._params.measure(-total, reader.params)
            if not self._streamed:
                for site in kept:
                    factor = site.log_density_factor(site.weight, values[site.name])
                    total = total if factor is None else total + factor
            self._inside = False
            return -total

        return closure

    def _stepped(self, closure: Callable[[], Tensor]) -> float:
        """A step; with half the rate where it would leave the family's domain. The loss before it."""
        while True:
            self._begin()
            try:
                return float(self.optimizer.step(closure))
            except (ValueError, NonFiniteError):
                if self._inside or not self._seen or not self._rates.taken_back():
                    raise

    def _newton(self, closure: Callable[[], Tensor]) -> float:
        """A step without noise that lowers the loss of its batch at the posterior's point; by how much."""
        kept, optimizer = self._made().kept, self.optimizer
        weights = [site.weight.detach().clone() for site in kept]
        saved, noise = optimizer.state_dict(), optimizer.noise
        optimizer.noise = "zero"
        try:
            while True:
                before = self._stepped(closure)
                seen = list(self._seen)
                with torch.no_grad():
                    fall = before - float(closure())
                self._seen = seen
                if fall > -self._rates.enough or not self._rates.taken_back():
                    return fall
                with torch.no_grad():
                    for site, weight in zip(kept, weights, strict=True):
                        site.weight.copy_(weight)
                optimizer.noise = noise
                optimizer.load_state_dict(saved)
                optimizer.noise = "zero"
        finally:
            optimizer.noise = noise

    def _begin(self) -> None:
        """Make ready for evaluations of a step at the present rate."""
        self._seen, self._inside = [], False
        self._params.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rates.rate()

    def _negative_elbo(self, before: Mapping[str, Any], draws: int) -> float:
        """The mean of −log p + log q over the evaluations at q; −log p₀ with it where p₀ is a posterior."""
        kept, parts, optimizer = self._made().kept, self._made().parts, self.optimizer
        total, seen = 0.0, self._seen[:: max(1, len(self._seen) // draws)]
        priors = {name: state for group in optimizer.param_groups for name, state in (group["prior"] or {}).items()}
        for log_joint, weights in seen:
            named = {site.name: weight for site, weight in zip(kept, weights, strict=True)}
            value = -float(log_joint)
            for part in parts:
                theta = part.gather(named).to(before[part.name][0].dtype)
                value += float(part.family.log_prob(before[part.name], theta).sum())
                if self._streamed:
                    value -= float(part.family.log_prob(priors[part.name], theta).sum())
            total += value / len(seen)
        return total

    # ---- saving ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, beside the model's own parameters (Pyro's parameter store, or the module's)."""
        reader, kept, optimizer = self._made().reader, self._made().kept, self.optimizer
        return {
            "optimizer": optimizer.state_dict(),
            "weights": {site.name: site.weight.detach().clone() for site in kept},
            "rates": self._rates.state_dict(),
            "params": self._params.state_dict(),
            "streamed": self._streamed,
            "sizes": dict(reader.sizes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a `NaturalVI` of the same model; before `setup`, at the first step.

        Raises:
            ValueError: for the state of another model's sites.
        """
        if self._ready is None:
            self._pending = state
        else:
            self._take(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        reader, kept, optimizer = self._made().reader, self._made().kept, self.optimizer
        shapes = {site.name: tuple(site.weight.shape) for site in kept}
        saved = {name: tuple(value.shape) for name, value in state["weights"].items()}
        if shapes != saved:
            raise ValueError(
                f"state_dict['weights']: it has sites {saved}, the model {shapes}; load that model's state."
            )
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for site in kept:
                site.weight.copy_(state["weights"][site.name])
        self._rates.load_state_dict(state["rates"])
        self._params.load_state_dict(state["params"])
        self._streamed, reader.sizes = bool(state["streamed"]), dict(state["sizes"])
        self._pending = None


def _can_start(optimizer: PosteriorCorrected) -> bool:
    """Whether a step without noise is a Newton step for all weights."""
    groups = optimizer.param_groups
    return all(g["family"].curvature != "none" and not g["curvature"].needs_noise for g in groups)
