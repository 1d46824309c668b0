r"""How good estimators of binary weights' natural gradients are: the numbers of `docs/binary-networks.md`.

    python benchmarks/binary_estimators.py            # two minutes
    python benchmarks/binary_estimators.py --out DIR  # JSON there, no table is replaced

* `moments`: bias and variance of every estimator on a network of 3-3-1 neurons and 12 weights, against the truth by
  enumeration of all 4096 networks, where weights are unsure (|λ| about 0.5) and where they are sure (about 2).
* `temperature`: signal to noise of the relaxed estimator on a 64-16-10 network and the digits, over τ.
* `noise`: what one noise for λ_in and λ_out is worth, on that small network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import expfam_poco as poco
from expfam_poco.estimators import LOSSES_ALONE, Draws, Estimator
from expfam_poco.families import Bernoulli, Relaxed
from expfam_poco.noise import NoiseKey

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "binary-networks.md"
EXAMPLES, WEIGHTS = 32, 12
DRAWS = 200_000


# ---- a network of 12 weights, and the truth -----------------------------------------------------------------


class TinyNetwork(NamedTuple):
    """Logistic loss of tanh(x W₁ᵀ) w₂ on examples labelled by a network of the same shape."""

    x: Tensor
    y: Tensor

    @classmethod
    def made(cls, seed: int = 0) -> TinyNetwork:
        """The problem of a seed."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
        teacher = torch.where(torch.rand(WEIGHTS, generator=generator) < 0.5, -1.0, 1.0).double()
        noise = 0.5 * torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
        return cls(x, (logits(teacher, x) + noise > 0.0).double())

    def loss(self, theta: Tensor) -> Tensor:
        """The mean loss at 12 weights."""
        return functional.binary_cross_entropy_with_logits(logits(theta, self.x), self.y)


def logits(theta: Tensor, x: Tensor) -> Tensor:
    """Three hidden neurons with three weights each, and three to the output."""
    return torch.tanh(x @ theta[:9].reshape(3, 3).T) @ theta[9:]


