"""Federated learning: ten clients with skewed shards of the digits, whose posteriors are merged.

Every client sees mostly two of the ten digits. In each round all clients train from the server's model for some steps,
and what they send is put together: weights averaged by numbers of examples (SGD and Adam: "FedAvg"), or posteriors
multiplied (`poco.merge`). For the latter each client keeps its site t_k; its prior of a round is the server's posterior
without it, q / t_k, so that no example counts twice, and it sends the new site, damped.

    python examples/federated_digits.py [--rounds 5] [--steps 60] [--clients 10] [--seeds 5]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

import expfam_poco as poco
from expfam_poco.family import fields

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
    server, generator = make_model(seed), torch.Generator().manual_seed(seed)
    sizes = [len(y) for _, y in data.shards]
    for _ in range(options.rounds):
        found: list[dict[str, Tensor]] = []
        for shard in data.shards:
            model = make_model(seed)
            model.load_state_dict(server.state_dict())
            kinds = {"SGD": (torch.optim.SGD, options.lr_sgd), "Adam": (torch.optim.Adam, options.lr_adam)}
            kind, lr = kinds[method]
            optimizer = kind(model.parameters(), lr=lr)
            for inputs, targets in batches(shard, options.steps, generator):
                optimizer.zero_grad()
                cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            found.append(model.state_dict())
        shares = [size / sum(sizes) for size in sizes]
        mean = {name: sum(s * own[name] for s, own in zip(shares, found, strict=True)) for name in found[0]}
        server.load_state_dict(mean)
    return [scores(server(data.test[0]).softmax(-1), data.test[1])]


def merged(_: str, data: Data, options: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """Posteriors: all clients start from the product of the sites."""
    server, generator = make_model(seed), torch.Generator().manual_seed(seed)
    # Symmetry between hidden units is broken by the initial weights, which are the prior's mean as well.
    prior = {name: GAUSSIAN.centred_at(p.detach().clone(), options.precision) for name, p in server.named_parameters()}
    posterior, sites = prior, [prior] * len(data.shards)  # a site t_k is kept as p₀ t_k
    for _ in range(options.rounds):
        others = [poco.merge([*sites[:k], *sites[k + 1 :]], prior, GAUSSIAN) for k in range(len(sites))]
        found = []
        for shard, cavity in zip(data.shards, others, strict=True):
            model = make_model(seed)
            optimizer = poco.IVON(
                model.named_parameters(), lr=options.lr_ivon, ess=len(shard[1]), prior=cavity, seed=seed,
                beta2=options.beta2, hess_init=1.0, curvature="gradsq",
            )  # fmt: skip
            optimizer.set_posterior(posterior)
            for inputs, targets in batches(shard, options.steps, generator):
                optimizer.step(lambda x=inputs, y=targets, model=model: cross_entropy(model(x), y))
            found.append(optimizer.posterior_states())
        triples = zip(found, others, sites, strict=True)
        sites = [site_of(own, cavity, prior, old, options.damping) for own, cavity, old in triples]
        posterior = poco.merge(sites, prior, GAUSSIAN)
    optimizer = poco.IVON(server.named_parameters(), lr=0.1, ess=1.0)
    optimizer.set_posterior(posterior)
    draws = poco.predict_classes(server, optimizer, data.test[0], samples=32).probabilities
    return [scores(probabilities, data.test[1]) for probabilities in (server(data.test[0]).softmax(-1), draws)]


def site_of(own: Any, cavity: Any, prior: Any, old: Any, damping: float) -> dict[str, Any]:
    """The client's new site as p₀ (q_k / cavity)ʷ t_k^(1−w), w the damping."""
    made = {}
    for name in own:
        now, without, first, before = (GAUSSIAN.to_nat(s[name]) for s in (own, cavity, prior, old))
        new = fields.add(first, fields.subtract(now, without))
        nat = fields.add(fields.scale(before, 1.0 - damping), fields.scale(new, damping))
        made[name] = GAUSSIAN.from_nat(nat)
    return made


def main() -> None:
    """Print accuracy and NLL of every method, and their standard errors over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("steps", 60), ("clients", 10), ("seeds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    rates = {"lr-sgd": 0.3, "lr-adam": 0.01, "lr-ivon": 0.1, "damping": 0.5, "beta2": 0.95, "precision": 10.0}
    for name, rate in rates.items():
        parser.add_argument(f"--{name}", type=float, default=rate)
    options = parser.parse_args()
    print(f"{options.clients} clients, {options.rounds} rounds of {options.steps} steps, {options.seeds} seeds")
    print(f"{'method':<16} {'accuracy':>16} {'NLL':>16}")
    warnings.filterwarnings("ignore", message="ess: ")  # posteriors are as wide as the prior at first, on purpose
    runs: Sequence[tuple[tuple[str, ...], Any]] = [
        (("SGD",), averaged), (("Adam",), averaged), (("merged, point", "merged, draws"), merged)
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
