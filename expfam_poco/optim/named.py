"""The named optimizers. What each chooses stands in the table of `choices`; here is how it is called, and what it does.

`AlphaSVRG`, over any torch optimizer, stands in `alpha_svrg`; `VSGD` and `ConstantVSGD` in `vsgd`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

from expfam_poco.arguments import flag, no_decay, positive
from expfam_poco.correction.snapshot import Alpha
from expfam_poco.engine.settings import estimator_of, precision_rate
from expfam_poco.family.draws import Estimator
from expfam_poco.family.registry import get_family
from expfam_poco.optim.choices import CHOICES, IVON_OPT, ONE_RATE, PUBLISHED, STRENGTH, Named, scaled


class VSGDPoCo(Named):
    """Variational SGD with posterior correction (PC Alg. 3): SVRG at weights drawn from N(m, s⁻¹ I).

        m ← m − lr [ ∇ℓ_B(m + ε) − α (∇ℓ_B(m_out + ε) − g_out) + δ m ]

    Args:
        params: parameters or groups.
        lr: η on the mean loss (the paper's Alg. 3; η_Alg3 = N η_Alg2).
        precision: s, the fixed precision of the noise; 1 in the paper, far larger for deep networks.
        weight_decay: δ of the regularised loss, the L2 term δθ: a prior of precision ess·δ, another than q's.
        ess: N, which matters to `objective`, and to the weight of a `prior`.
        alpha: α of the correction; None: 1, as `choices.CHOICES` has it.
        **choices: passed to `PosteriorCorrected`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> opt = poco.VSGDPoCo([w], lr=0.5, precision=1e6, seed=0)
        >>> _ = opt.step(lambda: 0.5 * (w**2).sum())
        >>> round(w.item(), 2)
        0.5
    """

    chosen = CHOICES["VSGDPoCo"]

    def __init__(
        self, params: Any, lr: float, *, precision: float = 1.0, weight_decay: float = 0.0, ess: float = 1.0,
        alpha: Alpha | None = None, **choices: Any,
    ) -> None:  # fmt: skip
        member = get_family(self.chosen["family"])(precision=precision)  # type: ignore[call-arg]
        super().__init__(params, lr, ess, member=member, weight_decay=weight_decay, alpha=alpha, **choices)


class SVRG(VSGDPoCo):
    """Stochastic variance reduced gradient (PC Alg. 1, Eq. 2): `VSGDPoCo` without noise (Thm 2).

    Its q = N(m, I) is a device of the theorem; predict at the point (`predict(…, samples=0)`), not with draws.

        θ ← θ − lr [ ∇ℓ_B(θ) − α (∇ℓ_B(θ_out) − g_out) + δ θ ]

    Args:
        params: parameters or groups.
        lr: η on the mean loss.
        weight_decay: δ of the regularised loss.
        alpha: None: 1, which is SVRG; below 1 it is α-SVRG with SGD (Yin et al. 2025).
        **choices: passed to `PosteriorCorrected`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = poco.SVRG([w], lr=0.5)
        >>> _ = opt.refresh([lambda: 0.5 * (w**2).sum()])
        >>> _ = opt.step(lambda: 0.5 * (w**2).sum())
        >>> w.data
        tensor([0.5000, 1.0000])
    """

    chosen = CHOICES["SVRG"]


class VONPoCo(Named):
    """Variational online Newton with posterior correction (PC Alg. 5, Eq. 24; the paper's VON-PC).

        G = S₀ − S + N [H_in + α H̄],   S ← S + β G + ½ β² G S⁻¹ G
        m ← m − η S⁻¹ (S₀ m + N [ĝ + α H̄ (m − m_out)])

    `retraction="plain"` leaves the quadratic term out and is Alg. 5 to the letter; it refuses steps after which S is
    not positive definite.

    Args:
        params: parameters or groups; the posterior is joint over all parameters of a group (d × d).
        lr: Alg. 5's α, here η: the step size of the mean.
        ess: N.
        precision_lr: Alg. 5's β, the step size of the precision; None: lr.
        hess_init: the initial precision is ess·(hess_init + weight_decay).
        weight_decay: δ; the prior's precision is ess·δ.
        curvature: None: "exact" (dense Hessian).
        alpha: α of the correction; None: 1 (`VON`: 0).
        **choices: passed to `PosteriorCorrected`; `noise="zero"` is the delta method.

    Example:
        >>> import torch, expfam_poco as poco
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> opt = poco.VONPoCo([w], lr=1.0, ess=1.0, weight_decay=0.0, noise="zero")
        >>> _ = opt.step(lambda: 0.5 * (w**2).sum())       # Newton: the minimum in one step
        >>> w.abs().max().item() < 1e-12
        True
    """

    chosen = CHOICES["VONPoCo"]

    def __init__(
        self, params: Any, lr: float, ess: float, *, precision_lr: float | None = None, hess_init: float = 1.0,
        weight_decay: float = 1e-4, curvature: str | Estimator | None = None, alpha: Alpha | None = None,
        **choices: Any,
    ) -> None:  # fmt: skip
        choices.update(precision_lr=precision_lr, hess_init=hess_init, weight_decay=weight_decay)
        super().__init__(params, lr, ess, curvature=curvature, alpha=alpha, **choices)


class VON(VONPoCo):
    """Variational online Newton (PC Eq. 8): `VONPoCo` with α = 0. Same arguments.

    Example:
        >>> import torch, expfam_poco as poco
        >>> w = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        >>> opt = poco.VON([w], lr=1.0, ess=1.0, weight_decay=1.0, noise="zero")
        >>> _ = opt.step(lambda: 0.5 * (w**2).sum())
        >>> abs(w.item()) < 1e-12
        True
    """

    chosen = CHOICES["VON"]


class IVONPoCo(Named):
    """IVON with posterior correction (PC Alg. 4 without outer momentum; the paper's IVON-PC).

        g ← β₁ g + (1−β₁)[ĝ_in − α(ĝ_out − g_out)],   ĥ = ĥ_in − α(ĥ_out − h_out)
        h ← β₂ h + (1−β₂) ĥ + ½ (1−β₂)² (h − ĥ)²/(h+δ)
        m ← m − lr clip([g/(1−β₁ᵗ) + δ m + α w (h_out − ĥ_out)(m − m_out)]/(h+δ), ξ)

    with precision ess·(h+δ), t counted over the whole training and w = `anchor_weight`.

    Args:
        params: parameters or groups.
        lr: η; multiplied by (hess_init + weight_decay) unless `rescale_lr` is off, as in `ivon-opt`: a first step is
            that of SGD with momentum and rate lr. 0.3 to 3 did best for small networks; `find_lr` finds one.
        ess: κ, the effective sample size.
        hess_init: h₀. Larger than the loss's curvature, it keeps the first draws near the mean.
        beta1: β₁, the momentum of the gradient.
        beta2: β₂; the rate of the precision is 1−β₂. A smaller one learns faster in runs of fewer than 1/(1−β₂) steps;
            in far longer ones h forgets h₀ = 10 and can become so small that training breaks down.
        weight_decay: δ; the prior's precision is ess·δ.
        mc_samples: draws per evaluation.
        hess_approx: `ivon-opt`'s name for the curvature estimator: "price" is "reparam", "gradsq" itself.
        clip_radius: ξ.
        debias: divide g by 1−β₁ᵗ.
        rescale_lr: see lr.
        alpha: α; None: 1 (`IVON`: 0; `IVONPoCoMo`: "mega_batch").
        curvature: any estimator's name, in place of `hess_approx`.
        **choices: passed to `PosteriorCorrected`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(4, 1)
        >>> x, y = torch.randn(32, 4), torch.randn(32, 1)
        >>> closure = lambda: torch.nn.functional.mse_loss(model(x), y)
        >>> opt = poco.IVONPoCo(model.parameters(), lr=0.1, ess=32)
        >>> for step in range(4):
        ...     if step == 2:
        ...         _ = opt.refresh([closure])       # burn-in until here
        ...     loss = opt.step(closure)
        >>> opt.diagnostics()["refreshes"]
        1
    """

    chosen = CHOICES["IVONPoCo"]

    def __init__(
        self, params: Any, lr: float, ess: float, hess_init: float = 10.0, beta1: float = 0.9, beta2: float = 0.99999,
        weight_decay: float = 1e-4, mc_samples: int = 1, hess_approx: str = "price", clip_radius: float = math.inf,
        debias: bool = True, rescale_lr: bool = True, *, alpha: Alpha | None = None,
        curvature: str | Estimator | None = None, **choices: Any,
    ) -> None:  # fmt: skip
        self._refuse(choices, momentum="beta1", precision_lr="beta2")
        flag("rescale_lr", rescale_lr)
        if not rescale_lr:
            choices.setdefault("lr_scale", 1.0)
        curvature = estimator_of(hess_approx) if curvature is None else curvature
        super().__init__(
            params, lr, ess, hess_init=hess_init, momentum=beta1, precision_lr=precision_rate(beta2),
            weight_decay=weight_decay, mc_samples=mc_samples, curvature=curvature, clip_radius=clip_radius,
            debias=debias, alpha=alpha, **choices,
        )  # fmt: skip


class IVONPoCoMo(IVONPoCo):
    """IVON with posterior correction and outer momentum (PC Alg. 4; the paper's IVON-PCM).

    `IVONPoCo` whose mega-batch averages have momentum: g_out ← ρ₁ g_out + (1−ρ₁) new, h_out with ρ₂. It is for
    mega-batches of a part of the data: α is that of `MegaBatchAlpha` unless it is given.

    Args:
        params: parameters or groups.
        lr: as all further arguments, see `IVONPoCo`.
        ess: κ.
        rho1: ρ₁ of the gradient, multiplying the old value; 0 (the default) keeps the freshest mega-batch. The
            paper uses 0.6 and 0.1 for pretraining, 0.3 and 0.05 for continual pretraining.
        rho2: ρ₂ of the curvature.
        **choices: passed to `IVONPoCo`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = poco.IVONPoCoMo(model.parameters(), lr=0.1, ess=100, rho1=0.6, rho2=0.1, alpha=0.7)
        >>> opt.param_groups[0]["rho"]
        (0.6, 0.1)
    """

    chosen = CHOICES["IVONPoCoMo"]

    def __init__(
        self, params: Any, lr: float, ess: float, *args: Any, rho1: float = 0.0, rho2: float = 0.0, **choices: Any
    ) -> None:
        self._refuse(choices, rho="rho1 and rho2")
        super().__init__(params, lr, ess, *args, rho=(rho1, rho2), **choices)


class IVON(IVONPoCo):
    """IVON (Shen et al. 2024): `IVONPoCo` with α = 0. Same arguments, which have the names of `ivon-opt`.

    `IVON.like_ivon_opt` has the defaults of that package, too (hess_init 1).

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=100)
        >>> loss = opt.step(lambda: model(torch.ones(1, 4)).square().mean())
        >>> opt.posterior()["group0.param0"].event_shape
        torch.Size([1, 4])
    """

    chosen = CHOICES["IVON"]

    @classmethod
    def like_ivon_opt(cls, params: Any, lr: float, ess: float, **choices: Any) -> Self:
        """An `IVON` with the defaults of the package `ivon-opt` (0.1.3), `choices.IVON_OPT`, in place of its own.

        Args:
            params: parameters or groups.
            lr: as all further arguments, see `IVON`.
            ess: κ.
            **choices: over those defaults.

        Example:
            >>> import torch, expfam_poco as poco
            >>> opt = poco.IVON.like_ivon_opt(torch.nn.Linear(4, 1).parameters(), lr=0.1, ess=100)
            >>> opt.param_groups[0]["hess_init"]
            1.0
        """
        return cls(params, lr, ess, **{**IVON_OPT, **choices})


class BayesBiNNPoCo(Named):
    """BayesBiNN with posterior correction: weights in {−1, +1} with a Bernoulli posterior (PC Eq. 13, 18).

        ĝ = ĝ_in − α (ĝ_out − ḡ_out),     m ← β m + (1−β) ĝ,     λ ← λ − ηᵢ [(N/T) m/(1−βᵗ) + λ − λ₀]

    with ĝ the estimator's natural gradient of the mean loss; noise is shared between λ_in and λ_out.

    All parameters that are given become ±1, biases and normalisation scales too (a warning tells): for a network use
    `binarize_groups`.

    Args:
        params: parameters or groups; groups of other families (`binarize_groups`) are stepped beside the binary ones.
        lr: λ moves by about 100·lr in a step, as a latent weight does by Adam's lr; its range is Adam's, too.
        ess: N, the number of examples.
        temperature: τ of the relaxed estimator, which it chooses: 1 to about 0.01, see `docs/binary-networks.md`.
        beta1: β.
        square_momentum: β₂ of the squares by which every weight has a rate of its own (`rule.blr.own_rates`): no scale
            of the loss, and none of a layer, matters then. None: the rule as published, in which λ moves by lr · ess
            times the gradient.
        kl_weight: T of N E_q[ℓ] + T KL(q ‖ p₀); None: 1/250, colder than Bayes' posterior, for the accuracy of the
            signs (1 with `square_momentum=None`). After `next_task` it is 1, since the prior then has seen data.
        mc_samples: draws per evaluation.
        strength: |λ| at first; None: 10 (1 with `square_momentum=None`). The published code has 10, which float32
            does not bear at small τ.
        initial: "sign" of the model's weights, or "value" (λ = strength · weight: from a trained float network).
        stale_mean: of the relaxed estimator, which it chooses: divide by 1 − μ² of the λ before the last step, as the
            published code does.
        curvature: another estimator's name (or object) in place of "straight_through"; the paper's is "relaxed".
        alpha: α; None: "mega_batch", or 0 without "PoCo" in the name.
        **choices: passed to `PosteriorCorrected`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 5)
        >>> y = x @ torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
        >>> weight = torch.nn.Parameter(torch.randn(5))
        >>> opt = poco.BayesBiNNPoCo([weight], ess=64.0, seed=0)
        >>> closure = lambda: (x @ weight - y).square().mean()
        >>> for step in range(100):
        ...     if step % 20 == 10:
        ...         _ = opt.refresh([closure])
        ...     loss = opt.step(closure)
        >>> weight.data
        tensor([ 1., -1.,  1.,  1., -1.])
    """

    chosen = CHOICES["BayesBiNNPoCo"]

    def __init__(
        self, params: Any, lr: float = 1e-2, ess: float | None = None, *, temperature: float | None = None,
        beta1: float = 0.9, square_momentum: float | None = 0.999, kl_weight: float | None = None, mc_samples: int = 1,
        strength: float | None = None, initial: str = "sign", stale_mean: bool = False,
        curvature: str | Estimator | None = None, alpha: Alpha | None = None, **choices: Any,
    ) -> None:  # fmt: skip
        self._refuse(choices, momentum="beta1")
        usual = ONE_RATE if square_momentum is None else {"strength": STRENGTH, **self.chosen}
        params = scaled(params, own=square_momentum is not None)
        choices = {"lr_scale": usual["lr_scale"], **choices, "square_momentum": square_momentum}
        choices["kl_weight"] = usual["kl_weight"] if kl_weight is None else kl_weight
        strength = usual["strength"] if strength is None else strength
        no_decay(choices)
        flag("stale_mean", stale_mean)
        kind: Any = get_family(self.chosen["family"])
        kind = kind.stale_variant() if stale_mean else kind
        member = kind(initial=initial, strength=strength)
        if (isinstance(curvature, str) and curvature == "relaxed") or (
            curvature is None and (stale_mean or temperature is not None)
        ):
            relaxed = member.estimators["relaxed"]
            curvature = relaxed if temperature is None else dataclasses.replace(relaxed, temperature=temperature)
        elif temperature is not None and positive("temperature", temperature) != 1.0:
            raise ValueError(f"temperature={temperature}: only the relaxed estimator has one, not {curvature!r}.")
        choices.update(momentum=beta1, mc_samples=mc_samples)
        super().__init__(params, lr, ess, member=member, curvature=curvature, alpha=alpha, **choices)


class BayesBiNN(BayesBiNNPoCo):
    """BayesBiNN (Meng, Bachmann and Khan 2020): `BayesBiNNPoCo` with α = 0. Same arguments.

    `BayesBiNN.as_published` has the rule and the estimator of that paper.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.randn(3))
        >>> opt = poco.BayesBiNN([weight], ess=10.0)
        >>> loss = opt.step(lambda: (weight - 1.0).square().mean())
        >>> weight.abs()
        tensor([1., 1., 1.], grad_fn=<AbsBackward0>)
    """

    chosen = CHOICES["BayesBiNN"]

    @classmethod
    def as_published(cls, params: Any, lr: float, ess: float, **choices: Any) -> Self:
        """A `BayesBiNN` that is the published rule, `choices.PUBLISHED`: one rate, Bayes' posterior, relaxed gradients.

        Args:
            params: parameters or groups.
            lr: η; λ moves by lr · ess times the natural gradient.
            ess: N.
            **choices: over those; `temperature` is τ.

        Example:
            >>> import torch, expfam_poco as poco
            >>> opt = poco.BayesBiNN.as_published([torch.nn.Parameter(torch.randn(3))], lr=1e-3, ess=10.0)
            >>> opt.param_groups[0]["curvature"], opt.param_groups[0]["square_momentum"]
            (Relaxed(temperature=1.0, epsilon=0.0), None)
        """
        return cls(params, lr, ess, **{**PUBLISHED, **choices})
