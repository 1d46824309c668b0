"""Saving and loading as torch does it, for all optimizers: hooks, groups, and states of which none is half loaded.

A state_dict is plain (`torch.load(weights_only=True)` reads it), looked at as a whole, and only then taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.errors import CheckpointError
from expfam_poco.optim import travelled

PRECISE = (torch.float32, torch.float64)  # what states are kept in, whatever the weights'
LARGEST = 2**63  # of a counter
FILLED = {"maximize": False}  # what torch, too, has from the defaults where an older state_dict lacks it


@contextmanager
def reading() -> Iterator[None]:
    """Whatever goes wrong while a stranger's dictionary is read is that one's fault, and said in one sentence."""
    try:
        yield
    except CheckpointError as error:
        if "\n" not in str(error):
            raise
        raise CheckpointError(" ".join(str(error).split())) from None  # it shows a tensor
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"state_dict: something in it is damaged ({found}); use another file.") from error


class Uncompiled:
    """`step` and `refresh` are one break in the graph of a user's torch.compile, as `torch.optim.LBFGS.step` is.

    The closure, and what it calls, may still be compiled.
    """

    def _patch_step_function(self) -> None:
        """Called by torch for every new or copied optimizer, to put its hooks around the class's `step`."""
        super()._patch_step_function()  # type: ignore[misc]
        for name in ("step", "refresh"):
            method = getattr(type(self), name, None)
            if method is not None and not getattr(method, "_torchdynamo_disable", False):
                setattr(type(self), name, torch.compiler.disable(method))


