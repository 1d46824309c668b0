"""What `NaturalVI` refuses, each by one sentence that says what to do; nothing is changed."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro_models import ONE, ZERO, gamma_poisson, normal_normal, real
from torch import Tensor

from expfam_poco.integrations.pyro import NaturalVI

Y = real(1.0, 2.0, 0.5, 1.5)


def discrete(y: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.5 * ONE))
    pyro.sample("y", dist.Normal(k, ONE).expand([4]).to_event(1), obs=y)


def sphere(y: Tensor) -> None:
    direction = pyro.sample("direction", dist.ProjectedNormal(torch.zeros(3, dtype=torch.float64)))
    pyro.sample("y", dist.Normal(direction[0], ONE).expand([4]).to_event(1), obs=y)


def local_to_two(y: Tensor) -> None:
    with pyro.plate("rows", 8, subsample_size=4, dim=-1), pyro.plate("columns", 6, subsample_size=2, dim=-2):
        pyro.sample("z", dist.Normal(ZERO, ONE))


def sequential(y: Tensor) -> None:
    for i in pyro.plate("rows", 4):
        z = pyro.sample(f"z{i}", dist.Normal(ZERO, ONE))
        pyro.sample(f"y{i}", dist.Normal(z, ONE), obs=y[i])


def nothing(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(ZERO, ONE).expand([4]).to_event(1), obs=y)


def mean(y: Tensor) -> None:
    with poutine.scale(scale=1 / len(y)):
        normal_normal(y)


def sometimes(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(ZERO, ONE))
    if float(y[0]) > 5:
        z = z + pyro.sample("outlier", dist.Normal(ZERO, ONE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, ONE), obs=y)


def growing(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(ZERO, ONE).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Normal(z, ONE).to_event(1), obs=y)


def missing(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(ZERO, ONE))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(z, ONE), obs=y, obs_mask=y > 1.0)


MODELS: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "discrete": (discrete, r"site 'k': it is discrete, and no gradient reaches it; sum it out"),
    "support": (sphere, r"site 'direction': nothing maps real numbers one to one onto its support"),
    "local": (local_to_two, r"site 'z': it is local to 2 subsampled plates, .*; subsample one of them"),
    "sequential": (sequential, r"site 'z0': the plate 'rows' around it is sequential; use it as a context"),
    "no latent": (nothing, r"model: it has no latent site, so there is no posterior; sample one without obs="),
    "masked": (missing, r"site 'y_unobserved': some of its entries are masked"),
    "mean loss": (mean, r"model: every site is scaled by 0.25, as for a mean loss, where the log joint is meant"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_has_no_posterior_here(name: str) -> None:
    model, words = MODELS[name]
    vi = NaturalVI(model, seed=0)
    with pytest.raises(ValueError, match=words):
        vi.step(Y)
    with pytest.raises(
        RuntimeError, match=r"model: its sites are not known before the first step; call vi.step\(batch\)"
    ):
        vi.guide(Y)


@pytest.mark.parametrize(
    ("model", "other", "words"),
    [
        (sometimes, real(9.0, 1.0, 1.0, 1.0), r"site 'outlier': it appears now and did not at first"),
        (growing, real(1.0, 2.0), r"site 'z': its shape was \(4,\) and is \(2,\) now; a posterior is of one shape"),
        (
            normal_normal,
            real(1.0, 2.0),
            r"plate 'data': its size was 4 and is 2 now; a plate's size is that of the whole data: give "
            r"pyro.plate\('data', 4, subsample=rows\), or call next_data\(\) for new data",
        ),
    ],
    ids=["sometimes", "shape", "plate"],
)
def test_a_model_that_changes(model: Any, other: Tensor, words: str) -> None:
    vi = NaturalVI(model, seed=0)
    vi.step(Y)
    before = vi.optimizer.posterior_states()
    with pytest.raises(ValueError, match=words):
        vi.step(other)
    after = vi.optimizer.posterior_states()
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    vi.step(Y)


@pytest.mark.parametrize(
    ("choices", "error", "words"),
    [
        (
            {"family": "gamma"},
            ValueError,
            r"family=Gamma for the site 'mean': the family's support is .* the site's Real",
        ),
        ({"family": "bernoulli"}, ValueError, r"family=Bernoulli for the site 'mean': its weights have a few levels"),
        ({"family": {"other": "gamma"}}, ValueError, r"no pattern matches the site 'mean'; add one, '\*' matches"),
        ({"ess": 3.0}, TypeError, r"ess=3.0: NaturalVI has it from the model; leave it out"),
        ({"weight_decay": 1.0}, TypeError, r"weight_decay=1.0: NaturalVI has it from the model"),
        ({"lr": 2.0}, ValueError, r"lr=2.0: give a rate in \(0, 1\], or None"),
        ({"particles": 0}, ValueError, r"particles=0: give an integer, 1 or larger"),
        ({"param_optimizer": 0.1}, TypeError, r"param_optimizer=0.1: give one of pyro.optim, or a function"),
        ({"init": "median"}, TypeError, r"init='median': give a function of pyro.infer.autoguide.initialization"),
    ],
)
def test_arguments(choices: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NaturalVI(normal_normal, seed=0, **choices).step(Y)


def test_a_start_on_the_border() -> None:
    with pytest.raises(ValueError, match=r"init: it puts the site 'rate' on the border of its support"):
        NaturalVI(gamma_poisson, init=lambda site=None: real(0.0), seed=0).step(Y.round()[:, None])
    with pytest.raises(TypeError, match=r"model=None: give a Pyro model"):
        NaturalVI(None)  # type: ignore[arg-type]


def test_an_error_of_the_models_is_raised_as_it_is() -> None:
    """And not taken for a step that is too large."""
    calls = []

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(ZERO, ONE))
        calls.append(z)
        if len(calls) > 4:
            raise ValueError("the user's own")
        pyro.sample("y", dist.Normal(z, ONE).expand([4]).to_event(1), obs=y)

    vi = NaturalVI(model, seed=0)
    with pytest.raises(ValueError, match="the user's own"):
        for _ in range(5):
            vi.step(Y)
    assert len(calls) == 6  # once more from the posterior of the step before, whose fault it might have been


@pytest.mark.parametrize("quantiles", [[0.5, 1.0], 0.5])
def test_quantiles(quantiles: Any) -> None:
    vi = NaturalVI(normal_normal, seed=0)
    vi.step(Y)
    with pytest.raises((TypeError, ValueError), match=r"quantiles=.*give a list of numbers between 0 and 1"):
        vi.guide.quantiles(quantiles)
