"""The guide of a `NaturalVI` among Pyro's plates."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from expfam_poco.integrations.pyro import NaturalVI


@pytest.mark.parametrize("size", [None, 4])
def test_the_guide_follows_plates_around_and_within(size: int | None) -> None:
    """Vectorised particles, and parallel draws: the same ELBO, and the shapes of an AutoGuide."""

    def model(y: Tensor | None, size: int | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
        with pyro.plate("g", 8, subsample_size=size) as i:
            theta = pyro.sample("theta", dist.LogNormal(0.2 * mu, 0.5))
            pyro.sample("y", dist.Normal(theta, 2.0), obs=None if y is None else y[i])

    pyro.set_rng_seed(0)
    vi, y = NaturalVI(model, seed=0), torch.arange(1.0, 9.0, dtype=torch.float64)
    for _ in range(30):
        vi.step(y, size)
    losses = []
    for vectorised in (False, True):
        elbo = Trace_ELBO(num_particles=10, vectorize_particles=vectorised, max_plate_nesting=1)
        losses.append(torch.tensor([elbo.loss(model, vi.guide, y, size) for _ in range(60)]))  # of as many subsamples
    errors = [values.std() / 60**0.5 for values in losses]
    assert abs(losses[0].mean() - losses[1].mean()) < 4.0 * torch.stack(errors).norm()
    shapes = []
    for guide in (vi.guide, AutoNormal(model)):
        for parallel in (False, True):
            found = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(None)
            shapes.append({name: found[name].shape for name in ("mu", "theta", "y")})
    assert shapes[0] == shapes[2] and shapes[1] == shapes[3]
