"""Steps that nobody has to watch: Newton steps at the start, and bad ones taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expfam_poco.errors import NonFiniteError
from expfam_poco.integrations.pyro.losses import Losses
from expfam_poco.integrations.pyro.rates import Rates
from expfam_poco.integrations.pyro.sites import Part
from expfam_poco.optim.optimizer import PosteriorCorrected

Closure = Callable[[], Tensor]


class Steps:
    """Steps an optimizer at rates of its own.

    Args:
        optimizer: of the latent sites, with the exact rule as retraction unless the user has chosen another.
        parts: of the posterior.
        losses: whose closures are stepped with.
        rates: of the steps.
    """

    def __init__(self, optimizer: PosteriorCorrected, parts: Sequence[Part], losses: Losses, rates: Rates) -> None:
        self.rates = rates
        self._optimizer, self._parts, self._losses = optimizer, list(parts), losses
        self._weights = sum(part.shape.numel() for part in parts)
        self._last: dict[str, Any] | None = None

    def step(self, closure: Closure) -> float:
        """Step, and return the estimate of −ELBO before it; from the posterior of a step ago where the last was bad."""
        starting, again = self.rates.is_starting, False
        with self._noise("zero" if starting else self._optimizer.noise):
            moved = self._moved(closure)
            if moved is None:
                assert self._last is not None
                present, last = self._optimizer.posterior_states(), self._last
                self._put(last)
                self.rates.taken_back()
                again, level, self._last, self.rates.level = True, self.rates.level, None, None
                try:
                    moved = self._moved(closure)
                except BaseException:  # it was not the last step's fault
                    self._put(present)
                    self._last, self.rates.level = last, level
                    raise
                assert moved is not None
                if starting and self.rates.whole:
                    self.rates.level = level  # else the level may have been luck: go on from here in any case
            self._losses.params.step(self._draws)
        before, loss, estimate = moved
        self.rates.stepped(loss, again=again)
        self._last = before
        return estimate

    def restart(self) -> None:
        """Begin again, with other data."""
        self._last = None
        self.rates.restart()

    @property
    def _draws(self) -> int:
        """Evaluations at q in a step."""
        optimizer = self._optimizer
        return {"zero": 1, "antithetic": 2 * optimizer.mc_samples}.get(optimizer.noise, optimizer.mc_samples)

    def _moved(self, closure: Closure) -> tuple[dict[str, Any], float, float] | None:
        """Step: the states before it, the loss there that rates go by, and the estimate of −ELBO.

        None, where that loss, or an error of the model, tells that the last step was a bad one. A step that would leave
        the family's domain, as the exact rule may where the loss is not convex, is tried again at a smaller rate; at
        last with a retraction that cannot.
        """
        before = self._optimizer.posterior_states()
        while True:
            error = self._tried(closure)
            if error is not None and self._losses.is_models_fault:
                return None
            loss = estimate = self._losses.mean()
            if math.isfinite(loss):
                estimate = self._losses.negative_elbo(before, self._priors(), self._draws)
                loss = loss if self.rates.is_starting else estimate
            if self._last is not None and self.rates.is_bad(loss, self._weights):
                return None
            if error is None:
                return before, loss, estimate
            if not math.isfinite(loss):
                raise error
            if not self.rates.taken_back():
                with self._retraction("second_order"):
                    self._at_rate(closure)
                return before, loss, estimate

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
            group["lr"] = self.rates.rate(self._losses.share(group["plate"]))
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

    def _put(self, states: Mapping[str, Any]) -> None:
        """Set the posterior back; the counters, and so the noise, go on."""
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
        last = self._last and {name: state._asdict() for name, state in self._last.items()}
        return {"rates": self.rates.state_dict(), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.rates.load_state_dict(state["rates"])
        families = {part.name: part.family for part in self._parts}
        last = state["last"]
        self._last = last and {name: families[name].State(**values) for name, values in last.items()}
