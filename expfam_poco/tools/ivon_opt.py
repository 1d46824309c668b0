"""Going on here with a run that was begun with the package `ivon-opt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.correction import Correction
from expfam_poco.engine.beginning import initial_posterior
from expfam_poco.engine.block import Block, new_record
from expfam_poco.engine.settings import precision_rate
from expfam_poco.errors import CheckpointError
from expfam_poco.optim import records
from expfam_poco.optim.named import IVONPoCo

_NUMBERS = ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius", "mc_samples")
_KEPT = ("lr", "ess", "hess_init", "weight_decay", "clip_radius")
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr")


def load_ivon_opt(optimizer: IVONPoCo, state_dict: Mapping[str, Any], *, steps: int) -> None:
    """Give an optimizer of the IVON family the state of a run with `ivon-opt` (tried with its version 0.1.3).

        m = the model's weights,      S = ess (h + δ),      g and the hyperparameters: the checkpoint's

    Load the model's weights as well, before or after. From then on the steps are those that `ivon-opt` would have
    made, but for the noise. `ivon-opt` does not save everything: its step count is the argument `steps`, and
    `hess_approx`, `debias` and `rescale_lr` must be given to `optimizer` as they were given to it. Its groups are
    matched by their order and sizes. A parameter that is frozen now keeps its h and g for the day it is unfrozen;
    there is no q_out until the next `refresh`.

    Args:
        optimizer: an `IVON`, `IVONPoCo` or `IVONPoCoMo` that has made no step yet, with the same groups and
            `mc_samples`. Its other hyperparameters (lr, ess, hess_init, momentum for beta1, precision_lr for 1 − beta2,
            weight_decay, clip_radius) become the checkpoint's.
        state_dict: what `ivon.IVON.state_dict()` gave.
        steps: how many steps the run has made, `current_step` of the `ivon-opt` optimizer.

    Raises:
        TypeError: `optimizer` is of another family.
        ValueError: `optimizer` has been used, or `steps` is not a count.
        CheckpointError: the state does not fit the optimizer, is incomplete, or holds NaN or h + δ ≤ 0. In every
            case the optimizer is as it was.

    Example:
        >>> import ivon, torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> old = ivon.IVON(model.parameters(), lr=0.1, ess=8.0)
        >>> with old.sampled_params(train=True):
        ...     model(torch.ones(4, 2)).square().mean().backward()
        >>> _ = old.step()
        >>> new = poco.IVONPoCoMo(model.parameters(), lr=0.1, ess=8.0, rho1=0.6, rho2=0.1, alpha=0.7)
        >>> poco.load_ivon_opt(new, old.state_dict(), steps=old.current_step)
        >>> new.diagnostics()["steps"]
        1
    """
    if not isinstance(optimizer, IVONPoCo):
        raise TypeError(f"optimizer={type(optimizer).__name__}: give an IVON, IVONPoCo or IVONPoCoMo.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps={steps!r}: give the number of steps of the run, `current_step` of ivon-opt.")
    plain = optimizer.state_dict()
    if any(plain["poco"]["clock"].values()):
        raise ValueError("optimizer: it has been used already; make a new one for the checkpoint.")
    saved = _checked_groups(state_dict, optimizer)
    plain["poco"]["clock"].update(step=steps, refreshed=steps)
    plain["param_groups"] = [
        {**own, **_hyperparameters(theirs, f"state_dict['param_groups'][{number}]")}
        for number, (own, theirs) in enumerate(zip(plain["param_groups"], saved, strict=True))
    ]
    plain["state"] = {}
    for number, theirs in enumerate(saved):
        blocks = [block for block in optimizer._blocks if block.group_number == number]
        plain["state"].update(
            _states(blocks, theirs, steps, optimizer.correction, f"state_dict['param_groups'][{number}]")
        )
    plain["poco"]["records"] = sorted(plain["state"])
    optimizer.load_state_dict(plain)


def _checked_groups(state_dict: Any, optimizer: IVONPoCo) -> Sequence[Mapping[str, Any]]:
    """The groups, of the number, sizes and types that they should have."""
    saved = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(saved, list) or not all(isinstance(group, Mapping) for group in saved):
        raise CheckpointError("state_dict['param_groups']: missing; give what state_dict() of ivon.IVON returned.")
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"state_dict['param_groups']: {len(saved)} groups for an optimizer with {len(optimizer.param_groups)}; "
            "make the optimizer with the same groups first."
        )
    count = state_dict["state"].get("count", 0) if isinstance(state_dict.get("state"), Mapping) else 0
    if count:
        raise CheckpointError(
            f"state_dict['state']['count']: {count} samples without their step; save ivon-opt's state after a step."
        )
    for number, (theirs, own) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        _check_group(theirs, own, f"state_dict['param_groups'][{number}]", optimizer.mc_samples)
    return saved


def _check_group(theirs: Mapping[str, Any], own: Mapping[str, Any], where: str, mc_samples: int) -> None:
    numel = sum(p.numel() for p in own["params"])
    for name in (*_NUMBERS, "params", "momentum", "hess"):
        if name not in theirs:
            raise CheckpointError(f"{where}[{name!r}]: missing; give what state_dict() of ivon.IVON returned.")
    for name in ("momentum", "hess"):
        value = theirs[name]
        if not isinstance(value, Tensor) or value.shape != (numel,) or not value.is_floating_point():
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{where}[{name!r}]: {found} where {numel} numbers are needed; load this model's.")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{where}[{name!r}]: it holds NaN or infinities; use an earlier checkpoint.")
    if theirs["mc_samples"] != mc_samples:
        raise CheckpointError(
            f"{where}['mc_samples']: saved with {theirs['mc_samples']!r}, the optimizer has {mc_samples!r}; make the "
            "optimizer with the same mc_samples."
        )
    names, saved_names = own.get("param_names"), theirs.get("param_names")
    if names is not None and saved_names is not None and list(names) != list(saved_names):
        raise CheckpointError(f"{where}: parameters {saved_names}, the optimizer has {names}; load this model's.")


def _hyperparameters(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """In our names; `load_state_dict` checks their ranges."""
    kept = {name: theirs[name] for name in (*_KEPT, *(name for name in _OF_SCHEDULERS if name in theirs))}
    try:
        return {**kept, "momentum": theirs["beta1"], "precision_lr": precision_rate(theirs["beta2"])}
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _states(
    blocks: Sequence[Block], theirs: Mapping[str, Any], steps: int, correction: Correction, where: str
) -> dict[int, dict[str, Any]]:
    """The flat vectors of a group, cut into the blocks' states."""
    if steps == 0 and bool(theirs["momentum"].any()):
        raise CheckpointError(f"{where}['momentum']: not zero after steps=0; give `current_step` of ivon-opt as steps.")
    sizes = [block.numel for block in blocks]
    found = {}
    for block, hess, momentum in zip(blocks, theirs["hess"].split(sizes), theirs["momentum"].split(sizes), strict=True):
        precision, gradient = (_like(value, block) for value in (hess, momentum))
        precision = theirs["ess"] * (precision + theirs["weight_decay"])
        if not bool((precision > 0.0).all()) or not bool(torch.isfinite(precision).all()):
            raise CheckpointError(
                f"{where}['hess']: ess·(hess + weight_decay) of {block.name!r} is not positive and finite everywhere, "
                f"the least is {float(precision.min())}; use an earlier checkpoint."
            )
        memory = () if theirs["beta1"] == 0.0 else (gradient,)
        record = new_record(initial_posterior(block)._replace(precision=precision))
        record["step"], record["momentum"] = (steps if memory else 0), memory
        found[block.index] = records.encode_state(block, record, correction)
    return found


def _like(flat: Tensor, block: Block) -> Tensor:
    return flat.detach().to(device=block.device, dtype=block.dtype).reshape(block.shape)
