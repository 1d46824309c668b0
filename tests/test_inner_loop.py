"""Inner loops of generalised linear models: the steps of ordinary closures, in one call."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from backend_cases import compiles
from torch import Tensor

import expfam_poco as poco
from expfam_poco.closures.linear import LOSSES, Loss
from expfam_poco.engine import inner_loop
from expfam_poco.errors import NonFiniteError

N, D, M, B = 40, 4, 6, 5
MAKE: dict[str, Callable[[Any], Any]] = {
    "SVRG": lambda p: poco.SVRG(p, lr=0.3, weight_decay=0.1),
    "SVRG, momentum": lambda p: poco.SVRG(p, lr=0.1, weight_decay=0.1, momentum=0.8, alpha=lambda t: 1.0 / t),
    "VSGDPoCo": lambda p: poco.VSGDPoCo(p, lr=0.3, weight_decay=0.1, precision=50.0, ess=50.0, seed=1),
    "VONPoCo": lambda p: poco.VONPoCo(p, lr=0.2, ess=200.0, weight_decay=0.1, noise="zero"),
    "VONPoCo, noise": lambda p: poco.VONPoCo(p, lr=0.1, ess=200.0, mc_samples=2, noise="antithetic", seed=1, rho=0.3),
    "VON": lambda p: poco.VON(p, lr=0.05, ess=200.0, seed=1),
    "IVON": lambda p: poco.IVON(p, lr=0.1, ess=200.0, seed=1),
    "IVONPoCo": lambda p: poco.IVONPoCo(p, lr=0.1, ess=200.0, seed=1, mc_samples=3),
    "IVONPoCo, exact": lambda p: poco.IVONPoCo(p, lr=0.2, ess=200.0, seed=1, curvature="exact"),
    "IVONPoCo, gradsq": lambda p: poco.IVONPoCo(p, lr=0.1, ess=200.0, seed=1, curvature="gradsq"),
    "recursive": lambda p: poco.PosteriorCorrected(
        p, "diagonal_gaussian", 0.05, 200.0, weight_decay=0.1, seed=1, correction="recursive", alpha=0.7, hess_init=1.0
    ),
    "transported": lambda p: poco.IVON(p, lr=0.1, ess=200.0, seed=1, transport=0.3),
    "maximize": lambda p: poco.IVON(p, lr=0.01, ess=200.0, seed=1, maximize=True),
}  # fmt: skip
REFRESHED = [name for name in MAKE if "PoCo" in name or "SVRG" in name]


def problem(loss: str = "logistic") -> poco.GeneralisedLinear:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=random, dtype=torch.float64)
    margin = x @ torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64)
    noise = torch.rand(N, generator=random, dtype=torch.float64)
    y = {"logistic": (noise < margin.sigmoid()).double(), "squared": margin + noise, "poisson": (4 * noise).floor()}
    return poco.GeneralisedLinear(x, y[loss], loss)


def batches(loops: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(N, generator=random)[: M * B].view(M, B) for _ in range(loops)])


def trained(name: str, data: Any, how: str, shape: tuple[int, ...] = (D,)) -> tuple[Tensor, Tensor, Any]:
    """Weights, losses and optimizer after three loops."""
    weight = torch.nn.Parameter(torch.full(shape, 0.1, dtype=torch.float64))
    opt, losses, refresh = MAKE[name]([weight]), [], name in REFRESHED
    for own in batches():
        if how == "steps":
            if refresh:
                opt.refresh([lambda: data.mean_loss(weight)])
            losses += [opt.step(lambda rows=rows: data.mean_loss(weight, rows)) for rows in own]
        else:
            losses += opt.inner_loop(data, own, refresh=refresh, compiled=how == "compiled")
    return weight.detach(), torch.stack(losses), opt


def far(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
@pytest.mark.parametrize("name", MAKE)
def test_a_loop_is_its_steps(name: str, loss: str) -> None:
    data = problem(loss)
    (w, losses, opt), (found, theirs, own) = trained(name, data, "steps"), trained(name, data, "eager")
    assert (
        far((w, losses), (found, theirs)) <= 1e-12 and bool((w - 0.1).abs().max() > 1e-3) and bool(losses.max() < 10.0)
    )
    assert opt._clock == own._clock
    (state,), (other,) = opt.posterior_states().values(), own.posterior_states().values()
    assert far([v / (1 + v.abs().max()) for v in state], [v / (1 + v.abs().max()) for v in other]) <= 1e-10
    # and both go on alike: momentum, memory and its stamp are there
    rows = torch.arange(B)
    for a in (opt, own):
        (weight,) = a.param_groups[0]["params"]
        a.step(lambda weight=weight: data.mean_loss(weight, rows))
    assert far(*[[a.param_groups[0]["params"][0].detach()] for a in (opt, own)]) <= 1e-10


def test_other_shapes_of_weights_and_several_loops_in_one_call() -> None:
    data = problem()
    flat, losses, _ = trained("IVONPoCo", data, "eager")
    row, _, _ = trained("IVONPoCo", data, "eager", shape=(1, D))
    assert torch.equal(flat, row[0])
    weight = torch.nn.Parameter(torch.full((D,), 0.1, dtype=torch.float64))
    found = MAKE["IVONPoCo"]([weight]).inner_loop(data, batches(), refresh=True)
    assert torch.equal(weight.detach(), flat) and torch.equal(found.flatten(), losses)


def test_a_linear_layer_with_its_bias_is_one_block_of_a_joint_family() -> None:
    data, layer = problem(), torch.nn.Linear(D - 1, 1, dtype=torch.float64)
    with_ones = poco.GeneralisedLinear(torch.cat([data.x[:, 1:], torch.ones(N, 1).double()], 1), data.y)
    opt = poco.VONPoCo(layer.parameters(), lr=0.8, ess=float(N), weight_decay=0.1, noise="zero")
    opt.inner_loop(with_ones, batches(30), refresh=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(layer(data.x[:, 1:]).squeeze(1), data.y)
    (loss + 0.05 * sum(p.square().sum() for p in layer.parameters())).backward()
    assert all(float(p.grad.abs().max()) <= 1e-12 for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", LOSSES)
def test_closed_forms_of_losses(name: str) -> None:
    z = torch.linspace(-30.0, 8.0, 50, dtype=torch.float64)
    y = torch.linspace(0.0, 1.0, 50, dtype=torch.float64)
    closed, general = LOSSES[name], Loss(LOSSES[name].value)
    torch.testing.assert_close(closed.slope(z, y), general.slope(z, y), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(closed.bend(z, y), general.bend(z, y), rtol=1e-10, atol=1e-15)


def test_a_loss_of_the_users_own() -> None:
    def huber(z: Tensor, y: Tensor) -> Tensor:
        return (1.0 + (z - y).square()).sqrt()

    data = problem("squared")
    own = poco.GeneralisedLinear(data.x, data.y, huber)
    steps, loop = trained("VONPoCo", own, "steps"), trained("VONPoCo", own, "eager")
    assert far(steps[:2], loop[:2]) <= 1e-12 and far(loop[:1], trained("VONPoCo", data, "eager")[:1]) > 1e-3


@compiles
@pytest.mark.parametrize(
    "name", ["recursive", *[pytest.param(n, marks=pytest.mark.slow) for n in ("SVRG, momentum", "VONPoCo", "IVONPoCo")]]
)
def test_the_scan_is_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled, run by the compiler's front end alone."""
    data, kept = problem(), {}

    def loop(self: Any, kind: Any, weights: Any, x: Tensor, y: Tensor, found: Any, *, compiled: bool) -> Any:
        kept.update(kind=kind, weights=weights, found=found)
        return inner_loop.eager(kind, weights, x, y, found)

    monkeypatch.setattr("expfam_poco.engine.backend.Backend.loop", loop)
    trained(name, data, "eager")
    kind, weights, found = kept["kind"], kept["weights"], kept["found"]
    noise = found.noise[0] if kind.constants.noise == "zero" else torch.stack(found.noise)
    with torch.no_grad():
        moved, losses = inner_loop.eager(kind, weights, data.x, data.y, found)
        torch._dynamo.reset()
        scan = torch.compile(inner_loop.scanned, backend="eager", fullgraph=True)
        values, theirs = scan(kind, data.x, data.y, weights, found.rows, inner_loop.packed(found.numbers), noise)
    wanted = inner_loop.carried(kind, inner_loop.Weights(*moved, weights.prior))
    assert max(float((a / b - 1.0).abs().max()) for a, b in zip(values, wanted, strict=True) if b.all()) <= 1e-9
    assert far(values[:1], wanted[:1]) <= 1e-12
    assert far([losses], [theirs]) <= 1e-12


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SVRG", "VONPoCo", "IVONPoCo"])
def test_a_compiled_loop_is_its_steps(name: str) -> None:
    steps, loop = trained(name, problem(), "steps"), trained(name, problem(), "compiled")
    assert far(steps[:2], loop[:2]) <= 1e-10
    assert loop[2].diagnostics()["compile_seconds"] > 0.0 and loop[2].backend.fallback is None


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"noise": "independent"}, "noise='independent'"),
        ({"curvature": "hutchinson"}, "curvature="),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0"),
        ({"alpha": "adaptive"}, "alpha='adaptive'"),
        ({"anchor": "stored", "curvature": "exact"}, "anchor='stored'"),
        ({"one_pass": True}, "one_pass=True"),
    ],
)
def test_what_no_loop_does(changes: dict[str, Any], says: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))
    opt = poco.IVONPoCo([weight], lr=0.1, ess=10.0, **changes)
    with pytest.raises(ValueError, match=says):
        opt.inner_loop(problem(), batches(1))
    assert not weight.any() and opt._clock["step"] == 0


