"""α-SVRG over any torch optimizer: corrected gradients for SGD, AdamW, … before their moments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer as torch_hooks

from expfam_poco.arguments import is_real, shown
from expfam_poco.closures.evaluate import Closure, parts_of
from expfam_poco.closures.fp16 import ScaledOverflow
from expfam_poco.closures.rows import rows_of
from expfam_poco.correction.snapshot import Alpha, Snapshot
from expfam_poco.correction.transported import momentum_of, transported
from expfam_poco.engine.block import Block
from expfam_poco.engine.settings import check_foreign, checked_alpha, checked_max_grad_norm, python_number
from expfam_poco.engine.step import show_meter
from expfam_poco.errors import CheckpointError, NonFiniteError
from expfam_poco.family.registry import get_family
from expfam_poco.optim import travelled
from expfam_poco.optim.base import without_hooks
from expfam_poco.optim.checkpoint import Checkpointed, check_groups, filled, is_count
from expfam_poco.optim.optimizer import PosteriorCorrected


class AlphaSVRG(Checkpointed, torch.optim.Optimizer):
    """α-SVRG (Yin et al. 2025), the isotropic case of PC Eq. 18 without noise, handing its gradient to `base`.

        g = ∇ℓ_B(θ) − α (∇ℓ_B(θ_out) − g_out),     then base.step() with g as the parameters' gradients

    It shares `param_groups` and `state` with the base, so that schedulers and wrappers see a real optimizer.
    Weight decay, momentum and moments are the base's.

    Args:
        base_optimizer: any torch optimizer whose step needs only gradients.
        alpha: α in [0, 1], a schedule step → α (`LinearAlpha`), or "adaptive" (the α of least variance, measured for
            every tensor); no effect before `refresh`.
        transport: γ in [0, 1]: with alpha=0, evaluate beyond the weights by this share of the lag of the base's
            momentum (`correction.Transported`; AdamW with look-ahead); off unless given.
        max_grad_norm: clip the *corrected* gradient of all parameters together to this norm.
        stale_after: warn, once, when α > 0 and the last refresh is more steps ago than this; None: never.
        process_group: of `torch.distributed`, as in `PosteriorCorrected`.

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
        alpha: Alpha = 1.0,
        transport: float = 0.0,
        max_grad_norm: float | None = None,
        stale_after: int | None = 1000,
        process_group: Any = None,
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
        self.base = base_optimizer
        self.max_grad_norm = checked_max_grad_norm(max_grad_norm)
        self.transport = transport
        groups = [self._bare(group) for group in base_optimizer.param_groups]
        family = get_family("isotropic_gaussian")()
        self._engine = PosteriorCorrected(
            groups,
            family,
            0.0,
            1.0,
            alpha=alpha,
            transport=transport,
            noise="zero",
            stale_after=stale_after,
            seed=0,
            process_group=process_group,
        )
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.param_groups = base_optimizer.param_groups
        self.state = base_optimizer.state

    @property
    def alpha(self) -> Any:
        """α, as it was given."""
        return self._engine.param_groups[0]["alpha"]

    @alpha.setter
    def alpha(self, alpha: Any) -> None:
        value = checked_alpha(python_number(alpha))
        if self.transport > 0.0:
            transported(Snapshot(), self.transport, value)  # refuses any but 0
        for group in self._engine.param_groups:
            group["alpha"] = value

    def _lag(self, group: Mapping[str, Any]) -> float:
        """β of the base's momentum, by which gradients are transported; 0 where they are not."""
        return momentum_of(group) if self.transport > 0.0 else 0.0

    def _bare(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group's parameters and their names, and of the base's hyperparameters what a transport goes by."""
        return {key: list(group[key]) for key in ("params", "param_names") if key in group} | {
            "momentum": self._lag(group)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, and the `step` that a scheduler has wrapped: they belong to this one, not to a copy."""
        return without_hooks(self.__dict__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; steps are plain until the next `refresh`."""
        check_foreign(param_group, {})
        if not any(param_group is group for group in self.base.param_groups):
            self.base.add_param_group(param_group)
            self._engine.add_param_group(self._bare(self.base.param_groups[-1]))

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
        if travelled.only_makes_state(closure, self.param_groups):
            return self._make_state()
        engine, parts = self._engine, parts_of(closure, weights, scaler=scaler)
        for own, group in zip(engine.param_groups, self.param_groups, strict=True):
            if own["momentum"] != (lag := self._lag(group)):
                own["momentum"] = lag
        if any(map(any, (rows_of(part) for part, _ in parts))):
            raise ValueError(
                "rows: the base optimizer steps all rows of a parameter; give AlphaSVRG the closure alone."
            )
        blocks = engine._trainable()
        params = [block.params[0] for block in blocks]
        number = engine._clock["step"] + 1
        engine._join(parts, blocks, "a step", weights)
        try:
            with engine._evaluator.undone_on_error():
                with engine._weights_restored(blocks):
                    loss, steps = engine._measured(parts, blocks, number)
                    show_meter(engine._meter, steps, number, blocks, engine._evaluator.spread)
                for step in steps:
                    for block, grad in zip(step.block.members, step.gradients(), strict=True):
                        (p,) = block.params
                        p.grad = block.whole_of(grad if grad.dtype is p.dtype else grad.to(p.dtype))
                if self.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
                try:
                    with _no_global_hooks():
                        self.base.step()
                except BaseException:
                    for block in blocks:  # half-stepped weights: the posteriors hold those before
                        engine._write_point(block)
                    raise
                engine._follow(blocks)
        except ScaledOverflow:
            engine._clock["skipped"] += 1
            loss = NonFiniteError.loss
        finally:
            for p in params:
                p.grad = None
        engine._clock["step"] = number
        self._mark(blocks)
        return loss

    def _make_state(self) -> Tensor:
        """The base's state and the posteriors, as torch.distributed.checkpoint asks for them."""
        with _no_global_hooks():
            self.base.step()
        self._engine._begin_all()
        self._mark([block for block in self._engine._blocks if block.active])
        return NonFiniteError.loss

    def _mark(self, blocks: Sequence[Block]) -> None:
        """Entries of the state in whose places a checkpoint has the snapshot's records."""
        for block in blocks:
            self.state[block.params[0]].setdefault("alpha_svrg", None)

    def refresh(
        self, closures: Sequence[Closure], weights: Sequence[float] | None = None, *, scaler: Any = None
    ) -> Tensor:
        """Take the snapshot: θ_out ← θ, g_out ← mean of the chunks' gradients there (weighted by `weights`).

        A gradient at θ_out has no draws: there is no `draws=` here. With `scaler`, gradients are taken of the scaled
        loss; if they overflow, the snapshot stays as it was and the loss is NaN. No buffers are moved.
        """
        return self._engine.refresh(closures, weights, scaler=scaler)

    def diagnostics(self) -> dict[str, float]:
        """Plain numbers worth logging, those of `PosteriorCorrected.diagnostics` that are not about a posterior."""
        numbers = self._engine.diagnostics()
        return {name: value for name, value in numbers.items() if name not in ("mean_stddev", "compile_seconds")}

    def _saved(self) -> dict[str, Any]:
        """The base's state, and the snapshot with what else belongs to the correction."""
        plain, engine = self.base.state_dict(), self._engine.state_dict()
        groups = [{key: python_number(value) for key, value in group.items()} for group in plain["param_groups"]]
        states: dict[Any, Any] = {n: state for n, state in plain["state"].items() if not is_count(n)}  # others' entries
        for number in filter(is_count, {**plain["state"], **engine["state"]}):
            states[number] = {k: v for k, v in plain["state"].get(number, {}).items() if k != "alpha_svrg"}
            states[number]["alpha_svrg"] = engine["state"].get(number, {})
        if engine["state"]:  # its groups are the base's, but for α
            header = {**engine["poco"], "alpha": engine["param_groups"][0]["alpha"]}
            words = travelled.packed(header, self._engine._room())
            first = min(engine["state"])
            states[first]["alpha_svrg"] = {**engine["state"][first], travelled.KEY: words}
        return {**plain, "state": states, "param_groups": groups, "alpha_svrg": engine}

    def _checked(self, state_dict: Mapping[str, Any]) -> Callable[[], None]:
        bare, states = dict[Any, Any](), state_dict.get("state")
        for number, state in states.items() if isinstance(states, Mapping) else ():
            bare[number] = (
                {k: v for k, v in state.items() if k != "alpha_svrg"} if isinstance(state, Mapping) else state
            )
        snapshot = state_dict.get("alpha_svrg", self._travelled(states))
        if not isinstance(snapshot, Mapping):
            raise CheckpointError("state_dict['alpha_svrg']: missing; give what state_dict() of AlphaSVRG returned.")
        own = self._engine._checked(self._upgraded(snapshot))
        if isinstance(states, Mapping):
            state_dict = {**state_dict, "state": {n: own for n, own in bare.items() if own != {} or states[n] == {}}}
        theirs = self._of_base({key: value for key, value in state_dict.items() if key != "alpha_svrg"})

        def take() -> None:
            before = dict(vars(self.base))
            try:  # torch's optimizers put new objects in the places of old ones, and may fail after that
                self.base.load_state_dict(theirs)
            except Exception as error:
                vars(self.base).clear()
                vars(self.base).update(before)
                raise CheckpointError(
                    f"state_dict: the base optimizer refuses it ({str(error).splitlines()[0]})."
                ) from error
            own()
            self.param_groups, self.state = self.base.param_groups, self.base.state
            self._mark([block for block in self._engine._blocks if self.state.get(block.params[0])])

        return take

    def _travelled(self, states: Any) -> Any:
        """The snapshot's state_dict from what torch.distributed.checkpoint has left of it, in the states."""
        if not isinstance(states, Mapping):
            return None
        own = {
            n: state["alpha_svrg"]
            for n, state in states.items()
            if isinstance(state, Mapping) and "alpha_svrg" in state
        }
        plain = travelled.with_header({"state": own}, "poco")
        if "poco" not in plain:
            return None
        groups = self._engine.state_dict()["param_groups"]
        return {**plain, "param_groups": [{**group, "alpha": plain["poco"]["alpha"]} for group in groups]}

    def _of_base(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The base's part, as far as what the base has now tells that it is sound; missing flags are filled in."""
        groups = filled(saved.get("param_groups"))
        check_groups(self.base.state_dict()["param_groups"], groups, (), ())
        of_number: dict[Any, Parameter] = {}
        for place, (mine, theirs) in enumerate(zip(self.base.param_groups, groups, strict=True)):
            of_number.update(zip(theirs["params"], mine["params"], strict=True))
            where = f"state_dict['param_groups'][{place}]"
            for name, usual in self.base.defaults.items():
                if name not in theirs and is_real(usual):
                    raise CheckpointError(f"{where}[{name!r}]: missing; use another file.")
                own = theirs.get(name, usual)
                kind = isinstance(usual, bool | tuple) and not isinstance(own, (type(usual), list))
                if kind or (_is_finite(mine.get(name)) and not _is_finite(theirs.get(name))):
                    raise CheckpointError(f"{where}[{name!r}]: {shown(theirs.get(name))} is damaged; use another file.")
            self._try_hyperparameters(where, theirs)
        states = {n: s for n, s in saved["state"].items() if is_count(n)}
        unknown = [n for n in states if n not in of_number]
        if unknown:
            raise CheckpointError(f"state_dict['state'][{unknown[0]}]: of no parameter; load this model's checkpoint.")
        known = {name for state in states.values() for name in state} - {travelled.KEY}
        for number, state in states.items():
            where, p = f"state_dict['state'][{number}]", of_number[number]
            present, peers = self.base.state.get(p, {}), [s for s in states.values() if s is not state]
            for name in [name for name in known if not isinstance(state.get(name), Tensor)]:
                if isinstance(present.get(name), Tensor) or any(isinstance(s.get(name), Tensor) for s in peers):
                    raise CheckpointError(f"{where}[{name!r}]: missing, or no tensor; use another file.")
            for name, value in state.items():
                like = present.get(name)
                fits = not isinstance(like, Tensor) or (isinstance(value, Tensor) and value.shape == like.shape)
                sound = (
                    not isinstance(value, Tensor | float) or _is_finite(value) or not (like is None or _is_finite(like))
                )
                if not fits or not sound:
                    raise CheckpointError(
                        f"{where}[{name!r}]: {shown(value)} is not finite, or of another shape than the base's; use "
                        "another file."
                    )
        return {**saved, "param_groups": groups}

    def _try_hyperparameters(self, where: str, group: Mapping[str, Any]) -> None:
        """Torch's own optimizers look at their hyperparameters when they are made, but not when they load."""
        if type(self.base).__module__.startswith("torch.optim."):
            takes = inspect.signature(type(self.base)).parameters
            own = {name: value for name, value in group.items() if name in takes and name in self.base.defaults}
            try:
                type(self.base)([torch.zeros(1)], **own)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{where}: {error}; use another file.") from None

    def _upgraded(self, own: Any) -> Any:
        """What older versions saved of the snapshot, in the present form; anything else passes."""
        if not isinstance(own, Mapping) or "outer" not in own or "clock" not in own:
            return own
        params = [p for group in self.param_groups for p in group["params"]]
        try:
            steps, refreshes = own["clock"]["steps"], own["clock"]["refreshes"]
            plain = self._engine.state_dict()
            for number, (snapshot, mean) in own["outer"].items():
                precision = torch.ones((), dtype=mean.dtype)
                memory = {
                    "posterior": {"mean": snapshot.to(mean.dtype), "precision": precision},
                    "site": {"theta": mean},
                }
                plain["state"][number] = {
                    "step": 0, "stamp": refreshes, "in_mega": True, "drawn": None, "momentum": [], "memory": memory,
                    "posterior": {"mean": params[number].detach().to(mean.dtype), "precision": precision},
                }  # fmt: skip
            clock = {"step": steps, "refresh": refreshes, "memory": refreshes, "refreshed": own["clock"]["refreshed"]}
            plain["poco"]["clock"].update(clock, skipped=own["clock"]["skipped"])
            for group in plain["param_groups"]:
                group["alpha"] = own["alpha"]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise CheckpointError(f"state_dict['alpha_svrg']: damaged ({error!r}); use another file.") from None
        return plain

    def captured(self, closure: Any, example_batch: Any) -> NoReturn:
        """Refused: the base's step cannot be looked into."""
        raise TypeError(
            f"captured: AlphaSVRG hands its gradients to {type(self.base).__name__}, whose step no graph holds; call "
            "step(closure), or take SVRG(…).captured(…)."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's."""
        self.base.zero_grad(set_to_none)


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number, or several; what is none is not."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    return is_real(value) and math.isfinite(value)


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """The base's step is a part of this optimizer's, around which torch has run the hooks of all optimizers already."""
    known: tuple[Any, ...] = (torch_hooks._global_optimizer_pre_hooks, torch_hooks._global_optimizer_post_hooks)
    kept = [dict(hooks) for hooks in known]
    for hooks in known:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(known, kept, strict=True):
            hooks.update(before)