class Checkpointed(Uncompiled):
    """`state_dict` and `load_state_dict` with torch's hooks around; mixed into an optimizer."""

    def _saved(self) -> dict[str, Any]:
        """Everything a run continues from."""
        raise NotImplementedError("every optimizer has its own")

    def _checked(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        """Look at the whole state_dict; what takes it over."""
        raise NotImplementedError("every optimizer has its own")

    def state_dict(self) -> dict[str, Any]:
        """Everything a run continues from, bit for bit, in plain types (`torch.load(weights_only=True)`)."""
        own: Any = self
        for before in list(own._optimizer_state_dict_pre_hooks.values()):
            before(self)
        plain = self._saved()
        for after in list(own._optimizer_state_dict_post_hooks.values()):
            changed = after(self, plain)
            plain = plain if changed is None else changed
        return plain

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. The model's weights are the model's checkpoint's business.

        As in torch, states in float32 and float64 are cast to what the model needs, and entries of `optimizer.state`
        that belong to no parameter come back as they are.

        Raises:
            CheckpointError: if it belongs to another model, optimizer, setting or version, or is damaged; nothing is
                changed.
        """
        own: Any = self
        if not isinstance(state_dict, Mapping):
            raise CheckpointError(f"state_dict={type(state_dict).__name__}: give what state_dict() returned.")
        state_dict = dict(state_dict)
        for before in list(own._optimizer_load_state_dict_pre_hooks.values()):
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        with reading():
            take = self._checked(travelled.numbered(state_dict))
        take()
        for after in list(own._optimizer_load_state_dict_post_hooks.values()):
            after(self)


class Recorded(Checkpointed):
    """An optimizer whose groups and states are its own: what differs are the methods below, down to `_take`.

    Attributes:
        header: the key of what is neither a group's nor a parameter's; a copy travels in the first state (`travelled`).
        newest: the version of the format.
        needed: the hyperparameters that a group must have.
        described: those of them that must be the optimizer's own, as `_encoded_group` has them.
    """

    header: ClassVar[str]
    newest: ClassVar[int]
    described: ClassVar[tuple[str, ...]] = ()
    needed: Sequence[str]
    param_groups: list[dict[str, Any]]
    state: Any

    def _encoded_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("every optimizer has its own")

    def _encoded(self, p: Parameter, record: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("every optimizer has its own")

    def _room(self) -> int:
        raise NotImplementedError("every optimizer has its own")

    def _header(self) -> dict[str, Any]:
        raise NotImplementedError("every optimizer has its own")

    def _upgraded(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        raise NotImplementedError("every optimizer has its own")

    def _check_header(self, header: Mapping[str, Any]) -> None:
        raise NotImplementedError("every optimizer has its own")

    def _decoded_group(self, own: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError("every optimizer has its own")

    def _decoded(self, p: Parameter, number: int, plain: Any) -> Any:
        raise NotImplementedError("every optimizer has its own")

    def _take(self, header: Mapping[str, Any]) -> None:
        raise NotImplementedError("every optimizer has its own")

    # ---- what they share -----------------------------------------------------------------------------------

    def _saved(self) -> dict[str, Any]:
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = {id(p): number for number, p in reversed(list(enumerate(params)))}
        groups = []
        for group in self.param_groups:
            groups.append({**self._encoded_group(group), "params": [numbers[id(p)] for p in group["params"]]})
        states = {numbers[id(p)]: self._encoded(p, own) for p, own in self.state.items() if own and id(p) in numbers}
        others = {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}
        header = {"format": self.newest, **self._header(), "records": sorted(states)}
        if states:
            first = min(states, key=lambda number: (not params[number].requires_grad, number))
            states[first][travelled.KEY] = travelled.packed(header, self._room())
            states = {number: states.get(number, {}) for number in sorted({*numbers.values()})}
        return {"state": {**states, **others}, "param_groups": groups, self.header: header}

    def _checked(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        state_dict = self._upgraded(travelled.with_header(state_dict, self.header))
        where = f"state_dict[{self.header!r}]"
        header, saved = state_dict.get(self.header), state_dict.get("state")
        if not isinstance(header, Mapping) or header.get("format") != self.newest:
            found = header.get("format") if isinstance(header, Mapping) else None
            raise CheckpointError(
                f"{where}: format {found!r} where {self.newest} is needed; this is not a checkpoint of "
                f"{type(self).__name__}, or of another version, or torch.distributed.checkpoint has left out a "
                "parameter that is frozen here and was not."
            )
        self._check_header(header)
        own = [self._encoded_group(group) for group in self.param_groups]
        saved_groups = filled(state_dict.get("param_groups"))
        check_groups(own, saved_groups, self.described, self.needed)
        if not isinstance(saved, Mapping):
            raise CheckpointError("state_dict['state']: missing; use another file.")
        states = {number: plain for number, plain in saved.items() if is_count(number) and plain != {}}
        if header.get("records") != sorted(states):
            raise CheckpointError(
                f"{where}['records']: {header.get('records')!r} were saved, but state_dict['state'] holds "
                f"{sorted(states)}; the checkpoint is damaged, or torch.distributed.checkpoint has left out parameters "
                "that are frozen here: let them require gradients while it loads, or use another file."
            )
        groups, params = [], dict[int, Parameter]()
        for place, (mine, theirs) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            try:
                groups.append({k: v for k, v in self._decoded_group(mine, theirs).items() if k != "params"})
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"state_dict['param_groups'][{place}]: {error}") from error
            params.update(zip(theirs["params"], mine["params"], strict=True))
        unknown = [number for number in saved if is_count(number) and number not in params]
        if unknown:
            raise CheckpointError(f"state_dict['state'][{unknown[0]}]: of no parameter; load this model's checkpoint.")
        records = {params[number]: self._decoded(params[number], number, plain) for number, plain in states.items()}
        others = {key: value for key, value in saved.items() if not is_count(key)}

        def take() -> None:
            for group, values in zip(self.param_groups, groups, strict=True):
                group.update(values)
            self.state.clear()
            self.state.update({**{p: record for p, record in records.items() if record is not None}, **others})
            self._take(header)

        return take


def check_groups(
    own: Sequence[Mapping[str, Any]], saved: Sequence[Any], described: Sequence[str], needed: Sequence[str]
) -> None:
    """Refuse groups of another number, size or description, or without what is needed."""
    if len(own) != len(saved):
        raise CheckpointError(
            f"state_dict['param_groups']: {len(saved) or 'no'} groups for an optimizer with {len(own)}; "
            "make the optimizer with the same groups first."
        )
    for number, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        where = f"state_dict['param_groups'][{number}]"
        missing = [name for name in ("params", *needed) if not isinstance(theirs, Mapping) or name not in theirs]
        if missing:
            raise CheckpointError(
                f"{where}[{missing[0]!r}]: missing; the checkpoint is damaged or of another version, use another file."
            )
        if len(mine["params"]) != len(theirs["params"]):
            raise CheckpointError(
                f"{where}: {len(theirs['params'])} parameters, the optimizer has {len(mine['params'])}; load the "
                "checkpoint of this model."
            )
        for entry in described:
            if theirs.get(entry) != mine[entry]:
                raise CheckpointError(
                    f"{where}[{entry!r}]: saved with {theirs.get(entry)}, the optimizer has {mine[entry]}; make the "
                    f"optimizer with the same {entry}."
                )
        names, saved_names = mine.get("param_names"), theirs.get("param_names")
        if names is not None and saved_names is not None and names != saved_names:
            first = next(pair for pair in zip(names, saved_names, strict=True) if pair[0] != pair[1])
            raise CheckpointError(
                f"{where}: parameter {first[1]!r} stands where the optimizer has {first[0]!r}; load the checkpoint of "
                "this model."
            )


def filled(groups: Any) -> list[Any]:
    """The saved groups with what an older version did not know; none where they are damaged."""
    given = groups if isinstance(groups, list) else []
    return [{**FILLED, **group} if isinstance(group, Mapping) else group for group in given]


def check_clock(where: str, clock: Any, names: Sequence[str]) -> None:
    """Refuse counters that are missing, or out of range."""
    for name in names:
        if not isinstance(clock, Mapping) or not is_count(clock.get(name)):
            raise CheckpointError(f"{where}['clock'][{name!r}]: missing or damaged; use another file.")


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return type(value) is int and 0 <= value < LARGEST


def fitted(where: str, name: str, value: Any, like: Tensor) -> Tensor:
    """A copy of a saved tensor in the dtype, and on the device, of one of the model's.

    Raises:
        CheckpointError: if it is none, of another shape, of no dtype of states, or not finite.
    """
    shape, dtype = tuple(getattr(value, "shape", ())), getattr(value, "dtype", type(value).__name__)
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype not in PRECISE:
        raise CheckpointError(
            f"{where} holds {name} of shape {shape} and {dtype}, the model needs {tuple(like.shape)} and "
            f"{like.dtype}; load the checkpoint of this model."
        )
    cast = value.to(like.device, like.dtype, copy=True).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise CheckpointError(f"{where} holds {name} with NaN or infinities, which no domain has; use another file.")
    return cast
