"""Optimizer state as plain dictionaries that `torch.load(weights_only=True)` reads, and back, with checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction import CORRECTIONS
from expfam_poco.correction.alpha import alpha_from, describe_alpha
from expfam_poco.correction.base import Averaging, Correction
from expfam_poco.correction.memory import tensors
from expfam_poco.correction.snapshot import Snapshot
from expfam_poco.correction.variance import is_meter_state
from expfam_poco.engine.block import Block, Record
from expfam_poco.engine.settings import HYPERPARAMETERS, check_group
from expfam_poco.errors import CheckpointError
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Estimator
from expfam_poco.family.noise import NoiseKey
from expfam_poco.family.registry import name_of
from expfam_poco.optim.base import Shell

FORMAT = 3
CLOCK = ("step", "refresh", "refreshed", "memory", "chunk", "sample", "skipped")
_HEADER: dict[str, Any] = {
    "settings": Mapping,
    "seed": int,
    "clock": Mapping,
    "meter": Mapping,
    "anchor_hessian": (Tensor, type(None)),
}
_OBJECTS = ("family", "curvature", "prior", "alpha")


def encode_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with its objects described in plain types."""
    plain = {key: value for key, value in group.items() if key not in _OBJECTS}
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
    settings = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
    return {"name": name, "settings": settings}


def encode_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """One block's record: NamedTuples become dictionaries of copies, which later steps in place do not reach."""
    return {
        "step": state["step"],
        "stamp": state["stamp"],
        "in_mega": state["in_mega"],
        "drawn": None if state["drawn"] is None else dataclasses.asdict(state["drawn"]),
        "posterior": plain_of(state["posterior"]),
        "momentum": [value.clone() for value in state["momentum"]],
        "memory": None if state["memory"] is None else plain_of(state["memory"]),
    }


def plain_of(values: Any) -> Any:
    """Nested NamedTuples of tensors as nested dictionaries of copies."""
    if isinstance(values, Tensor):
        return values.clone()
    return {name: plain_of(value) for name, value in values._asdict().items()}


def decode_state(block: Block, plain: Mapping[str, Any], correction: Correction) -> Record:
    """The inverse of `encode_state` on the block's device, in the dtypes that were saved, checked."""
    family, where = block.family, f"the state of {block.name!r}"
    expected = family.centred_at(block.read())
    site = family.kl_gradient(expected, expected)
    average = [getattr(site, name) for name in family.momentum_block]
    try:
        memory = plain["memory"]
        like = None if memory is None else memory_like(correction, family, expected, site)
        record = Record(
            step=int(plain["step"]),
            stamp=int(plain["stamp"]),
            in_mega=_boolean(plain["in_mega"]),
            drawn=None if plain["drawn"] is None else NoiseKey(**plain["drawn"]),
            posterior=_nested(expected, plain["posterior"], block),
            momentum=tuple(value.to(block.device, copy=True).contiguous() for value in plain["momentum"]),
            memory=None if memory is None else _nested(like, memory, block),
        )
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"state_dict: {where} is incomplete or damaged ({type(error).__name__}: {error}); use another file."
        ) from None
    _check_like(where, expected._fields, record["posterior"], expected)
    if not bool(family.in_domain(record["posterior"])):
        raise CheckpointError(
            f"state_dict: {where} is outside the domain of {type(family).__name__}; use another file."
        )
    if record["momentum"]:
        _check_like(f"the momentum of {block.name!r}", family.momentum_block, record["momentum"], average)
    if record["memory"] is not None:
        own = dict(tensors(like))
        _check_like(f"the memory of {block.name!r}", list(own), fields.leaves(record["memory"]), list(own.values()))
    return record


def memory_like(correction: Correction, family: ExponentialFamily, state: Any, site: Any) -> Any:
    """A memory of this correction for such a state, whose values mean nothing."""
    how = Averaging(family.per_block(0.0, 0.0), True, 0.0)
    begun = correction.begin(family, state)
    return begun if begun is not None else correction.after_refresh(family, None, state, site, how)


