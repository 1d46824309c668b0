"""Weights for any family: a tensor in its support, whatever one weight is."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from expfam_poco.checks import suite
from expfam_poco.checks.specimens import Specimen


def weights_in(family: Any, free: Tensor) -> Tensor:
    """Weights in the support, made of unconstrained numbers; a draw where the support has no transform."""
    if family.fixed_point:
        return family.reference_like(free)
    try:
        moved = transform_to(family.support)(free)
        if moved.shape != free.shape:  # of the simplex
            moved = transform_to(family.support)(torch.zeros_like(free[..., :-1]))
        return moved
    except NotImplementedError:
        noise = free.unsqueeze(-1).expand(*free.shape, *family.noise_dims) if family.noise_dims else free
        noise = torch.sigmoid(noise) if family.noise_kind == "uniform" else noise
        return family.sample(family.centred_at(family.reference_like(free)), noise.unsqueeze(0))[0]


def takes(family: Any, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can hold its weights."""
    try:
        family.centred_at(family.reference_like(torch.zeros(shape)))
    except (ValueError, AssertionError, RuntimeError):
        return False
    return True


def event_of(family: Any) -> tuple[int, ...]:
    """The shape of one weight in the tensors that laws are tried on."""
    shape = suite.default_shape(family)
    return tuple(shape[len(shape) - family.event_dim :])


def specimen_of(family: Any, seed: int = 0) -> Specimen:
    shape = suite.default_shape(family)
    fitted = family if family.joint else family.for_shape(shape)
    return Specimen(fitted, shape, torch.float64, torch.device("cpu"), seed).with_members()
