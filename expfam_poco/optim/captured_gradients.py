"""Captured steps of optimizers that take gradients and keep no posterior over the weights: `VSGD`, `ConstantVSGD`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures.effects import Buffers, capture_random, replay_random
from expfam_poco.closures.evaluate import evaluate
from expfam_poco.engine.capture import Captured, CudaGraph, Graph, Recorder, check_captured, loss_elsewhere
from expfam_poco.engine.interrupts import Uninterrupted
from expfam_poco.errors import NonFiniteError
from expfam_poco.family.transfer import AHEAD

if TYPE_CHECKING:
    from expfam_poco.optim.vsgd import GradientModelOptimizer, Spoiled


class Done(NamedTuple):
    """What a graph's run leaves: the loss, the parameters that it has stepped and their state, what was not finite."""

    loss: Tensor
    used: list[Any]
    state: list[Tensor]
    found: list[Spoiled]


class CapturedGradientStep(Captured):
    """A closure's gradients and the optimizer's step, recorded. Call it with a batch.

    Args:
        optimizer: whose steps these are.
        closure: gives the loss of a batch.
        example: a batch.
        recorder: makes recorders for a device.
    """

    def __init__(
        self,
        optimizer: GradientModelOptimizer,
        closure: Callable[..., Any],
        example: Any,
        recorder: Callable[[torch.device], Recorder] = CudaGraph,
    ) -> None:
        self._optimizer, self._buffers = optimizer, Buffers()
        device = check_captured(closure, {p.device for p in self._params()}, recorder)
        super().__init__(closure, example, device, recorder)
        self._present()

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """One step on this batch; the loss, on the device.

        Raises:
            ValueError: for a batch of another shape, or a hyperparameter out of range.
            NonFiniteError: about an earlier step (with nonfinite="raise").
        """
        optimizer = self._optimizer
        self._batch.take(batch)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # so that schedulers do not miss a step
        graph = self._present()
        done: Done = graph.result
        with Uninterrupted():
            for place, value in zip(done.state, self._state(done.used), strict=True):
                if value is not place:
                    place.copy_(value)
            self._keep(done)
            for i, own in enumerate(optimizer.kinds(done.used).values()):
                graph.numbers.write(f"kind {i}", own)
            graph.replay()
            torch.autograd.graph.increment_version([p for _, p in done.used])
            for _, p in done.used:
                optimizer.state[p]["step"] += 1
            optimizer._clock["steps"] += 1
        number = optimizer._clock["steps"]
        optimizer._watch.note(number, [own._replace(counts=own.counts.clone()) for own in done.found])
        loss = done.loss.clone()
        try:
            for error in optimizer._watch.errors(number if self._device.type in AHEAD else number + 1):
                raise error
        except NonFiniteError as error:
            optimizer._fell(error)
        else:
            optimizer._skips.stepped()
        return loss

    def _pairs(self) -> list[tuple[dict[str, Any], Parameter]]:
        """All groups and parameters that may have a gradient."""
        groups = self._optimizer.param_groups
        return [(group, p) for group in groups for p in group["params"] if p.requires_grad and p.numel()]

    def _params(self) -> list[Parameter]:
        return [p for _, p in self._pairs()]

    def _state(self, used: list[Any]) -> list[Tensor]:
        """What is kept for the parameters, in the order of their state."""
        optimizer = self._optimizer
        states = [optimizer._started(p, group) for group, p in used]
        return [state[name] for state in states for name in optimizer.state_names]

    def _keep(self, done: Done) -> None:
        """Let the optimizer's state be the graph's tensors."""
        rest = iter(done.state)
        for _, p in done.used:
            for name in self._optimizer.state_names:
                self._optimizer.state[p][name] = next(rest)

    def _present(self) -> Graph:
        """The graph of the next step's kind, made now if there is none."""
        optimizer, pairs = self._optimizer, self._pairs()
        for group in optimizer.param_groups:
            optimizer.check(group)
        ages = [(id(group), optimizer._started(p, group)["step"]) for group, p in pairs]
        order = {age: i for i, age in enumerate(dict.fromkeys(ages))}
        members = [(order[age], p.data_ptr(), group["maximize"]) for age, (group, p) in zip(ages, pairs, strict=True)]
        kind = optimizer.nonfinite, *members
        return self._graph(kind, self._run, self._undone)

    def _run(self) -> Done:
        """Gradients, and the device's part of the step."""
        optimizer, params = self._optimizer, self._params()
        measured = evaluate(self._closure, params, check=False)
        if measured.loss.device.type != self._device.type:
            raise TypeError(loss_elsewhere(measured.loss, self._device))
        try:
            for p, grad in zip(params, measured.grads, strict=True):
                p.grad = grad
            used = optimizer._used()
            found = optimizer._advanced(used)
        finally:
            for p in params:
                p.grad = None
        return Done(measured.loss, used, self._state(used), found)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Run a block after which state, weights, buffers and generators are what they were."""
        params = self._params()
        tensors = [*self._state(self._pairs()), *[p.detach() for p in params]]
        copies = [value.clone() for value in tensors]
        with replay_random(capture_random(params)), self._buffers.kept(params, self._closure), torch.no_grad():
            try:
                yield
            finally:
                for value, copy in zip(tensors, copies, strict=True):
                    value.copy_(copy)
