"""Large leafwise tensors, stepped span by span in place: views and steps that hold nothing larger than a span.

They do what `View` and `WholeStep` do for small and joint blocks, by the kernels of `kernels`. Since a step in place
cannot be undone, weights whose step would not be finite keep their values, and the error comes after the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import blr, correction, fields, groups
from .backend import Backend, span_size
from .blocks import Block
from .correction import Outer
from .estimators import Estimator, Reparameterised
from .evaluation import Measured, NonFiniteError
from .family import ExponentialFamily
from .kernels import Evidence, Numbers, Recipe, site
from .measurement import View
from .meter import VarianceMeter
from .noise import TILE as BLOCKS
from .noise import NoiseKey

TILE = 4 * BLOCKS
METER_WEIGHTS = 2**14  # of each block; the meter's ratios need no more


def can_stream(block: Block) -> bool:
    """Whether the block may be cut: a leafwise family with the library's noise, an estimator of gradients alone."""
    family, estimator = block.family, block.group["curvature"]
    return (
        not family.joint
        and len(block.shape) > family.event_dim
        and type(family).noise is ExponentialFamily.noise
        and estimator.needs == "gradient"
        and not estimator.independent_draws
        and block.group["retraction"] != "plain"
    )


class Span(NamedTuple):
    """Weights `start` … `stop − 1` of a block whose weights stand along the axes `batch`, each of shape `event`."""

    start: int
    stop: int
    batch: torch.Size
    event: torch.Size

    @property
    def shape(self) -> torch.Size:
        """The shape that the family sees."""
        return torch.Size([self.stop - self.start, *self.event])

    def cut(self, values: Any) -> Any:
        """A tuple of tensors (or one, or None) restricted to the span; constants without the batch's axes pass."""
        if values is None:
            return None
        if not isinstance(values, Tensor):
            parts = map(self.cut, values)
            return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)
        dims = len(self.batch)
        if values.shape[:dims] != self.batch:
            return values
        rows = values if dims == 1 else values.reshape(-1, *values.shape[dims:])
        return rows if self.start == 0 and self.stop == rows.shape[0] else rows[self.start : self.stop]


