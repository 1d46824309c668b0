"""Large leafwise tensors, stepped span by span in place: views and steps that hold nothing larger than a span.

They do what `View` and `WholeStep` do for small and joint blocks, by the kernels of `kernels`. Since a step in place
cannot be undone, weights whose step would not be finite keep their values, and the error comes after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import blr, correction, fields, groups
from .backend import Backend, plainly, span_size
from .blocks import Block
from .correction import Outer
from .errors import NonFiniteError
from .estimators import Estimator, Reparameterised
from .evaluation import Measured
from .kernels import Evidence, Numbers, Recipe, corrected, numbers_of, site_pair
from .measurement import View
from .meter import VarianceMeter
from .noise import Address, NoiseKey
from .spans import TILE, Bucket, Span, can_stream, spans, spread

METER_WEIGHTS = 2**12  # of each block; the meter's ratios need no more


@dataclass
class StreamedView(View):
    """A view that looks its noise up again wherever it needs it, and keeps only gradients.

    With several draws, or chunks of a mega-batch, each is added to `total` with `weight` and dropped.
    """

    key: NoiseKey = field(default_factory=lambda: NoiseKey(0))
    mode: str = "shared"
    draws: int = 1
    backend: Backend | None = None
    collected: bool = False
    bucket: Bucket | None = None

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
            float(group["momentum"]) > 0.0,
            float(group["clip_radius"]),
            group["retraction"],
            groups.anchor_weight(group),
            "zero" if self.mode == "zero" else "reflected" if reflected else "random",
            group["prior_in_momentum"],
        )

    def source(self, span: Span, recipe: Recipe, draw: int) -> Tensor | Address:
        """One draw's noise on a span, or its address."""
        number = draw // 2 if self.mode == "antithetic" else draw
        key = self.key.at(
            parameter=self.block.index,
            draw=self.key.draw + number,
            offset=span.start * span.event.numel() * numbers_of(self.block.family),
        )
        tiles = self.block.tiles if isinstance(self.block, Bucket) else None
        return self.runner.noise(recipe, key, self.like(span), tiles)

    def like(self, span: Span) -> Tensor:
        """A tensor of the span's shape, dtype and device; its values mean nothing."""
        return torch.empty(span.shape, dtype=self.block.dtype, device=self.block.device)

    @property
    def runner(self) -> Backend:
        """The backend, which every streamed view has."""
        assert self.backend is not None
        return self.backend

    def spans(self) -> Iterator[Span]:
        """The block's spans, as long as the backend likes them; a bucket is one."""
        whole = isinstance(self.block, Bucket)
        return spans(self.block, self.block.numel if whole else span_size(self.runner.mode, self.block.device))

    @plainly
    def write(self, draw: int) -> None:
        """Put draw number `draw` into the model, unless it is there."""
        recipe = self.recipe(draw)
        if draw == 0 and self._take_first_draw():
            return
        with self.block.rewritten() as out:
            for span in self.spans():
                source = self.source(span, recipe, draw)
                self.runner.draw(recipe, span.cut(self.state), source, span.cut(out), self.block.dtype)

    def _take_first_draw(self) -> bool:
        """Whether the last step has left this draw in the model; it counts once, for λ_out may have the same key."""
        blocks = self.block.blocks if isinstance(self.block, Bucket) else [self.block]
        held = all(block.drawn == self.key for block in blocks)
        for block in blocks:
            block.drawn = None
        return held

    def record(self, draw: int, measured: Measured, position: slice) -> None:
        """Keep the block's gradient."""
        (grad,) = measured.grads[position]
        if grad is not None:
            self.grad, self.loss, self.collected = [grad], [measured.loss], True

    def collect(self, draw: int) -> None:
        """Add the natural gradient of the draw just recorded to the total, and drop the gradient."""
        if not self.grad or self.grad[0] is None:
            return
        recipe, grad = self.recipe(draw), self.grad[0]
        for span in self.spans():
            evidence = Evidence(self.source(span, recipe, draw), span.cut(grad), self.loss[0])
            arguments = (recipe, span.cut(self.state), evidence, span.cut(self.total), self.weight)
            self.runner.collect(*arguments, float(self.block.group["ess"]), self.like(span))
        self.grad, self.loss = [], []

    def used(self) -> bool:
        """Whether any evaluation depended on the block."""
        return self.used_before or self.collected

    def settled(self) -> Any:
        """The total, to which every draw has been added."""
        return self.total

    def evidence(self, span: Span, recipe: Recipe, *, shared: bool = False) -> Any:
        """What was measured on a span: the total, or one draw's gradient (zero where the batch did not use it).

        With `shared` the noise is left out, being that of another view's evidence.
        """
        if self.total is not None:
            return span.cut(self.total)
        source = None if shared else self.source(span, recipe, 0)
        if not self.grad or self.grad[0] is None:
            return Evidence(source, torch.zeros_like(self.like(span)), torch.zeros((), device=self.block.device))
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
    view.total, view.weight, view.bucket = total, share / count, backend.buckets.get(block)
    return view


