"""Families that break a law each, in the way in which one goes wrong: (the family, the first law to fail)."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch.distributions import constraints
from user_families import Exponential, GaussianByHand, LogNormal, Moments

import expfam_poco as poco
from expfam_poco import estimators
from expfam_poco.families import Bernoulli, DiagonalGaussian, FullGaussian, IsotropicGaussian, Relaxed


class ScaledPartition(Exponential):
    def log_partition(self, nat):
        return 2.0 * super().log_partition(nat)


class MissingTerm(GaussianByHand):
    def log_partition(self, nat):
        return -(nat.theta**2) / (4.0 * nat.square)


class MissingConstant(GaussianByHand):
    def log_partition(self, nat):
        return super().log_partition(nat) - 0.5 * math.log(math.pi)


class WrongMean(DiagonalGaussian):
    def to_mean(self, nat):
        mean = super().to_mean(nat)
        return mean._replace(theta_theta=mean.theta_theta - mean.theta**2)


class WrongNatural(DiagonalGaussian):
    def to_natural(self, mean):
        nat = super().to_natural(mean)
        return nat._replace(theta=1.01 * nat.theta)


class WrongChart(DiagonalGaussian):
    def from_nat(self, nat):
        state = super().from_nat(nat)
        return state._replace(precision=0.5 * state.precision)


class SiteWithoutHalf(DiagonalGaussian):
    def site_to_nat(self, site, state):
        nat = super().site_to_nat(site, state)
        return nat._replace(theta_theta=site.curvature)


class BothSitesWithoutHalf(SiteWithoutHalf):
    """Consistent with itself, but not with the Bayesian learning rule."""

    def site_from_nat(self, site, state):
        return super().site_from_nat(site._replace(theta_theta=0.5 * site.theta_theta), state)


class WideSamples(LogNormal):
    def sample(self, state, noise):
        return super().sample(state, 1.2 * noise)


class NegativeSamples(Exponential):
    def sample(self, state, noise):
        return -super().sample(state, noise)


class RelaxedSamples(Bernoulli):
    def sample(self, state, noise):
        return torch.tanh(4.0 * (state.theta + noise))


class OneSample(DiagonalGaussian):
    def sample(self, state, noise):
        return super().sample(state, noise)[0]


class OwnNoise(DiagonalGaussian):
    def sample(self, state, noise):
        return super().sample(state, torch.randn_like(noise))


class GlobalNoise(DiagonalGaussian):
    def noise(self, shape, draws, key, *, dtype=torch.float32, device="cpu"):
        return torch.randn(draws, *shape, dtype=dtype, device=device)


class NoiseOfLambda(DiagonalGaussian):
    """Noise that remembers the λ that was sampled last."""

    last: ClassVar[list[float]] = [0.0]

    def noise(self, shape, draws, key, *, dtype=torch.float32, device="cpu"):
        return super().noise(shape, draws, key, dtype=dtype, device=device) * (1.0 + 0.01 * math.tanh(self.last[0]))

    def sample(self, state, noise):
        self.last[0] = float(state.mean.sum())
        return super().sample(state, noise)


class SpoiltNoise(DiagonalGaussian):
    def sample(self, state, noise):
        return noise.mul_(state.precision.rsqrt()).add_(state.mean)


class NoiseWithoutKey(DiagonalGaussian):
    def noise(self, shape, draws, key, *, dtype=torch.float32, device="cpu"):
        return torch.ones(draws, *shape, dtype=dtype, device=device)


class ShiftedMirror(Exponential):
    def reflect(self, noise):
        return 1.1 - noise


class WrongMirror(Exponential):
    def reflect(self, noise):
        return -noise


class WrongEntropy(DiagonalGaussian):
    def entropy(self, state):
        return super().entropy(state) - 0.5


class WrongExpectedBaseMeasure(IsotropicGaussian):
    def expected_log_base_measure(self, state):
        return self.log_base_measure(state.mean)


class WrongBaseMeasure(IsotropicGaussian):
    def log_base_measure(self, theta):
        return super().log_base_measure(theta) + 0.1


class WrongKL(DiagonalGaussian):
    def kl(self, state, prior):
        return super().kl(prior, state)


class SignOfKL(DiagonalGaussian):
    def kl_gradient(self, state, prior):
        return super().kl_gradient(prior, state)


class KLWithoutAnchor(FullGaussian):
    def kl_gradient(self, state, prior):
        kl = super().kl_gradient(state, prior)
        return kl._replace(gradient=self._apply(state.precision, state.mean - prior.mean))


class KinkedPartition(Bernoulli):
    """|λ| + log(1 + e^{−2|λ|}): right, but at λ = 0 autograd has ∇²A = 0 of it."""

    def log_partition(self, nat):
        return nat.theta.abs() + torch.nn.functional.softplus(-2.0 * nat.theta.abs())


class WrongFisherProduct(DiagonalGaussian):
    def fisher_vector_product(self, nat, vector):
        product = super().fisher_vector_product(nat, vector)
        return product._replace(theta=2.0 * product.theta)


class NotMinimal(GaussianByHand):
    """θ and 2θ + 1 together: the Fisher matrix is singular."""

    def statistics(self, theta):
        return Moments(theta, 2.0 * theta + 1.0)

    def log_partition(self, nat):
        slope = nat.theta + 2.0 * nat.square
        return nat.square + 0.5 * slope**2 + 0.5 * math.log(2.0 * math.pi)

    def log_base_measure(self, theta):
        return -0.5 * theta**2

    def sample(self, state, noise):
        return state.theta + 2.0 * state.square + noise

    def centred_at(self, theta, precision=None):
        return Moments(theta + 1.0, torch.full_like(theta, -0.5))


class NormalPerEntry(DiagonalGaussian):
    def distribution(self, state):
        return super().distribution(state).base_dist


class WrongDensity(DiagonalGaussian):
    def distribution(self, state):
        import pyro.distributions as dist

        return dist.Normal(state.mean, 1.0 / state.precision).to_event(state.mean.ndim)


class TorchDistribution(DiagonalGaussian):
    def distribution(self, state):
        return torch.distributions.Independent(
            torch.distributions.Normal(state.mean, state.precision.rsqrt()), state.mean.ndim
        )


class PointElsewhere(Exponential):
    def point(self, state):
        return 1.0 / state.theta


class NoPoint(LogNormal):
    point = poco.ExponentialFamily.point


class RecentreNothing(DiagonalGaussian):
    def recentre(self, state, theta):
        return state


class DoubledGradient(DiagonalGaussian):
    def natural_gradient(self, state, draws):
        site = super().natural_gradient(state, draws)
        return site._replace(gradient=2.0 * site.gradient)


class AscendingGradient(IsotropicGaussian):
    def natural_gradient(self, state, draws):
        return self.Site(-super().natural_gradient(state, draws).theta)


class ForgottenFisher(GaussianByHand):
    """∇_λ E_q[ℓ] instead of ∇_μ E_q[ℓ]."""

    def fisher_solve(self, nat, vector):
        return vector


class SquareOfGradient(FullGaussian):
    """Declares as exact what it makes of ∇ℓ alone: the curvature is not unbiased."""

    def natural_gradient(self, state, draws):
        curvature = self._outer(draws.grad, draws.grad)
        return super().natural_gradient(state, draws._replace(hessian=curvature))


@dataclasses.dataclass(frozen=True)
class UnbiasedRelaxation(Relaxed):
    unbiased: ClassVar[bool] = True


class BiasedDeclaredUnbiased(Bernoulli):
    estimators: ClassVar = {"relaxed": UnbiasedRelaxation()}


@dataclasses.dataclass(frozen=True)
class SummedRelaxation(Relaxed):
    def natural_gradient(self, family, state, draws):
        return family.Site(len(draws.theta) * super().natural_gradient(family, state, draws).theta)


class WrongRelaxation(Bernoulli):
    estimators: ClassVar = {"relaxed": SummedRelaxation()}


@dataclasses.dataclass(frozen=True)
class UphillRelaxation(Relaxed):
    def natural_gradient(self, family, state, draws):
        return family.Site(-super().natural_gradient(family, state, draws).theta)


class Uphill(Bernoulli):
    estimators: ClassVar = {"relaxed": UphillRelaxation()}


@dataclasses.dataclass(frozen=True)
class MoodyEstimator(estimators.Reparameterised):
    """Fresh randomness behind the draws' back."""

    def natural_gradient(self, family, state, draws):
        site = super().natural_gradient(family, state, draws)
        return site._replace(gradient=site.gradient + 1e-3 * torch.randn_like(site.gradient))


