"""α-SVRG over any torch optimizer: corrected gradients for SGD, AdamW, … before their moments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import correction
from .checkpoint import CheckpointError
from .effects import Buffers, capture_random, replay_random
from .errors import NonFiniteError
from .evaluation import Closure, Measured, Request, check_chunks, evaluate, parts_of, unused_error
from .family import Theta
from .groups import check_max_grad_norm, checked_alpha
from .inspection import weight_norm
from .meter import VarianceMeter, is_meter_state
from .scaling import ScaledOverflow, owned
from .schedules import AdaptiveAlpha, Staleness, alpha_from, describe_alpha
from .shell import without_hooks

CLOCK = ("steps", "refreshes", "refreshed", "skipped")


class AlphaSVRG(torch.optim.Optimizer):
    """α-SVRG (Yin et al. 2025), the isotropic case of PC Eq. 18 without noise, handing its gradient to `base`.

        g = ∇ℓ_B(θ) − α (∇ℓ_B(θ_out) − g_out),     then base.step() with g as the parameters' gradients

    It shares `param_groups` and `state` with the base, so that schedulers and wrappers see a real optimizer.
    Weight decay, momentum and moments are the base's.

    Args:
        base_optimizer: any torch optimizer whose step needs only gradients.
        alpha: α in [0, 1], a schedule step → α (`schedules`), or "adaptive" (the α of least variance, measured for
            every tensor); no effect before `refresh`.
        max_grad_norm: clip the *corrected* gradient of all parameters together to this norm.
        stale_after: warn, once, when α > 0 and the last refresh is more steps ago than this; None: never.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.AlphaSVRG(torch.optim.AdamW(model.parameters(), lr=1e-2), alpha=0.5)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> closure = lambda: torch.nn.functional.mse_loss(model(x), y)
        >>> _ = opt.refresh([closure])
        >>> loss = opt.step(closure)
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        *,
        alpha: correction.Alpha = 1.0,
        max_grad_norm: float | None = None,
        stale_after: int | None = 1000,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"base_optimizer={type(base_optimizer).__name__}: give a torch.optim.Optimizer, made for the "
                "model's parameters."
            )
        takes = inspect.signature(base_optimizer.step).parameters.get("closure")
        if takes is not None and takes.default is inspect.Parameter.empty:
            raise TypeError(
                f"base_optimizer={type(base_optimizer).__name__}: its step needs a closure of its own, whose gradients "
                "would not be corrected; give one that steps with the gradients it finds, such as SGD or AdamW."
            )
        self.alpha = checked_alpha(alpha)
        check_max_grad_norm(max_grad_norm)
        self.base = base_optimizer
        self.max_grad_norm = max_grad_norm
        self._clock = dict.fromkeys(CLOCK, 0)
        self._outer: dict[Parameter, tuple[Tensor, Tensor]] = {}
        self._alphas: dict[int, float] = {}
        self._buffers = Buffers()
        self._meter = VarianceMeter()
        self._stale = Staleness(stale_after)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.param_groups = base_optimizer.param_groups
        self.state = base_optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, and the `step` that a scheduler has wrapped: they belong to this one, not to a copy."""
        return without_hooks(self.__dict__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; steps are plain until the next `refresh`."""
        if not any(param_group is group for group in self.base.param_groups):
            self.base.add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        weights: Sequence[float] | None = None,
        scaler: Any = None,
    ) -> Tensor:
        """Evaluate the closure here and, after a `refresh`, at the snapshot; correct; let the base step.

        Args:
            closure: returns the mean loss of the mini-batch; a list of closures accumulates micro-batches.
            weights: the micro-batches' numbers of examples; None counts them equally.
            scaler: a `torch.amp.GradScaler` for fp16; a step whose gradients overflow is skipped.

        Returns:
            the mini-batch loss at the current weights.
        """
        ((part, _),) = parts_of(closure, weights, scaler=scaler)
        params = self._params()
        self._check_devices(params)
        number = self._clock["steps"] + 1
        moved = self._buffers.record(params, part)
        try:
            loss, grads = self._corrected_gradients(part, params, number)
            for p, grad in zip(params, owned(grads), strict=True):
                p.grad = None if grad is None else grad.to(p.dtype)
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
            self.base.step()
        except BaseException as error:
            moved.restore()
            if not isinstance(error, ScaledOverflow):
                raise
            self._clock.update(steps=number, skipped=self._clock["skipped"] + 1)
            return NonFiniteError.loss
        finally:
            for p in params:
                p.grad = None
        self._clock["steps"] = number
        return loss

    def _corrected_gradients(
        self, part: Closure, params: Sequence[Parameter], number: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        alphas, measuring = self._alphas_at(params, number)
        random = capture_random(params)
        inner = evaluate(part, params, Request())
        if all(grad is None for grad in inner.grads):
            raise unused_error()
        # Frozen, unfrozen or added since the snapshot: g_out belongs to another function, so the step is plain.
        if not (any(alphas) or measuring) or set(params) != set(self._outer):
            return inner.loss, list(inner.grads)
        with replay_random(random), self._buffers.kept(params, part), self._snapshot_weights(params):
            outer = evaluate(part, params, Request())
        self._measure(params, inner, outer, alphas, number)
        rows = zip(params, inner.grads, outer.grads, alphas, strict=True)
        return inner.loss, [self._corrected(p, g, o, alpha) for p, g, o, alpha in rows]

    def _check_devices(self, params: Sequence[Parameter]) -> None:
        for i, p in enumerate(params):
            if p in self._outer and self._outer[p][0].device != p.device:
                raise RuntimeError(
                    f"params: parameter {i} is on {p.device} but its snapshot on {self._outer[p][0].device}; move the "
                    "model before refresh(), or call refresh() again."
                )

    def _alphas_at(self, params: Sequence[Parameter], number: int) -> tuple[list[float], bool]:
        """α of every tensor, and whether pairs are to be measured though α may be 0."""
        adaptive = self.alpha
        if isinstance(adaptive, AdaptiveAlpha):
            names = [str(i) for i in range(len(params))]
            alphas = [self._meter.alpha(name, Theta._fields, adaptive)[0] for name in names]
            measuring = self._meter.probes(number, names, adaptive)
        else:
            alphas, measuring = [correction.alpha_at(adaptive, number)[0]] * len(params), False
        self._alphas = dict(enumerate(alphas))
        self._stale.check(any(alphas) or measuring, number - self._clock["refreshed"])
        return alphas, measuring

    def _measure(
        self, params: Sequence[Parameter], inner: Measured, outer: Measured, alphas: Sequence[float], number: int
    ) -> None:
        """Show the meter the pairs."""
        keep = self.alpha.keep if isinstance(self.alpha, AdaptiveAlpha) else None
        if not self._meter.samples(number, keep is not None):
            return
        for i, (p, *pair) in enumerate(zip(params, inner.grads, outer.grads, strict=True)):
            if alphas[i] == 0.0 and pair == [None, None]:
                continue  # the step leaves it alone
            mean = Theta(self._outer[p][1])
            sites = [Theta(torch.zeros_like(mean.theta) if g is None else g.to(mean.theta.dtype)) for g in pair]
            terms = correction.variance_terms(sites[0], sites[1], correction.Outer(None, mean))
            self._meter.add(str(i), terms, [alphas[i]], keep)

    def diagnostics(self) -> dict[str, float]:
        """Plain numbers worth logging.

        Steps, refreshes and skipped steps; α of the last step (the mean over tensors); "variance_ratio.theta" and
        "optimal_alpha.theta", as `PosteriorCorrected.diagnostics` has them; the norm of the weights.
        """
        counts = {"steps": self._clock["steps"], "refreshes": self._clock["refreshes"]}
        alphas = list(self._alphas.values()) or [0.0]
        numbers = {"skipped_steps": self._clock["skipped"], "alpha": sum(alphas) / len(alphas)}
        return {**counts, **numbers, **self._meter.read(), "weight_norm": weight_norm(self._params())}

    @torch.no_grad()
    def refresh(
        self, closures: Sequence[Closure], weights: Sequence[float] | None = None, *, scaler: Any = None
    ) -> Tensor:
        """Take the snapshot: θ_out ← θ, g_out ← mean of the chunks' gradients there (weighted by `weights`).

        With `scaler`, gradients are taken of the scaled loss; if they overflow, the snapshot stays as it was and the
        loss is NaN. No buffers are moved.
        """
        try:
            return self._refresh(closures, weights, scaler)
        except ScaledOverflow:
            return NonFiniteError.loss

    def _refresh(self, closures: Sequence[Closure], weights: Sequence[float] | None, scaler: Any) -> Tensor:
        chunks, shares = check_chunks(closures, weights)
        params = self._params()
        means = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        losses = []
        for chunk, share in zip(chunks, shares, strict=True):
            ((part, _),) = parts_of(chunk, None, scaler=scaler)
            with self._buffers.kept(params, part):
                measured = evaluate(part, params, Request())
            losses.append(share * measured.loss)
            for mean, grad in zip(means, measured.grads, strict=True):
                if grad is not None:
                    mean.add_(grad.to(mean.dtype), alpha=share)
        self._outer = {p: (p.detach().clone(), mean) for p, mean in zip(params, means, strict=True)}
        self._clock.update(refreshes=self._clock["refreshes"] + 1, refreshed=self._clock["steps"])
        return torch.stack(losses).sum()

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and the snapshot by parameter number."""
        numbered = list(enumerate(p for group in self.param_groups for p in group["params"]))
        outer = {i: list(self._outer[p]) for i, p in numbered if p in self._outer}
        shapes = [tuple(p.shape) for _, p in numbered]
        own = {"outer": outer, "clock": dict(self._clock), "shapes": shapes}
        own.update(alpha=describe_alpha(self.alpha), meter=self._meter.state())
        return {**self.base.state_dict(), "alpha_svrg": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: if it belongs to another model or base optimizer, or is damaged; nothing is changed.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        own = self._checked(state_dict.get("alpha_svrg"), params)
        try:
            self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "alpha_svrg"})
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"state_dict: the base optimizer refuses it ({error}).") from error
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self._clock = dict(own["clock"])
        self.alpha = alpha_from(own["alpha"], self.alpha)
        self._meter.load(own["meter"])
        self._outer = {
            params[i]: (
                snapshot.to(params[i].device, copy=True),
                mean.to(params[i].device, copy=True),
            )
            for i, (snapshot, mean) in own["outer"].items()
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's."""
        self.base.zero_grad(set_to_none)

    def _checked(self, own: Any, params: Sequence[Parameter]) -> Mapping[str, Any]:
        if not isinstance(own, Mapping):
            raise CheckpointError("state_dict['alpha_svrg']: missing; this is not a checkpoint of AlphaSVRG.")
        sound = {
            **{name: isinstance(own.get(name), kind) for name, kind in (("outer", Mapping), ("shapes", list))},
            "clock": isinstance(own.get("clock"), Mapping) and all(type(own["clock"].get(n)) is int for n in CLOCK),
            "alpha": True,
            "meter": is_meter_state(own.get("meter")),
        }
        try:
            checked_alpha(alpha_from(own["alpha"], self.alpha))
        except (KeyError, ValueError, TypeError, AttributeError):
            sound["alpha"] = False
        for name, ok in sound.items():
            if not ok:
                raise CheckpointError(f"state_dict['alpha_svrg'][{name!r}]: missing or damaged; use another file.")
        shapes = [tuple(p.shape) for p in params]
        if [tuple(shape) for shape in own["shapes"]] != shapes:
            raise CheckpointError(
                f"state_dict['alpha_svrg']['shapes']: {own['shapes']}, the model has {shapes}; load the checkpoint of "
                "this model."
            )
        for i, pair in own["outer"].items():
            if not 0 <= i < len(params) or any(tensor.shape != params[i].shape for tensor in pair) or len(pair) != 2:
                raise CheckpointError(
                    f"state_dict['alpha_svrg']['outer'][{i}]: it does not fit the model; load the checkpoint of this "
                    "model."
                )
        return own

    def _params(self) -> list[Parameter]:
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise ValueError("params: no parameter requires a gradient, so there is nothing to step.")
        return params

    def _corrected(self, p: Parameter, inner: Tensor | None, outer: Tensor | None, alpha: float) -> Tensor | None:
        """In the mean's precision; a batch that does not use p has gradient 0, and p still moves by α g_out."""
        mean = self._outer[p][1]
        if alpha == 0.0 or (inner is None and outer is None and not bool(mean.any())):
            return inner
        here, there = (
            Theta(torch.zeros_like(mean) if grad is None else grad.to(mean.dtype)) for grad in (inner, outer)
        )
        return correction.natural_correct(here, there, Theta(mean), alpha).theta.to(p.dtype)

    @contextmanager
    def _snapshot_weights(self, params: Sequence[Parameter]) -> Iterator[None]:
        """Inside, the weights are θ_out; outside they are what they were, bit for bit."""
        present = {p: p.detach().clone() for p in params if p in self._outer}
        try:
            for p in present:
                p.data.copy_(self._outer[p][0])
            yield
        finally:
            for p, value in present.items():
                p.data.copy_(value)
