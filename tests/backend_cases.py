"""A model with tensors of every layout, and what the tests of backends and spans share."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import pytest
import torch
from optimizer_cases import Make, Task, flat, run
from torch import Tensor, nn

import expfam_poco as poco

SHAPES: dict[str, tuple[int, ...]] = {
    "long": (700,), "matrix": (20, 30), "kernel": (4, 3, 5, 5), "transposed": (9, 40), "scalar": (), "one": (1,),
}  # fmt: skip
FLAT = ("long", "matrix")
# Compiled kernels serve the whole process: of several workers, one runs all tests that compile.
compiles = pytest.mark.xdist_group("compiler")


def model_of(names: Collection[str] = tuple(SHAPES), dtype: torch.dtype = torch.float64) -> nn.ParameterDict:
    """Positive weights in all layouts: contiguous, channels last, transposed, without dimensions, a single one."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.rand(SHAPES[name], generator=generator, dtype=torch.float64) + 0.5 for name in SHAPES}
    made["kernel"] = made["kernel"].contiguous(memory_format=torch.channels_last)
    made["transposed"] = made["transposed"].T
    return nn.ParameterDict({name: nn.Parameter(made[name].to(dtype)) for name in names})


class Wells(Task):
    """Every weight in a well whose middle depends on the batch; all weights are coupled. Names in `skip` are unused."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        self.x = tuple(range(4))
        self.skip: set[str] = set()

    def closure(self, batch: int) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(batch % 4)
        params = dict(self.model.named_parameters())
        middles = {
            name: (1.0 + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
            for name, p in params.items()
        }

        def loss() -> Tensor:
            used = {name: p for name, p in params.items() if name not in self.skip}
            wells = [0.5 * (p - middles[name]).square().sum() + 0.1 * p.cos().sum() for name, p in used.items()]
            return torch.stack(wells).sum() + 0.05 * torch.stack([p.mean() for p in used.values()]).sum().square()

        return loss


class Vectors(poco.ExponentialFamily):
    """Vectors from N(Σλ, Σ), Σ = I + 11ᵀ/4: one weight is a row, whose entries depend on each other."""

    event_dim: ClassVar[int] = 1

    def statistics(self, theta: Tensor) -> Any:
        return self.Mean(theta)

    def log_partition(self, nat: Any) -> Tensor:
        return 0.5 * nat.theta.square().sum(-1) + 0.125 * nat.theta.sum(-1).square()

    def sample(self, state: Any, noise: Tensor) -> Tensor:
        size = noise.shape[-1]
        root = ((1.0 + size / 4.0) ** 0.5 - 1.0) / size
        mean = state.theta + 0.25 * state.theta.sum(-1, keepdim=True)
        return mean + noise + root * noise.sum(-1, keepdim=True)

    def centred_at(self, theta: Tensor, precision: float | Tensor | None = None) -> Any:
        return self.State(theta - 0.25 / (1.0 + theta.shape[-1] / 4.0) * theta.sum(-1, keepdim=True))


def trained(
    make: Make, steps: int = 14, names: Collection[str] = tuple(SHAPES), dtype: torch.dtype = torch.float64, **more: Any
) -> tuple[nn.ParameterDict, Any, Wells]:
    """A model after so many steps, with a refresh before every fourth."""
    model = model_of(names, dtype)
    opt, task = make(model.named_parameters(), **more), Wells(model)
    run(opt, task, steps)
    return model, opt, task


def numbers(model: nn.Module, opt: Any) -> dict[str, list[Tensor]]:
    """Weights, and the posteriors field by field."""
    states = list(opt.posterior_states().values())
    fields = {name: [getattr(state, name) for state in states] for name in states[0]._fields}
    return {"weights": [p.detach().clone() for p in model.parameters()], **fields}


def distance(first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> float:
    """The largest difference of a field, relative to its norm."""
    assert first.keys() == second.keys()
    pairs = [(flat(first[name]).double(), flat(second[name]).double()) for name in first]
    assert all(bool(torch.isfinite(a).all() and torch.isfinite(b).all()) for a, b in pairs)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