@plainly
def empty_site(block: Block, state: Any) -> Any:
    """A site of zeros for the whole block."""
    first = next(spans(block, TILE, most=1)).cut(state)
    example = block.family.kl_gradient(first, first)
    return fields.map_fields(lambda value: value.new_zeros(*block.batch, *value.shape[1:]), example)


def together(views: Sequence[View]) -> list[View]:
    """The same views with those of a whole bucket merged into one; others pass."""
    found, waiting = by_bucket(views, lambda view: view)
    for bucket, members in waiting.items():
        merged = merge(bucket, members)
        found.extend(members if merged is None else [merged])
    return found


def by_bucket(items: Sequence[Any], view_of: Callable[[Any], View]) -> tuple[list[Any], dict[Bucket, list[Any]]]:
    """The items whose view is in no bucket, and the others by bucket."""
    alone: list[Any] = []
    waiting: dict[Bucket, list[Any]] = {}
    for item in items:
        view = view_of(item)
        bucket = view.bucket if isinstance(view, StreamedView) else None
        (alone if bucket is None else waiting.setdefault(bucket, [])).append(item)
    return alone, waiting


@plainly
def collect(views: Sequence[View], draw: int) -> None:
    """Add the draw just recorded to the totals of those views that have one."""
    collecting = [view for view in views if isinstance(view, StreamedView) and view.total is not None]
    for view in together(collecting):
        assert isinstance(view, StreamedView)
        view.collect(draw)
    for view in collecting:
        view.grad, view.loss = [], []


def merge(bucket: Bucket, members: Sequence[StreamedView]) -> StreamedView | None:
    """One view of the bucket, or None where some member is missing, unused, or still to be laid beside the others."""
    if bucket.group["prior"] is not None:
        return None  # each member has its own
    totals = [view.total is not None for view in members]
    grads = [view.grad[0] for view in members if view.grad and view.grad[0] is not None]
    whole = [view.block for view in members] == bucket.blocks and len(set(totals)) == 1
    if not whole or len(grads) not in (0, len(members)):
        return None
    first = members[0]
    state, _ = bucket.bound([view.state for view in members])
    total = None
    if totals[0]:
        total, parts = bucket.bound([view.total for view in members])
        for view, part in zip(members, parts, strict=True):
            view.total = part
    grad: list[Tensor | None] = [bucket.beside(grads)] if grads else []
    merged = replace(first, block=bucket, state=state, total=total, grad=grad, bucket=None)
    return merged


