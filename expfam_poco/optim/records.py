"""What a `PosteriorCorrected` keeps, as plain dictionaries and back: its groups, and a record for every block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco import arguments
from expfam_poco.arguments import instance
from expfam_poco.correction import CORRECTIONS
from expfam_poco.correction.alpha import alpha_from, describe_alpha
from expfam_poco.correction.base import Averaging, Correction
from expfam_poco.correction.snapshot import Snapshot
from expfam_poco.correction.variance import is_meter_state
from expfam_poco.engine.beginning import check_prior
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.flips import Flips
from expfam_poco.engine.settings import HYPERPARAMETERS, check_group, python_number
from expfam_poco.errors import CheckpointError
from expfam_poco.family import fields, hyperparameters
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Estimator
from expfam_poco.family.noise import NoiseKey
from expfam_poco.family.registry import name_of
from expfam_poco.optim.base import Shell
from expfam_poco.optim.checkpoint import PRECISE, Recorded, check_clock, check_groups, filled, fitted, is_count, reading
from expfam_poco.rule.blr import average_names

CLOCK = ("step", "refresh", "refreshed", "memory", "chunk", "sample", "skipped", "mega", "every")
_NEWER = {"mega": 0, "every": 0}  # counters that formats below 5 do not have
_HEADER: dict[str, Any] = {
    "settings": Mapping,
    "seed": int,
    "clock": Mapping,
    "meter": Mapping,
    "anchor_hessian": (Tensor, type(None)),
}
NOISE = tuple(f.name for f in dataclasses.fields(NoiseKey))
_OBJECTS = ("family", "curvature", "prior", "alpha")


def encode_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with its objects described in plain types."""
    plain = {key: python_number(value) for key, value in group.items() if key not in _OBJECTS}
    plain["family"] = describe(group["family"])
    plain["curvature"] = describe(group["curvature"])
    plain["alpha"] = describe_alpha(group["alpha"])
    prior = group["prior"]
    if isinstance(prior, dict):
        plain["prior"] = {name: fields.to_plain(value) for name, value in prior.items()}
    else:
        plain["prior"] = None if prior is None else fields.to_plain(prior)
    return plain


def describe(thing: ExponentialFamily | Estimator | Correction) -> dict[str, Any]:
    """The registered name (or import path) and the hyperparameters of a family or an estimator."""
    name = name_of(thing) if isinstance(thing, ExponentialFamily) else type(thing).__name__
    settings = {f.name: python_number(hyperparameters.plain(getattr(thing, f.name))) for f in dataclasses.fields(thing)}
    return {"name": name, "settings": settings}


def encode_state(
    block: Block, state: Mapping[str, Any], correction: Correction, *, begins: bool = False
) -> dict[str, Any]:
    """One block's record: NamedTuples become dictionaries of copies, which later steps in place do not reach.

    All records of a block have the same entries, for torch.distributed.checkpoint reads only into those that there
    are: what there is not yet holds its place with infinities, or with −1 in whole numbers; the posterior, too, of a
    block that `begins` at its first step.
    """
    family, posterior, memory, momentum = block.family, state["posterior"], state["memory"], state["momentum"]
    count = len(family.momentum_block)
    squares = len(momentum) > count or block.settings.square_momentum is not None
    names = average_names(family, squares)
    averaged = dict(zip(names, momentum, strict=True)) if len(momentum) == len(names) else {}
    if memory is None or not averaged:
        site = family.kl_gradient(posterior, posterior)
        like = memory_like(correction, family, posterior, site) if memory is None else memory
        memory = fields.map_leaves(_absent, like) if memory is None else memory
        zeros = [getattr(site, name) for name in family.momentum_block]
        averaged = averaged or {name: _absent(zeros[i % count]) for i, name in enumerate(names)}
    drawn = dict.fromkeys(NOISE, -1) if state["drawn"] is None else dataclasses.asdict(state["drawn"])
    ages = torch.full(block.batch[:1], -1) if state["ages"] is None else state["ages"].clone()
    plain = {
        "step": state["step"],
        "ages": ages,
        "stamp": state["stamp"],
        "in_mega": state["in_mega"],
        "drawn": drawn,
        "posterior": plain_of(fields.map_leaves(_absent, posterior) if begins else posterior),
        "momentum": {name: value.clone() for name, value in averaged.items()},
        "memory": {} if memory is None else plain_of(memory),
    }
    return plain if block.shard is None else _of_tensors(block.whole_of, plain) | {"ages": block.shard.spread(ages, 1)}


