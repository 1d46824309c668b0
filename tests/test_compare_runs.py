"""The runs of `expfam-poco compare`: what is counted, what depends on the seed, how near the methods come."""

import itertools
import math

import numpy as np
import pytest
import torch

from expfam_poco.compare.methods import DEFAULT_METHODS, METHODS, check_settings, default_methods, find_methods
from expfam_poco.compare.pool import Run, run_all
from expfam_poco.compare.runner import Budget, Curve, mini_batches, train
from expfam_poco.compare.tasks import Task, load_task
from expfam_poco.compare.tune import FIRST_SEED, POINTS, SEEDS, grid, score, tune
from expfam_poco.errors import InputError
from expfam_poco.tools.jobs import WorkerError, worker_count


@pytest.fixture(scope="module")
def breast() -> Task:
    return load_task("breast-cancer")


@pytest.fixture(scope="module")
def wine() -> Task:
    return load_task("wine")


def run(task: Task, name: str, seed: int = 0, passes: float = 20.0, batch: int = 5, **changes: object) -> Curve:
    method = METHODS[name]
    settings = {**method.settings(task), "delta": task.delta, "ess": 100.0 * task.size, **changes}
    return train(task, method, settings, seed, Budget(passes, batch))


def test_uncorrected_passes_are_batches(wine: Task) -> None:
    curve = run(wine, "SGD", passes=3.0, batch=7)
    assert curve.steps[-1] == 3 * 178 // 7
    assert curve.passes[-1] == curve.steps[-1] * 7 / 178
    assert curve.hessians[-1] == 0.0 and not curve.outer


@pytest.mark.parametrize("name", ["SVRG", "IVON-PoCo", "alpha-SVRG"])
def test_corrected_steps_cost_two_gradients_and_refreshes_a_pass(wine: Task, name: str) -> None:
    batch, burn_in, inner = 6, 1.0, 20
    curve = run(wine, name, passes=6.0, batch=batch, burn_in=burn_in, inner=inner)
    single = math.ceil(burn_in * 178 / batch)
    spent, steps, refreshes = single * batch, single, 0
    while True:
        if (steps - single) % inner == 0 and spent + 178 + 2 * batch <= 6 * 178:
            spent, refreshes = spent + 178, refreshes + 1
        if spent + 2 * batch > 6 * 178:
            break
        spent, steps = spent + 2 * batch, steps + 1
    assert (curve.steps[-1], len(curve.outer)) == (steps, refreshes)
    assert curve.passes[-1] * 178 == pytest.approx(spent, abs=1e-9)
    assert [end - begin for begin, end in curve.outer] == pytest.approx([1.0] * refreshes)
    assert curve.outer[0][0] == pytest.approx(single * batch / 178)
    assert curve.outer[1][0] - curve.outer[0][1] == pytest.approx(inner * 2 * batch / 178)


def test_antithetic_draws_cost_twice(wine: Task) -> None:
    plain = run(wine, "IVON-PoCo", passes=8.0, burn_in=0.0)
    pairs = run(wine, "IVON-PoCo", passes=8.0, burn_in=0.0, noise="antithetic")
    assert pairs.outer[0] == (0.0, 2.0)
    assert pairs.steps[-1] < 0.6 * plain.steps[-1]
    assert pairs.passes[-1] <= 8.0


def test_hessians_are_counted_beside(wine: Task) -> None:
    assert run(wine, "IVON", passes=1.0).hessians[-1] == 0.0
    curve = run(wine, "IVON-PoCo-exact", passes=4.0)
    assert curve.hessians == curve.passes


def test_budget_is_never_exceeded_and_the_gap_is_recorded_often(wine: Task) -> None:
    for name in (name for name, method in METHODS.items() if not method.solver):
        curve = run(wine, name, passes=5.0)
        assert 4.7 < curve.passes[-1] <= 5.0, name
        steps_between = np.diff(curve.steps)
        gaps_between = np.diff(curve.passes)[steps_between > 0]
        assert gaps_between.max() < 0.25, name
        assert curve.gaps[0] == pytest.approx(wine.gap(np.zeros(wine.shape)))


