"""`NaturalVI` beside Pyro's SVI: passes and CPU seconds to a given ELBO, and the posterior beside NUTS.

    python benchmarks/natural_vi.py logistic      # breast cancer, 31 weights, full batch and mini-batches
    python benchmarks/natural_vi.py poisson       # hierarchical Poisson regression, 100 groups of 10
    python benchmarks/natural_vi.py network       # a Bayesian network of 97 weights
    python benchmarks/natural_vi.py nuts          # means and deviations beside a long NUTS run (minutes)
    python benchmarks/natural_vi.py report        # tables into RESULTS.md

A pass is one evaluation of the log joint of all data, with its gradient and, for NaturalVI, its Hessian (of a batch,
its part of that); the first trace and steps that are taken back count. The gap is (ELBO* − ELBO)/N in nats a datum, by
1,000 draws that are the same for all; ELBO* is that of the family's best member, found by a long run of NaturalVI.
SVI's rate is tuned for every guide and optimizer on a seed that is not reported; it takes one draw a step. `--quick`
makes all so short that it shows only that everything works. (A file called pyro.py would hide Pyro.)
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer import autoguide as auto
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import softplus

from expfam_poco.integrations.pyro import NaturalVI

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "natural_vi" / "natural_vi.json", HERE / "RESULTS.md"
SEEDS, TUNING_SEED = (0, 1, 2), 1000
LEVELS = (1e-2, 1e-3, 1e-4)
RATES = (0.01, 0.03, 0.1)
GUIDES: dict[str, Callable[[Any], Any]] = {
    "AutoDiagonalNormal": auto.AutoDiagonalNormal,
    "AutoMultivariateNormal": auto.AutoMultivariateNormal,
    "AutoLowRank": auto.AutoLowRankMultivariateNormal,
}
OPTIMIZERS = ("Adam", "ClippedAdam")


class Problem(NamedTuple):
    """A model, its data, its log joint at many points of unconstrained space at once, and its sizes."""

    model: Callable[..., None]
    data: tuple[Tensor, ...]
    log_joint: Callable[[Tensor], Tensor]
    weights: int
    examples: int


# ---- the problems --------------------------------------------------------------------------------------------


def logistic() -> Problem:
    """L2-regularised logistic regression on standardised breast-cancer data."""
    raw = load_breast_cancer()
    x = torch.tensor(StandardScaler().fit_transform(raw.data), dtype=torch.float64)
    x, y = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1), torch.tensor(raw.target, dtype=torch.float64)
    normal = dist.Normal(torch.zeros(31, dtype=x.dtype), 1.0).to_event(1)

    def model(x: Tensor, y: Tensor, size: int | None = None) -> None:
        w = pyro.sample("w", normal)
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            pyro.sample("y", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])

    return Problem(model, (x, y), lambda u: normal.log_prob(u) - softplus((1 - 2 * y) * (u @ x.T)).sum(-1), 31, len(x))


def poisson() -> Problem:
    """100 groups of 10 counts: log rates around a mean, with a slope; mean, log deviation, slope, 100 log rates."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(100, 10, generator=draw, dtype=torch.float64)
    levels = 1.0 + 0.7 * torch.randn(100, 1, generator=draw, dtype=torch.float64)
    y = torch.poisson((levels + 0.3 * x).exp(), generator=draw)
    zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
    wide, unit = dist.Normal(zero, 3 * one), dist.Normal(zero, one)

    def model(x: Tensor, y: Tensor) -> None:
        mean, log_sd, slope = pyro.sample("mean", wide), pyro.sample("log_sd", unit), pyro.sample("slope", unit)
        with pyro.plate("groups", 100):
            level = pyro.sample("level", dist.Normal(mean, log_sd.exp()))
            with pyro.plate("counts", 10):
                pyro.sample("y", dist.Poisson((level + slope * x.T).exp()), obs=y.T)

    def log_joint(u: Tensor) -> Tensor:
        mean, log_sd, slope, level = u[:, 0], u[:, 1], u[:, 2], u[:, 3:]
        prior = wide.log_prob(mean) + unit.log_prob(log_sd) + unit.log_prob(slope)
        prior = prior + dist.Normal(mean[:, None], log_sd.exp()[:, None]).log_prob(level).sum(-1)
        rates = (level[:, :, None] + slope[:, None, None] * x).exp()
        return prior + dist.Poisson(rates).log_prob(y).sum((-1, -2))

    return Problem(model, (x, y), log_joint, 103, 1000)


