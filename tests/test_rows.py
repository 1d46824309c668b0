"""Local parameters: only the rows that a batch has used are decayed and stepped, with the right scale and age."""

from typing import Any

import pytest
import torch
from torch import Tensor

import expfam_poco as poco

G, B, PER = 60, 3, 5
torch_normal = torch.randn(G, 1 + PER, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch_normal[:, :1] + torch_normal[:, 1:]
MEAN, PRECISION = Y.sum(1) / (1.0 + PER), 1.0 + PER


def locals_of(family: str = "diagonal_gaussian", **choices: Any) -> tuple[Tensor, Any]:
    """z_g ~ N(0, 1), y_gj ~ N(z_g, 1): the locals and their optimizer; N(MEAN, 1/PRECISION) is exact."""
    z = torch.nn.Parameter(torch.zeros(G, dtype=torch.float64))
    given = {
        "lr": 0.3,
        "weight_decay": 1.0 / G,
        "hess_init": 1.0 / G,
        "curvature": "exact",
        "own_site": True,
        **choices,
    }
    return z, poco.PosteriorCorrected([("z", z)], family, ess=G, seed=0, **given)


def batch(z: Tensor, rows: Tensor, **named: Any) -> Any:
    """The mean loss of a batch of groups, which names its rows."""
    return poco.Rows(lambda: 0.5 * (Y[rows] - z[rows, None]).square().sum() / len(rows), {"z": rows, **named})


def passes(count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    return [rows for _ in range(count) for rows in torch.randperm(G, generator=generator).split(B)]


def state_of(opt: Any) -> Any:
    return opt.posterior_states()["z"]


@pytest.mark.parametrize("choices", [{}, {"lr": 0.2, "momentum": 0.5}, {"curvature": "reparam", "mc_samples": 4}])
def test_local_precisions_are_right_after_twenty_passes(choices: dict[str, Any]) -> None:
    z, opt = locals_of(**choices)
    for rows in passes(20):
        opt.step(batch(z, rows))
    q = state_of(opt)
    assert float((q.precision / PRECISION - 1.0).abs().max()) < 0.1
    assert float((q.mean - MEAN).square().mean().sqrt() * PRECISION**0.5) < 0.05


@pytest.mark.parametrize("family", ["diagonal_gaussian", "gamma"])
def test_rows_are_stepped_as_often_as_seen_as_a_full_batch_would(family: str) -> None:
    # Against a full batch of all rows, each stepped with the same noise: rows seen once are after step 1, and so on.
    choices: dict[str, Any] = {"noise": "zero", "momentum": 0.7, "own_site": False} if family != "gamma" else {}
    loss = (lambda z, rows: (z[rows] - (1.0 + Y[rows, 0].abs()) * z[rows].log()).sum()) if family == "gamma" else None

    def optimizer() -> tuple[Tensor, Any]:
        if loss is None:
            return locals_of(**choices)
        z = torch.nn.Parameter(torch.ones(G, dtype=torch.float64))
        given = {"lr": 1.0, "curvature": "regression", "mc_samples": 2, "retraction": "plain"}
        return z, poco.PosteriorCorrected([("z", z)], family, ess=G, weight_decay=0.1, seed=0, **given)

    def closure(z: Tensor, rows: Tensor) -> Any:
        if loss is None:
            return batch(z, rows)
        return poco.Rows(lambda: loss(z, rows) / len(rows), {z: rows})

    everything = torch.arange(G)
    z, full = optimizer()
    states = [None]
    for _ in range(3):
        full.step(closure(z, everything).closure)
        states.append(state_of(full))
    z, opt = optimizer()
    seen = torch.zeros(G, dtype=torch.int64)
    opt.step(closure(z, everything[:40]))  # the others begin later
    opt.step(closure(z, everything[20:]))
    opt.step([closure(z, everything[20:30]), closure(z, everything[50:])], weights=[10, 10])
    for rows in (everything[:40], everything[20:], torch.cat([everything[20:30], everything[50:]])):
        seen[rows] += 1
    for number in (1, 2, 3):
        rows = (seen == number).nonzero().flatten()
        assert len(rows)
        for mine, expected in zip(state_of(opt), states[number], strict=True):
            torch.testing.assert_close(mine[rows], expected[rows], rtol=1e-10, atol=1e-10)


def test_a_refresh_of_all_rows_takes_the_noise_of_batches_and_others_stay() -> None:
    z, opt = locals_of(alpha=1.0, own_site=False)
    opt.refresh([batch(z, rows) for rows in torch.arange(G).split(B)])
    before = state_of(opt)
    rows = torch.arange(6)
    opt.step(batch(z, rows))
    after = state_of(opt)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[6:], new[6:]) and not torch.equal(old[:6], new[:6])
    with pytest.raises(ValueError, match=r"rows\['z'\]: the mega-batch has used 6 of 60 rows; refresh with all"):
        opt.refresh([batch(z, rows)])


def test_globals_beside_locals_and_a_checkpoint_between() -> None:
    def made() -> tuple[list[Tensor], Any]:
        weights = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (G, 1)]
        named = list(zip(("z", "mu"), weights, strict=True))
        choices = {"weight_decay": 1.0 / G, "hess_init": 1.0, "momentum": 0.5, "own_site": True, "seed": 0}
        return weights, poco.PosteriorCorrected(named, "diagonal_gaussian", 0.1, float(G), **choices)

    def closure(weights: list[Tensor], rows: Tensor) -> Any:
        z, mu = weights
        return poco.Rows(lambda: (Y[rows] - mu - z[rows, None]).square().sum() / len(rows), {"z": rows})

    plan = passes(3)
    weights, opt = made()
    for rows in plan[:30]:
        opt.step(closure(weights, rows))
    saved = opt.state_dict()
    again, other = made()
    for mine, theirs in zip(again, weights, strict=True):
        mine.data.copy_(theirs.data)
    other.load_state_dict(saved)
    for rows in plan[30:]:
        opt.step(closure(weights, rows))
        other.step(closure(again, rows))
    for name, state in opt.posterior_states().items():
        assert all(torch.equal(a, b) for a, b in zip(state, other.posterior_states()[name], strict=True))
    ages = opt.state[weights[0]]["ages"]
    assert torch.equal(ages, torch.full((G,), 3)) and opt.state[weights[1]]["step"] == 60
    opt.step(lambda: weights[0].square().sum() + weights[1].square().sum())  # a batch that names none used all
    assert torch.equal(opt.state[weights[0]]["ages"], torch.full((G,), 4))