def test_arguments_that_do_not_fit() -> None:
    data, weight = problem(), torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))
    opt = poco.SVRG([weight], lr=0.1)
    for rows, says in (
        (torch.zeros(3, 2), "batches: torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
        (torch.full((1, 1), N), f"row {N} of {N}"),
        (torch.full((1, 1), -1), "row -1"),
    ):
        with pytest.raises(ValueError, match=says):
            opt.inner_loop(data, rows)
    with pytest.raises(TypeError, match="data="):
        opt.inner_loop(data.x, batches())
    with pytest.raises(ValueError, match="data: 4 columns for the 3 weights"):
        poco.SVRG([torch.nn.Parameter(torch.zeros(3).double())], lr=0.1).inner_loop(data, batches())
    with pytest.raises(ValueError, match=r"data: torch\.float64 on cpu"):
        poco.SVRG([torch.nn.Parameter(torch.zeros(D))], lr=0.1).inner_loop(data, batches())
    with pytest.raises(ValueError, match="params: 2 blocks"):
        poco.SVRG(torch.nn.Linear(3, 1).double().parameters(), lr=0.1).inner_loop(data, batches())


def test_data_that_do_not_fit() -> None:
    x, y = torch.randn(5, 2), torch.zeros(5)
    for arguments, says in (
        ((x, y[:4]), "y: shape"),
        ((x[0], y), r"x: torch\.float32"),
        ((x, y - 1.0), "y: -1 is no target of loss='logistic'"),
        ((x, y - 1.0, "poisson"), "give counts"),
        ((x, y, "hinge"), "loss='hinge'"),
        ((x * float("inf"), y), "x: not all"),
    ):
        with pytest.raises((ValueError, NonFiniteError), match=says):
            poco.GeneralisedLinear(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_loop_that_overflows_takes_no_step(nonfinite: str) -> None:
    data, weight = problem("poisson"), torch.nn.Parameter(torch.zeros(D, dtype=torch.float64))
    opt = poco.SVRG([weight], lr=1e3, nonfinite=nonfinite)
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="lr=1000"):
            opt.inner_loop(data, batches(1)[0], refresh=True)
    else:
        opt.inner_loop(data, batches(1)[0], refresh=True)
        assert opt._clock["skipped"] == 1
    assert not weight.any()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: (0.5 * (z - y).square()).mean(),
        lambda z, y: torch.nn.functional.huber_loss(z, y),
        lambda z, y: 0.5 * (z - y).square() + z.sum(),
    ],
    ids=["mean", "torch's default", "coupled"],
)
def test_losses_that_do_not_work_by_entries_are_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="entry by entry"):
        poco.GeneralisedLinear(torch.randn(6, 2), torch.randn(6), loss)


