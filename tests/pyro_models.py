"""Pyro models with known answers, for the tests of `expfam_poco.integrations.pyro`; all in float64."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def real(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ZERO, ONE = real(0.0)[0], real(1.0)[0]


def normal_normal(y: Tensor) -> None:
    """Posterior precision 1 + n, mean Σy/(1 + n)."""
    mean = pyro.sample("mean", dist.Normal(ZERO, ONE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, ONE), obs=y)


def linear(x: Tensor, y: Tensor) -> None:
    """Posterior precision I + xᵀx/0.25."""
    w = pyro.sample("w", dist.Normal(ZERO, ONE).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5 * ONE), obs=y)


def rows_of(x: Tensor, y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """`linear` with a part of the data, of the plate's choosing or the caller's."""
    w = pyro.sample("w", dist.Normal(ZERO, ONE).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(y), subsample_size=size, subsample=rows) as i:
        pyro.sample("y", dist.Normal(x[i] @ w, 0.5 * ONE), obs=y[i])


def beta_bernoulli(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2 * ONE, 3 * ONE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def gamma_poisson(y: Tensor) -> None:
    """A rate for every column."""
    with pyro.plate("groups", y.shape[1]):
        rate = pyro.sample("rate", dist.Gamma(2 * ONE, 0.5 * ONE))
        with pyro.plate("data", y.shape[0]):
            pyro.sample("y", dist.Poisson(rate), obs=y)


def dirichlet_categorical(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(real(1.0, 2.0, 0.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


def gamma_precision(y: Tensor) -> None:
    precision = pyro.sample("precision", dist.Gamma(ONE, 2 * ONE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.5 * ONE, precision.rsqrt()), obs=y)


SCHOOLS = real(28, 8, -3, 7, -1, 1, 18, 12), real(15, 10, 16, 11, 9, 11, 10, 18)


def schools(y: Tensor, error: Tensor) -> None:
    """Eight schools, not centred."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 5 * ONE))
    tau = pyro.sample("tau", dist.HalfCauchy(5 * ONE))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(ZERO, ONE))
        pyro.sample("y", dist.Normal(mu + tau * z, error), obs=y)


def local(y: Tensor, size: int | None = None, shared: bool = False) -> None:
    """A latent of every column, of which a batch may have a part: of mean 0 or a shared one, posterior precision 1 + n.

    The plate is not the first axis of the site, which has two entries with the same data.
    """
    mean = pyro.sample("mean", dist.Normal(ZERO, 3 * ONE)) if shared else ZERO
    with pyro.plate("twice", 2, dim=-2), pyro.plate("columns", y.shape[1], subsample_size=size, dim=-1) as i:
        z = pyro.sample("z", dist.Normal(mean, ONE))
        with pyro.plate("data", y.shape[0], dim=-3):
            pyro.sample("y", dist.Normal(z, ONE), obs=y[:, None, i].expand(-1, 2, -1))
