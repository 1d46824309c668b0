"""Reference trajectories: what every optimizer, family and option computes in fifty steps, to the last bit.

A change of the engine that is meant to change no number is checked against a record made before it:

    python trajectories.py record FILE.json    # run all cases and store what they gave
    python trajectories.py check FILE.json     # run them again: identical, or the largest relative deviation

Only the public interface is used. A `Case` is a problem, an optimizer for it and a training loop; `outcome` runs it
and returns the losses, the final weights and the posterior's tensors. The record holds for every case a SHA-256 of the
bytes of all of them, and samples of every tensor, so that a platform whose arithmetic rounds differently (another
processor or build of PyTorch) can still be compared, up to `TOLERANCES`. Bits are only comparable with one thread,
which `main` sets.

`trajectory_problems` has the problems and the training loops. `backend="eager"` steps tensors span by span in place,
whatever their size.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trajectory_problems import (
    F32,
    F64,
    LARGE,
    LEAFWISE,
    ROWS,
    TINY,
    Case,
    Loop,
    Make,
    Problem,
    accumulated,
    batched,
    corrected,
    edited,
    frozen,
    interrupted,
    mixture,
    next_task,
    on_gradients,
    plain,
    resumed,
    scheduled,
    thawed,
    transferred,
    wells,
)

import expfam_poco as poco
from expfam_poco.families import Bernoulli, Categorical, IsotropicGaussian, ProductFamily

Record = dict[str, Any]

SAMPLES = 120  # entries stored of a case, at least LEAST and at most MOST of each tensor
LEAST, MOST = 4, 64
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}  # of the deviation, where bits differ


# ---- cases ---------------------------------------------------------------------------------------------------


def named(kind: Callable[..., Any], **choices: Any) -> Make:
    """A named optimizer with these arguments."""
    return lambda problem: kind(problem.named(), **choices)


def poco_of(family: Any, lr: float, ess: float, **choices: Any) -> Make:
    """`PosteriorCorrected` with this family; by default with weight decay, and correction of α = 0.8."""
    given = {"weight_decay": 0.01, "alpha": 0.8, "seed": 1, **choices}
    return lambda problem: poco.PosteriorCorrected(problem.named(), family, lr, ess, **given)


def diagonal(**choices: Any) -> Make:
    """A diagonal Gaussian, with momentum."""
    return poco_of("diagonal_gaussian", **{"lr": 0.05, "ess": 100.0, "hess_init": 2.0, "momentum": 0.8, **choices})


def full(**choices: Any) -> Make:
    """A full Gaussian."""
    return poco_of("full_gaussian", **{"lr": 0.02, "ess": 100.0, "hess_init": 5.0, "weight_decay": 0.1, **choices})


def over(
    base: Callable[..., torch.optim.Optimizer], alpha: Any, max_grad_norm: float | None = None, **own: Any
) -> Make:
    """`AlphaSVRG` over another optimizer."""
    return lambda problem: poco.AlphaSVRG(
        base([p for _, p in problem.named()], **own), alpha=alpha, max_grad_norm=max_grad_norm
    )


def two_groups(problem: Problem) -> torch.optim.Optimizer:
    """Gammas for the gains, a full Gaussian for the biases, a diagonal one for the weights."""
    named = problem.named()
    chosen = {
        "gain": [(n, p) for n, p in named if n == "gain"],
        "bias": [(n, p) for n, p in named if n.endswith("bias")],
        "weight": [(n, p) for n, p in named if n.endswith("weight")],
    }
    groups = [
        {"params": chosen["gain"], "family": "gamma", "lr": 0.02, "weight_decay": 0.1},
        {"params": chosen["bias"], "family": "full_gaussian", "lr": 0.02, "hess_init": 5.0, "alpha": 0.5},
        {"params": chosen["weight"], "hess_init": 2.0, "momentum": 0.9, "rho": (0.5, 0.2)},
    ]
    return poco.PosteriorCorrected(
        groups, "diagonal_gaussian", 0.05, 100.0, weight_decay=0.01, max_grad_norm=5.0, seed=1
    )


def by_name(problem: Problem) -> torch.optim.Optimizer:
    """A product of three families, chosen by the parameters' names."""
    parts = {
        "gain": ("log_normal", {"lr": 0.02, "weight_decay": 0.1}),
        "*bias": ("isotropic_gaussian", {"lr": 0.01}),
        "*": ("diagonal_gaussian", {"hess_init": 2.0, "momentum": 0.9}),
    }
    return poco.PosteriorCorrected(problem.named(), ProductFamily(parts), lr=0.05, ess=100.0, alpha=0.8, seed=1)


