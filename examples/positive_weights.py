"""Weights with constraints: Gamma, Beta and Dirichlet posteriors on the digits of scikit-learn.

* Gamma: rates. Every inner pixel is a Poisson count whose rate is a positive combination of its eight neighbours and a
  rate of its own (negative log-likelihood a pixel, less log n!).
* Beta: chances. For each digit and pixel the chance of ink (Bernoulli cross-entropy a pixel).
* Dirichlet: shares. How much to believe each of six classifiers, one of them useless: the mixture's negative
  log-likelihood of images that no classifier has seen.

Each is trained by the Bayesian learning rule with and without posterior correction, at the same number of steps (median
of the seeds). The correction begins half way, for it wants an anchor that is near; a refresh takes many chunks, since
the noise of its draws stays until the next.

    python examples/positive_weights.py [--steps 100] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn
from torch.distributions import constraints

import expfam_poco as poco

Loss = Callable[[Tensor], Tensor]
BATCH, ALPHA, EVERY = 20, 0.5, 10


def digits() -> tuple[Tensor, Tensor]:
    """Pixel counts from 0 to 16, and labels, in one fixed order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def neighbours() -> tuple[nn.ParameterDict, Loss, int]:
    """Nine positive weights for every inner pixel: of its eight neighbours, and a rate of its own."""
    x = digits()[0][:1000].view(-1, 1, 8, 8)
    near = nn.functional.unfold(x, 3).transpose(1, 2)  # images × 36 inner pixels × 9
    count = near[..., 4].clone()
    near[..., 4] = 1.0
    weights = nn.ParameterDict({"rates": nn.Parameter(torch.full((36, 9), 0.1))})

    def loss(rows: Tensor) -> Tensor:
        expected = (near[rows] * weights["rates"]).sum(-1)
        return (expected - count[rows] * expected.log()).sum(-1).mean()

    return weights, loss, len(x)


def chances() -> tuple[nn.ParameterDict, Loss, int]:
    """The chance of ink for each digit and pixel."""
    x, y = digits()
    ink = (x[:1000] > 8.0).float()
    weights = nn.ParameterDict({"chances": nn.Parameter(torch.full((10, 64), 0.5))})

    def loss(rows: Tensor) -> Tensor:
        chance = weights["chances"][y[rows]]
        return -(ink[rows] * chance.log() + (1.0 - ink[rows]) * torch.log1p(-chance)).sum(-1).mean()

    return weights, loss, len(ink)


def shares() -> tuple[nn.ParameterDict, Loss, int]:
    """The shares of six classifiers in a mixture."""
    x, y = digits()
    models = [
        LogisticRegression(max_iter=300),
        GaussianNB(var_smoothing=1e-2),
        KNeighborsClassifier(5),
        *(DecisionTreeClassifier(max_depth=depth, random_state=0) for depth in (4, 8)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a solver that stops early is a fine member of an ensemble
        fitted = [model.fit(x[:300].numpy(), y[:300].numpy()) for model in models]
    p = [torch.tensor(model.predict_proba(x[300:].numpy()), dtype=torch.float32) for model in fitted]
    p.append(torch.full_like(p[0], 0.1))
    right = torch.stack(p, -1)[torch.arange(len(x) - 300), y[300:]]  # images × classifiers
    weights = nn.ParameterDict({"shares": nn.Parameter(torch.full((6,), 1.0 / 6.0))})

    def loss(rows: Tensor) -> Tensor:
        return -(right[rows] @ weights["shares"]).log().mean()

    return weights, loss, len(right)


TASKS = {
    "gamma": (neighbours, constraints.positive, 36, 0.02),
    "beta": (chances, constraints.unit_interval, 64, 0.05),
    "dirichlet": (shares, constraints.simplex, 1, 0.05),
}


def train(family: str, steps: int, corrected: bool, seed: int = 0) -> tuple[float, bool, dict[str, Tensor]]:
    """The loss over all data at the end, whether every draw and every point was a true weight, and the weights."""
    make, support, scale, lr = TASKS[family]
    weights, loss, size = make()
    optimizer = poco.PosteriorCorrected(
        weights.named_parameters(), family, lr=lr, ess=float(size), alpha=ALPHA, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    kept = True

    def closure(rows: Tensor) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            nonlocal kept
            kept = kept and all(bool(support.check(weight.detach()).all()) for weight in weights.values())
            return loss(rows)

        return evaluate

    for step in range(steps):
        if corrected and step >= steps // 2 and step % EVERY == 0:
            optimizer.refresh([closure(rows) for rows in torch.arange(size).split(25)])
        optimizer.step(closure(torch.randint(size, (BATCH,), generator=generator)))
    with torch.no_grad():
        total = float(closure(torch.arange(size))())
    return total / scale, kept, {name: weight.detach().clone() for name, weight in weights.items()}


def main() -> None:
    """Print a table of losses, and the shares of the classifiers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'family':10s}{'correction':>12s}{'loss':>10s}{'constraint kept':>18s}")
    for family in TASKS:
        for corrected in (False, True):
            runs = [train(family, options.steps, corrected, seed) for seed in range(options.seeds)]
            loss, kept = statistics.median(run[0] for run in runs), all(run[1] for run in runs)
            print(f"{family:10s}{'yes' if corrected else 'no':>12s}{loss:10.4f}{'yes' if kept else 'no':>18s}")
    weights = runs[-1][2]
    print("shares:", " ".join(f"{share:.3f}" for share in weights["shares"].tolist()))


if __name__ == "__main__":
    main()