class Moody(DiagonalGaussian):
    estimators: ClassVar = {"reparam": MoodyEstimator()}


class ReanchorNothing(DiagonalGaussian):
    def reanchor(self, site, state_from, state_to):
        return site


class ReanchorBackwards(FullGaussian):
    def reanchor(self, site, state_from, state_to):
        return super().reanchor(site, state_to, state_from)


class MeanBeforePrecision(DiagonalGaussian):
    def retract(self, state, direction, rates, *, variant="second_order", clip_radius=math.inf):
        moved = super().retract(state, direction, rates, variant=variant, clip_radius=clip_radius)
        return moved._replace(mean=state.mean - rates[0] * direction.gradient / state.precision)


class AlwaysPlain(FullGaussian):
    def retract(self, state, direction, rates, *, variant="second_order", clip_radius=math.inf):
        return super().retract(state, direction, rates, variant="plain", clip_radius=clip_radius)


class HalvedStep(Bernoulli):
    def retract(self, state, direction, rates, *, variant="second_order", clip_radius=math.inf):
        rates = self.Site(0.5 * rates[0])
        return super().retract(state, direction, rates, variant=variant, clip_radius=clip_radius)


class OtherSecondOrder(GaussianByHand):
    """Stays in the domain, but with another derivative at zero."""

    def retract(self, state, direction, rates, *, variant="second_order", clip_radius=math.inf):
        if variant == "second_order":
            rates = self.Site(*(2.0 * rate for rate in rates))
        return super().retract(state, direction, rates, variant=variant, clip_radius=clip_radius)