def every_leafwise(**choices: Any) -> Make:
    """All leafwise families at once, on `mixture`."""
    parts: dict[str, Any] = {f"*{family}*": family for family in LEAFWISE}
    return poco_of(ProductFamily(parts), lr=0.01, ess=50.0, **{"weight_decay": 0.1, "backend": "eager", **choices})


def with_prior(problem: Problem) -> torch.optim.Optimizer:
    """Priors of their own for two parameters, α as a pair, and an average that is not moved to the new q_out."""
    family = poco.get_family("diagonal_gaussian")()
    shapes = {n: p for n, p in problem.named() if n in ("first.weight", "second.bias")}
    prior = {n: family.centred_at(torch.full_like(p, 0.3), 7.0) for n, p in shapes.items()}
    return diagonal(prior=prior, alpha=(0.9, 0.4), rho=(0.5, 0.2), reanchor_average=False)(problem)


def partly_binary(problem: Problem) -> torch.optim.Optimizer:
    """Binary weights beside a Gaussian group, as `binarize_groups` makes them."""
    groups = poco.binarize_groups(problem.model, gaussian={"lr": 0.1, "beta2": 0.99})
    return poco.BayesBiNNPoCo(
        groups, square_momentum=None, lr=0.01, ess=24.0, strength=2.0, curvature="straight_through", alpha=0.6, seed=1
    )


IVON: dict[str, Any] = {"lr": 0.1, "ess": 500.0, "beta2": 0.99, "hess_init": 1.0, "weight_decay": 0.01, "seed": 1}
MOMENTUM: dict[str, Any] = {**IVON, "rho1": 0.6, "rho2": 0.1, "alpha": 0.7}
VON: dict[str, Any] = {"lr": 0.05, "ess": 24.0, "hess_init": 2.0, "weight_decay": 0.1, "seed": 1}

NAMED: dict[str, tuple[Make, Loop]] = {
    "SVRG": (named(poco.SVRG, lr=0.1, weight_decay=0.01, seed=1), corrected),
    "VSGDPoCo": (named(poco.VSGDPoCo, lr=0.1, precision=100.0, weight_decay=0.01, noise="fixed", seed=1), corrected),
    "VON": (named(poco.VON, **VON, own_site=False), plain),
    "VONPoCo": (named(poco.VONPoCo, **VON), corrected),
    "IVON": (named(poco.IVON, **IVON), plain),
    "IVONPoCo": (named(poco.IVONPoCo, **IVON), corrected),
    "IVONPoCoMo": (named(poco.IVONPoCoMo, **MOMENTUM), corrected),
    "BayesBiNN": (
        named(poco.BayesBiNN, square_momentum=None, lr=0.01, ess=24.0, stale_mean=True, curvature="relaxed", seed=1),
        plain,
    ),
    "BayesBiNNPoCo": (
        named(
            poco.BayesBiNNPoCo,
            square_momentum=None,
            lr=0.01,
            ess=24.0,
            temperature=0.5,
            alpha=1.0,
            mc_samples=2,
            seed=1,
        ),
        corrected,
    ),
    "AlphaSVRG-SGD": (over(torch.optim.SGD, 0.7, lr=0.05, momentum=0.9), corrected),
    "AlphaSVRG-AdamW": (over(torch.optim.AdamW, "adaptive", lr=0.02, max_grad_norm=1.0), corrected),
    "AlphaSVRG-VSGD": (over(poco.VSGD, 0.5, lr=0.02, init="official", weight_decay=0.01), corrected),
    "VSGD": (named(poco.VSGD, lr=0.05, weight_decay=0.01), on_gradients),
    "ConstantVSGD": (named(poco.ConstantVSGD, lr=0.05, K_g=9.0), on_gradients),
}

LEVELS = tuple(torch.linspace(-1.0, 1.0, 8).tolist())
POSITIVE, EAGER = wells("positive", TINY), {"backend": "eager"}