def _of_tensors(function: Callable[[Tensor], Tensor], plain: Any) -> Any:
    """Nested dictionaries with a function of their tensors."""
    if isinstance(plain, Mapping):
        return {name: _of_tensors(function, value) for name, value in plain.items()}
    return function(plain) if isinstance(plain, Tensor) else plain


def _absent(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.inf, memory_format=torch.contiguous_format)


def _is_absent(value: Any, like: Any) -> bool:
    """Whether it holds the place of such tensors; what a format below 7 left out has none."""
    if value is None:
        return True
    if isinstance(like, Tensor):
        fits = isinstance(value, Tensor) and value.shape == like.shape and value.dtype in PRECISE
        return fits and value.numel() > 0 and bool((value == torch.inf).all())
    like = like if isinstance(like, Mapping) else like._asdict()
    return bool(like) and set(value) == set(like) and all(_is_absent(value[name], own) for name, own in like.items())


def plain_of(values: Any) -> Any:
    """Nested NamedTuples of tensors as nested dictionaries of copies."""
    if isinstance(values, Tensor):
        return values.clone(memory_format=torch.contiguous_format)
    return {name: plain_of(value) for name, value in values._asdict().items()}


def decode_state(block: Block, plain: Any, correction: Correction) -> Record | None:
    """The inverse of `encode_state` on the block's device and in its dtype, checked; None has not begun."""
    block.fit()  # the model may have moved
    family, where = block.family, f"state_dict: the state of {block.name!r}"
    if block.shard is not None and isinstance(plain, Mapping):
        plain = _of_tensors(block.part_of, plain) | {"ages": block.shard.cut(plain["ages"], 1)}
    expected = family.centred_at(block.read())
    site = family.kl_gradient(expected, expected)
    try:
        given, count = plain["momentum"], len(family.momentum_block)
        names = average_names(family, isinstance(given, dict) and len(given) > count)
        average = {name: getattr(site, family.momentum_block[i % count]) for i, name in enumerate(names)}
        like = memory_like(correction, family, expected, site)
        if plain["posterior"] is not None and _is_absent(plain["posterior"], expected):
            return None
        memory, momentum, drawn = plain["memory"], plain["momentum"], plain["drawn"]
        if type(momentum) is list:  # below format 7
            momentum = dict(zip(average, momentum, strict=True)) if momentum else None
        if _count(plain, "step") == 0 and _is_absent(momentum, average):  # of steps in the average
            average = momentum = {}
        if not isinstance(momentum, dict) or set(momentum) != set(average):
            raise ValueError(f"momentum is {type(momentum).__name__} where {sorted(average)} are needed")
        if memory == {} if like is None else _is_absent(memory, like):
            memory = None
        if memory is None and _count(plain, "stamp") > 0:
            raise ValueError("stamp is that of a memory, which there is not")
        drawn = None if drawn == dict.fromkeys(NOISE, -1) else drawn
        record = Record(
            step=_count(plain, "step"),
            ages=_ages(plain["ages"], block),
            stamp=_count(plain, "stamp"),
            in_mega=_boolean(plain["in_mega"]),
            drawn=None if drawn is None else NoiseKey(**{name: drawn[name] for name in NOISE}),
            header=None,
            posterior=_nested(expected, plain["posterior"], where),
            momentum=tuple(fitted(where, f"momentum of {n}", momentum[n], own) for n, own in average.items()),
            memory=None if memory is None else _nested(like, memory, where),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{where} is incomplete or damaged ({type(error).__name__}: {error}); use another file."
        ) from None
    states = [record["posterior"], *_states_in(record["memory"], like, expected)]
    if not all(bool(family.in_domain(state)) for state in states):
        raise CheckpointError(f"{where} is outside the domain of {type(family).__name__}; use another file.")
    return record


def _ages(ages: Any, block: Block) -> Tensor | None:
    if type(ages) is tuple:  # below format 7
        return None
    fits = ages.dtype == torch.int64 and ages.shape == block.batch[:1]
    if fits and bool((ages == -1).all()):
        return None
    if not fits or bool((ages < 0).any()):
        raise ValueError(
            f"ages are {tuple(ages.shape)} of {ages.dtype} where {tuple(block.batch[:1])} counts are needed"
        )
    return torch.as_tensor(ages).to(block.device)


def _states_in(memory: Any, like: Any, state: Any) -> list[Any]:
    """The memory's States: a Site may be of the same type, but stands elsewhere in `like`."""
    return [] if memory is None else [own for own, kind in zip(memory, like, strict=True) if kind is state]