def network() -> Problem:
    """A network of 8 hidden units for standardised diabetes data, with normal weights and noise of 0.7: 97 weights."""
    raw = load_diabetes()
    x = torch.tensor(StandardScaler().fit_transform(raw.data), dtype=torch.float64)
    y = torch.tensor(StandardScaler().fit_transform(raw.target[:, None])[:, 0], dtype=torch.float64)
    sizes, zero, noise = (80, 8, 8, 1), torch.zeros((), dtype=x.dtype), torch.tensor(0.7, dtype=x.dtype)
    normal = dist.Normal(torch.zeros(sum(sizes), dtype=x.dtype), 1.0).to_event(1)

    def outputs(u: Tensor) -> Tensor:
        weights, shifts, last, shift = u.split(sizes, -1)
        hidden = (x @ weights.unflatten(-1, (10, 8)) / 10**0.5 + shifts[..., None, :]).tanh()
        return (hidden * last[..., None, :]).sum(-1) / 8**0.5 + shift

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", normal)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(outputs(w), noise), obs=y)

    def log_joint(u: Tensor) -> Tensor:
        return normal.log_prob(u) + dist.Normal(zero, noise).log_prob(y - outputs(u)).sum(-1)

    return Problem(model, (x, y), log_joint, sum(sizes), len(x))


# ---- measuring -----------------------------------------------------------------------------------------------


class Elbo:
    """The ELBO of Gaussians over unconstrained space, with the same draws for all."""

    def __init__(self, problem: Problem, draws: int) -> None:
        self.problem = problem
        generator = torch.Generator().manual_seed(7)
        self.noise = torch.randn(draws, problem.weights, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, mean: Tensor, root: Tensor) -> float:
        """Of N(m, R Rᵀ) with a lower triangle R."""
        log_q = -0.5 * (self.noise**2).sum(-1) - 0.5 * len(mean) * math.log(2 * math.pi) - root.diagonal().log().sum()
        return float((self.problem.log_joint(mean + self.noise @ root.T) - log_q).mean())


class Counted:
    """A model that counts its evaluations, in passes."""

    def __init__(self, model: Callable[..., None], share: float) -> None:
        self.model, self.share, self.passes = model, share, 0.0

    def __call__(self, *args: Any) -> None:
        self.passes += self.share
        self.model(*args)


def natural_steps(problem: Problem, seed: int, family: str, size: int | None) -> Iterator[tuple[float, float, Any]]:
    """Passes, CPU seconds and the Gaussian after every step."""
    torch.manual_seed(seed)
    counted = Counted(problem.model, 1.0 if size is None else size / problem.examples)
    vi = NaturalVI(counted, family, seed=seed)
    args = problem.data if size is None else (*problem.data, size)
    seconds = 0.0
    while True:
        begun = time.process_time()
        vi.step(*args)
        seconds += time.process_time() - begun
        states = vi.optimizer.posterior_states().values()
        mean = torch.cat([state.mean.reshape(-1) for state in states])
        if family == "full_gaussian":
            (state,) = states
            root = torch.linalg.cholesky(torch.linalg.inv(state.precision))
        else:
            root = torch.cat([state.precision.reshape(-1) for state in states]).rsqrt().diag()
        yield counted.passes, seconds, (mean, root)


