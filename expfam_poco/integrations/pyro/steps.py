"""Steps that nobody has to watch: Newton steps at the start, and bad ones taken back."""

from __future__ import annotations

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
        """Step, and return the estimate of −ELBO before it."""
        if self.rates.is_starting:
            return self._newton(closure)
        before, loss = self._moved(closure)
        if self._last is not None and self.rates.has_fallen_back(loss, self._weights):
            self._put(self._last)
            self._last = None
            self.rates.taken_back()
            before, loss = self._moved(closure)
        else:
            self._last = before
        self._losses.params.step(self._draws)
        self.rates.stepped(loss)
        return loss

    def restart(self) -> None:
        """Begin again, with other data."""
        self._last = None
        self.rates.restart()

    @property
    def _draws(self) -> int:
        """Evaluations at q in a step."""
        optimizer = self._optimizer
        return {"zero": 1, "antithetic": 2 * optimizer.mc_samples}.get(optimizer.noise, optimizer.mc_samples)

    def _moved(self, closure: Closure) -> tuple[dict[str, Any], float]:
        """Step; the states before it, and the estimate of −ELBO there."""
        before = self._optimizer.posterior_states()
        self._allowed(closure)
        return before, self._losses.negative_elbo(before, self._priors(), self._draws)

    def _newton(self, closure: Closure) -> float:
        """A step without noise that does not raise the loss of its batch at the posterior's point."""
        with self._without_noise():
            while True:
                before = self._optimizer.posterior_states()
                at_point = self._allowed(closure)
                loss = self._losses.negative_elbo(before, self._priors(), 1)
                with torch.no_grad():
                    fall = at_point - float(closure())
                if fall > -self.rates.enough or not self.rates.taken_back():
                    break
                self._put(before)
        self._losses.params.step(1)
        self.rates.stepped(loss, fall)
        return loss

    def _allowed(self, closure: Closure) -> float:
        """A step, at half the rate where it would leave the family's domain; the optimizer's loss.

        The exact rule may leave it where the loss is not convex; at last comes a retraction that cannot.
        """
        while True:
            try:
                return self._at_rate(closure)
            except (ValueError, NonFiniteError):
                if self._losses.is_models_fault:
                    raise
                if not self.rates.taken_back():
                    break
        chosen = [group["retraction"] for group in self._optimizer.param_groups]
        try:
            for group in self._optimizer.param_groups:
                group["retraction"] = "second_order"
            return self._at_rate(closure)
        finally:
            for group, retraction in zip(self._optimizer.param_groups, chosen, strict=True):
                group["retraction"] = retraction

    def _at_rate(self, closure: Closure) -> float:
        self._losses.begin()
        for group in self._optimizer.param_groups:
            group["lr"] = self.rates.rate()
        return float(self._optimizer.step(closure))

    @contextmanager
    def _without_noise(self) -> Iterator[None]:
        noise, self._optimizer.noise = self._optimizer.noise, "zero"
        try:
            yield
        finally:
            self._optimizer.noise = noise

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
