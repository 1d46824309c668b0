"""Of what steps can be captured, what tells one kind of them from another, and when the next one is like the last."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from expfam_poco.arguments import shown
from expfam_poco.closures import processes
from expfam_poco.engine.block import LOOK_AGAIN, LOOKS, Block, Record
from expfam_poco.engine.flat import ROLES, FlatBlock
from expfam_poco.engine.settings import Settings
from expfam_poco.engine.width import PATIENCE
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.optim.base import Shell


def refuse(optimizer: Shell) -> None:
    """Refuse what no step can be captured of.

    Raises:
        ValueError: names the argument.
    """
    instead = "call step(closure)"
    if optimizer.one_pass:
        raise ValueError(f"one_pass=True: a captured step leaves the model at the point; leave it out, or {instead}.")
    if optimizer._products.kind != "curvature":
        kind = optimizer._products.kind
        raise ValueError(
            f"anchor={kind!r}: it evaluates other batches besides, which no graph does; take anchor='curvature', or "
            f"{instead}."
        )
    if optimizer._evaluator.processes is not None or (
        not optimizer._is_alone and processes.are_many(optimizer._process_group)
    ):
        raise ValueError(f"process_group: several processes wait for each other, which no graph does; {instead}.")
    for block in optimizer._blocks:
        family, estimator = block.family, block.settings.estimator
        if family.joint or type(family).noise is not ExponentialFamily.noise:
            raise ValueError(
                f"family={type(family).__name__}: its steps look at values (factors of matrices, noise of its own), "
                f"which no graph does; {instead}."
            )
        if estimator.needs != "gradient" or estimator.compares:
            raise ValueError(
                f"curvature={shown(estimator)}: a graph holds estimators of gradients alone, not second derivatives, "
                f"other losses or solutions of linear systems; take curvature='reparam' (or 'gradsq'), or {instead}."
            )


def constants_of(s: Settings) -> Hashable:
    """What a graph keeps of a block's settings."""
    prior = None if s.prior is None else _Same(s.prior)
    own = s.anchor_weight, s.clip_radius, s.retraction, s.prior_in_momentum, s.own_site, s.maximize
    return (s.family, s.estimator, s.momentum > 0.0, s.square_momentum is not None, prior, *own)


class _Same:
    """An object by its identity, as a part of a key."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._own is self._own

    def __hash__(self) -> int:
        return id(self._own)


class Last(NamedTuple):
    """What the last step found, by which the next one may go as long as it is so: looking costs a tenth of making it.

    Attributes:
        settings: of every group.
        own: what the optimizer has for all groups, and its counters of refreshes.
        params: the trainable parameters, one by one with the block that knows what they are.
        records: the records of all blocks.
        units: the flat blocks.
        steady: whether α is a number everywhere.
        settled: whether all numbers are the last step's: also those that depend on the momentum's age do not move.
    """

    settings: list[Settings]
    own: tuple[Any, ...]
    params: list[tuple[Any, Block]]
    frozen: list[Any]
    records: list[tuple[Any, Record, list[Any]]]
    units: list[FlatBlock]
    steady: bool
    settled: bool = False

    @staticmethod
    def _own(optimizer: Shell) -> tuple[Any, ...]:
        clock = optimizer._clock
        return (
            optimizer.seed, optimizer.noise, optimizer.mc_samples, optimizer.correction, optimizer.max_grad_norm,
            optimizer.one_pass, clock["refresh"], clock["memory"], len(optimizer.param_groups),
        )  # fmt: skip

    @classmethod
    def of(cls, optimizer: Shell, blocks: Sequence[Block], units: Sequence[tuple[Block, Record]]) -> Last:
        """What a step of these blocks, stepped as these units, has found."""
        params = [(block.params[0], block) for block in blocks]
        known = {id(p) for p, _ in params}
        frozen = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known and p.numel()]
        settings = [reading.of(g) for reading, g in zip(optimizer._readings, optimizer.param_groups, strict=True)]
        records = [(p, b.record, [b.record[role] for role in ROLES]) for p, b in params]  # type: ignore[literal-required]
        flat = [block for block, _ in units if isinstance(block, FlatBlock)]
        return cls(settings, cls._own(optimizer), params, frozen, records, flat, _are_steady(settings))

    def still(self, optimizer: Shell) -> Last | None:
        """The same for the next step, if all is so, and nobody is to look closer: the meter, or for hidden writes.

        What a graph finds in its slots, rates among it, may have changed; the blocks then go by it.
        """
        number, looks = optimizer._clock["step"] + 1, self.params[0][1]._looks
        closer = looks < LOOKS or not (looks + 1) % LOOK_AGAIN or number == PATIENCE
        if closer or optimizer._meter.samples(number) or optimizer._layout.trying or self._own(optimizer) != self.own:
            return None
        settings = [reading.of(g) for reading, g in zip(optimizer._readings, optimizer.param_groups, strict=True)]
        same = all(map(operator.is_, settings, self.settings))
        if not same and not all(map(_are_alike, settings, self.settings)):
            return None
        if any(
            [p.grad is not None or not p.requires_grad or b.weights_changed() or not b.at_point for p, b in self.params]
        ):
            return None
        if any([p.requires_grad for p in self.frozen]):
            return None
        state = optimizer.state
        for p, record, values in self.records:
            present = [record[role] for role in ROLES]  # type: ignore[literal-required]
            if state.get(p) is not record or not all(map(operator.is_, present, values)):
                return None
        if not all([unit.is_bound() for unit in self.units]):
            return None
        for _, block in self.params:
            block._looks += 1
        if same:
            return self
        optimizer._read_settings()
        for unit in self.units:
            unit.adopt(unit.members[0].settings)
        return self._replace(settings=settings, steady=_are_steady(settings), settled=False)


def _are_alike(first: Settings, second: Settings) -> bool:
    """Whether what differs is in slots; a prior of their own strength has to be brought."""
    if first is second:
        return True
    adaptive = first.adaptive is not None or second.adaptive is not None
    strengths = first.ess * first.weight_decay, second.ess * second.weight_decay
    return not adaptive and strengths[0] == strengths[1] and constants_of(first) == constants_of(second)


def _are_steady(settings: Sequence[Settings]) -> bool:
    return all([isinstance(own.alpha, int | float | tuple) for own in settings])