def bind(bucket: Bucket, states: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The members' records as one of flat tensors, of which theirs become views; None where they differ in age."""
    ages = {(state["step"], len(state["momentum"]), state["outer"] is None) for state in states}
    if len(ages) != 1:
        return None
    flat: dict[str, Any] = {"step": states[0]["step"], "outer": None}
    for role in ("posterior", "momentum"):
        flat[role], own = bucket.bound([state[role] for state in states])
        for state, value in zip(states, own, strict=True):
            state[role] = value
    if states[0]["outer"] is not None:
        outers = [state["outer"] for state in states]
        posterior, own_posterior = bucket.bound([outer.posterior for outer in outers])
        site, own_site = bucket.bound([outer.site for outer in outers])
        flat["outer"] = Outer(posterior, site)
        for state, *parts in zip(states, own_posterior, own_site, strict=True):
            state["outer"] = Outer(*parts)
    return flat


@plainly
def sample_into(block: Block, state: Any, backend: Backend, key: NoiseKey) -> None:
    """Put a sample of q into the model."""
    streamed_view(block, state, backend, "shared", 1, key, estimator=Reparameterised()).write(0)


@plainly
def still_drawn(block: Block, record: dict[str, Any], mode: str, backend: Backend) -> bool:
    """Whether the model holds, up to rounding, the draw that `one_pass` left there (it may come from a checkpoint)."""
    key, block.drawn = block.drawn, None
    if key is None or not can_stream(block):
        return False
    state = record["posterior"]
    (p,) = block.params
    view = streamed_view(block, state, backend, mode, 1, key)
    recipe, present = view.recipe(), p.detach()
    for span in view.spans():
        drawn = torch.empty(span.shape, dtype=p.dtype, device=p.device)
        backend.draw(recipe, span.cut(state), view.source(span, recipe, 0), drawn, block.dtype)
        if not torch.allclose(drawn, span.cut(present), rtol=1e-4, atol=1e-6):
            return False
    return True


@plainly
def write_point(block: Block, state: Any) -> None:
    """Put the point of q into the model."""
    with block.rewritten() as out:
        for span in spans(block, span_size("eager", block.device)):
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


@plainly
def update_outer(block: Block, state: dict[str, Any], total: Any) -> Outer:
    """q_out ← the present posterior, ḡ_out ← ρ ḡ_out + (1−ρ) total; `total` is used up."""
    family, group, old = block.family, block.group, state["outer"]
    rho = family.per_block(*groups.pair(group["rho"]))
    if old is not None:
        old = Outer(*(fields.map_fields(Tensor.contiguous, part) for part in old))
    posterior = fields.map_fields(torch.clone, state["posterior"]) if old is None else old.posterior
    for span in spans(block, span_size("eager", block.device)):
        present, mean = span.cut(state["posterior"]), span.cut(total)
        before = None if old is None else Outer(span.cut(old.posterior), span.cut(old.site))
        averaged = correction.update_outer(
            family,
            before,
            present,
            mean,
            rho=rho,
            reanchor_average=group["reanchor_average"],
            anchor_weight=groups.anchor_weight(group),
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
        self.unsound = 0
        self.block, self.state, self.inner, self.outer, self.alpha = inner.block, state, inner, outer, alpha
        self.age = state["step"] + 1 if state["momentum"] else 1

    @plainly
    def gradient_square(self) -> Tensor:
        """‖corrected gradient‖² of the momentum block."""
        numbers, values = self._numbers(1.0), []
        for span, recipe, inside, outside, outer in self._measured():
            arguments = (span.cut(self.state["posterior"]), outer, inside, outside, numbers)
            values.append(self.inner.runner.square(recipe, self.inner.like(span), *arguments).cpu())
        return torch.stack(values).sum()

    def prepare(self, factor: float, following: NoiseKey | None = None) -> None:
        """Nothing can fail before the step. `following`: the key of the draw to leave in the model, if any."""
        self.factor, self.following = factor, following

    def commit(self) -> None:
        """Step every span in place and write the point, or the next draw, into the model."""
        block, state, numbers = self.block, self.state, self._numbers(self.factor)
        prior = spread(groups.prior_of(block), state["posterior"], block)
        real = block.real if isinstance(block, Bucket) else None
        following = None if self.following is None else replace(self.inner, key=self.following)
        unsound = []
        with block.rewritten() as out:
            for span, recipe, inside, outside, outer in self._measured():
                posterior, momentum = span.cut(state["posterior"]), span.cut(state["momentum"])
                after = None if following is None else following.source(span, recipe, 0)
                arguments = (posterior, momentum, span.cut(prior), outer, inside, outside, numbers, real, after)
                unsound.append(self.inner.runner.advance(recipe, span.cut(out), block.dtype, *arguments).cpu())
        state["step"] = self.age if state["momentum"] else 0
        block.at_point, block.drawn = following is None, self.following
        self.unsound_tiles = unsound[0]
        self.unsound = int(torch.stack(unsound).sum())

    @plainly
    def meter(self, meter: VarianceMeter, number: int, keep: float | None = None) -> None:
        """Show the meter some of the weights; `keep` is of an adaptive α, which looks at every pair."""
        if not meter.samples(number, keep is not None):
            return
        span = next(spans(self.block, METER_WEIGHTS, most=METER_WEIGHTS))
        ((_, recipe, inside, outside, q_out),) = self._measured(span)
        state, like = span.cut(self.state["posterior"]), self.inner.like(span)
        pair = site_pair(recipe, state, q_out, inside, outside, like, self.block.group["ess"])
        if q_out is not None:
            terms = correction.variance_terms(pair[0], *correction.carried(self.block.family, pair[1], q_out, state))
            meter.add(self.block.name, terms, self.block.family.per_block(*self.alpha), keep)
        if meter.samples(number):
            site = corrected(recipe, state, q_out, *pair, self._numbers(1.0), like).site
            square = blr.square_of([getattr(site, name) for name in self.block.family.momentum_block])
            meter.add_square(number, self.block.name, float(square) * self.block.numel / like.numel())

    def sites(self) -> Iterator[tuple[Any, Any, Any]]:
        """Span by span: the site inside, the one outside, and the corrected one with its anchor term."""
        numbers = self._numbers(1.0)
        for span, recipe, inside, outside, q_out in self._measured():
            state, like = span.cut(self.state["posterior"]), self.inner.like(span)
            pair = site_pair(recipe, state, q_out, inside, outside, like, self.block.group["ess"])
            yield *pair, corrected(recipe, state, q_out, *pair, numbers, like)

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

    def _numbers(self, factor: float) -> Tensor:
        group = self.block.group
        unbias = blr.unbias_of(float(group["momentum"]), self.age, group["debias"])
        alpha = self.block.family.per_block(*self.alpha)
        rates = groups.rates(group, self.block)
        return Numbers(rates, alpha, float(group["ess"]), float(group["momentum"]), unbias, factor).packed()


@plainly
def commit(steps: Sequence[Any]) -> None:
    """Commit all steps, those of a whole bucket in one."""
    alone, waiting = by_bucket(steps, lambda step: step.inner)
    for step in alone:
        step.commit()
    for bucket, members in waiting.items():
        merged = merge_steps(bucket, members)
        if merged is None:
            for step in members:
                step.commit()
            continue
        merged.commit()
        for step in members:
            step.state["step"] = merged.state["step"]
            step.block.at_point, step.block.drawn = merged.block.at_point, merged.block.drawn
        counts = bucket.per_member(merged.unsound_tiles) if merged.unsound else [0] * len(members)
        for step, count in zip(members, counts, strict=True):
            step.unsound = count


def merge_steps(bucket: Bucket, steps: Sequence[StreamedStep]) -> StreamedStep | None:
    """One step of the whole bucket, or None where the members' steps differ."""
    outers = [step.outer for step in steps if step.outer is not None]
    if len(outers) not in (0, len(steps)) or len({(step.alpha, step.factor, step.following) for step in steps}) != 1:
        return None
    inner = merge(bucket, [step.inner for step in steps])
    outer = merge(bucket, outers) if outers else None
    if inner is None or (outers and outer is None):
        return None
    state = bind(bucket, [step.state for step in steps])
    if state is None:
        return None
    inner.state = state["posterior"]
    merged = StreamedStep(state, inner, outer, steps[0].alpha)
    merged.prepare(steps[0].factor, steps[0].following)
    return merged


def unsound_error(steps: Sequence[Any]) -> NonFiniteError | None:
    """The error after a step in which some weights had to keep their values."""
    for step in steps:
        if step.unsound:
            error = NonFiniteError(
                f"lr={step.block.group['lr']}: the step would have made {step.unsound} of {step.block.numel} weights "
                f"of {step.block.name!r} infinite or NaN; these kept their values, all others were stepped. Lower lr "
                "or precision_lr, or clip (clip_radius, max_grad_norm)."
            )
            error.stepped = True
            return error
    return None
