"""Where a step and a refresh evaluate the loss: which noise goes where, in which order, under which dropout masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import Task, equal, flat, network, not_looking
from torch import Tensor, nn

import expfam_poco as poco

DRAWS = 2


class Recorder:
    """A diagonal Gaussian's optimizer on a network, and every point at which a closure was called, standardised."""

    def __init__(self, noise: str, *, dropout: float = 0.0, **choices: Any) -> None:
        self.model = network(dropout=dropout)
        self.task = Task(self.model)
        settings = {"lr": 0.05, "ess": 50.0, "hess_init": 1.0, "curvature": "exact", "seed": 2, "mc_samples": DRAWS}
        self.opt = poco.PosteriorCorrected(
            self.model.parameters(), "diagonal_gaussian", noise=noise, **{**settings, **choices}
        )
        not_looking(self.opt)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def closure(self, batch: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            loss = self.task.closure(batch)()
            self.calls.append((flat(self.model.parameters()), loss.detach()))
            return loss

        return evaluate

    def q(self) -> tuple[Tensor, Tensor]:
        states = self.opt.posterior_states().values()
        return flat(s.mean for s in states), flat(s.precision for s in states)

    def take(self) -> list[Tensor]:
        points = [point for point, _ in self.calls]
        self.calls.clear()
        return points

    def step(self, batch: int = 0) -> list[Tensor]:
        self.take()
        self.opt.step(self.closure(batch))
        return self.take()

    def refresh(self) -> list[Tensor]:
        self.take()
        self.opt.refresh([self.closure(batch) for batch in range(3)])
        return self.take()


def standardised(points: list[Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    """ε = (θ − m) √S of every point."""
    mean, precision = q
    return torch.stack([(point - mean) * precision.sqrt() for point in points])


def prepared(noise: str, **choices: Any) -> tuple[Recorder, tuple[Tensor, Tensor], list[Tensor]]:
    """A recorder some steps after its refresh, q_out, and the points of the mega-batch."""
    recorder = Recorder(noise, **choices)
    for batch in range(3):
        recorder.step(batch)
    outer = recorder.q()
    mega = recorder.refresh()
    for batch in range(2):
        recorder.step(batch)
    return recorder, outer, mega


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=0.0, atol=1e-12)


def distinct(noises: Tensor) -> bool:
    """All rows differ in every entry."""
    rows = list(noises)
    return all(bool((a - b).abs().min() > 1e-9) for i, a in enumerate(rows) for b in rows[:i])


def test_before_a_refresh_and_without_alpha_only_the_inner_points_are_evaluated() -> None:
    recorder = Recorder("shared")
    inner = recorder.q()
    points = recorder.step()
    assert len(points) == DRAWS and distinct(standardised(points, inner))
    without = Recorder("shared", alpha=0.0)
    without.refresh()
    assert equal(without.step(), points)


def test_shared_noise_pair_by_pair_inner_first() -> None:
    recorder, outer, _ = prepared("shared")
    steps = []
    for batch in range(3):
        inner = recorder.q()
        points = recorder.step(batch)
        assert len(points) == 2 * DRAWS
        at_in, at_out = standardised(points[0::2], inner), standardised(points[1::2], outer)
        assert close(at_in, at_out) and distinct(at_in)
        steps.append(at_in)
    assert distinct(torch.cat(steps))


def test_independent_noise() -> None:
    recorder, outer, _ = prepared("independent")
    seen = []
    for batch in range(3):
        inner = recorder.q()
        points = recorder.step(batch)
        seen += [standardised(points[0::2], inner), standardised(points[1::2], outer)]
    assert distinct(torch.cat(seen))


def test_fixed_noise_keeps_the_outer_point_until_the_next_refresh() -> None:
    recorder, outer, mega = prepared("fixed")
    assert all(equal(mega[i : i + DRAWS], mega[:DRAWS]) for i in (DRAWS, 2 * DRAWS)), "one draw for all chunks"
    inners = []
    for batch in range(3):
        inner = recorder.q()
        points = recorder.step(batch)
        assert equal(points[1::2], mega[:DRAWS]), "θ_out is the mega-batch's"
        inners.append(standardised(points[0::2], inner))
    assert distinct(torch.cat([*inners, standardised(mega[:DRAWS], outer)]))
    again = recorder.q()
    fresh = recorder.refresh()
    assert distinct(torch.cat([standardised(fresh[:DRAWS], again), standardised(mega[:DRAWS], outer)]))
    assert equal(recorder.step()[1::2], fresh[:DRAWS])


def test_antithetic_pairs_lie_on_both_sides_of_the_mean() -> None:
    recorder, outer, mega = prepared("antithetic")
    inner = recorder.q()
    points = recorder.step()
    assert len(points) == 4 * DRAWS and len(mega) == 3 * 2 * DRAWS
    at_in, at_out = standardised(points[0::2], inner), standardised(points[1::2], outer)
    assert close(at_in, at_out)
    for noises in (at_in, standardised(mega, outer)):
        assert close(noises[0::2], -noises[1::2]) and distinct(noises[0::2])


def test_zero_noise_is_the_delta_method() -> None:
    recorder, outer, mega = prepared("zero")
    inner = recorder.q()
    points = recorder.step()
    assert equal(points, [inner[0], outer[0]] * DRAWS)
    assert equal(mega, [outer[0]] * (3 * DRAWS))


@pytest.mark.parametrize("noise", ["shared", "independent", "antithetic"])
def test_every_chunk_of_a_mega_batch_has_noise_of_its_own(noise: str) -> None:
    recorder = Recorder(noise)
    q = recorder.q()
    first, second = standardised(recorder.refresh(), q), standardised(recorder.refresh(), q)
    upper = slice(0, None, 2) if noise == "antithetic" else slice(None)
    assert distinct(torch.cat([first[upper], second[upper]]))
    assert distinct(torch.cat([first[upper], standardised(recorder.step()[0:1], q)])), "the steps' noise is their own"


def test_noise_is_standard_normal() -> None:
    recorder = Recorder("shared", mc_samples=200, curvature="reparam")
    q = recorder.q()
    eps = standardised(recorder.step(), q).flatten()  # 200 × 21
    assert abs(float(eps.mean())) < 4 / eps.numel() ** 0.5
    assert abs(float(eps.var()) - 1.0) < 4 * (2 / eps.numel()) ** 0.5


# ---- dropout -----------------------------------------------------------------------------------------------


class Masks(nn.Module):
    """A network that records the dropout masks it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8, dtype=torch.float64)
        self.out = nn.Linear(8, 1, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape[0], 8, dtype=x.dtype) < 0.5
        self.seen.append(mask)
        return self.out(torch.tanh(self.layer(x)) * mask)

    def take(self) -> list[Tensor]:
        seen, self.seen = self.seen, []
        return seen


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "shell": lambda p: poco.IVONPoCo(p, lr=0.1, ess=100.0, mc_samples=DRAWS, seed=0),
    "exact": lambda p: poco.PosteriorCorrected(p, "diagonal_gaussian", lr=0.1, ess=100.0, hess_init=1.0,
                                               curvature="exact", anchor="products", mc_samples=DRAWS, seed=0),
    "over-a-base": lambda p: poco.AlphaSVRG(torch.optim.SGD(p, lr=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_the_gradients_of_a_pair_see_the_same_dropout_masks(kind: str) -> None:
    model = Masks()
    opt, task = MAKERS[kind](model.parameters()), Task(model)
    opt.refresh(task.chunks())
    assert not any(torch.equal(a, b) for i, a in enumerate(model.seen) for b in model.seen[:i])
    model.take()
    inner = []
    for step in range(3):
        state = torch.get_rng_state()
        opt.step(task.closure(step))
        masks = model.take()
        pairs = masks[-2 * getattr(opt, "mc_samples", 1) :]  # before them, products on the mega-batch
        assert equal(pairs[0::2], pairs[1::2])
        inner += pairs[0::2]
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        for mask in pairs[0::2]:
            assert torch.equal(torch.rand(mask.shape, dtype=torch.float64) < 0.5, mask)
        assert torch.equal(torch.get_rng_state(), after), "the outer pass moved torch's generator"
    assert not any(torch.equal(a, b) for i, a in enumerate(inner) for b in inner[:i]), "one mask for several steps"


@pytest.mark.parametrize("kind", MAKERS)
def test_the_generator_goes_on_after_an_exception_at_the_outer_point(kind: str) -> None:
    model = Masks()
    opt, task = MAKERS[kind](model.parameters()), Task(model)
    opt.refresh(task.chunks())
    calls = []
    state = torch.get_rng_state()

    def interrupted() -> Tensor:
        loss = task.closure(0)()
        calls.append(model.seen[-1])
        if len(calls) > 1 and torch.equal(calls[-1], calls[-2]):
            raise RuntimeError("at the outer point")
        return loss

    with pytest.raises(RuntimeError, match="at the outer point"):
        opt.step(interrupted)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(model.seen[-1].shape, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), after)