def memory_like(correction: Correction, family: ExponentialFamily, state: Any, site: Any) -> Any:
    """A memory of this correction for such a state, whose values mean nothing."""
    how = Averaging(family.per_block(0.0, 0.0), True, 0.0)
    begun = correction.begin(family, state)
    return begun if begun is not None else correction.after_refresh(family, None, state, site, how)


def decode_states(
    blocks: Sequence[Block], own: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any], correction: Correction
) -> dict[str, Record]:
    """The states of all blocks that have one, by block name."""
    groups, saved = state_dict["param_groups"], state_dict["state"]
    number_of = {
        id(p): n for g, s in zip(own, groups, strict=True) for p, n in zip(g["params"], s["params"], strict=True)
    }
    found = {block.name: saved.get(number_of[id(block.params[0])]) for block in blocks}
    records = {b.name: decode_state(b, plain, correction) for b in blocks if (plain := found[b.name])}
    return {name: record for name, record in records.items() if record is not None}


def posteriors_of(
    state: Mapping[str, Any], blocks: Sequence[Block], own: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A State for every block, from a dictionary of States by name or from an optimizer's `state_dict`."""
    instance("state", state, Mapping, "give what posterior_states() or state_dict() returns")
    if "param_groups" in state:
        with reading():
            check_groups([encode_group(group) for group in own], filled(state["param_groups"]), ("family",), ())
            state = upgraded(state)
            if not isinstance(state.get("state"), Mapping):
                raise CheckpointError("state_dict['state']: missing; use a state_dict of PosteriorCorrected.")
            found = decode_states(blocks, own, state, _correction_of(state))
        states = {name: value["posterior"] for name, value in found.items()}
    else:
        states = dict(state)
    for block in blocks:
        value, example = states.get(block.name), block.family.centred_at(block.read())
        states[block.name] = _posterior(block, value, example)
    return states


def _posterior(block: Block, value: Any, like: Any) -> Any:
    """The State on the block's device and in its dtype."""
    if isinstance(value, type(like)) and all(isinstance(v, Tensor) and v.is_floating_point() for v in value):
        cast = type(like)(*(block.part_of(v).to(device=block.device, dtype=block.dtype) for v in value))
        shapes = [v.shape for v in cast] == [v.shape for v in like]
        if shapes and bool(block.family.in_domain(cast)):
            return cast
    raise ValueError(
        f"state: it has no finite {type(like).__name__} of the right shape, and in the domain of "
        f"{type(block.family).__name__}, for {block.name!r}; give what posterior_states() or state_dict() of an "
        "optimizer of the same model returns."
    )


def _decode_group(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyperparameters; family, estimator and a function of the user's own for α stay the optimizer's."""
    group = {key: value for key, value in saved.items() if key not in (*_OBJECTS, "params")}
    group["alpha"] = alpha_from(saved["alpha"], own["alpha"])
    prior, state = saved["prior"], own["family"].State
    if prior and all(isinstance(value, Tensor) for value in prior.values()):
        group["prior"] = fields.from_plain(state, prior)
    else:
        group["prior"] = None if prior is None else {k: fields.from_plain(state, v) for k, v in prior.items()}
    return group


def upgraded(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state_dict of format 2 to 7 in the present format."""
    header = state_dict.get("poco")
    if not isinstance(header, Mapping) or header.get("format") not in (2, 3, 4, 5, 6, 7):
        return state_dict
    try:
        state_dict = _from_2(state_dict, header) if header["format"] == 2 else state_dict
        groups = []
        for group in state_dict["param_groups"]:  # below 4 their lr_scale was what is lr_convention now
            kept = {name: value for name, value in group.items() if name != "lr_scale" or "lr_convention" in group}
            scale = group["lr_convention" if "lr_convention" in group else "lr_scale"]
            groups.append(
                {"own_site": False, "square_momentum": None, "kl_weight": 1.0, **kept, "lr_convention": scale}
            )
        state = {
            key: _with_ages(record) if is_count(key) and header["format"] < 7 else record
            for key, record in state_dict["state"].items()
        }
        header = {
            "records": sorted(filter(is_count, state_dict["state"])),
            **state_dict["poco"],
            "format": Resuming.newest,
            "clock": {**_NEWER, **state_dict["poco"]["clock"]},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"state_dict: a damaged checkpoint of format {header['format']} ({error!r}); use another file."
        ) from None
    return {**state_dict, "state": state, "param_groups": groups, "poco": header}


def _with_ages(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record below format 7, where ages that there were not had no place: () says so."""
    return {**record, "ages": () if record.get("ages") is None else record["ages"]}


def _from_2(state_dict: Mapping[str, Any], header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Format 3 of format 2, whose memories were always those of `Snapshot`."""
    clock = {**header["clock"], "memory": header["clock"]["refresh"]}
    settings = {**header["settings"], "correction": describe(Snapshot())}
    state = {}
    for key, old in state_dict["state"].items():
        new = {name: value for name, value in old.items() if name not in ("refresh", "outer")}
        state[key] = {**new, "stamp": old["refresh"], "memory": old["outer"]}
    return {**state_dict, "state": state, "poco": {**header, "clock": clock, "settings": settings}}


def _correction_of(state_dict: Mapping[str, Any]) -> Correction:
    """The correction that a state_dict was saved with, as far as it is one of the library's."""
    try:
        name = state_dict["poco"]["settings"]["correction"]["name"]
    except (KeyError, TypeError):
        return Snapshot()
    return next((kind() for kind in CORRECTIONS.values() if kind.__name__ == name), Snapshot())


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"in_mega is {value!r}")
    return value


def _count(plain: Mapping[str, Any], name: str) -> int:
    value: int = plain[name]
    if not is_count(value):
        raise ValueError(f"{name} is {value!r}")
    return value


def _nested(like: Any, plain: Any, where: str, name: str = "") -> Any:
    """Nested dictionaries of tensors in the types of `like`, which has the same names."""
    if isinstance(like, Tensor):
        return fitted(where, name, plain, like)
    if like is None or set(plain) != set(like._fields):
        raise ValueError(f"entries {sorted(plain)} where {sorted(like._fields) if like is not None else []} are needed")
    return type(like)(**{own: _nested(getattr(like, own), plain[own], where, own) for own in like._fields})


class Resuming(Recorded, Shell):
    """What a `PosteriorCorrected` saves, and continues from; mixed into it."""

    header: ClassVar[str] = "poco"
    newest: ClassVar[int] = 8
    described: ClassVar[tuple[str, ...]] = ("family", "curvature")
    needed: Sequence[str] = HYPERPARAMETERS

    def _saved(self) -> dict[str, Any]:
        self._settle(raising=False)
        for block in self._blocks:
            if self.state.get(block.params[0]):
                self._state(block)["drawn"] = block.drawn
        return super()._saved()

    def _encoded_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return encode_group(group)

    def _encoded(self, p: Parameter, record: Mapping[str, Any]) -> dict[str, Any]:
        block = self._block_of(p)  # if only shown, its point is not in the model yet, and it will begin anew
        shown = any(begun.block is block and begun.is_elsewhere for begun in self._begun) and record["memory"] is None
        return encode_state(block, record, self.correction, begins=block.provisional or shown)

    def _block_of(self, p: Parameter) -> Block:
        return next(block for block in self._blocks if block.params[0] is p)

    def _room(self) -> int:
        """With all that the variance meter may come to hold."""
        meter = sum(2 * len(b.name) + 200 * len(b.family.Site._fields) + 64 for b in self._blocks)
        return 2048 + len(str(self._settings())) + meter

    def _header(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "seed": self.seed,
            "clock": dict(self._clock),
            "meter": self._meter.state(),
            "anchor_hessian": self._products.hessian,
        }

    def _upgraded(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        return upgraded(state_dict)

    def _check_header(self, header: Mapping[str, Any]) -> None:
        """Refuse damage, and other settings of the optimizer."""
        where = "state_dict['poco']"
        if "anchor_hessian" not in header and self._products.kind == "stored":
            raise CheckpointError(
                f"{where}['anchor_hessian']: torch.distributed.checkpoint does not keep it; with anchor='stored' save "
                "by poco.save, or by torch.save(optimizer.state_dict(), path)."
            )
        for name, kind in _HEADER.items():
            if not isinstance(header.get(name, ...), kind) or isinstance(header[name], bool):
                raise CheckpointError(f"{where}[{name!r}]: missing or damaged; use another file.")
        check_clock(where, header["clock"], CLOCK)
        try:
            NoiseKey(header["seed"])
        except ValueError as error:
            raise CheckpointError(f"{where}['seed']: {error}") from None
        if not is_meter_state(header["meter"]):
            raise CheckpointError(f"{where}['meter']: damaged; use another file.")
        for name, value in self._settings().items():
            if name not in header["settings"] or header["settings"][name] != value:
                raise CheckpointError(
                    f"{where}['settings'][{name!r}]: saved with {header['settings'].get(name)!r}, the optimizer has "
                    f"{value!r}; make the optimizer with the same {name}."
                )
        hessian, weights = header["anchor_hessian"], sum(block.numel for block in self._blocks)
        if hessian is not None:
            square = hessian.ndim == 2 and hessian.shape[0] == hessian.shape[1] <= weights
            if not square or not hessian.is_floating_point() or not bool(torch.isfinite(hessian).all()):
                raise CheckpointError(f"{where}['anchor_hessian']: damaged, or another model's; use another file.")

    def _decoded_group(self, own: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """The saved hyperparameters, checked like an optimizer's arguments."""
        group = _decode_group(own, saved)
        check_group({**own, **group})
        for block in self._blocks:
            if self.param_groups[block.group_number] is own:
                check_prior(block, group["prior"])
        return group

    def _decoded(self, p: Parameter, number: int, plain: Any) -> Record | None:
        for block in self._blocks:
            if block.params[0] is p:
                return decode_state(block, plain, self.correction)
        raise CheckpointError(f"state_dict['state'][{number}]: of no posterior; load the checkpoint of this model.")

    def _take(self, header: Mapping[str, Any]) -> None:
        for block in self._blocks:
            if block.params[0] in self.state:
                block.forget_weights()
                block.drawn = self._state(block)["drawn"]
                block.provisional = False
        self._products.reset()
        self._committed = 0, set()  # else a step of the number of the last one would be taken for its second half
        self.seed = header["seed"]
        self._clock = dict(header["clock"])
        self._meter.load(header["meter"])
        self._flips = Flips()
        self._products.hessian = header["anchor_hessian"]

    @torch.no_grad()
    def next_task(self, *, kl_weight: float | None = None) -> None:
        """Make the present posterior the prior: training goes on with another task's data (as in BayesBiNN §5).

        λ₀ ← λ for every family and parameter, frozen ones too; q stays where it is. Momentum and q_out, which belong to
        the old task, are forgotten.
        `weight_decay` has no further part; ∇̃KL now pulls towards the old task's posterior.

        Args:
            kl_weight: T of the objective N E_q[ℓ] + T KL(q ‖ p₀) from now on, in groups where every weight has a rate
                of its own (`square_momentum`); steps do not become larger by it. A first prior that knows nothing may
                be weak for the sake of accuracy; this one has seen data, and counts as Bayes' rule says at 1, which
                None stands for. Other groups keep theirs.

        Raises:
            ValueError: for a weight that is not positive and finite, or where no group has rates of its own.
        """
        if kl_weight is not None:
            arguments.positive("kl_weight", kl_weight)
            if all(group["square_momentum"] is None for group in self.param_groups):
                raise ValueError(
                    f"kl_weight={kl_weight}: no group has a rate for every weight (square_momentum=None), and steps "
                    "would become larger by it; set group['kl_weight'] and lr together, or leave it out."
                )
        self._trainable()
        for number, group in enumerate(self.param_groups):
            blocks = [block for block in self._blocks if block.group_number == number]
            old = group["prior"]
            known = dict(old) if isinstance(old, dict) else {b.name: old for b in blocks if old is not None}
            for block in blocks:
                own = self.state.get(block.params[0])
                if own:  # a parameter that was always frozen has no posterior, and keeps its prior
                    known[block.name] = fields.map_fields(lambda v, b=block: b.whole_of(v.clone()), own["posterior"])
                    own.update(memory=None, stamp=0, in_mega=False, momentum=(), step=0, ages=None)
            group["prior"] = known
            if group["square_momentum"] is not None:
                group["kl_weight"] = 1.0 if kl_weight is None else float(kl_weight)
        self._meter.outer = {}
        self._products.reset()

    def _wide(self) -> dict[str, Any]:
        """What holds for all groups, and may be repeated in one."""
        wide = {**self._settings(), "seed": self.seed, "one_pass": self.one_pass}
        return {name: value for name, value in wide.items() if name != "correction"}

    def _settings(self) -> dict[str, Any]:
        return {
            "noise": self.noise,
            "correction": describe(self.correction),
            "mc_samples": self.mc_samples,
            "anchor": self._products.kind,
            "max_grad_norm": self.max_grad_norm,
            "nonfinite": self.nonfinite,
        }
