"""`NaturalVI`: the posterior of a Pyro model by the Bayesian learning rule, stepped as Pyro's `SVI` is.

It holds no mathematics of its own: sites become parameters (`sites`), the trace's log joint their loss (`reading`), and
a `PosteriorCorrected` with ess = 1 and the prior p₀ ∝ h steps them (`rates` says how fast).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from expfam_poco.arguments import function, number, shown, whole
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.integrations.pyro.auto import AUTO, JOINT, automatic, can_be_solved, draws_for
from expfam_poco.integrations.pyro.guide import NaturalGuide
from expfam_poco.integrations.pyro.losses import Losses
from expfam_poco.integrations.pyro.params import Params
from expfam_poco.integrations.pyro.rates import Rates
from expfam_poco.integrations.pyro.reading import Model, Reader, first_trace, latents_of, sizes_of
from expfam_poco.integrations.pyro.sites import Kept, Part, families_of, groups_of, keep, parts_of
from expfam_poco.integrations.pyro.slopes import Slopes
from expfam_poco.integrations.pyro.steps import Steps
from expfam_poco.optim.optimizer import PosteriorCorrected

WHOLE, SUBSAMPLED = 5.0, 2.0  # c of `Rates`, with all data in a step and with a part of them
LOCAL = 20.0  # with local latents, whose rows are seen seldom
LARGEST_HESSIAN = 1000  # weights of which the Hessian's diagonal is computed entry by entry


@dataclass(frozen=True)
class _Made:
    """What is made of the first trace."""

    kept: list[Kept]
    optimizer: PosteriorCorrected
    losses: Losses
    steps: Steps
    guide: NaturalGuide


class NaturalVI:
    """Variational inference of a Pyro model by natural gradients; nobody chooses a rate, a prior or a data size.

        q ← the family's member that lowers −ELBO = E_q[log q(θ) − log p(x, θ)],
        λ ← λ − η (λ + ∇_μ E_q[ℓ]),     ℓ = −log p(x, θ) + log h(θ)

    Supports, plates, subsample scales and the prior come from the model's trace at the first step.

    Args:
        model: a Pyro model; all its latent sites are continuous.
        family: of the latents: an `ExponentialFamily` or its registered name for all of them; a mapping from patterns
            of site names to families; or "auto": conjugate sites (see `auto`) have their own, all others a Gaussian.
            A family of real weights keeps a site in unconstrained space, one with the site's support ("gamma", "beta",
            "dirichlet") in its own; a joint one is over all sites that have it.
        lr: a rate η in (0, 1] for all steps; None: whole ones at first, then averages (see `Rates`).
        particles: draws of q in a step; None: one, or as many as a regression on the statistics takes.
        curvature: how ∇²ℓ is measured, as in `PosteriorCorrected`; None: exactly, where it is small enough.
        alpha: α of posterior correction, after `refresh`; 0, the default: none.
        noise: as in `PosteriorCorrected`; pairs and repeated evaluations see one subsample of a plate.
        param_optimizer: trains the model's `pyro.param`s: one of `pyro.optim`, or a function from a list of parameters
            to a torch optimizer.
        init: where sites begin, of `pyro.infer.autoguide.initialization`.
        seed: of the draws, and of where sites begin; None takes one from torch's generator, as Pyro's plates take their
            subsamples.
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
        particles: int | None = None,
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
        if particles is not None:
            whole("particles", particles, 1)
        for name in ("ess", "prior", "weight_decay", "hess_init"):
            if name in choices:
                raise TypeError(f"{name}={shown(choices[name])}: NaturalVI has it from the model; leave it out.")
        if lr is not None:
            number("lr", lr, lambda v: 0.0 < v <= 1.0, "give a rate in (0, 1], or None")
        self.model, self.family = model, family
        self._curvature, self._init = curvature, init
        seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        given = {"alpha": alpha, "noise": noise, "seed": seed}
        self._choices = {"retraction": "plain", "own_site": True, **choices, **given}
        self._lr, self._particles = lr, particles
        self._params = Params(param_optimizer)
        self._pending: Mapping[str, Any] | None = None
        self._ready: _Made | None = None

    # ---- what it is made of ------------------------------------------------------------------------------

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Read the model's sites from a trace with these arguments, as the first step does; once."""
        if self._ready is not None:
            return
        with torch.random.fork_rng():  # a resumed run sees the random numbers that an undisturbed one sees
            torch.manual_seed(self._choices["seed"])
            trace = first_trace(self.model, self._init, args, kwargs)
            latents = latents_of(trace)
            reader = Reader(trace, latents)

            def closure_of(kept: list[Kept]) -> Callable[[], Tensor]:
                return Losses(reader, kept, [], self._params, Slopes([], [])).of(self.model, args, kwargs)

            exact = False
            if isinstance(self.family, str) and self.family == AUTO:
                kept = keep(latents, automatic(latents, closure_of))
                # Then conjugate sites have no noise, whatever the others do.
                exact = self._lr is None and not reader.subsampled
            else:
                kept = keep(latents, families_of(latents, self.family))
        parts = parts_of(kept)
        optimizer = self._optimizer_of(kept, parts, exact=exact)
        slopes = Slopes(kept, parts)
        losses = Losses(reader, kept, parts, self._params, slopes)
        memory = SUBSAMPLED if reader.subsampled else WHOLE
        if any(site.latent.plate is not None for site in kept):
            memory = LOCAL
        rates = Rates(self._lr, memory)
        guide = NaturalGuide(parts, optimizer.posterior_states, functools.partial(sizes_of, self.model), slopes)
        self._ready = _Made(kept, optimizer, losses, Steps(optimizer, parts, losses, rates), guide)
        if self._pending is not None:
            self._take(self._pending)

    def _optimizer_of(self, kept: list[Kept], parts: list[Part], *, exact: bool) -> PosteriorCorrected:
        """The rule with ess = 1; families without a curvature are solved for by regression, where draws suffice.

        Those that "auto" has found to be `exact` are stepped at rate 1.
        """
        solved = [part for part in parts if part.family.curvature == "none" and can_be_solved(part)]
        draws = max([1, *map(draws_for, solved)]) if self._particles is None else self._particles
        by_hand = {part.family for part in solved if part.family.least_draws(part.shape) > draws}
        groups = groups_of(kept)
        for group in groups:
            group["curvature"] = self._curvature
            if self._curvature is None:
                group["curvature"] = _curvature_of(group, solved={part.family for part in solved} - by_hand)
            group["exact"] = exact and group["curvature"] == "regression"
        return PosteriorCorrected(groups, groups[0]["family"], 1.0, 1.0, mc_samples=draws, **self._choices)

    def _made(self) -> _Made:
        if self._ready is None:
            raise RuntimeError(
                "model: its sites are not known before the first step; call vi.step(batch) or vi.setup(batch) first."
            )
        return self._ready

    @property
    def guide(self) -> NaturalGuide:
        """The posterior, as a guide that follows it.

        Warns:
            UserWarning: once, where after many steps −ELBO still falls or steps keep being taken back.
        """
        made = self._made()
        made.steps.tell()
        return made.guide

    @property
    def optimizer(self) -> PosteriorCorrected:
        """The optimizer of the latents, with `posterior_states()`, `diagnostics()` and all else."""
        return self._made().optimizer

    # ---- steps -------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step with a batch: the model's arguments, as for `SVI.step`.

        Returns:
            an estimate of −ELBO at the posterior before the step, the mean of −log p(x, θ) + log q(θ) over its draws:
            without noise where q is the posterior.
        """
        self.setup(*args, **kwargs)
        made = self._made()
        losses = made.losses
        estimate = made.steps.step(losses.of(self.model, args, kwargs))
        if losses.slopes.values and made.steps.rates.factor == 1.0:  # not while steps are taken back
            evaluate = functools.partial(losses.at_leaves, model=self.model, args=args, kwargs=kwargs)
            losses.slopes.follow(evaluate, made.optimizer.posterior_states(), losses.rows)
        return estimate

    def refresh(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate a mega-batch, much data or all of it, with which steps are corrected from now on.

        Raises:
            ValueError: with α = 0, for which no step would be.
        """
        self.setup(*args, **kwargs)
        made = self._made()
        if all(group["alpha"] == 0.0 for group in made.optimizer.param_groups):
            raise ValueError("alpha=0.0: no step would be corrected; give NaturalVI(…, alpha=1.0).")
        loss = float(made.optimizer.refresh([made.losses.of(self.model, args, kwargs)]))
        made.losses.slopes.freeze()  # the snapshot's gradients are of the spaces that they make
        return loss

    def next_data(self) -> None:
        """Make the posterior the prior of the data that follow, in place of the model's own prior of its latents.

        From now on the latent sites' own densities are not counted; what the model observes is. Plates may have other
        sizes, unless latent sites are in them: those are taken for the same ones again.
        """
        made = self._made()
        made.optimizer.next_task()
        made.losses.slopes.freeze()  # the prior is independent in the spaces that they make
        made.losses.reader.forget_sizes()
        made.losses.streamed = True
        made.steps.restart()

    # ---- saving ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, beside the model's own parameters (Pyro's parameter store, or the module's)."""
        made = self._made()
        return {
            "optimizer": made.optimizer.state_dict(),
            "weights": {site.name: site.weight.detach().clone() for site in made.kept},
            "steps": made.steps.state_dict(),
            "slopes": made.losses.slopes.state_dict(),
            "params": made.losses.params.state_dict(),
            "streamed": made.losses.streamed,
            "sizes": dict(made.losses.reader.sizes),
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
        made = self._made()
        shapes = {site.name: tuple(site.weight.shape) for site in made.kept}
        saved = {name: tuple(value.shape) for name, value in state["weights"].items()}
        if shapes != saved:
            raise ValueError(f"state_dict['weights']: its sites are {saved}, the model's {shapes}; load that model's.")
        with torch.no_grad():
            for site in made.kept:
                site.weight.copy_(state["weights"][site.name])
        made.optimizer.load_state_dict(state["optimizer"])
        made.steps.load_state_dict(state["steps"])
        made.losses.slopes.load_state_dict(state["slopes"])
        made.losses.params.load_state_dict(state["params"])
        made.losses.streamed, made.losses.reader.sizes = bool(state["streamed"]), dict(state["sizes"])
        self._pending = None


def _curvature_of(group: Mapping[str, Any], solved: set[ExponentialFamily]) -> str | None:
    """How a group's natural gradient is measured, where nobody says it; None: as its family likes."""
    family, size = group["family"], sum(weight.numel() for _, weight in group["params"])
    if family.curvature == "none":
        return "regression" if family in solved else None
    is_small = family.curvature == "dense" or (family.curvature == "diagonal" and size <= LARGEST_HESSIAN)
    return "exact" if is_small else "hutchinson"