def signs() -> Tensor:
    """All 4096 networks."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=WEIGHTS)), dtype=torch.float64)


def probabilities(lam: Tensor, theta: Tensor) -> Tensor:
    """Π σ(2 λ θ)."""
    return torch.sigmoid(2.0 * lam * theta).prod(-1)


def truth(lam: Tensor, network: TinyNetwork) -> Tensor:
    """∇_μ E[ℓ]: half the difference of E[ℓ | θᵢ = ±1], by enumeration."""
    theta = signs()
    losses, weights = torch.func.vmap(network.loss)(theta), probabilities(lam, theta)
    mean = torch.tanh(lam)
    given = weights[:, None] / ((1.0 + theta * mean) / 2.0)  # of the other weights
    return 0.5 * (given * theta * losses[:, None]).sum(0)


def posterior(confidence: float) -> Tensor:
    """λ of mixed signs, |λ| between a half and one and a half times the confidence."""
    generator = torch.Generator().manual_seed(1)
    size = 0.5 + torch.rand(WEIGHTS, generator=generator, dtype=torch.float64)
    return confidence * size * torch.where(torch.rand(WEIGHTS, generator=generator) < 0.5, -1.0, 1.0)


# ---- moments ------------------------------------------------------------------------------------------------


def estimates(estimator: Estimator, lam: Tensor, network: TinyNetwork, draws: int) -> Tensor:
    """`draws` independent estimates, each of the fewest evaluations that the estimator does with."""
    family = Bernoulli()
    state = family.State(lam)
    noise = family.noise(lam.shape, draws, NoiseKey(3), dtype=torch.float64)[:, None]
    if estimator.antithetic:
        noise = torch.cat([noise, family.reflect(noise)], 1)
    if estimator.independent_draws:
        other = family.noise(lam.shape, draws, NoiseKey(4), dtype=torch.float64)[:, None]
        noise = torch.cat([noise, other], 1)
    theta = estimator.points(family, state, noise)

    def one(eps: Tensor, points: Tensor) -> Tensor:
        loss, grad, variations = torch.func.vmap(network.loss)(points), None, None
        if estimator.needs not in LOSSES_ALONE:
            grad = torch.func.vmap(torch.func.grad(network.loss))(points)
        if estimator.needs == "variations":
            varied = torch.stack(list(estimator.variations(family, points[0])))
            variations = torch.func.vmap(network.loss)(varied)[None]
        found: Tensor = estimator.natural_gradient(
            family, state, Draws(eps, points, loss, grad, variations=variations)
        ).theta
        return found

    return torch.func.vmap(one, chunk_size=4000)(noise, theta)


CASES: dict[str, tuple[Estimator, str]] = {
    "relaxed, τ = 1": (Relaxed(1.0), "1 gradient"),
    "relaxed, τ = 0.5": (Relaxed(0.5), "1 gradient"),
    "relaxed, τ = 0.1": (Relaxed(0.1), "1 gradient"),
    "relaxed, τ = 0.01": (Relaxed(0.01), "1 gradient"),
    "straight_through": (Bernoulli.estimators["straight_through"], "1 gradient"),
    "clipped_straight_through": (Bernoulli.estimators["clipped_straight_through"], "1 gradient"),
    "score": (poco.estimators.ScoreFunction(), "2 losses"),
    "arm": (Bernoulli.estimators["arm"], "2 losses"),
    "flip": (Bernoulli.estimators["flip"], f"{WEIGHTS + 1} losses"),
}
CONFIDENCES = {"unsure": 0.5, "sure": 2.0}


def moments() -> dict[str, Any]:
    """Relative bias ‖E − truth‖/‖truth‖ with its standard error, and variance tr Cov/‖truth‖²."""
    network, found = TinyNetwork.made(), {}
    for name, (estimator, cost) in CASES.items():
        found[name] = {"cost": cost, "unbiased": estimator.unbiased}
        for label, confidence in CONFIDENCES.items():
            lam = posterior(confidence)
            wanted = truth(lam, network)
            values = estimates(estimator, lam, network, DRAWS)
            scale, spread = wanted.norm(), values.var(0).sum()
            found[name][label] = {
                "bias": float((values.mean(0) - wanted).norm() / scale),
                "error": float((spread / len(values)).sqrt() / scale),
                "variance": float(spread / scale**2),
            }
    return found


# ---- temperature --------------------------------------------------------------------------------------------

TEMPERATURES = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001, 1e-4)


def temperature(draws: int = 400) -> dict[str, Any]:
    """‖mean‖²/tr Cov of one draw on the digits with all of 1797 examples, a 64-16-10 network, |λ| = 1, in float32."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 8.0 - 1.0, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    lam = torch.where(torch.rand(64 * 16 + 16 * 10, generator=generator) < 0.5, -1.0, 1.0)

    def loss(theta: Tensor) -> Tensor:
        hidden = torch.tanh(x @ theta[: 64 * 16].reshape(16, 64).T / 8.0)
        return functional.cross_entropy(hidden @ theta[64 * 16 :].reshape(10, 16).T / 4.0, y)

    family, found = Bernoulli(), {}
    state = family.State(lam)
    noise = family.noise(lam.shape, draws, NoiseKey(5), dtype=torch.float32)
    cases: dict[str, Estimator] = {f"{t:g}": Relaxed(t) for t in TEMPERATURES}
    cases["straight_through"] = Bernoulli.estimators["straight_through"]
    gradient: Callable[[Tensor], Tensor] = torch.func.grad(loss)
    for name, estimator in cases.items():
        values = []
        for eps in noise.split(1):
            theta = estimator.points(family, state, eps)
            values.append(estimator.natural_gradient(family, state, Draws(eps, theta, theta, gradient(theta[0])[None])))
        sample = torch.stack([value.theta for value in values]).double()
        spread = sample.var(0).sum()
        signal = sample.mean(0).square().sum() - spread / draws  # without what the noise adds to it
        found[name] = {"signal_to_noise": float(signal / spread), "variance": float(spread)}
    return found


# ---- noise --------------------------------------------------------------------------------------------------