FAMILIES: dict[str, Case] = {
    "isotropic_gaussian": Case(
        poco_of(IsotropicGaussian(precision=100.0), 0.1, 100.0, momentum=0.5, lr_scale="mean_loss")
    ),
    "diagonal_gaussian": Case(diagonal()),
    "full_gaussian": Case(full(curvature="reparam", mc_samples=2)),
    "block_diagonal_gaussian": Case(
        poco_of("block_diagonal_gaussian", 0.05, 100.0, hess_init=2.0, precision_lr=1e-3, momentum=0.5)
    ),
    "kronecker_gaussian": Case(
        poco_of("kronecker_gaussian", 0.05, 100.0, hess_init=2.0, precision_lr=1e-3, momentum=0.5)
    ),
    "low_rank_gaussian": Case(
        poco_of("low_rank_gaussian", 0.05, 100.0, hess_init=2.0, precision_lr=1e-3, momentum=0.5)
    ),
    "bernoulli": Case(poco_of(Bernoulli(point_estimate="mean"), 0.01, 24.0, momentum=0.5, rho=0.3)),
    "categorical": Case(poco_of(Categorical(levels=LEVELS, strength=4.0), 0.01, 24.0, momentum=0.5)),
    "gamma": Case(poco_of("gamma", 0.01, 50.0, momentum=0.5, rho=0.3), problem=POSITIVE),
    "exponential": Case(poco_of("exponential", 0.002, 10.0, weight_decay=0.1), problem=POSITIVE),
    "log_normal": Case(poco_of("log_normal", 0.02, 50.0, momentum=0.5), problem=POSITIVE),
    "inverse_gaussian": Case(poco_of("inverse_gaussian", 0.01, 50.0), problem=POSITIVE),
    "beta": Case(poco_of("beta", 0.02, 50.0, momentum=0.5), problem=wells("unit", TINY)),
    "dirichlet": Case(poco_of("dirichlet", 0.02, 50.0, momentum=0.5), problem=wells("simplex", ROWS)),
    "von_mises": Case(poco_of("von_mises", 0.02, 50.0, momentum=0.5), problem=wells("angle", TINY)),
    "product": Case(by_name),
}

OPTIONS: dict[str, Case] = {
    "independent-rho": Case(diagonal(noise="independent", rho=(0.6, 0.1))),
    "fixed-full-reparam": Case(full(noise="fixed", curvature="reparam", mc_samples=3, anchor_weight=1.0)),
    "antithetic-hutchinson": Case(diagonal(noise="antithetic", curvature="hutchinson", max_grad_norm=1.0)),
    "zero-exact": Case(diagonal(noise="zero", curvature="exact", anchor_weight=0.5, momentum=0.0)),
    "draws-gradsq": Case(diagonal(mc_samples=3, curvature="gradsq", hess_init=9.0, debias=False)),
    "anchor-stored": Case(diagonal(anchor="stored", anchor_weight=1.0)),
    "anchor-products": Case(diagonal(anchor="products", anchor_weight=0.5, mc_samples=2, alpha=(0.9, 0.6))),
    "anchor-products-full": Case(full(anchor="products", noise="antithetic", curvature="hutchinson")),
    "linear-alpha": Case(diagonal(alpha=poco.BurnIn(15, poco.LinearAlpha(1.0, 0.1, steps=30)))),
    "adaptive-alpha": Case(diagonal(alpha="adaptive", rho=0.3, mc_samples=2)),
    "clip-prior-in-momentum": Case(diagonal(clip_radius=0.2, prior_in_momentum=True, weight_decay=0.3, rho=0.2)),
    "plain-retraction": Case(full(retraction="plain", curvature="exact", precision_lr=0.01, momentum=0.5)),
    "score": Case(poco_of("gamma", 0.001, 10.0, curvature="score", mc_samples=3), problem=wells("positive", ROWS)),
    "bernoulli-arm": Case(poco_of("bernoulli", 0.0005, 24.0, curvature="arm", noise="antithetic")),
    "binary-groups": Case(partly_binary, F32),
    "prior-alpha-pair": Case(with_prior),
    "groups": Case(two_groups),
    "kronecker-gradsq": Case(
        poco_of("kronecker_gaussian", 0.05, 100.0, hess_init=5.0, precision_lr=1e-3, curvature="gradsq", rho=0.4), F32
    ),
    "low-rank-gradsq": Case(
        poco_of("low_rank_gaussian", 0.05, 100.0, hess_init=5.0, precision_lr=1e-3, curvature="gradsq", rho=0.4), F32
    ),
    "micro-batches": Case(diagonal(mc_samples=2), loop=accumulated(weights=[6.0, 3.0])),
    "micro-batches-fresh-noise": Case(diagonal(), loop=accumulated(weights=[6.0, 3.0], fresh_noise=True)),
    "batched-draws": Case(diagonal(mc_samples=3), loop=batched(poco.BatchedDraws)),
    "per-example": Case(named(poco.IVONPoCo, **IVON), loop=batched(poco.PerExample)),
    "resumed": Case(diagonal(alpha="adaptive", rho=(0.5, 0.2)), loop=resumed),
    "resumed-full-stored": Case(full(anchor="stored", noise="fixed"), loop=resumed),
    "set-outer": Case(diagonal(), loop=transferred),
    "next-task": Case(diagonal(), loop=interrupted(at_25=next_task)),
    "changes": Case(diagonal(rho=0.3), loop=interrupted(at_17=scheduled, at_23=frozen, at_33=thawed, at_43=edited)),
}