def test_what_cannot_be_is_one_sentence() -> None:
    z, opt = locals_of()
    before = state_of(opt)
    cases = (
        ({"z": torch.tensor([0, 60])}, "some are none of the rows 0 to 59"),
        ({"z": torch.tensor([4, 4])}, "some are repeated; name every row once"),
        ({"y": torch.tensor([4])}, r"rows\['y'\]: no such parameter takes part; the known names are z"),
    )
    for rows, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            opt.step(poco.Rows(lambda: z.square().sum(), rows))
    with pytest.raises(ValueError, match="1 of 2 closures name rows of 'z'; let all do"):
        opt.step([batch(z, torch.tensor([1])), lambda: z.square().sum()])
    with pytest.raises(ValueError, match="FullGaussian has no rows of their own"):
        joint = poco.PosteriorCorrected([("z", z)], "full_gaussian", 0.1, 1.0)
        joint.step(poco.Rows(lambda: z.square().sum(), {z: torch.tensor([1])}))
    for rows in ({}, {"z": [1]}, {"z": torch.ones(2, dtype=torch.bool)}, {"z": torch.tensor([1.0])}):
        with pytest.raises(TypeError, match="rows"):
            poco.Rows(lambda: z.square().sum(), rows)
    with pytest.raises(ValueError, match="rows: the base optimizer steps all rows"):
        poco.AlphaSVRG(torch.optim.SGD([z], lr=0.1)).step(batch(z, torch.tensor([1])))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(opt), strict=True)) and not z.any()
