"""Steps that nobody has to watch: bad ones are taken back, and where they lead nowhere that is said."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.errors import NonFiniteError
from expfam_poco.integrations.pyro.losses import Losses
from expfam_poco.integrations.pyro.rates import Rates
from expfam_poco.integrations.pyro.sites import Part
from expfam_poco.integrations.pyro.slopes import Slope
from expfam_poco.optim.optimizer import PosteriorCorrected

Closure = Callable[[], Tensor]


class Posterior(NamedTuple):
    """All of it: the states of its parts, and the slopes of local latents, each by name."""

    states: dict[str, Any]
    slopes: dict[str, Slope]


class Steps:
    """Steps an optimizer at rates of its own.

    Args:
        optimizer: of the latent sites, with the exact rule as retraction unless the user has chosen another.
        parts: of the posterior.
        losses: whose closures are stepped with.
        rates: of the steps.
    """

    def __init__(self, optimizer: PosteriorCorrected, parts: Sequence[Part], losses: Losses, rates: Rates) -> None:
        self._by_curvature = all(part.family.curvature != "none" for part in parts)
        self.rates = rates
        self._optimizer, self._parts, self._losses = optimizer, list(parts), losses
        self._weights = sum(part.shape.numel() for part in parts)
        self._last: Posterior | None = None
        self._told = False

    def step(self, closure: Closure) -> float:
        """Step, and return the estimate of −ELBO before it; from the posterior of a step ago where the last was bad."""
        with self._noise("antithetic" if self._is_first else self._optimizer.noise):
            before, estimate, again = self._moved_on(closure)
            self._losses.params.step(self._draws)
        self.rates.stepped(estimate, again=again)
        self._last = Posterior(before, self._losses.slopes.values)  # after a bad step those that were put back
        return estimate

    @property
    def _is_first(self) -> bool:
        """Whether the next step is the first: of a pair ±ε, by Hessians, it is exact for a Gaussian from anywhere."""
        return self._by_curvature and self.rates.steps == 0

    def _moved_on(self, closure: Closure) -> tuple[dict[str, Any], float, bool]:
        """`_moved`, from a step ago where the last one was bad, which is told too."""
        moved, again = self._moved(closure), False
        if moved is None:
            assert self._last is not None
            present, last = Posterior(self._optimizer.posterior_states(), self._losses.slopes.values), self._last
            self._put(last)
            self.rates.taken_back()
            again, level, self._last, self.rates.level = True, self.rates.level, None, None
            try:
                moved = self._moved(closure, again=True)
            except BaseException:  # it was not the last step's fault
                self._put(present)
                self._last, self.rates.level = last, level
                raise
            assert moved is not None
        return *moved, again

    def restart(self) -> None:
        """Begin again, with other data."""
        self._last = None
        self.rates.restart()

    def tell(self) -> None:
        """Warn, once, where the posterior is asked for before it has settled."""
        complaint = self.rates.complaint()
        if complaint is None or self._told:
            return
        self._told = True
        warnings.warn(
            f"model: the posterior has not settled after {self.rates.steps} steps: {complaint}; take more before it is "
            "used, begin nearer to it (init=), or write the model in units and variables in which it is of order 1.",
            UserWarning,
            stacklevel=3,
        )

    @property
    def _draws(self) -> int:
        """Evaluations at q in a step."""
        optimizer = self._optimizer
        return 2 * optimizer.mc_samples if optimizer.noise == "antithetic" else optimizer.mc_samples

    def _moved(self, closure: Closure, *, again: bool = False) -> tuple[dict[str, Any], float] | None:
        """Step: the states before it and the estimate of −ELBO there.

        None, where that estimate, or an error of the model, tells that the last step was a bad one. A step that would
        leave the family's domain, as the exact rule may where the loss is not convex, is tried again at a smaller rate;
        at last with a retraction that cannot but by rounding: then the last step was bad, or, if it was taken `again`,
        this one is left out.
        """
        before = self._optimizer.posterior_states()
        while True:
            error = self._tried(closure)
            if error is not None and self._losses.is_models_fault:
                return None
            estimate = self._losses.mean()
            if math.isfinite(estimate):
                estimate = self._losses.negative_elbo(before, self._priors(), self._draws)
            if self._last is not None and self.rates.is_bad(estimate, self._weights):
                return None
            if error is None:
                return before, estimate
            if not math.isfinite(estimate):
                raise error
            if not self.rates.taken_back():
                with self._retraction("second_order"):
                    error = self._tried(closure)
                if error is not None and self._last is not None:
                    return None
                if error is not None and not again:
                    raise error
                return before, estimate

    def _tried(self, closure: Closure) -> ValueError | NonFiniteError | torch.linalg.LinAlgError | None:
        """A step, or why it could not be taken; the model's own errors are raised, unless a step may be their cause."""
        try:
            self._at_rate(closure)
        except (ValueError, NonFiniteError, torch.linalg.LinAlgError) as error:
            if self._losses.is_models_fault and self._last is None:
                raise
            return error
        return None

    def _at_rate(self, closure: Closure) -> None:
        self._losses.begin()
        for group in self._optimizer.param_groups:
            group["lr"] = 1.0 if group["exact"] else self.rates.rate(self._losses.share(group["plate"]))
        self._optimizer.step(closure)

    @contextmanager
    def _noise(self, mode: str) -> Iterator[None]:
        chosen, self._optimizer.noise = self._optimizer.noise, mode
        try:
            yield
        finally:
            self._optimizer.noise = chosen

    @contextmanager
    def _retraction(self, variant: str) -> Iterator[None]:
        chosen = [group["retraction"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["retraction"] = variant
        try:
            yield
        finally:
            for group, own in zip(self._optimizer.param_groups, chosen, strict=True):
                group["retraction"] = own

    def _priors(self) -> dict[str, Any]:
        groups = self._optimizer.param_groups
        return {name: state for group in groups for name, state in (group["prior"] or {}).items()}

    def _put(self, posterior: Posterior) -> None:
        """Set the posterior back; the counters, and so the noise, go on."""
        states, self._losses.slopes.values = posterior
        saved, first = self._optimizer.state_dict(), 0
        with torch.no_grad():
            for part in self._parts:
                saved["state"][first]["posterior"] = states[part.name]._asdict()
                point = part.split(part.family.point(states[part.name]))
                for site, weight in zip(part.sites, point, strict=True):
                    site.weight.copy_(weight)
                first += len(part.sites)
        self._optimizer.load_state_dict(saved)

    # ---- saving ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rates, and the posterior that a bad step would be taken back to."""
        last = None
        if self._last is not None:
            states = {name: state._asdict() for name, state in self._last.states.items()}
            last = {"states": states, "slopes": {name: slope._asdict() for name, slope in self._last.slopes.items()}}
        return {"rates": self.rates.state_dict(), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.rates.load_state_dict(state["rates"])
        families = {part.name: part.family for part in self._parts}
        last = state["last"]
        if last is None:
            self._last = None
            return
        states = {name: families[name].State(**values) for name, values in last["states"].items()}
        self._last = Posterior(states, {name: Slope(**values) for name, values in last["slopes"].items()})