def svi_steps(problem: Problem, seed: int, guide: str, optimizer: str, rate: float, steps: int) -> Iterator[Any]:
    """Passes, CPU seconds and the Gaussian after every tenth step."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    made = GUIDES[guide](problem.model)
    settings = {"lr": rate} if optimizer == "Adam" else {"lr": rate, "lrd": 0.1 ** (1 / steps)}
    svi = SVI(problem.model, made, getattr(pyro.optim, optimizer)(settings), Trace_ELBO())
    seconds = 0.0
    for number in range(1, steps + 1):
        begun = time.process_time()
        svi.step(*problem.data)
        seconds += time.process_time() - begun
        if number % 10 == 0:
            yield number, seconds, gaussian_of(made)


def gaussian_of(guide: Any) -> tuple[Tensor, Tensor]:
    """Mean and lower triangle of an autoguide's normal distribution."""
    if isinstance(guide, auto.AutoMultivariateNormal):
        return guide.loc.detach(), (guide.scale[:, None] * guide.scale_tril).detach()
    if isinstance(guide, auto.AutoDiagonalNormal):
        return guide.loc.detach(), guide.scale.detach().diag()
    q = guide.get_posterior()
    return q.mean.detach(), torch.linalg.cholesky(q.covariance_matrix.detach())


def laplace(problem: Problem, seed: int, steps: int) -> tuple[float, float, tuple[Tensor, Tensor]]:
    """Adam to the mode, and the Hessian there."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    guide = auto.AutoLaplaceApproximation(problem.model)
    svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    begun = time.process_time()
    for _ in range(steps):
        svi.step(*problem.data)
    return steps, time.process_time() - begun, gaussian_of(guide.laplace_approximation(*problem.data))


def reached(steps: Iterator[Any], elbo: Elbo, best: float, most: float) -> dict[str, Any]:
    """Passes and seconds to each level of the gap, and the last gap, below 0 where it is better than `best`."""
    found: dict[str, Any] = {f"{level:g}": None for level in LEVELS}
    gap, passes = math.inf, 0.0
    for passes, seconds, gaussian in steps:
        gap = (best - elbo(*gaussian)) / elbo.problem.examples
        for level in LEVELS:
            if gap < level and found[f"{level:g}"] is None:
                found[f"{level:g}"] = [passes, seconds]
        if passes >= most or all(found.values()):
            break
    return {**found, "gap": gap, "passes": passes}


def best_of(problem: Problem, elbo: Elbo, family: str, steps: int) -> float:
    """The ELBO of the family's best member: the largest of a long run."""
    values = []
    for number, (_, _, gaussian) in enumerate(natural_steps(problem, TUNING_SEED, family, None)):
        if number >= steps // 2 and number % 10 == 0:
            values.append(elbo(*gaussian))
        if number == steps:
            return max(values)
    raise AssertionError("steps go on for ever")


def compared(problem: Problem, quick: bool) -> dict[str, Any]:
    """Every method's passes and seconds, for three seeds."""
    torch.set_num_threads(1)
    elbo = Elbo(problem, 100 if quick else 1000)
    seeds, most, long = (SEEDS[:1], 8, 20) if quick else (SEEDS, 150, 600)
    svi_most = 20 if quick else 1500
    best = {family: best_of(problem, elbo, family, long) for family in ("full_gaussian", "diagonal_gaussian")}
    rows: dict[str, Any] = {}

    def add(name: str, runs: list[dict[str, Any]], **more: Any) -> None:
        rows[name] = {"runs": runs, **more}

    for family, label in (("full_gaussian", "full"), ("diagonal_gaussian", "diagonal")):
        runs = [reached(natural_steps(problem, s, family, None), elbo, best[family], most) for s in seeds]
        add(f"NaturalVI, {label}", runs)
    if problem.examples == 569:
        size = 57
        runs = [
            reached(natural_steps(problem, s, "full_gaussian", size), elbo, best["full_gaussian"], 30) for s in seeds
        ]
        add("NaturalVI, full, batches of 57", runs)
    for guide in GUIDES:
        goal = best["diagonal_gaussian" if guide == "AutoDiagonalNormal" else "full_gaussian"]
        for optimizer in OPTIMIZERS:

            def tried(seed: int, rate: float, how: tuple[str, str, float] = (guide, optimizer, goal)) -> dict[str, Any]:
                return reached(svi_steps(problem, seed, *how[:2], rate, svi_most), elbo, how[2], svi_most)

            tuned = {rate: tried(TUNING_SEED, rate) for rate in (RATES[:1] if quick else RATES)}
            rate = min(tuned, key=lambda r: quality(tuned[r]))
            add(f"SVI {guide}, {optimizer}", [tried(seed, rate) for seed in seeds], rate=rate)
    runs = []
    for seed in seeds[:1]:
        passes, seconds, gaussian = laplace(problem, seed, svi_most)
        gap = (best["full_gaussian"] - elbo(*gaussian)) / problem.examples
        runs.append({f"{level:g}": [passes, seconds] if gap < level else None for level in LEVELS} | {"gap": gap})
    add("Laplace (Adam, 1,500 steps)", runs)
    return {"rows": rows, "best": best}