class UndeclaredDomain(Exponential):
    domain: ClassVar = {}


class Float32Inside(DiagonalGaussian):
    def to_nat(self, state):
        nat = super().to_nat(state)
        return type(nat)(*(value.float() for value in nat))


class Float64Inside(IsotropicGaussian):
    def kl_gradient(self, state, prior):
        return self.Site(*(value.double() for value in super().kl_gradient(state, prior)))


class Cancelling(DiagonalGaussian):
    """Adds and subtracts 10⁴: four digits are lost, which float64 hides."""

    def sample(self, state, noise):
        return (super().sample(state, noise) + 1e4) - 1e4


class UnknownDomainField(Exponential):
    domain: ClassVar = {"lambda": constraints.less_than(0.0)}


class UnknownEstimator(Exponential):
    default_estimator: ClassVar = "price"


class UnknownMomentum(DiagonalGaussian):
    momentum_block: ClassVar = ("theta",)


class CentredOutside(Exponential):
    def centred_at(self, theta, precision=None):
        return self.State(1.0 / theta)


class SummedPartition(Exponential):
    def log_partition(self, nat):
        return super().log_partition(nat).sum()


class NoPrecision(Exponential):
    def centred_at(self, theta, precision=None):
        return super().centred_at(theta * precision.sqrt(), precision)


class StepsTogether(DiagonalGaussian):
    """Right to first order and always in the domain, but the least precision of a tensor bends the steps of all."""

    def _sandwich(self, curvature, precision):
        return curvature * (curvature / precision.min())


class NoPull(DiagonalGaussian):
    def log_ratio_gradient(self, state, prior, theta):
        return -state.precision * (theta - state.mean)


class PlainRegression(DiagonalGaussian):
    def regressed_natural_gradient(self, state, draws):
        return self.natural_gradient(state, draws)


BROKEN = [
    (NoPull, "own_site"),
    (PlainRegression, "regression"),
    (StepsTogether, "spans"),
    (ScaledPartition, "gradient_of_log_partition"),
    (MissingTerm, "gradient_of_log_partition"),
    (MissingConstant, "log_prob"),
    (WrongMean, "gradient_of_log_partition"),
    (WrongNatural, "to_natural"),
    (WrongChart, "round_trips"),
    (SiteWithoutHalf, "round_trips"),
    (BothSitesWithoutHalf, "kl_gradient"),
    (WideSamples, "samples"),
    (NegativeSamples, "samples"),
    (RelaxedSamples, "samples"),
    (OneSample, "samples"),
    (OwnNoise, "samples"),
    (GlobalNoise, "noise"),
    (NoiseOfLambda, "noise"),
    (SpoiltNoise, "noise"),
    (NoiseWithoutKey, "noise"),
    (ShiftedMirror, "noise"),
    (WrongMirror, "noise"),
    (WrongEntropy, "entropy"),
    (WrongExpectedBaseMeasure, "entropy"),
    (WrongBaseMeasure, "log_prob"),
    (WrongKL, "kl"),
    (SignOfKL, "kl_gradient"),
    (KLWithoutAnchor, "kl_gradient"),
    (WrongFisherProduct, "fisher"),
    (KinkedPartition, "fisher"),
    (NotMinimal, "fisher"),
    (NormalPerEntry, "distribution"),
    (WrongDensity, "distribution"),
    (TorchDistribution, "distribution"),
    (PointElsewhere, "point"),
    (NoPoint, "point"),
    (RecentreNothing, "point"),
    (DoubledGradient, "natural_gradient"),
    (AscendingGradient, "natural_gradient"),
    (ForgottenFisher, "fisher"),
    (SquareOfGradient, "natural_gradient"),
    (BiasedDeclaredUnbiased, "natural_gradient"),
    (WrongRelaxation, "natural_gradient"),
    (Uphill, "natural_gradient"),
    (Moody, "zero_variance"),
    (ReanchorNothing, "reanchor"),
    (ReanchorBackwards, "reanchor"),
    (MeanBeforePrecision, "retraction"),
    (AlwaysPlain, "retraction"),
    (HalvedStep, "retraction"),
    (OtherSecondOrder, "retraction"),
    (UndeclaredDomain, "retraction"),
    (Float64Inside, "dtypes"),
    (Cancelling, "dtypes"),
    (UnknownDomainField, "declarations"),
    (UnknownEstimator, "declarations"),
    (UnknownMomentum, "declarations"),
    (CentredOutside, "centred_at"),
    (SummedPartition, "centred_at"),
    (NoPrecision, "centred_at"),
]