def test_mini_batches_are_reshuffled_epochs() -> None:
    batches = list(itertools.islice(mini_batches(23, 5, seed=3), 8))
    first, second = batches[:4], batches[4:]
    for epoch in (first, second):
        seen = torch.cat(epoch).tolist()
        assert len(seen) == len(set(seen)) == 20
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_every_method_sees_the_same_batches_and_depends_on_the_seed_alone(wine: Task) -> None:
    once, again, other = (run(wine, "IVON-PoCo", seed, passes=4.0) for seed in (0, 0, 1))
    torch.manual_seed(123)
    assert once.gaps == again.gaps == run(wine, "IVON-PoCo", 0, passes=4.0).gaps
    assert once.gaps != other.gaps
    # Without momentum, at α = 0 and with a precision that hardly moves, SVRG's and SGD's steps are the same.
    sgd = run(wine, "SGD", passes=2.0, lr=0.1)
    svrg = run(wine, "SVRG", passes=2.0, lr=0.1)
    np.testing.assert_allclose(sgd.gaps, svrg.gaps, rtol=1e-9)


# ---- how near they come: the targets of the issue, on seeds that no tuning has seen ----------------------------------


def median_gap(task: Task, name: str, passes: float = 20.0, seeds: int = 3, **changes: object) -> float:
    return float(np.median([run(task, name, 50 + seed, passes, **changes).gaps[-1] for seed in range(seeds)]))


def gap_at(curve: Curve, passes: float) -> float:
    """The last record at or before so many passes."""
    return curve.gaps[int(np.searchsorted(curve.passes, passes, side="right")) - 1]


def test_svrg_on_breast_cancer(breast: Task) -> None:
    assert median_gap(breast, "SVRG") <= 2e-6
    assert median_gap(breast, "SGD") > 5e-5


@pytest.mark.slow
def test_ivon_poco_on_breast_cancer(breast: Task) -> None:
    corrected = [run(breast, "IVON-PoCo", 50 + seed) for seed in range(3)]
    assert np.median([curve.gaps[-1] for curve in corrected]) <= 5e-6
    steps = corrected[0].steps[-1]
    plain = [run(breast, "IVON", 50 + seed, passes=steps * 5 / 569) for seed in range(3)]
    assert plain[0].steps[-1] == steps
    assert np.median([c.gaps[-1] for c in plain]) >= 5 * np.median([c.gaps[-1] for c in corrected])
    assert median_gap(breast, "IVON-PoCo-literal") >= 3 * np.median([c.gaps[-1] for c in corrected])


@pytest.mark.slow
def test_ivon_poco_with_exact_curvature_on_breast_cancer(breast: Task) -> None:
    assert median_gap(breast, "IVON-PoCo-exact") <= 1e-6


def test_von_poco_on_breast_cancer(breast: Task) -> None:
    curves = [run(breast, "VON-PoCo", 50 + seed) for seed in range(3)]
    assert np.median([gap_at(curve, 12.0) for curve in curves]) <= 1e-5
    assert np.median([curve.gaps[-1] for curve in curves]) <= 1e-12


@pytest.mark.slow
def test_von_alone_stays_behind(breast: Task) -> None:
    # Its median over 60 seeds is 1.4e-4, but 3 of 100 triples of seeds have theirs just below 1e-4.
    assert median_gap(breast, "VON") >= 7e-5


# ---- settings --------------------------------------------------------------------------------------------------------


def test_default_methods_leave_out_large_matrices(breast: Task) -> None:
    assert default_methods(breast) == list(DEFAULT_METHODS)
    assert {"SGD", "SVRG", "IVON", "IVON-PoCo", "VON", "VON-PoCo"} <= set(DEFAULT_METHODS)
    assert not any(METHODS[name].dense for name in default_methods(load_task("digits")))