def _check_like(where: str, names: Sequence[str], values: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    if len(values) != len(own):
        raise CheckpointError(f"state_dict: {where} has {len(values)} tensors, not {len(own)}; use another file.")
    for name, value, reference in zip(names, values, own, strict=True):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            raise CheckpointError(
                f"state_dict: {where} holds {name} of shape {tuple(value.shape)} and {value.dtype}, the model "
                f"needs {tuple(reference.shape)} and {reference.dtype}; load the checkpoint of this model."
            )


def decode_states(
    blocks: Sequence[Block],
    own: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    correction: Correction,
) -> dict[str, Record]:
    """The states of all blocks that have one, by block name."""
    saved = state_dict.get("state")
    if not isinstance(saved, Mapping):
        raise CheckpointError("state_dict['state']: missing; use a state_dict of PosteriorCorrected.")
    number_of = {}
    pairs = ((p, n) for g, s in zip(own, state_dict["param_groups"], strict=True) for p, n in _numbered(g, s))
    number_of = {id(p): n for p, n in pairs}
    found = {block.name: saved.get(number_of[id(block.params[0])]) for block in blocks}
    return {b.name: decode_state(b, plain, correction) for b in blocks if (plain := found[b.name]) is not None}


def posteriors_of(
    state: Mapping[str, Any], blocks: Sequence[Block], own: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A State for every block, from a dictionary of States by name or from an optimizer's `state_dict`."""
    if "param_groups" in state:
        check_groups(own, state["param_groups"], ("family",))
        state = upgraded(state)
        found = decode_states(blocks, own, state, _correction_of(state))
        states = {name: value["posterior"] for name, value in found.items()}
    else:
        states = dict(state)
    for block in blocks:
        value, example = states.get(block.name), block.family.centred_at(block.read())
        if not isinstance(value, type(example)) or any(
            v.shape != e.shape or not bool(torch.isfinite(v).all()) for v, e in zip(value, example, strict=True)
        ):
            raise ValueError(
                f"state: it has no finite {type(example).__name__} of the right shape for {block.name!r}; give what "
                "posterior_states() or state_dict() of an optimizer of the same model returns."
            )
        states[block.name] = type(value)(*(v.to(device=block.device, dtype=block.dtype) for v in value))
    return states


def _numbered(group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[tuple[Any, int]]:
    return list(zip(group["params"], saved["params"], strict=True))


def check_groups(
    own: Sequence[Mapping[str, Any]],
    saved: Any,
    described: Sequence[str] = ("family", "curvature"),
    needed: Sequence[str] = HYPERPARAMETERS,
) -> None:
    """Refuse groups of another number, size or family, or without what is needed."""
    if not isinstance(saved, list) or len(own) != len(saved):
        count = len(saved) if isinstance(saved, list) else "no"
        raise CheckpointError(
            f"state_dict['param_groups']: {count} groups for an optimizer with {len(own)}; "
            "make the optimizer with the same groups first."
        )
    for number, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        missing = [name for name in ("params", *needed) if name not in theirs]
        if missing:
            raise CheckpointError(
                f"state_dict['param_groups'][{number}][{missing[0]!r}]: missing; the checkpoint is damaged or of "
                "another version, use another file."
            )
        if len(mine["params"]) != len(theirs["params"]):
            raise CheckpointError(
                f"state_dict['param_groups'][{number}]: {len(theirs['params'])} parameters, the optimizer has "
                f"{len(mine['params'])}; load the checkpoint of this model."
            )
        for entry in described:
            expected = describe(mine[entry])
            if theirs.get(entry) != expected:
                raise CheckpointError(
                    f"state_dict['param_groups'][{number}][{entry!r}]: saved with {theirs.get(entry)}, the "
                    f"optimizer has {expected}; make the optimizer with the same {entry}."
                )
        names, saved_names = mine.get("param_names"), theirs.get("param_names")
        if names is not None and saved_names is not None and names != saved_names:
            first = next(pair for pair in zip(names, saved_names, strict=True) if pair[0] != pair[1])
            raise CheckpointError(
                f"state_dict['param_groups'][{number}]: parameter {first[1]!r} stands where the optimizer has "
                f"{first[0]!r}; load the checkpoint of this model."
            )


def decode_groups(own: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The saved hyperparameters of every group, checked like an optimizer's arguments."""
    decoded = []
    for number, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        try:
            decoded.append(_decode_group(mine, theirs))
            check_group({**mine, **decoded[-1]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"state_dict['param_groups'][{number}]: {error}") from error
    return decoded


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
    """A state_dict of format 2, whose memories were always those of `Snapshot`, in the present format."""
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"state_dict={type(state_dict).__name__}: give what state_dict() returned.")
    header = state_dict.get("poco")
    if not isinstance(header, Mapping) or header.get("format") != 2:
        return state_dict
    try:
        clock = {**header["clock"], "memory": header["clock"]["refresh"]}
        settings = {**header["settings"], "correction": describe(Snapshot())}
        state = {}
        for key, old in state_dict["state"].items():
            new = {name: value for name, value in old.items() if name not in ("refresh", "outer")}
            state[key] = {**new, "stamp": old["refresh"], "memory": old["outer"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"state_dict: a damaged checkpoint of format 2 ({error!r}); use another file.") from None
    return {**state_dict, "state": state, "poco": {**header, "format": FORMAT, "clock": clock, "settings": settings}}


def _correction_of(state_dict: Mapping[str, Any]) -> Correction:
    """The correction that a state_dict was saved with, as far as it is one of the library's."""
    try:
        name = state_dict["poco"]["settings"]["correction"]["name"]
    except (KeyError, TypeError):
        return Snapshot()
    return next((kind() for kind in CORRECTIONS.values() if kind.__name__ == name), Snapshot())


def check_header(header: Any, settings: Mapping[str, Any]) -> None:
    """Refuse state of another optimizer, another version of the format, or other settings of the optimizer."""
    if not isinstance(header, Mapping) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, Mapping) else None
        raise CheckpointError(
            f"state_dict['poco']: format {found!r} where {FORMAT} is needed; this is not a checkpoint of "
            "PosteriorCorrected, or of another version."
        )
    for name, kind in _HEADER.items():
        if name not in header or not isinstance(header[name], kind):
            raise CheckpointError(f"state_dict['poco'][{name!r}]: missing or damaged; use another file.")
    for name in CLOCK:
        if not isinstance(header["clock"].get(name), int) or header["clock"][name] < 0:
            raise CheckpointError(f"state_dict['poco']['clock'][{name!r}]: missing or damaged; use another file.")
    if not is_meter_state(header["meter"]):
        raise CheckpointError("state_dict['poco']['meter']: damaged; use another file.")
    for name, value in settings.items():
        if name not in header["settings"] or header["settings"][name] != value:
            raise CheckpointError(
                f"state_dict['poco']['settings'][{name!r}]: saved with {header['settings'].get(name)!r}, the "
                f"optimizer has {value!r}; make the optimizer with the same {name}."
            )


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"in_mega is {value!r}")
    return value


def _nested(like: Any, plain: Any, block: Block) -> Any:
    """Nested dictionaries of tensors in the types of `like`, which has the same names."""
    if isinstance(like, Tensor):
        return torch.as_tensor(plain).to(block.device, copy=True).contiguous()
    if like is None or set(plain) != set(like._fields):
        raise ValueError(f"entries {sorted(plain)} where {sorted(like._fields) if like is not None else []} are needed")
    return type(like)(**{name: _nested(getattr(like, name), plain[name], block) for name in like._fields})


class Resuming(Shell):
    """`state_dict` and `load_state_dict` of a `PosteriorCorrected`; mixed into it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a run continues from, bit for bit, in plain types (`torch.load(weights_only=True)`)."""
        self._settle(raising=False)
        for block in self._blocks:
            if block.params[0] in self.state:
                self._state(block)["drawn"] = block.drawn
        plain: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        plain["state"] = {key: encode_state(value) for key, value in plain["state"].items()}
        plain["param_groups"] = [encode_group(group) for group in plain["param_groups"]]
        plain["poco"] = {
            "format": FORMAT,
            "settings": self._settings(),
            "seed": self.seed,
            "clock": dict(self._clock),
            "meter": self._meter.state(),
            "anchor_hessian": self._products.hessian,
        }
        return plain

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. The model's weights are the model's checkpoint's business.

        Raises:
            CheckpointError: if it belongs to another model, family, setting or version; nothing is changed.
        """
        state_dict = upgraded(state_dict)
        check_header(state_dict.get("poco"), self._settings())
        check_groups(self.param_groups, state_dict.get("param_groups"))
        states = decode_states(self._blocks, self.param_groups, state_dict, self.correction)
        decoded = decode_groups(self.param_groups, state_dict["param_groups"])
        for group, values in zip(self.param_groups, decoded, strict=True):
            group.update(values)
        self.state.clear()
        for block in self._blocks:
            if block.name in states:
                self.state[block.params[0]] = states[block.name]
                block.forget_weights()
                block.drawn = self._state(block)["drawn"]
        self._products.reset()
        header = state_dict["poco"]
        self.seed = header["seed"]
        self._clock = dict(header["clock"])
        self._meter.load(header["meter"])
        self._products.hessian = header["anchor_hessian"]

    @torch.no_grad()
    def next_task(self) -> None:
        """Make the present posterior the prior: training goes on with another task's data (as in BayesBiNN §5).

        λ₀ ← λ for every family and parameter, frozen ones too; q stays where it is. Momentum and q_out, which belong to
        the old task, are forgotten.
        `weight_decay` has no further part; ess·∇̃KL now pulls towards the old task's posterior.
        """
        self._trainable()
        for number, group in enumerate(self.param_groups):
            blocks = [block for block in self._blocks if block.group_number == number]
            old = group["prior"]
            known = dict(old) if isinstance(old, dict) else {b.name: old for b in blocks if old is not None}
            for block in blocks:
                own = self.state.get(block.params[0])
                if own:  # a parameter that was always frozen has no posterior, and keeps its prior
                    known[block.name] = fields.map_fields(torch.clone, own["posterior"])
                    own.update(memory=None, stamp=0, in_mega=False, momentum=(), step=0)
            group["prior"] = known
        self._products.reset()

    def _settings(self) -> dict[str, Any]:
        return {
            "noise": self.noise,
            "correction": describe(self.correction),
            "mc_samples": self.mc_samples,
            "anchor": self._products.kind,
            "max_grad_norm": self.max_grad_norm,
            "nonfinite": self.nonfinite,
        }
