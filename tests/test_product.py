"""The product of families: a group for each part in optimizers, and one true exponential family of flat vectors."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from user_families import Exponential

import expfam_poco as poco
from expfam_poco import blr
from expfam_poco.checks import FamilyLaws
from expfam_poco.families import DiagonalGaussian, FullGaussian, IsotropicGaussian, ProductFamily


class Scaled(nn.Module):
    """A small network whose layers have positive scales, which need another family than the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.last = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 3)
    return x, x[:, :1] * x[:, 1:2]


def parts() -> dict[str, Any]:
    return {"scale*": (Exponential(), {"lr": 0.002}), "*.weight": DiagonalGaussian(), "*": IsotropicGaussian(100.0)}


def by_hand(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())

    def members(test: Any) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in named.items() if test(name)]

    return [
        {"params": members(lambda name: name == "scale"), "family": Exponential(), "lr": 0.002},
        {"params": members(lambda name: name.endswith("weight")), "family": DiagonalGaussian()},
        {"params": members(lambda name: name.endswith("bias")), "family": IsotropicGaussian(100.0)},
    ]


def trained(model: nn.Module, optimizer: poco.PosteriorCorrected, steps: int = 12) -> list[float]:
    x, y = data()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    losses = []
    for step in range(steps):
        if step % 5 == 2:
            optimizer.refresh([lambda: (model(x) - y).square().mean()])
        rows = slice(8 * (step % 8), 8 * (step % 8) + 8)
        losses.append(optimizer.step(lambda rows=rows: (model(x[rows]) - y[rows]).square().mean()).item())
        schedule.step()
    return losses


def twins(*families: Any) -> list[tuple[nn.Module, poco.PosteriorCorrected]]:
    """Equal models with an optimizer each: a product for a family, hand-made groups for None."""
    first = Scaled()
    made = []
    for family in families:
        model = copy.deepcopy(first)
        params = by_hand(model) if family is None else model.named_parameters()
        made.append((model, poco.PosteriorCorrected(params, family or DiagonalGaussian(), lr=0.05, ess=64, seed=3)))
    return made


# ---- in optimizers -------------------------------------------------------------------------------------------


def test_training_with_a_product_is_training_with_hand_made_groups_bit_for_bit() -> None:
    (one, product), (two, groups) = twins(ProductFamily(parts()), None)
    torch.manual_seed(1)
    losses = trained(one, product)
    torch.manual_seed(1)
    assert losses == trained(two, groups)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert bool((one.scale > 0).all())
    assert [g["param_names"] for g in product.param_groups] == [g["param_names"] for g in groups.param_groups]


def test_everything_else_of_the_optimizer_works(tmp_path: Path) -> None:
    (one, product), (two, again) = twins(ProductFamily(parts()), ProductFamily(parts()))
    trained(one, product)
    poco.save(tmp_path / "run.pt", model=one, optimizer=product)
    poco.load(tmp_path / "run.pt", model=two, optimizer=again)
    torch.manual_seed(1)
    losses = trained(one, product)
    torch.manual_seed(1)
    assert losses == trained(two, again)
    posterior = product.posterior()
    assert list(posterior) == ["scale", "first.weight", "last.weight", "first.bias", "last.bias"]
    assert bool((posterior["scale"].sample() > 0).all())
    x, _ = data()
    assert torch.equal(poco.predict(one, product, x), poco.predict(two, again, x))
    assert {type(copied["family"]) for copied in copy.deepcopy(product).param_groups} == {
        Exponential,
        DiagonalGaussian,
        IsotropicGaussian,
    }