def test_other_data_gets_rates_by_the_size_of_its_rows(wine: Task) -> None:
    own = Task("own.csv", wine.features * 2.0, wine.labels, wine.classes, 1e-2)
    norm = 4.0 * float((wine.features**2).sum(axis=1).mean())
    known = METHODS["SVRG"].tuned["breast-cancer"]["lr"]
    assert METHODS["SVRG"].settings(own)["lr"] == pytest.approx(known * 31.0 / norm, rel=0.02)
    von = METHODS["VON"]
    assert von.settings(own)["lr"] == pytest.approx(von.tuned["breast-cancer"]["lr"] * 569 / 178, rel=0.06)
    assert von.settings(wine, batch=10)["lr"] == 2 * von.tuned["wine"]["lr"]
    assert METHODS["VON-PoCo"].settings(wine, batch=100)["lr"] == 0.3


def test_methods_are_found_by_name() -> None:
    assert [method.name for method in find_methods(["svrg", " VON "])] == ["SVRG", "VON"]
    for names, expected in ([["Adam"], "'Adam' is not known"], [["SGD", "sgd"], "twice"], [[], "is empty"]):
        with pytest.raises(InputError, match=expected):
            find_methods(names)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("SGD", {"lr": 0.0}, "lr=0"),
        ("SGD", {"lr": math.nan}, "lr=nan"),
        ("SVRG", {"alpha": 1.5}, "alpha=1.5"),
        ("SVRG", {"chunks": 0}, "chunks=0"),
        ("SVRG", {"inner": 0}, "inner=0"),
        ("SVRG", {"burn_in": -1.0}, "burn_in=-1"),
        ("IVON", {"beta2": 1.5}, "beta2=1.5"),
        ("IVON", {"hess_init": -1.0}, "hess_init=-1"),
        ("IVON", {"noise": "loud"}, "noise='loud'"),
        ("IVON", {"noise": "zero"}, "noise='zero'"),
        ("VON", {"curvature": "guess"}, "curvature='guess'"),
    ],
)
def test_settings_out_of_range_are_named(wine: Task, name: str, changes: dict[str, object], expected: str) -> None:
    settings = {**METHODS[name].settings(wine), "delta": 1e-2, "ess": 1e4, **changes}
    with pytest.raises(InputError) as caught:
        check_settings(METHODS[name], settings)
    assert str(caught.value).startswith(f"{name}: ") and expected in str(caught.value)


# ---- divergence, worker processes, tuning ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "SVRG", "IVON", "IVON-PoCo", "VON-PoCo"])
def test_a_run_that_diverges_ends_and_says_why(wine: Task, name: str) -> None:
    curve = run(wine, name, passes=10.0, lr=1e6)
    assert curve.reason
    assert curve.passes[-1] < 3.0


def test_worker_processes_give_what_one_process_gives(wine: Task) -> None:
    runs = [
        Run(name, {**METHODS[name].settings(wine), "delta": wine.delta, "ess": 1e4}, seed)
        for name in ("SVRG", "IVON-PoCo")
        for seed in (0, 1)
    ]
    messages: list[tuple[int, float, Curve | None]] = []
    watch = lambda *message: messages.append(message)  # noqa: E731
    spawned = run_all(wine, runs, Budget(4.0, 5), workers=2, watch=watch)
    here = run_all(wine, runs, Budget(4.0, 5), workers=1, watch=watch)
    assert [(c.method, c.seed, c.gaps) for c in spawned] == [(c.method, c.seed, c.gaps) for c in here]
    assert [(c.method, c.seed) for c in here] == [(r.method, r.seed) for r in runs]
    assert sum(curve is not None for _, _, curve in messages) == 8
    assert sum(curve is None for _, _, curve in messages) > 8


@pytest.mark.slow
def test_a_failed_worker_is_told(wine: Task) -> None:
    broken = [Run("SVRG", {"lr": 0.1}, seed) for seed in (0, 1)]
    with pytest.raises(WorkerError, match="SVRG, seed"):
        run_all(wine, broken, Budget(1.0, 5), workers=2, watch=lambda *message: None)