DISTANCES = (0.02, 0.1, 0.5)


def corrections(steps: int = 2000) -> dict[str, Any]:
    """tr Var of the relaxed ĝ_in − ĝ_out + ḡ_out on mini-batches of 4 at τ = 1, λ_in at a distance from λ_out."""
    network, family, estimator = TinyNetwork.made(), Bernoulli(), Relaxed(1.0)
    outer = posterior(0.5)
    batches = torch.stack(
        [torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(i))[:4] for i in range(steps)]
    )
    first = family.noise((WEIGHTS,), steps, NoiseKey(6), dtype=torch.float64)
    fresh = family.noise((WEIGHTS,), steps, NoiseKey(7), dtype=torch.float64)

    def measured(lam: Tensor, noise: Tensor) -> Tensor:
        def one(eps: Tensor, batch: Tensor) -> Tensor:
            theta = estimator.points(family, family.State(lam), eps)
            grad = torch.func.grad(TinyNetwork(network.x[batch], network.y[batch]).loss)(theta)
            draws = Draws(eps[None], theta[None], eps[:1], grad[None])
            found: Tensor = estimator.natural_gradient(family, family.State(lam), draws).theta
            return found

        return torch.func.vmap(one)(noise, batches)

    found = {}
    for distance in DISTANCES:
        inner = measured(outer + distance * torch.sin(torch.arange(WEIGHTS, dtype=torch.float64)), first)
        cases = {"plain": 0.0, "shared": measured(outer, first), "independent": measured(outer, fresh)}
        found[f"{distance:g}"] = {name: float((inner - other).var(0).sum()) for name, other in cases.items()}
    return found


# ---- tables -------------------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *body])


def markdown(part: str, content: dict[str, Any]) -> str:
    """A part's table."""
    if part == "moments":
        rows = [["estimator", "cost", "bias, unsure", "variance, unsure", "bias, sure", "variance, sure"]]
        for name, row in content.items():
            cells = []
            for label in CONFIDENCES:
                cell = row[label]
                error = f" ± {cell['error']:.2f}" if cell["error"] >= 0.02 else ""
                shown = "0" if row["unbiased"] else f"{cell['bias']:.2f}{error}"
                cells += [shown, f"{cell['variance']:.2g}" if cell["variance"] < 100 else f"{cell['variance']:.0f}"]
            rows.append([f"`{name}`" if "," not in name else name, row["cost"], *cells])
    elif part == "temperature":
        rows = [["τ", "signal to noise of one draw", "draws for as much signal as noise"]]
        for name, cell in content.items():
            ratio = cell["signal_to_noise"]
            shown = f"{ratio:.2g}" if ratio > 0.0 else "none found"
            rows.append([f"`{name}`" if "_" in name else name, shown, f"{1 / ratio:.0f}" if ratio > 0.0 else "–"])
    else:
        rows = [["largest difference of λ_in from λ_out", "variance of the plain gradient"]]
        rows[0] += ["less by, with shared noise", "less by, with fresh noise"]
        for distance, cell in content.items():
            factors = [f"{cell['plain'] / cell[name]:.3g}×" for name in ("shared", "independent")]
            rows.append([distance, f"{cell['plain']:.2g}", *factors])
    return table(rows)


def write_table(part: str, content: dict[str, Any]) -> None:
    """Replace the table of a part in the page."""
    pattern = re.compile(rf"(<!-- table {part} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(pattern.sub(lambda m: f"{m[1]}\n{markdown(part, content)}\n{m[2]}", text), encoding="utf-8")


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "moments": moments, "temperature": temperature, "noise": corrections,
}  # fmt: skip


def main() -> None:
    """Measure all, write the JSON, and replace the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes in place of results/")
    options = parser.parse_args()
    content = {name: part() for name, part in PARTS.items()}
    folder = options.out or HERE / "results"
    (folder / "binary-estimators.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, part in content.items():
        print(markdown(name, part), end="\n\n")
        if options.out is None:
            write_table(name, part)


if __name__ == "__main__":
    main()