def spans(block: Block, size: int | None = None, most: int | None = None) -> Iterator[Span]:
    """The spans of a block, of equal length and each beginning with a tile of noise.

    Args:
        block: leafwise.
        size: at most so many entries; None takes the eager backend's.
        most: only the first so many weights.
    """
    dims = len(block.shape) - block.family.event_dim
    batch, event = block.shape[:dims], block.shape[dims:]
    weights = batch.numel() if most is None else min(batch.numel(), most)
    limit = max(TILE, (size or span_size("eager", block.device)) // max(1, event.numel()))
    parts = -(-weights // limit)
    length = -(-weights // parts // TILE) * TILE
    for start in range(0, weights, length):
        yield Span(start, min(start + length, weights), batch, event)


@dataclass
class StreamedView(View):
    """A view that looks its noise up again wherever it needs it, and keeps only gradients.

    With several draws, or chunks of a mega-batch, each is added to `total` with `weight` and dropped.
    """

    key: NoiseKey = field(default_factory=lambda: NoiseKey(0))
    mode: str = "shared"
    draws: int = 1
    backend: Backend | None = None
    total: Any = None
    weight: float = 1.0
    collected: bool = False

    @property
    def count(self) -> int:
        """The number of evaluations."""
        return self.draws

    def recipe(self, draw: int = 0) -> Recipe:
        """The constants of this block's kernels at one draw."""
        group = self.block.group
        reflected = self.mode == "antithetic" and draw % 2 == 1
        return Recipe(
            self.block.family,
            self.estimator,
            float(group["ess"]),
            float(group["momentum"]),
            float(group["clip_radius"]),
            group["retraction"],
            groups.anchor_weight(group),
            "zero" if self.mode == "zero" else "reflected" if reflected else "random",
        )

    def source(self, span: Span, recipe: Recipe, draw: int) -> Tensor:
        """One draw's noise on a span, or its address."""
        number = draw // 2 if self.mode == "antithetic" else draw
        key = self.key.at(parameter=self.block.index, draw=number, offset=span.start * span.event.numel())
        return self.runner.noise(recipe, key, span.shape, self.block.dtype, self.block.device)

    @property
    def runner(self) -> Backend:
        """The backend, which every streamed view has."""
        assert self.backend is not None
        return self.backend

    def spans(self) -> Iterator[Span]:
        """The block's spans, as long as the backend likes them."""
        return spans(self.block, span_size(self.runner.mode, self.block.device))

    def write(self, draw: int) -> None:
        """Put draw number `draw` into the model."""
        recipe = self.recipe(draw)
        with self.block.rewritten() as out:
            for span in self.spans():
                source = self.source(span, recipe, draw)
                self.runner.draw(recipe, span.cut(self.state), source, span.cut(out), self.block.dtype)

    def record(self, draw: int, measured: Measured, position: slice) -> None:
        """Keep the block's gradient, or add its natural gradient to the total."""
        (grad,) = measured.grads[position]
        if grad is None:
            return
        self.collected = True
        if self.total is None:
            self.grad, self.loss = [grad], [measured.loss]
            return
        recipe = self.recipe(draw)
        for span in self.spans():
            evidence = Evidence(self.source(span, recipe, draw), span.cut(grad), measured.loss)
            like = torch.empty(span.shape, dtype=self.block.dtype, device=self.block.device)
            self.runner.collect(recipe, span.cut(self.state), evidence, span.cut(self.total), self.weight, like)

    def used(self) -> bool:
        """Whether any evaluation depended on the block."""
        return self.collected

    def evidence(self, span: Span, recipe: Recipe, *, shared: bool = False) -> Any:
        """What was measured on a span: the total, or one draw's gradient (zero where the batch did not use it).

        With `shared` the noise is left out, being that of another view's evidence.
        """
        if self.total is not None:
            return span.cut(self.total)
        source = None if shared else self.source(span, recipe, 0)
        if not self.grad:
            zero = torch.zeros(span.shape, dtype=self.block.dtype, device=self.block.device)
            return Evidence(source, zero, torch.zeros((), device=self.block.device))
        assert self.grad[0] is not None
        return Evidence(source, span.cut(self.grad[0]), self.loss[0])


def streamed_view(
    block: Block,
    state: Any,
    backend: Backend,
    mode: str,
    draws: int,
    key: NoiseKey,
    *,
    total: Any = None,
    share: float = 1.0,
    estimator: Estimator | None = None,
) -> StreamedView:
    """A view with `draws` evaluations (pairs for "antithetic"), collecting into `total` from the second on."""
    count = 2 * draws if mode == "antithetic" else draws
    if total is None and count > 1:
        total = empty_site(block, state)
    view = StreamedView(block, estimator or block.group["curvature"], state, torch.empty(0), None)
    view.key, view.mode, view.draws, view.backend = key, mode, count, backend
    view.total, view.weight = total, share / count
    return view


def empty_site(block: Block, state: Any) -> Any:
    """A site of zeros for the whole block."""
    first = next(spans(block, most=1)).cut(state)
    example = block.family.kl_gradient(first, first)
    batch = block.shape[: len(block.shape) - block.family.event_dim]
    return fields.map_fields(lambda value: value.new_zeros(*batch, *value.shape[1:]), example)


def sample_into(block: Block, state: Any, backend: Backend, key: NoiseKey) -> None:
    """Put a sample of q into the model."""
    streamed_view(block, state, backend, "shared", 1, key, estimator=Reparameterised()).write(0)


def write_point(block: Block, state: Any) -> None:
    """Put the point of q into the model."""
    with block.rewritten() as out:
        for span in spans(block):
            span.cut(out).copy_(block.family.point(span.cut(state)))


def prepare(block: Block, state: dict[str, Any]) -> None:
    """Make the state fit for steps in place: contiguous, with a momentum where the group has one."""
    posterior = state["posterior"]
    if not all(value.is_contiguous() for value in posterior):
        state["posterior"] = fields.map_fields(Tensor.contiguous, posterior)
    if block.group["momentum"] == 0.0:
        state["momentum"] = ()
    elif not state["momentum"]:
        zero = empty_site(block, posterior)
        state["momentum"] = tuple(getattr(zero, name) for name in block.family.momentum_block)


def update_outer(block: Block, state: dict[str, Any], total: Any) -> Outer:
    """q_out ← the present posterior, ḡ_out ← ρ ḡ_out + (1−ρ) total; `total` is used up."""
    family, group, old = block.family, block.group, state["outer"]
    rho = family.per_block(*groups.pair(group["rho"]))
    posterior = fields.map_fields(torch.clone, state["posterior"]) if old is None else old.posterior
    for span in spans(block):
        present, mean = span.cut(state["posterior"]), span.cut(total)
        before = None if old is None else Outer(span.cut(old.posterior), span.cut(old.site))
        averaged = correction.update_outer(
            family, before, present, mean, rho=rho, reanchor_average=group["reanchor_average"]
        )
        for value, new in zip((*mean, *span.cut(posterior)), (*averaged.site, *present), strict=True):
            value.copy_(new)
    return Outer(posterior, total)


class StreamedStep:
    """One block's step, taken in place when it is committed."""

    def __init__(
        self,
        state: dict[str, Any],
        inner: StreamedView,
        outer: StreamedView | None,
        alpha: tuple[float, float],
    ) -> None:
        prepare(inner.block, state)
        self.block, self.state, self.inner, self.outer, self.alpha = inner.block, state, inner, outer, alpha
        self.prior = _spread(groups.prior_of(self.block), state["posterior"], self.block)
        self.age = state["step"] + 1 if state["momentum"] else 1

    def gradient_square(self) -> Tensor:
        """‖corrected gradient‖² of the momentum block."""
        numbers, values = self._numbers(1.0), []
        for span, recipe, inside, outside, outer in self._measured():
            like = torch.empty(span.shape, dtype=self.block.dtype, device=self.block.device)
            state = span.cut(self.state["posterior"])
            values.append(self.inner.runner.square(recipe, state, outer, inside, outside, numbers, like).cpu())
        return torch.stack(values).sum()

    def prepare(self, factor: float) -> None:
        """Nothing can fail before the step."""
        self.factor = factor

    def commit(self) -> None:
        """Step every span in place and write the point into the model."""
        block, state, numbers = self.block, self.state, self._numbers(self.factor)
        unsound = []
        with block.rewritten() as out:
            for span, recipe, inside, outside, outer in self._measured():
                posterior, momentum = span.cut(state["posterior"]), span.cut(state["momentum"])
                arguments = (recipe, posterior, momentum, span.cut(self.prior), outer, inside, outside, numbers)
                unsound.append(self.inner.runner.advance(*arguments, span.cut(out), block.dtype).cpu())
        block.at_point = True
        state["step"] = self.age if state["momentum"] else 0
        self.unsound = int(torch.stack(unsound).sum())

    def meter(self, meter: VarianceMeter, number: int) -> None:
        """Show the meter some of the weights."""
        if self.outer is None or not meter.samples(number):
            return
        span = next(spans(self.block, most=METER_WEIGHTS))
        ((_, recipe, inside, outside, q_out),) = self._measured(span)
        assert q_out is not None
        if isinstance(inside, Evidence):
            like = torch.empty(span.shape, dtype=self.block.dtype, device=self.block.device)
            outside = outside._replace(noise=inside.noise if outside.noise is None else outside.noise)
            outside = site(recipe, q_out.posterior, outside, like)
            inside = site(recipe, span.cut(self.state["posterior"]), inside, like)
        meter.add(number, self.block, inside, outside, q_out, self.alpha)

    def _measured(self, only: Span | None = None) -> Iterator[tuple[Span, Recipe, Any, Any, Outer | None]]:
        """Span by span: the recipe, what was measured inside and outside, and q_out."""
        recipe = self.inner.recipe()
        q_out = None if self.outer is None else self.state["outer"]
        for span in [only] if only is not None else self.inner.spans():
            inside = self.inner.evidence(span, recipe)
            outside = None
            if self.outer is not None:
                outside = self.outer.evidence(span, recipe, shared=self.outer.key == self.inner.key)
            yield span, recipe, inside, outside, span.cut(q_out)

    def _numbers(self, factor: float) -> Numbers:
        group = self.block.group
        unbias = blr.unbias_of(float(group["momentum"]), self.age, group["debias"])
        alpha = self.block.family.per_block(*self.alpha)
        return Numbers(groups.rates(group, self.block), alpha, unbias, factor)


def _spread(prior: Any, posterior: Any, block: Block) -> Any:
    """The prior with every field either of one weight's shape or of the whole block's."""

    def spread(value: Tensor, own: Tensor) -> Tensor:
        batch = len(block.shape) - block.family.event_dim
        constant = value.ndim <= own.ndim - batch
        return value if constant or value.shape == own.shape else value.expand_as(own).contiguous()

    return fields.map_fields(spread, prior, posterior)


def unsound_error(steps: Sequence[Any]) -> NonFiniteError | None:
    """The error after a step in which some weights had to keep their values."""
    for step in steps:
        count = getattr(step, "unsound", 0)
        if count:
            return NonFiniteError(
                f"lr={step.block.group['lr']}: the step would have made {count} of {step.block.numel} weights of "
                f"{step.block.name!r} infinite or NaN; these kept their values, all others were stepped. Lower lr or "
                "precision_lr, or clip (clip_radius, max_grad_norm)."
            )
    return None