def test_worker_count() -> None:
    assert worker_count(3) == 3
    assert 1 <= worker_count(None) <= 2
    with pytest.raises(InputError, match="--workers 0"):
        worker_count(0)


def test_tuning_is_fair_and_keeps_to_its_own_seeds(wine: Task) -> None:
    chosen = [
        (METHODS[name], {**METHODS[name].settings(wine), "lr": lr, "delta": wine.delta, "ess": 1e4})
        for name, lr in (("SGD", 10.0), ("IVON", 0.1))
    ]
    assert all(len(grid(settings)) == POINTS for _, settings in chosen)
    seen: list[Curve] = []
    found = tune(wine, chosen, Budget(2.0, 5), 1, lambda number, passes, curve: seen.append(curve) if curve else None)
    assert len(seen) == 2 * POINTS * SEEDS
    assert min(curve.seed for curve in seen) == FIRST_SEED
    for method, settings in chosen:
        tuned = found[method.name]
        best = min(tuned.grid, key=lambda pair: pair[1])
        assert {**settings, **best[0]} == tuned.settings
        assert len(tuned.grid) == POINTS
    assert found["SGD"].settings["lr"] == 2.5, "the lowest rate of a grid that starts far too high"


def test_score_prefers_the_earlier_of_those_at_machine_precision() -> None:
    early = Curve("a", 0, passes=[1.0, 2.0, 3.0], gaps=[1.0, 1e-20, 1e-30])
    late = Curve("a", 0, passes=[1.0, 2.0, 3.0], gaps=[1.0, 1e-9, 1e-40])
    lost = Curve("a", 0, passes=[1.0], gaps=[1e-30], reason="diverged")
    assert score([early]) < score([late]) < score([lost])


# ---- dedicated solvers ------------------------------------------------------------------------------------------


def test_solvers_minimise_the_same_loss(breast: Task) -> None:
    saga, lbfgs = run(breast, "saga", passes=5.5), run(breast, "lbfgs", passes=30.0)
    assert saga.passes == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and saga.steps[-1] == 5 * breast.size
    assert saga.gaps == sorted(saga.gaps, reverse=True) and saga.gaps[-1] < 0.05 * saga.gaps[0]
    assert lbfgs.gaps[-1] < 1e-10 and lbfgs.passes[-1] <= 30.0
    assert saga.times == sorted(saga.times) and lbfgs.times == sorted(lbfgs.times)


def test_solvers_do_several_classes(wine: Task) -> None:
    assert run(wine, "lbfgs", passes=60.0).gaps[-1] < 1e-9
    assert run(wine, "saga", passes=60.0).gaps[-1] < 1e-3


def test_solvers_need_scikit_learn(breast: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expfam_poco.compare.solvers.available", lambda: False)
    assert default_methods(breast) == [name for name in DEFAULT_METHODS if name not in ("saga", "lbfgs")]
    with pytest.raises(InputError, match="saga: it needs scikit-learn"):
        check_settings(METHODS["saga"], {})


def test_a_cosine_anneals_the_rate_of_reshuffled_sgd(breast: Task) -> None:
    annealed = run(breast, "SGD-cosine")
    assert annealed.gaps[-1] < 0.25 * run(breast, "SGD").gaps[-1]
    assert (
        run(breast, "SGD-cosine", schedule="constant", passes=2.0).gaps == run(breast, "SGD", lr=0.2, passes=2.0).gaps
    )
    with pytest.raises(InputError, match="schedule=linear is not known"):
        check_settings(METHODS["SGD-cosine"], {"schedule": "linear", "lr": 0.1})


def test_seconds_are_those_of_steps(breast: Task) -> None:
    curve = run(breast, "VON-PoCo", passes=4.0)
    assert len(curve.times) == len(curve.gaps) and curve.times == sorted(curve.times)
    assert curve.times[-1] > 0.0 and curve.times[0] == 0.0