STREAMED: dict[str, Case] = {
    "network-IVONPoCoMo": Case(named(poco.IVONPoCoMo, **MOMENTUM, **EAGER)),
    "network-next-task": Case(diagonal(**EAGER), loop=interrupted(at_15=scheduled, at_25=next_task)),
    "every-family/float64": Case(every_leafwise(momentum=0.5, rho=0.3), problem=mixture),
    "antithetic-draws": Case(diagonal(noise="antithetic", mc_samples=2, **EAGER), F32, wells()),
    "independent-rho-clip": Case(
        diagonal(noise="independent", rho=(0.6, 0.1), clip_radius=0.2, max_grad_norm=20.0, **EAGER), F64, wells()
    ),
    "fixed-gradsq": Case(diagonal(noise="fixed", curvature="gradsq", hess_init=9.0, **EAGER), F64, wells()),
    "zero-adaptive": Case(
        diagonal(noise="zero", curvature="gradsq", hess_init=9.0, alpha="adaptive", prior_in_momentum=True, **EAGER),
        F64,
        wells(),
    ),
    "fresh-noise": Case(diagonal(**EAGER), F32, wells(), accumulated(weights=[2.0, 1.0], fresh_noise=True)),
    "one-pass-resumed": Case(diagonal(one_pass=True, rho=0.3, **EAGER), F64, wells(), resumed),
    "set-outer": Case(diagonal(momentum=0.0, precision_lr=0.01, **EAGER), F64, wells(), transferred),
    "changes": Case(
        diagonal(one_pass=True, **EAGER), F32, wells(), interrupted(at_17=scheduled, at_23=frozen, at_33=thawed)
    ),
}

REAL, IN_PLACE = wells(shapes=LARGE), {"seed": 1, "backend": "eager"}

LARGE_CASES: dict[str, Case] = {
    "IVON-one-pass": Case(named(poco.IVON, **IVON, **EAGER, one_pass=True), F32, REAL, plain),
    "IVONPoCoMo": Case(named(poco.IVONPoCoMo, **MOMENTUM, **EAGER), F32, REAL),
    "SVRG-weight-decay": Case(named(poco.SVRG, lr=0.1, weight_decay=0.1, alpha=0.9, **IN_PLACE), F32, REAL),
    "BayesBiNNPoCo": Case(
        named(poco.BayesBiNNPoCo, square_momentum=None, lr=0.01, ess=24.0, curvature="relaxed", alpha=1.0, **IN_PLACE),
        F32,
        REAL,
    ),
    "VSGD": Case(named(poco.VSGD, lr=0.05, **EAGER), F32, REAL, on_gradients),
    "ConstantVSGD": Case(named(poco.ConstantVSGD, lr=0.05, **EAGER), F32, REAL, on_gradients),
}  # fmt: skip

CASES: dict[str, Case] = {
    **{f"{n}/{d}": Case(m, t, loop=r) for n, (m, r) in NAMED.items() for d, t in (("float64", F64), ("float32", F32))},
    **{f"family/{name}": case for name, case in FAMILIES.items()},
    **{f"option/{name}": case for name, case in OPTIONS.items()},
    **{f"streamed/{name}": case for name, case in STREAMED.items()},
    **{f"large/{name}": case for name, case in LARGE_CASES.items()},
}


