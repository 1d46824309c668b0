"""Small blocks of a large model, whose trials and steps are taken together where all of a bucket are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction.snapshot import Outer
from expfam_poco.engine.backend import Backend, plainly, span_size
from expfam_poco.engine.block import Block
from expfam_poco.engine.step import Step
from expfam_poco.engine.tiles import Bucket, can_stream, spans
from expfam_poco.engine.trial import Trial
from expfam_poco.errors import NonFiniteError
from expfam_poco.rule.estimators import Reparameterised


def together(views: Sequence[Trial]) -> list[Trial]:
    """The same views with those of a whole bucket merged into one; others pass."""
    found, waiting = by_bucket(views, lambda view: view)
    for bucket, members in waiting.items():
        merged = merge(bucket, members)
        found.extend(members if merged is None else [merged])
    return found


def by_bucket(items: Sequence[Any], view_of: Callable[[Any], Trial]) -> tuple[list[Any], dict[Bucket, list[Any]]]:
    """The items whose view is in no bucket, and the others by bucket."""
    alone: list[Any] = []
    waiting: dict[Bucket, list[Any]] = {}
    for item in items:
        bucket = view_of(item).bucket
        (alone if bucket is None else waiting.setdefault(bucket, [])).append(item)
    return alone, waiting


@plainly
def collect(views: Sequence[Trial], draw: int) -> None:
    """Add the draw just recorded to the totals of those views that have one."""
    collecting = [view for view in views if view.in_place and view.total is not None]
    for view in together(collecting):
        view.collect(draw)
    for view in collecting:
        view.grad, view.loss = [], []


def merge(bucket: Bucket, members: Sequence[Trial]) -> Trial | None:
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
    return replace(first, block=bucket, state=state, total=total, grad=grad)


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
def still_drawn(block: Block, record: dict[str, Any], mode: str, backend: Backend) -> bool:
    """Whether the model holds, up to rounding, the draw that `one_pass` left there (it may come from a checkpoint)."""
    key, block.drawn = block.drawn, None
    if key is None or not can_stream(block):
        return False
    state = record["posterior"]
    (p,) = block.params
    trial = Trial(block, block.group["curvature"], state, key, key, mode, 1, backend)
    recipe, present = trial.recipe(), p.detach()
    for span in trial.tiles():
        drawn = torch.empty(span.shape, dtype=p.dtype, device=p.device)
        backend.draw(recipe, span.cut(state), trial.source(span, recipe, 0), drawn, block.dtype)
        if not torch.allclose(drawn, span.cut(present), rtol=1e-4, atol=1e-6):
            return False
    return True


def draw_into(block: Block, state: Any, key: Any, backend: Backend | None) -> None:
    """Put a sample of q into the model."""
    Trial(block, Reparameterised(), state, key, key, backend=backend if can_stream(block) else None).write(0)


@plainly
def write_point(block: Block, state: Any) -> None:
    """Put the point of q into the model."""
    with block.rewritten() as out:
        for span in spans(block, span_size("eager", block.device)):
            span.cut(out).copy_(block.family.point(span.cut(state)))


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


def merge_steps(bucket: Bucket, steps: Sequence[Step]) -> Step | None:
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
    merged = Step(state, inner, outer, steps[0].alpha)
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