def test_a_group_is_added_whole_or_not_at_all() -> None:
    model, more = Scaled(), nn.Linear(2, 2)
    optimizer = poco.PosteriorCorrected(model.named_parameters(), ProductFamily(parts()), lr=0.05, ess=64)
    wrong = ProductFamily({"*weight": DiagonalGaussian(), "*": (DiagonalGaussian(), {"lr": -1.0})})
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        optimizer.add_param_group({"params": more.named_parameters("more"), "family": wrong})
    assert len(optimizer.param_groups) == 3 and len(optimizer.posterior()) == 5
    named = [(f"more.{name}", p) for name, p in more.named_parameters()]
    optimizer.add_param_group({"params": named, "lr": 0.01})
    assert [group["param_names"] for group in optimizer.param_groups[3:]] == [["more.weight"], ["more.bias"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.002, 0.05, 0.05, 0.01, 0.01]


def test_products_of_products_and_joint_parts() -> None:
    model = Scaled()
    inner = ProductFamily({"*.weight": DiagonalGaussian(), "*": (FullGaussian(), {"lr": 0.3})})
    family = ProductFamily({"scale": Exponential(), "*": (inner, {"lr": 0.2})})
    groups = poco.PosteriorCorrected(model.named_parameters(), family, lr=0.1, ess=64).param_groups
    kinds = [(type(group["family"]).__name__, group["lr"], len(group["params"])) for group in groups]
    assert kinds == [("Exponential", 0.1, 1), ("DiagonalGaussian", 0.2, 2), ("FullGaussian", 0.3, 2)]


def test_priors_by_name_go_to_their_parts(tmp_path: Path) -> None:
    prior = {
        "scale": Exponential.State(torch.tensor(-2.0)),
        "last.bias": IsotropicGaussian(100.0).centred_at(torch.tensor(0.5)),
    }
    made = []
    for _ in range(2):
        model = Scaled()
        made.append(poco.PosteriorCorrected(model.named_parameters(), ProductFamily(parts()), 0.05, 64, prior=prior))
    assert [set(group["prior"]) for group in made[0].param_groups] == [{"scale"}, set(), {"last.bias"}]
    made[1].load_state_dict(made[0].state_dict())
    with pytest.raises(ValueError, match=r"prior\['lost'\]: no such parameter"):
        poco.PosteriorCorrected(Scaled().named_parameters(), ProductFamily(parts()), 0.05, 64, prior={"lost": None})


@pytest.mark.parametrize(
    ("make", "error", "expected"),
    [
        (lambda: ProductFamily({}), ValueError, "needs at least one part"),
        (lambda: ProductFamily([("*", "bernoulli")]), TypeError, "give a mapping"),
        (lambda: ProductFamily({"*": "gauss"}), ValueError, "family='gauss' is not registered"),
        (lambda: ProductFamily({"*": ("bernoulli", 0.1)}), TypeError, "0.1 are no hyperparameters"),
        (lambda: ProductFamily({"*": "diagonal_gaussian"}, [0]), ValueError, "one positive integer for each of 1"),
        (lambda: ProductFamily({"*": "bernoulli"})._flat(), ValueError, "whose estimator is 'relaxed', so"),
        (lambda: ProductFamily({"*": "full_gaussian"})._flat(), ValueError, "whose weights are not one number each"),
        (lambda: ProductFamily({"a": "diagonal_gaussian", "*": "diagonal_gaussian"})._flat(), ValueError, "sizes=None"),
        (lambda: flat().statistics(torch.ones(4)), ValueError, r"theta has 4 entries, but sizes=\(2, 3, 1\) make 6"),
        (
            lambda: poco.PosteriorCorrected(Scaled().parameters(), ProductFamily(parts()), 0.1, 9),
            ValueError,
            "give model.named_parameters",
        ),
        (
            lambda: poco.PosteriorCorrected(
                Scaled().named_parameters(), ProductFamily({"*.weight": "diagonal_gaussian"}), 0.1, 9
            ),
            ValueError,
            "no pattern of the ProductFamily matches 'scale'",
        ),
    ],
)
def test_wrong_use_is_one_sentence(make: Any, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- as one family of flat vectors ---------------------------------------------------------------------------


class TwoNormals(Exponential):
    """The exponential family again, its samples made of two numbers: ½(ε₁² + ε₂²) has mean 1."""

    noise_kind = "normal"
    noise_dims = (2,)

    def sample(self, state, noise):
        return -0.5 * noise.square().sum(-1) / state.theta


def flat(scale: poco.ExponentialFamily | None = None) -> ProductFamily:
    parts = {"scale*": scale or Exponential(), "*.weight": DiagonalGaussian(), "*": IsotropicGaussian(3.0)}
    return ProductFamily(parts, (2, 3, 1))


@pytest.mark.xdist_group("laws of a flat product")
class TestFlatProduct(FamilyLaws):
    family = flat(TwoNormals())
    shape = (6,)


def test_its_fields_are_named_after_parts_and_statistics() -> None:
    family = flat()
    assert family.Nat._fields == ("scale_theta", "weight_theta", "weight_theta_theta", "part2_theta")
    states = ("scale_theta", "weight_mean", "weight_precision", "part2_mean", "part2_precision")
    assert family.State._fields == states
    assert type(family.centred_at(torch.ones(6))) is type(pickle.loads(pickle.dumps(family)).centred_at(torch.ones(6)))
    assert copy.deepcopy(family) == family and hash(family) == hash(flat())


def test_steps_of_the_flat_vector_are_the_steps_of_the_parts(float64: None) -> None:
    """A corrected run by pure functions, the loss coupling all weights: the product's equals that part by part."""
    family, members = flat(), [Exponential(), DiagonalGaussian(), IsotropicGaussian(3.0)]
    start = torch.rand(6) + 0.5
    whole = blr.BLRState(family.centred_at(start, 2.0), ())
    single = [blr.BLRState(f.centred_at(t, 2.0), ()) for f, t in zip(members, start.split([2, 3, 1]), strict=True)]
    prior = family.centred_at(torch.ones(6), 1.0)
    priors = [f.centred_at(torch.ones(n), 1.0) for f, n in zip(members, (2, 3, 1), strict=True)]
    mix = torch.randn(6, 6)
    for step in range(5):
        noise = family.noise(torch.Size([6]), 4, poco.noise.NoiseKey(7, step=step), dtype=torch.float64)
        theta = family.sample(whole.posterior, noise).requires_grad_()
        loss = torch.sin(theta @ mix).sum(-1)
        (grad,) = torch.autograd.grad(loss.sum(), theta)
        theta, loss = theta.detach(), loss.detach()
        site = family.natural_gradient(whole.posterior, poco.Draws(noise, theta, loss, grad))
        whole = blr.update(family, whole, prior, site, rates=family.per_block(0.02, 0.01), ess=9.0)
        cut = zip(*(value.split([2, 3, 1], -1) for value in (noise, theta, grad)), strict=True)
        for number, (f, (e, t, g)) in enumerate(zip(members, cut, strict=True)):
            own = f.natural_gradient(single[number].posterior, poco.Draws(e, t, loss, g))
            rates = f.per_block(0.02, 0.01)
            single[number] = blr.update(f, single[number], priors[number], own, rates=rates, ess=9.0)
        expected = [value for part in single for value in part.posterior]
        torch.testing.assert_close(list(whole.posterior), expected, rtol=1e-14, atol=0.0)