# ---- outcomes, records and their comparison ------------------------------------------------------------------


def outcome(name: str) -> dict[str, Tensor]:
    """The losses of a case's steps and refreshes, its final weights, and its posterior field by field."""
    run = CASES[name].loop(CASES[name])
    found = {"losses": torch.stack(run.losses)}
    if run.refreshes:
        found["refreshes"] = torch.stack(run.refreshes)
    found.update((f"weights/{key}", p.detach().clone()) for key, p in run.problem.named())
    states = run.optimizer.posterior_states() if hasattr(run.optimizer, "posterior_states") else {}
    for key, state in states.items():
        found.update((f"posterior/{key}/{part}", value) for part, value in state._asdict().items())
    return found


def record_of(name: str) -> Record:
    """Run a case: the hash of all its bytes, its precision, and samples of every tensor (the losses whole)."""
    tensors = outcome(name)
    whole = hashlib.sha256()
    for value in tensors.values():
        whole.update(value.contiguous().numpy().tobytes())
    each = min(MOST, max(LEAST, SAMPLES // len(tensors)))
    samples = {key: _sampled(value, None if key in ("losses", "refreshes") else each) for key, value in tensors.items()}
    return {"sha256": whole.hexdigest(), "dtype": str(CASES[name].dtype).removeprefix("torch."), "samples": samples}


def compare(record: Record, now: Record) -> tuple[bool, float]:
    """Whether two records of a case agree to the last bit, and their largest relative deviation.

    A tensor's deviation is the largest difference of its sampled entries over the largest of them; infinite where
    tensors are missing, of another shape, or not finite.
    """
    before, after = record["samples"], now["samples"]
    if before.keys() != after.keys():
        return False, math.inf
    deviation = max(_deviation(before[key], after[key]) for key in before)
    return record["sha256"] == now["sha256"], deviation


def _sampled(value: Tensor, most: int | None) -> list[float]:
    """Evenly spaced entries, first and last among them, as the shortest numbers that round to them."""
    flat = value.reshape(-1)
    if most is not None and flat.numel() > most:
        flat = flat[[round(i * (flat.numel() - 1) / (most - 1)) for i in range(most)]]
    return [float(str(entry)) for entry in flat.numpy()]


def _deviation(before: Sequence[float], after: Sequence[float]) -> float:
    if len(before) != len(after) or not all(map(math.isfinite, (*before, *after))):
        return math.inf
    scale = max(map(abs, before), default=0.0)
    error = max((abs(a - b) for a, b in zip(before, after, strict=True)), default=0.0)
    return error / scale if scale else (math.inf if error else 0.0)


def read(path: Path) -> dict[str, Record]:
    """The records of a file, by the names of their cases."""
    records: dict[str, Record] = json.loads(path.read_text(encoding="utf-8"))
    return records


def write(path: Path, records: Mapping[str, Record]) -> None:
    """A file with a line for every case."""
    lines = [f"{json.dumps(name)}: {json.dumps(record, separators=(',', ':'))}" for name, record in records.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Record or check; 1 where a checked case is not identical."""
    if len(arguments) != 2 or arguments[0] not in ("record", "check"):
        print("usage: python trajectories.py record|check FILE.json")
        return 2
    command, path = arguments[0], Path(arguments[1])
    known = read(path) if command == "check" else {}
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # an optimizer's first step looks through all tracked objects
    records, same, begin = {}, True, time.perf_counter()
    for name in CASES:
        start = time.perf_counter()
        records[name] = record_of(name)
        seconds = f"{time.perf_counter() - start:.1f} s"
        if command == "record":
            print(f"{name}: recorded, {seconds}", flush=True)
            continue
        identical, deviation = compare(known[name], records[name]) if name in known else (False, math.inf)
        same = same and identical
        print(f"{name}: {'identical' if identical else f'deviation {deviation:.1e}'}, {seconds}", flush=True)
    for name in sorted(known.keys() - CASES.keys()):
        same = False
        print(f"{name}: recorded, but there is no such case")
    print(f"{len(CASES)} cases, {time.perf_counter() - begin:.0f} s")
    if command == "record":
        write(path, records)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
