"""Three Pyro models by `NaturalVI`, and a picture: logistic regression, local latents, streaming data.

    python examples/pyro_models.py [--output pyro.png]

docs/pyro.md explains the models. The picture shows −ELBO beside Pyro's SVI with an AutoMultivariateNormal and Adam (one
rate, not tuned; benchmarks/natural_vi.py tunes), the levels of 60 schools with two standard deviations, and a mean that
is followed from day to day.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from expfam_poco.integrations.pyro import NaturalVI

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # told apart by everybody (Okabe and Ito)


def cancer(x: Tensor, y: Tensor) -> None:
    """Logistic regression."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)


def schools(tests: Tensor, size: int) -> None:
    """Every school has a level, of which a batch sees some."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("schools", tests.shape[1], subsample_size=size, dim=-1) as i:
        level = pyro.sample("level", dist.Normal(mean, spread))
        with pyro.plate("tests", len(tests), dim=-2):
            pyro.sample("score", dist.Normal(level, 0.3), obs=tests[:, i])


def day(y: Tensor) -> None:
    """A mean that stays."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("day", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def regression(steps: int) -> tuple[list[float], list[float]]:
    """−ELBO of both methods, step by step: a pass over the data each."""
    data = load_breast_cancer()
    x = torch.tensor(StandardScaler().fit_transform(data.data), dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.float32)
    vi = NaturalVI(cancer, seed=0)
    ours = [vi.step(x, y) for _ in range(steps)]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(cancer, AutoMultivariateNormal(cancer), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    return ours, [svi.step(x, y) for _ in range(steps)]


def hierarchical(passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The true levels, and the posterior's means and deviations."""
    torch.manual_seed(0)
    truth = 1.0 + 0.5 * torch.randn(60)
    vi = NaturalVI(schools, seed=0)
    tests = truth + 0.3 * torch.randn(8, 60)
    for _ in range(passes * 4):
        vi.step(tests, 15)
    q = vi.guide.sample(500, seed=0)["level"]
    return truth, q.mean(0), q.std(0)


def streaming(days: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of the posterior after each day; the data of the days before are gone."""
    torch.manual_seed(1)
    vi, means, deviations = NaturalVI(day, seed=0), [], []
    for _ in range(days):
        today = 0.7 + torch.randn(12)
        for _ in range(3):
            vi.step(today)
        q = vi.guide.get_posterior()
        means.append(float(q.mean))
        deviations.append(float(q.stddev))
        vi.next_data()
    return means, deviations


def picture(path: Path, steps: int, passes: int, days: int) -> dict[str, Any]:
    """Run all three and draw them; the numbers that the picture ends with."""
    ours, svi = regression(steps)
    truth, means, deviations = hierarchical(passes)
    followed, widths = streaming(days)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.0, 3.6), layout="constrained")
    left.plot(range(1, steps + 1), svi, color=ORANGE, linestyle="--", label="SVI, AutoMultivariateNormal, Adam")
    left.plot(range(1, steps + 1), ours, color=BLUE, label="NaturalVI")
    left.set(
        xscale="log", yscale="log", xlabel="passes over the data", ylabel="−ELBO [nats]", title="Logistic regression"
    )
    left.legend(loc="lower left")
    order = truth.argsort()
    middle.errorbar(
        range(len(truth)),
        means[order],
        2.0 * deviations[order],
        color=BLUE,
        fmt="o",
        ms=3,
        lw=1,
        label="posterior, ± 2 sd",
    )
    middle.plot(range(len(truth)), truth[order], color=GREY, label="truth")
    middle.set(xlabel="school, by true level", ylabel="level", title=f"Local latents after {passes} passes")
    middle.legend()
    number = range(1, days + 1)
    low, high = ([m + sign * 2.0 * s for m, s in zip(followed, widths, strict=True)] for sign in (-1.0, 1.0))
    right.fill_between(number, low, high, color=BLUE, alpha=0.25, label="± 2 sd")
    right.plot(number, followed, color=BLUE, marker="o", label="posterior mean")
    right.axhline(0.7, color=GREY, label="truth")
    right.set(xlabel="day", ylabel="mean", title="Streaming: a mean, day by day")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    inside = ((truth - means).abs() <= 2.0 * deviations).float().mean()
    return {"ours": sum(ours[-5:]) / 5, "svi": sum(svi[-5:]) / 5, "inside": float(inside), "width": widths[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pyro.png"))
    parser.add_argument("--steps", type=int, default=300, help="of logistic regression")
    options = parser.parse_args()
    found = picture(options.output, options.steps, 20, 8)
    print(
        f"−ELBO after {options.steps} passes: NaturalVI {found['ours']:.1f}, SVI {found['svi']:.1f}; levels within "
        f"2 sd: {found['inside']:.0%}; streamed deviation {found['width']:.4f}, exact {(1 + 8 * 12) ** -0.5:.4f}"
    )
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
