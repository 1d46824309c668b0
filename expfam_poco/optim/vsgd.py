"""VSGD and Constant VSGD (Chen, Kuzina, Esmaeili and Tomczak, "Variational Stochastic Gradient Descent").

Ordinary torch optimizers, stepped with the gradients that `backward()` leaves. What they compute stands in
`gradient_model`; here are groups, state, checkpoints, and the passes over large tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco import arguments
from expfam_poco.closures.evaluate import require_finite
from expfam_poco.closures.shards import require_whole
from expfam_poco.engine import settings
from expfam_poco.engine.backend import Backend, plainly
from expfam_poco.engine.block import check_parameter
from expfam_poco.engine.pointwise import Member, Pointwise, spoil_of
from expfam_poco.engine.watch import Watch
from expfam_poco.errors import CheckpointError, NonFiniteError, Skips
from expfam_poco.family import recording
from expfam_poco.family.transfer import is_ahead
from expfam_poco.optim import travelled
from expfam_poco.optim.base import without_hooks
from expfam_poco.optim.captured_gradients import CapturedGradientStep
from expfam_poco.optim.checkpoint import Recorded, check_clock, fitted, is_count
from expfam_poco.rule import gradient_model
from expfam_poco.rule.gradient_model import Families

SHAPE_OFFSET = 5e-5  # half of the 1e-4 that the published code adds to 2γ + 1
INITIAL: dict[str, dict[str, float]] = {
    "paper": {"kappa1": 0.9, "kappa2": 0.81, "eps": 0.0, "shape_offset": 0.0},
    "official": {"kappa1": 0.81, "kappa2": 0.9, "eps": 1e-8, "shape_offset": SHAPE_OFFSET},
}
_rate = (settings.number_in(0.0, 1.0), "a number between 0 and 1")
_prior = (settings.number_in(1e-30, 1e30), "a number from 1e-30 to 1e30")
_positive = (settings.number_in(0.0, settings.INF, high_open=True), "a finite number, 0 or larger")


class Spoiled(NamedTuple):
    """How many weights kept their values in a step, of how many, where the others have then done the same (or None)."""

    counts: Tensor
    among: int | None

    def error(self, late: str) -> NonFiniteError:
        """The error after such a step; `late` says in which."""
        count = int(self.counts)
        error = NonFiniteError(
            f"{late}params: the step of {count} weights would not have been finite, for their gradients are NaN, "
            "infinite or too large; they kept their values. Find the NaN, clip the gradients, or lower lr."
        )
        error.stepped = count != self.among
        return error


Used = tuple[dict[str, Any], Parameter]  # a group, and a parameter of it that has a gradient


class GradientModelOptimizer(Recorded, torch.optim.Optimizer):
    """What VSGD and Constant VSGD share: an optimizer whose direction is read off a model of the gradient.

    Args:
        params: parameters, named parameters or groups.
        defaults: the hyperparameters of a group.
        nonfinite: see `VSGD`.
        backend: see `VSGD`.
    """

    header: ClassVar[str] = "vsgd"
    newest: ClassVar[int] = 2
    state_names: ClassVar[tuple[str, ...]]
    rules: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]]
    rule: ClassVar[Any]  # a static `Rule`

    def __init__(self, params: Any, defaults: dict[str, Any], nonfinite: str, backend: str) -> None:
        settings.check_params(params)
        settings.check_nonfinite(nonfinite)
        self.nonfinite = nonfinite
        self.backend = Backend(backend)
        self._pointwise = Pointwise(self.backend, type(self).rule, Families.named())
        self._watch = Watch()
        self._skips = Skips()
        self._clock = {"steps": 0, "skipped": 0}
        self.needed = tuple(defaults)
        arguments.flag("maximize", defaults["maximize"])
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, and the `step` that a scheduler has wrapped: they belong to this one, not to a copy."""
        return without_hooks(self.__dict__)

    # ---- what the two differ in --------------------------------------------------------------------------

    def start(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The values that the state's tensors begin with."""
        raise NotImplementedError("VSGD and ConstantVSGD have their own")

    def numbers(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """What the kernel needs beside tensors at step t."""
        raise NotImplementedError("VSGD and ConstantVSGD have their own")

    def check(self, group: dict[str, Any]) -> None:
        """Refuse hyperparameters out of range, one sentence each; again at every step, since schedulers set them."""
        for name, (test, remedy) in self.rules.items():
            group[name] = settings.python_number(group[name])
            if not test(group[name]):
                raise ValueError(f"{name}={arguments.shown(group[name])}: it must be {remedy}.")

    # ---- groups --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters are checked, further keys carried along.

        Raises:
            ValueError: for a value out of range, or a parameter that is complex or sparse.
        """
        settings.check_foreign(param_group, {"nonfinite": self.nonfinite})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check(group)
            arguments.flag("maximize", group["maximize"])
            for number, p in enumerate(group["params"]):
                name = f"parameter {number} of group {len(self.param_groups) - 1}"
                check_parameter(p, name)
                require_whole(p, name, type(self).__name__)
        except ValueError:
            self.param_groups.pop()
            raise

    def _used(self) -> list[Used]:
        """The parameters that have a gradient; the others, and frozen ones, are left alone."""
        found = []
        for group in self.param_groups:
            self.check(group)
            for p in group["params"]:
                if p.grad is None or not p.requires_grad or not p.numel():
                    continue
                if p.grad.layout != torch.strided:
                    raise ValueError(
                        f"params: a gradient has layout {p.grad.layout}; only dense gradients are supported, so make "
                        "embeddings with sparse=False."
                    )
                found.append((group, p))
        return found

    # ---- a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls `backward()` and returns the loss; not needed.

        Returns:
            what the closure returns, or None.

        Raises:
            NonFiniteError: if a gradient is NaN or infinite (with nonfinite="raise"), nothing being changed; or after
                the step, where the weights concerned have kept their values: if a gradient was too large, and for
                large models, which are stepped tile by tile in place, also if one was NaN or infinite.
        """
        if travelled.only_makes_state(closure, self.param_groups) and not self.state:
            for group, p in self._used():
                self._started(p, group)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step(self._used())
        except NonFiniteError as error:
            self._fell(error)
        else:
            self._skips.stepped()
        return loss

    def _fell(self, error: NonFiniteError) -> None:
        """Count a step that was none, or raise its error."""
        self._clock["skipped"] += not error.stepped
        if self.nonfinite == "raise":
            raise error
        self._skips.skipped(error)

    def _step(self, used: list[Used]) -> None:
        counts = self._advanced(used)
        for _, p in used:
            self.state[p]["step"] += 1
        self._clock["steps"] += 1
        self._watch.take(counts, self._clock["steps"])

    @plainly
    def _advanced(self, used: list[Used]) -> list[Spoiled]:
        """Step all, but do not count it; what was not finite."""
        sizes = [p.numel() for _, p in used]
        streamed = self.backend.in_place(sum(sizes))
        # All or nothing; else what steps in place looks, in the same pass over the weights.
        together, spoils = not streamed or self.nonfinite == "skip", dict[torch.device, Tensor]()
        if together and used:
            where = {p.device for _, p in used}
            if len(where) == 1 and is_ahead(used[0][1].device):
                spoils = {device: spoil_of([p.grad for _, p in used if p.grad is not None]) for device in where}
            else:
                require_finite([p.grad for _, p in used])
        members, kinds = list[Member](), self.kinds(used)
        record, numbers = recording.active, dict[Any, tuple[Any, ...]](kinds)
        if record is not None:
            streamed = streamed or all([self.backend.fuses_all(self.rule, p.device) for _, p in used])
            numbers = {kind: tuple(record.numbers(f"kind {i}", own)) for i, (kind, own) in enumerate(kinds.items())}
        for group, p in used:
            state = self._started(p, group)
            assert p.grad is not None
            values = p.detach(), *(state[name] for name in self.state_names)
            members.append(Member(values, p.grad.detach(), numbers[id(group), state["step"]], group["maximize"]))
        counts = self._pointwise.step(members, streamed=streamed, spoils=spoils)
        return [Spoiled(count, sum(sizes) if spoils else None) for count in counts]

    def kinds(self, used: list[Used]) -> dict[tuple[int, int], tuple[float, ...]]:
        """The numbers of the next step, by the group and how often a parameter has been stepped."""
        found: dict[tuple[int, int], tuple[float, ...]] = {}
        for group, p in used:
            age = self._started(p, group)["step"]
            if (id(group), age) not in found:
                common = group["lr"], group["weight_decay"], group["eps"]
                found[id(group), age] = tuple([float(v) for v in (*common, *self.numbers(group, age + 1))])
        return found

    def _started(self, p: Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter, which begins with the prior."""
        state: dict[str, Any] = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            tensors = (torch.full_like(p, value, dtype=dtype) for value in self.start(group))
            state.update(step=0, **dict(zip(self.state_names, tensors, strict=True)), header=None)
        elif state["mu"].device != p.device:
            raise RuntimeError(
                f"params: a parameter is on {p.device} but its state on {state['mu'].device}; move the model before "
                "the first step, or call optimizer.load_state_dict(optimizer.state_dict()) after moving it."
            )
        return state

    def captured(self, closure: Callable[..., Any], example_batch: Any) -> CapturedGradientStep:
        """Gradients and step as one CUDA graph, as `PosteriorCorrected.captured` has it.

        Args:
            closure: closure(*batch) of a tuple or list, closure(batch) of anything else, returns the mean loss, without
                calling `backward()`.
            example_batch: tensors (or tuples, lists and dictionaries of them) of the shapes and dtypes to come.

        Returns:
            a function of a batch, which returns the loss as a tensor on the device.

        Raises:
            TypeError, ValueError: for what no graph can be made of; the sentence says why.
            RuntimeError: if the closure cannot be captured.
        """
        return CapturedGradientStep(self, closure, example_batch)

    def diagnostics(self) -> dict[str, float]:
        """Plain numbers worth logging: steps, skipped steps, the seconds spent on compiling."""
        self._settle()
        numbers: dict[str, float] = {"steps": self._clock["steps"], "skipped_steps": self._clock["skipped"]}
        return {**numbers, "compile_seconds": self.backend.compile_seconds}

    def _settle(self) -> None:
        """Count what all steps have left to be noticed, or keep it for the next step to raise."""
        skipping = self.nonfinite == "skip"
        self._clock["skipped"] += self._watch.settle(self._clock["steps"] + 1, skipping=skipping, raising=False)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _encoded_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: settings.python_number(value) for key, value in group.items()}

    def _encoded(self, p: Parameter, record: Mapping[str, Any]) -> dict[str, Any]:
        plain = {name: value for name, value in record.items() if name != travelled.KEY}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in plain.items()}

    def _room(self) -> int:
        return travelled.PAGE

    def _header(self) -> dict[str, Any]:
        self._settle()
        return {"kind": type(self).__name__, "nonfinite": self.nonfinite, "clock": dict(self._clock)}

    def _upgraded(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """The present format of format 1, which did not say how many states there are."""
        header, states = state_dict.get(self.header), state_dict.get("state")
        if not isinstance(header, Mapping) or header.get("format") != 1 or not isinstance(states, Mapping):
            return state_dict
        return {**state_dict, self.header: {**header, "format": self.newest, "records": sorted(states)}}

    def _check_header(self, header: Mapping[str, Any]) -> None:
        """Refuse state of another class, or another choice for errors."""
        where = f"state_dict[{self.header!r}]"
        for name, mine in (("kind", type(self).__name__), ("nonfinite", self.nonfinite)):
            if header.get(name) != mine:
                raise CheckpointError(
                    f"{where}[{name!r}]: {header.get(name)!r} where the optimizer has {mine!r}; make the optimizer in "
                    "the same way."
                )
        check_clock(where, header.get("clock"), tuple(self._clock))

    def _decoded_group(self, own: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """The saved hyperparameters, checked like an optimizer's arguments."""
        group = {**own, **saved}
        self.check(group)
        arguments.flag("maximize", group["maximize"])
        return {name: group[name] for name in saved}

    def _decoded(self, p: Parameter, number: int, plain: Any) -> dict[str, Any]:
        """The state of a parameter in the dtype of states, of rates that are positive."""
        where = f"state_dict['state'][{number}]"
        step = plain.get("step") if isinstance(plain, Mapping) else None
        if not is_count(step):
            raise CheckpointError(f"{where}['step']: missing or damaged; use another file.")
        like = torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        state: dict[str, Any] = {"step": step, travelled.KEY: None}
        for name in self.state_names:
            state[name] = fitted(where, name, plain.get(name), like)
            if name != "mu" and not bool((state[name] > 0.0).all()):
                raise CheckpointError(f"{where}[{name!r}]: a rate that is not positive; use another file.")
        return state

    def _take(self, header: Mapping[str, Any]) -> None:
        self._clock = dict(header["clock"])


_COMMON = {"lr": _positive, "gamma": _prior, "K_g": _prior, "weight_decay": _positive, "eps": _positive}


class VSGD(GradientModelOptimizer):
    r"""Variational SGD (Algorithm 1): SGD with a posterior of the gradient, normalised by its second moment.

        μ ← (s_g μ + s_ĝ ĝ)/(s_g + s_ĝ),   σ² = 1/(s_g + s_ĝ),   s = a/b = E[w]                        (Eq. 15, 16)
        b_g ← (1−ρ₁) b_g + ρ₁ [γ + ½ (σ² + (μ − μ₋)²)],   b_ĝ ← (1−ρ₂) b_ĝ + ρ₂ [K_g γ + ½ (σ² + (μ − ĝ)²)]    (18–21)
        θ ← (1 − η δ) θ − η μ / (√(μ² + σ²) + ε),   ρ_i = t^(−κ_i)                                   (Eq. 22–24)

    The second line is `blr.natural_step` on two Gamma posteriors (see `gradient_model`). Step with the gradients that
    `backward()` leaves, like any torch optimizer; `AlphaSVRG(VSGD(…))` feeds it posterior-corrected ones.

    | | init="paper" (Algorithm 1, Table 3) | init="official" (the published code) |
    |---|---|---|
    | prior shape of w_g, w_ĝ | γ | γ + 5e-5 (first step from this; a = γ + ½ + 5e-5 later) |
    | first σ² (γ = 1e-8, K_g = 30) | 0.97 | 1.9e-4: the first step is 70 times larger where ĝ is far below 0.4 |
    | κ₁ (of w_g), κ₂ (of w_ĝ) | 0.9, 0.81 (its §3 says κ₂ > κ₁, as the code has it) | 0.81, 0.9 |
    | ε | 0 | 1e-8 |

    Args:
        params: parameters, named parameters or groups; a group may have hyperparameters of its own.
        lr: η, the step of a weight whose gradient is certain.
        gamma: γ, the prior's strength in observations.
        K_g: the prior's ratio of the noise of ĝ to the drift of g, as rates of their Gammas.
        kappa1: κ₁ of w_g; None: as `init` has it.
        kappa2: κ₂ of w_ĝ; None: as `init` has it.
        weight_decay: δ, decoupled as in AdamW.
        eps: ε; None: as `init` has it.
        init: "paper" or "official", see the table.
        nonfinite: "raise" a `NonFiniteError`, or "skip" the step, when a gradient is NaN or infinite.
        backend: how large models are stepped, "auto", "eager" or "compiled" (docs/speed.md).
        maximize: make the loss large in place of small; a group may differ.

    Raises:
        ValueError: for an argument out of range, or parameters that are complex or sparse.

    Example:
        >>> import torch, expfam_poco as poco
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
        >>> opt = poco.VSGD(model.parameters(), lr=0.1)
        >>> for step in range(60):
        ...     opt.zero_grad()
        ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...     loss.backward()
        ...     opt.step()
        >>> loss.item() < 0.1
        True
    """

    state_names = ("mu", "b_g", "b_ghat")
    rule = staticmethod(gradient_model.step)
    rules: ClassVar = {**_COMMON, "kappa1": _rate, "kappa2": _rate}

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        gamma: float = 1e-8,
        K_g: float = 30.0,
        kappa1: float | None = None,
        kappa2: float | None = None,
        weight_decay: float = 0.0,
        eps: float | None = None,
        init: str = "paper",
        nonfinite: str = "raise",
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, gamma=gamma, K_g=K_g, kappa1=kappa1, kappa2=kappa2, weight_decay=weight_decay, eps=eps, init=init,
            maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, nonfinite, backend)

    def check(self, group: dict[str, Any]) -> None:
        """As every group; κ and ε that are None become those of `init`."""
        arguments.choice("init", group["init"], tuple(INITIAL), f"choose one of {', '.join(map(repr, INITIAL))}")
        for name, value in INITIAL[group["init"]].items():
            if name in group and group[name] is None:
                group[name] = value
        super().check(group)
        if not _prior[0](group["gamma"] * group["K_g"]):
            raise ValueError(f"K_g={group['K_g']!r}: K_g · gamma, the prior's rate, must be {_prior[1]}.")

    def start(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """μ = 0, and the prior's rates γ and K_g γ."""
        return 0.0, group["gamma"], group["K_g"] * group["gamma"]

    def numbers(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """a before the step (Eq. 17: the prior's, then ½ more), the prior's shape and rates, ρ₁ and ρ₂ (Eq. 22, 23)."""
        prior = group["gamma"] + INITIAL[group["init"]]["shape_offset"]
        rates = step ** -group["kappa1"], step ** -group["kappa2"]
        return (prior if step == 1 else prior + 0.5, prior, *self.start(group)[1:], *rates)


class ConstantVSGD(GradientModelOptimizer):
    r"""Constant VSGD (Algorithm 2): `VSGD` with one precision ω, of ĝ, and K_g ω for the drift of the gradient.

        μ ← (K_g μ + ĝ)/(K_g + 1),   σ² = (b/a)/(K_g + 1)                                              (Eq. 34, 35)
        b ← (1−ρ) b + ρ [γ + ½ (σ² + (μ − ĝ)²) + ½ K_g (σ² + (μ − μ₋)²)],   a = γ + 1,   ρ = t^(−κ)      (Eq. 36, 37)
        θ ← (1 − η δ) θ − η μ / (√(μ² + σ²) + ε)                                                           (Eq. 38)

    With K_g = β₁/(1−β₁), μ is Adam's first moment (without debiasing); with K_g = λ/η it is the increment of SGD with
    momentum λ divided by λ + η (the paper prints γ/η).

    Args:
        params: parameters, named parameters or groups; a group may have hyperparameters of its own.
        lr: η.
        gamma: γ, the prior's strength in observations.
        K_g: the ratio of the noise's variance to the drift's.
        kappa: κ; the paper gives no value, this is κ₂ of its Table 3.
        weight_decay: δ, decoupled as in AdamW.
        eps: ε.
        nonfinite: "raise" a `NonFiniteError`, or "skip" the step, when a gradient is NaN or infinite.
        backend: how large models are stepped, "auto", "eager" or "compiled" (docs/speed.md).
        maximize: make the loss large in place of small; a group may differ.

    Raises:
        ValueError: for an argument out of range, or parameters that are complex or sparse.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> opt = poco.ConstantVSGD([weight], lr=0.1, K_g=9.0)
        >>> for step in range(40):
        ...     opt.zero_grad()
        ...     (weight**2).sum().backward()
        ...     opt.step()
        >>> weight.abs().max().item() < 0.3
        True
    """

    state_names = ("mu", "b_ghat")
    rule = staticmethod(gradient_model.step_constant)
    rules: ClassVar = {**_COMMON, "kappa": _rate}

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        gamma: float = 1e-8,
        K_g: float = 30.0,
        kappa: float = 0.81,
        weight_decay: float = 0.0,
        eps: float = 0.0,
        nonfinite: str = "raise",
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        defaults = dict(lr=lr, gamma=gamma, K_g=K_g, kappa=kappa, weight_decay=weight_decay, eps=eps, maximize=maximize)
        super().__init__(params, defaults, nonfinite, backend)

    def start(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """μ = 0, and the prior's rate γ."""
        return 0.0, group["gamma"]

    def numbers(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """a before the step (Eq. 36: the prior's, then 1 more), the prior's shape and rate, ρ and K_g."""
        prior = group["gamma"]
        return (prior if step == 1 else prior + 1.0, prior, prior, step ** -group["kappa"], group["K_g"])