def test_torch_s_losses_are_taken_without_reduction_and_schedulers_follow() -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    loss = partial(torch.nn.functional.huber_loss, reduction="none")
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = poco.SVRG([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        optimizer.inner_loop(poco.GeneralisedLinear(x, x.sum(1), loss), torch.arange(40).view(8, 5), refresh=True)
        scheduler.step()
    other = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    again = poco.SVRG([other], lr=0.1)
    for rate in (0.1, 0.01):
        again.param_groups[0]["lr"] = rate
        again.refresh([lambda: loss(x @ other, x.sum(1)).mean()])
        for rows in torch.arange(40).view(8, 5):
            again.step(lambda rows=rows: loss(x[rows] @ other, x[rows].sum(1)).mean())
    torch.testing.assert_close(weight, other, rtol=1e-12, atol=1e-12)


def test_an_error_says_which_loop_it_is_of() -> None:
    x = 100.0 * torch.randn(40, 3, dtype=torch.float64)
    data = poco.GeneralisedLinear(x, x.sum(1), "squared")
    optimizer = poco.SVRG([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], lr=3.0)
    with pytest.raises(poco.NonFiniteError, match=r"Loop \d+ of 120, after those before it were taken: "):
        optimizer.inner_loop(data, torch.arange(40).view(8, 5).expand(120, 8, 5), refresh=True)
