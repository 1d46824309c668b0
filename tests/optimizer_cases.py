"""Small problems, and every optimizer ready to run on them: what the optimizers' tests share."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import expfam_poco as poco
from expfam_poco.estimators import LOSSES_ALONE
from expfam_poco.noise import NoiseKey

Make = Callable[..., torch.optim.Optimizer]
# The streams of an optimizer's noise: with its seed, the step and the parameter's number they say which noise it is.
INNER, OUTER, MEGA, FIXED, SAMPLE, PROBE_INNER, PROBE_OUTER, PROBE_MEGA = range(8)


def network(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A 3-4-1 network whose initial weights depend on the seed alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


class Task:
    """Regression on 24 examples in 4 mini-batches; `closure(batch)` returns the mean loss with its graph."""

    def __init__(self, model: nn.Module, *, seed: int = 0, batches: int = 4) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.model = model
        dtype = next(model.parameters()).dtype
        x = torch.randn(24, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(24, 1, generator=generator, dtype=torch.float64)
        y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.1 * noise
        self.x = x.to(dtype).chunk(batches)
        self.y = y.to(dtype).chunk(batches)

    def closure(self, batch: int) -> Callable[[], Tensor]:
        x, y = self.x[batch % len(self.x)], self.y[batch % len(self.y)]
        return lambda: 0.5 * (self.model(x) - y).square().mean()

    def chunks(self) -> list[Callable[[], Tensor]]:
        return [self.closure(batch) for batch in range(len(self.x))]


def shell(family: str, **fixed: Any) -> Make:
    """A factory of `PosteriorCorrected` with these choices, which the caller may change."""

    def make(params: Any, **choices: Any) -> torch.optim.Optimizer:
        return poco.PosteriorCorrected(params, family, **{"seed": 1, **fixed, **choices})

    return make


def named(kind: Callable[..., torch.optim.Optimizer], **fixed: Any) -> Make:
    """A factory of a named optimizer with these choices, which the caller may change."""
    return lambda params, **choices: kind(params, **{"seed": 1, **fixed, **choices})


# Every optimizer that is a `PosteriorCorrected`: the named ones, then other families and estimators.
SHELL: dict[str, Make] = {
    "SVRG": named(poco.SVRG, lr=0.1, weight_decay=0.01),
    "VSGDPoCo": named(poco.VSGDPoCo, lr=0.1, precision=100.0, weight_decay=0.01, noise="fixed"),
    "VON": named(poco.VON, lr=0.05, ess=24.0, hess_init=2.0, weight_decay=0.1),
    "VONPoCo": named(poco.VONPoCo, lr=0.05, ess=24.0, hess_init=2.0, weight_decay=0.1),
    "IVON": named(poco.IVON, lr=0.1, ess=500.0, hess_init=1.0, beta2=0.99),
    "IVONPoCo": named(poco.IVONPoCo, lr=0.1, ess=500.0, hess_init=1.0, beta2=0.99),
    "IVONPoCoMo": named(
        poco.IVONPoCoMo, lr=0.1, ess=500.0, hess_init=1.0, beta2=0.99, rho1=0.6, rho2=0.1, alpha=0.7
    ),
    "BayesBiNN": named(poco.BayesBiNN, square_momentum=None, lr=0.01, ess=24.0, curvature="relaxed"),
    "BayesBiNNPoCo": named(
        poco.BayesBiNNPoCo, lr=0.01, ess=24.0, temperature=0.5, mc_samples=2, alpha=1.0, strength=0.5
    ),
    "diagonal-exact": shell("diagonal_gaussian", lr=0.05, ess=100.0, hess_init=2.0, curvature="exact"),
    "diagonal-gradsq": shell("diagonal_gaussian", lr=0.05, ess=100.0, hess_init=9.0, curvature="gradsq", momentum=0.9),
    "diagonal-hutchinson": shell(
        "diagonal_gaussian", lr=0.05, ess=100.0, hess_init=2.0, weight_decay=0.1, curvature="hutchinson",
        noise="antithetic", max_grad_norm=5.0,
    ),
    "diagonal-stored": shell(
        "diagonal_gaussian", lr=0.05, ess=100.0, hess_init=2.0, weight_decay=0.1, anchor="stored", anchor_weight=1.0
    ),
    "full-reparam": shell(
        "full_gaussian", lr=0.02, ess=100.0, hess_init=5.0, weight_decay=0.1, curvature="reparam", mc_samples=2,
        noise="independent",
    ),
    "bernoulli-relaxed": shell("bernoulli", lr=0.01, ess=24.0, momentum=0.5),
    "bernoulli-mean": shell(
        poco.get_family("bernoulli")(point_estimate="mean"), lr=0.01, ess=24.0, curvature="straight_through"
    ),
    "bernoulli-score": shell("bernoulli", lr=0.001, ess=24.0, curvature="score", mc_samples=3),
}  # fmt: skip


def over_sgd(params: Any) -> torch.optim.Optimizer:
    return poco.AlphaSVRG(torch.optim.SGD(params, lr=0.05, momentum=0.9), alpha=0.7)


def over_adamw(params: Any) -> torch.optim.Optimizer:
    return poco.AlphaSVRG(torch.optim.AdamW(params, lr=0.02), alpha=0.5)


def over_vsgd(params: Any) -> torch.optim.Optimizer:
    return poco.AlphaSVRG(poco.VSGD(params, lr=0.02, init="official", weight_decay=0.01), alpha=0.5)


OVER_A_BASE: dict[str, Make] = {
    "AlphaSVRG-SGD": over_sgd,
    "AlphaSVRG-AdamW": over_adamw,
    "AlphaSVRG-VSGD": over_vsgd,
}
# Those that step with the gradients they find, as torch's own do: a training loop of theirs is another one.
ON_GRADIENTS: dict[str, Make] = {
    "VSGD": lambda params, **choices: poco.VSGD(params, **{"lr": 0.05, **choices}),
    "VSGD-official": lambda params, **choices: poco.VSGD(params, **{"lr": 0.05, "init": "official", **choices}),
    "ConstantVSGD": lambda params, **choices: poco.ConstantVSGD(params, **{"lr": 0.05, "K_g": 9.0, **choices}),
}
OPTIMIZERS: dict[str, Make] = {**SHELL, **OVER_A_BASE}


def through_a_file(value: Any) -> Any:
    """As `torch.load(weights_only=True)` gives it back."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def not_looking(optimizer: Any) -> Any:
    """The optimizer, whose first step then does not look at the weights as well: all evaluations are the step's own."""
    getattr(optimizer, "_engine", optimizer)._width._is_known = True
    return optimizer


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def states_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What a checkpoint has of every parameter, without the counters that travel with the first."""
    states = optimizer.state_dict()["state"]
    return {number: {k: v for k, v in state.items() if k != "header"} for number, state in states.items()}


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit for bit the same values, shapes and dtypes."""
    pairs = zip(first, second, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def same(first: Any, second: Any) -> bool:
    """Bit for bit the same plain value: tensors, numbers, strings, in dictionaries and lists."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def differentiates(opt: Any) -> bool:
    """Whether gradients are taken at all."""
    return all(getattr(g.get("curvature"), "needs", "gradient") not in LOSSES_ALONE for g in opt.param_groups)


def is_joint(opt: Any) -> bool:
    """Whether some posterior is over all parameters of a group at once."""
    return any(getattr(g.get("family"), "joint", False) for g in opt.param_groups)


def takes_second_derivatives(opt: Any) -> bool:
    """Whether a closure must return the loss's graph."""
    needs = {getattr(g.get("curvature"), "needs", "gradient") for g in opt.param_groups}
    return (
        bool({"hvp", "hessian"} & needs) or getattr(getattr(opt, "_products", None), "kind", "curvature") != "curvature"
    )


def those(condition: Callable[[Any], bool], makers: Mapping[str, Make] = OPTIMIZERS) -> list[str]:
    """The names of the optimizers of which the condition holds."""
    return [name for name, make in makers.items() if condition(make(network().parameters()))]


def noises(opt: Any, stream: int, step: int, mode: str = "shared", count: int | None = None) -> list[Tensor]:
    """What the optimizer's generator gives every posterior at a step (or chunk, or refresh): draws × shape each."""
    found, number = [], 0
    for group in opt.param_groups:
        sizes = [p.shape for p in group["params"]]
        alone = [(number + i, p.shape, p.dtype) for i, p in enumerate(group["params"])]
        whole = [(number, torch.Size([sum(size.numel() for size in sizes)]), group["params"][0].dtype)]
        number += len(sizes)
        for index, shape, dtype in whole if group["family"].joint else alone:
            family = group["family"] if group["family"].joint else group["family"].for_shape(shape)
            key = NoiseKey(opt.seed, stream, step, parameter=index)
            dtype = torch.promote_types(torch.float32, dtype)
            if mode == "zero":
                found.append(family.neutral_noise(torch.empty(count or opt.mc_samples, *shape, dtype=dtype)))
                continue
            drawn = family.noise(shape, count or opt.mc_samples, key, dtype=dtype)
            pairs = mode == "antithetic"
            found.append(torch.stack([drawn, family.reflect(drawn)], 1).flatten(0, 1) if pairs else drawn)
    return found


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def run(opt: torch.optim.Optimizer, task: Task, steps: int, *, refresh_every: int = 4, start: int = 0) -> list[Tensor]:
    """Steps number start+1 … start+steps, with a refresh before every fourth; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        if step and step % refresh_every == 0:
            losses.append(opt.refresh(task.chunks()))
        losses.append(opt.step(task.closure(step)))
    return losses