def quality(run: dict[str, Any]) -> tuple[float, ...]:
    """The sooner at the smallest level the better; then the gap."""
    return (*(math.inf if run[f"{level:g}"] is None else run[f"{level:g}"][0] for level in LEVELS[:2]), run["gap"])


def nuts(quick: bool) -> dict[str, Any]:
    """Means and deviations of logistic regression's weights beside those of NUTS."""
    torch.set_num_threads(1)
    problem = logistic()
    torch.manual_seed(0)
    vi = NaturalVI(problem.model, seed=0)
    for _ in range(30 if quick else 300):
        vi.step(*problem.data)
    q = vi.guide.get_posterior()
    kernel = NUTS(potential_fn=lambda z: -problem.log_joint(z["w"][None])[0])
    counts = (10, 10) if quick else (2000, 300)
    run = MCMC(kernel, counts[0], counts[1], initial_params={"w": q.mean}, disable_progbar=True)
    run.run()
    drawn = run.get_samples()["w"]
    sd = drawn.std(0)
    return {
        "draws": counts[0],
        "mean": float(((q.mean - drawn.mean(0)) / sd).abs().max()),
        "mean_rms": float((((q.mean - drawn.mean(0)) / sd) ** 2).mean().sqrt()),
        "sd": float((q.stddev / sd - 1).abs().max()),
        "sd_mean": float((q.stddev / sd - 1).mean()),
    }


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "logistic": lambda quick: compared(logistic(), quick),
    "poisson": lambda quick: compared(poisson(), quick),
    "network": lambda quick: compared(network(), quick),
    "nuts": nuts,
}


# ---- tables --------------------------------------------------------------------------------------------------


def shown(values: list[Any]) -> str:
    """The median of passes (and of seconds), – where not all seeds have got there."""
    if any(value is None for value in values):
        return "–"
    passes, seconds = (statistics.median(column) for column in zip(*values, strict=True))
    return f"{passes:.3g} ({seconds:.2g} s)"


def markdown(part: str, found: dict[str, Any]) -> str:
    """One part's table."""
    if part == "nuts":
        return (
            "| logistic regression, full Gaussian beside NUTS | worst of 31 | all together |\n|---|---|---|\n"
            f"| means apart, in posterior deviations | {found['mean']:.3f} | {found['mean_rms']:.3f} (rms) |\n"
            f"| deviations apart | {100 * found['sd']:.1f} % | {100 * found['sd_mean']:+.1f} % (mean) |"
        )
    lines = ["| method | passes to 1e-2 | to 1e-3 | to 1e-4 | last gap |", "|---|---|---|---|---|"]
    for name, row in found["rows"].items():
        cells = [shown([run[f"{level:g}"] for run in row["runs"]]) for level in LEVELS]
        rate = f", lr {row['rate']:g}" if "rate" in row else ""
        gap = statistics.median(run["gap"] for run in row["runs"])
        lines.append(f"| {name}{rate} | {' | '.join(cells)} | {gap:.1e} |")
    return "\n".join(lines)


def report(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the tables between their marks."""
    text = page.read_text(encoding="utf-8")
    for part, found in content.items():
        table = f"<!-- table natural-vi-{part} -->\n\n{markdown(part, found)}\n\n<!-- end -->"
        pattern = rf"<!-- table natural-vi-{part} -->.*?<!-- end -->"
        text = re.sub(pattern, lambda _, new=table: new, text, count=1, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "report"))
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if chosen.part == "report":
        report(content)
        return
    found = PARTS[chosen.part](chosen.quick)
    print(markdown(chosen.part, found))
    if not chosen.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({**content, chosen.part: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
