"""Weights with constraints: Gamma, Beta and Dirichlet posteriors on the digits of scikit-learn.

* Gamma: parts of images. 64 × 8 positive parts and a positive amount of each in every image explain the pixel counts
  (Poisson negative log-likelihood a pixel, as in non-negative matrix factorisation).
* Beta: chances. For each digit and pixel the chance of ink (Bernoulli cross-entropy a pixel).
* Dirichlet: shares. How much to believe each of six classifiers, one of them useless: the mixture's negative
  log-likelihood of images that no classifier has seen.

Each is trained by the Bayesian learning rule with and without posterior correction, at the same number of steps.

    python examples/positive_weights.py [--steps 400]
"""

from __future__ import annotations

import argparse
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
BATCH, LR, ALPHA, EVERY = 20, 0.05, 0.5, 10


def digits() -> tuple[Tensor, Tensor]:
    """Pixel counts from 0 to 16, and labels, in one fixed order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def parts() -> tuple[nn.ParameterDict, Loss, int]:
    """Positive parts, and their amounts in each of 200 images."""
    x = digits()[0][:200]
    generator = torch.Generator().manual_seed(1)
    weights = nn.ParameterDict(
        {
            "amounts": nn.Parameter(0.5 + torch.rand(200, 8, generator=generator)),
            "parts": nn.Parameter(0.3 + 0.4 * torch.rand(8, 64, generator=generator)),
        }
    )

    def loss(rows: Tensor) -> Tensor:
        expected = weights["amounts"][rows] @ weights["parts"]
        return (expected - x[rows] * expected.log()).sum(-1).mean()

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
    "gamma": (parts, constraints.positive, 64),
    "beta": (chances, constraints.unit_interval, 64),
    "dirichlet": (shares, constraints.simplex, 1),
}


def train(family: str, steps: int, corrected: bool) -> tuple[float, bool, dict[str, Tensor]]:
    """The loss over all data at the end, whether every draw and every point was a true weight, and the weights."""
    make, support, scale = TASKS[family]
    weights, loss, size = make()
    optimizer = poco.PosteriorCorrected(weights.named_parameters(), family, lr=LR, ess=float(size), alpha=ALPHA, seed=0)
    generator = torch.Generator().manual_seed(2)
    kept = True

    def closure(rows: Tensor) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            nonlocal kept
            kept = kept and all(bool(support.check(weight.detach()).all()) for weight in weights.values())
            return loss(rows)

        return evaluate

    for step in range(steps):
        if corrected and step >= steps // 4 and step % EVERY == 0:
            optimizer.refresh([closure(rows) for rows in torch.arange(size).split(100)])
        optimizer.step(closure(torch.randint(size, (BATCH,), generator=generator)))
    with torch.no_grad():
        total = float(closure(torch.arange(size))())
    return total / scale, kept, {name: weight.detach().clone() for name, weight in weights.items()}


def main() -> None:
    """Print a table of losses, and the shares of the classifiers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    print(f"{'family':10s}{'correction':>12s}{'loss':>10s}{'constraint kept':>18s}")
    for family in TASKS:
        for corrected in (False, True):
            loss, kept, weights = train(family, steps, corrected)
            print(f"{family:10s}{'yes' if corrected else 'no':>12s}{loss:10.4f}{'yes' if kept else 'no':>18s}")
    print("shares:", " ".join(f"{share:.3f}" for share in weights["shares"].tolist()))


if __name__ == "__main__":
    main()
