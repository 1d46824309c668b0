"""Federated learning: ten clients with skewed shards of the digits, whose posteriors are merged.

Every client sees mostly two of the ten digits. In each round all clients train from the server's model for some steps,
and what they send is put together: weights averaged by numbers of examples (SGD and Adam: "FedAvg"), or posteriors
multiplied (`poco.merge`). A client's posterior is a Gaussian around its weights, whose precisions are made of the
squared gradients of its examples at the server's weights: where its data say nothing, it has no say (as in "Fisher
merging", Matena and Raffel 2022). These gradients count as steps, so that all methods take as many; but a posterior is
twice as long a message as weights are, so SGD gets a second row, of twice the rounds with half the steps.

    python examples/federated_digits.py [--rounds 5] [--steps 60] [--clients 10] [--seeds 5]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, nll_loss

import expfam_poco as poco

TEST, BATCH = 500, 16
GAUSSIAN = poco.resolve_family("diagonal_gaussian")


class Data(NamedTuple):
    """The clients' shards, and what nobody has seen."""

    shards: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]


def make_data(clients: int, seed: int) -> Data:
    """Sorted by digit but for a tenth, and cut: most of a shard is of one or two digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    test, train = order[:TEST], order[TEST:]
    keys = torch.where(torch.rand(len(train), generator=generator) < 0.1, torch.randint(10, train.shape), y[train])
    shards = [(x[part], y[part]) for part in train[keys.argsort(stable=True)].chunk(clients)]
    return Data(shards, (x[test], y[test]))


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def batches(shard: tuple[Tensor, Tensor], steps: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    chosen = [torch.randint(len(shard[1]), (BATCH,), generator=generator) for _ in range(steps)]
    return [(shard[0][rows], shard[1][rows]) for rows in chosen]


def scores(probabilities: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and negative log likelihood."""
    right = (probabilities.argmax(-1) == y).double().mean()
    return float(right), float(nll_loss(probabilities.detach().clamp_min(1e-12).log(), y))


def averaged(method: str, data: Data, options: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """FedAvg: all clients start from the average of the weights."""
    often = 2 if method.endswith("rounds") else 1
    kinds = {"SGD": (torch.optim.SGD, options.lr_sgd), "Adam": (torch.optim.Adam, options.lr_adam)}
    kind, lr = kinds.get(method, (torch.optim.SGD, options.lr_often))
    server, generator = make_model(seed), torch.Generator().manual_seed(seed)
    sizes = [len(y) for _, y in data.shards]
    for _ in range(often * options.rounds):
        found: list[dict[str, Tensor]] = []
        for shard in data.shards:
            model = trained(server, kind, lr, batches(shard, options.steps // often, generator))
            found.append(model.state_dict())
        shares = [size / sum(sizes) for size in sizes]
        mean = {name: sum(s * own[name] for s, own in zip(shares, found, strict=True)) for name in found[0]}
        server.load_state_dict(mean)
    return [scores(server(data.test[0]).softmax(-1), data.test[1])]


def merged(_: str, data: Data, options: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """Posteriors: all clients start from the mean of their product."""
    server, generator = make_model(seed), torch.Generator().manual_seed(seed)
    flat = GAUSSIAN.centred_at(torch.zeros(()), 1e-6)
    for _ in range(options.rounds):
        found = []
        for shard in data.shards:
            size = len(shard[1])
            squares = squared_gradients(server, shard)
            steps = max(1, options.steps - -(-size // BATCH))
            model = trained(server, torch.optim.SGD, options.lr_merged, batches(shard, steps, generator))
            precisions = {name: size * (s + options.least) ** options.power for name, s in squares.items()}
            found.append(
                {name: GAUSSIAN.centred_at(p.detach(), precisions[name]) for name, p in model.named_parameters()}
            )
        posterior = poco.merge(found, flat, GAUSSIAN)
        server.load_state_dict({name: GAUSSIAN.point(state) for name, state in posterior.items()})
    optimizer = poco.IVON(server.named_parameters(), lr=0.1, ess=1.0)
    optimizer.set_posterior(posterior)
    draws = poco.predict_classes(server, optimizer, data.test[0], samples=32).probabilities
    return [scores(probabilities, data.test[1]) for probabilities in (server(data.test[0]).softmax(-1), draws)]


def trained(server: nn.Module, kind: Any, lr: float, parts: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of the server's model after a step for every batch."""
    model = copy.deepcopy(server)
    optimizer = kind(model.parameters(), lr=lr)
    for inputs, targets in parts:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def squared_gradients(model: nn.Module, shard: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The mean over examples of each one's squared gradient: the diagonal of the empirical Fisher matrix."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (x,)), y)

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *shard)
    return {name: value.square().mean(0) for name, value in each.items()}


def main() -> None:
    """Print accuracy and NLL of every method, and their standard errors over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("steps", 60), ("clients", 10), ("seeds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    rates = {"lr-sgd": 0.7, "lr-often": 0.8, "lr-adam": 0.015, "lr-merged": 0.4, "least": 1e-4, "power": 0.5}
    for name, rate in rates.items():
        parser.add_argument(f"--{name}", type=float, default=rate)
    options = parser.parse_args()
    print(f"{options.clients} clients, {options.rounds} rounds of {options.steps} steps, {options.seeds} seeds")
    print(f"{'method':<16} {'accuracy':>16} {'NLL':>16}")
    runs: Sequence[tuple[tuple[str, ...], Any]] = [
        (("SGD",), averaged), (("SGD, 2 × rounds",), averaged), (("Adam",), averaged),
        (("merged, point", "merged, draws"), merged),
    ]  # fmt: skip
    for names, run in runs:
        found = [run(names[0], make_data(options.clients, seed), options, seed) for seed in range(options.seeds)]
        for place, name in enumerate(names):
            numbers = torch.tensor([each[place] for each in found], dtype=torch.float64)
            error = numbers.std(0, correction=1 if len(found) > 1 else 0) / len(found) ** 0.5
            cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(numbers.mean(0).tolist(), error.tolist(), strict=True)]
            print(f"{name:<16} {cells[0]:>16} {cells[1]:>16}", flush=True)


if __name__ == "__main__":
    main()
