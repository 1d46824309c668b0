"""The optimizer shell: closures, noise keys, groups, state and checkpoints. It holds no mathematics.

What a step computes stands in `blr` and `correction`, what is measured in `estimators` and the family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expfam_poco.closures.evaluate import Closure, check_chunks, parts_of, unused_error
from expfam_poco.closures.fp16 import ScaledOverflow
from expfam_poco.correction import snapshot
from expfam_poco.correction.alpha import AdaptiveAlpha, Staleness
from expfam_poco.correction.variance import VarianceMeter
from expfam_poco.engine import anchors, buckets, settings
from expfam_poco.engine.backend import Backend, plainly
from expfam_poco.engine.block import Block, make_blocks
from expfam_poco.engine.noise_plan import NOISE_MODES
from expfam_poco.engine.pairs import Pairs
from expfam_poco.engine.step import Step
from expfam_poco.engine.tiles import can_stream
from expfam_poco.engine.trial import NoisePlan, Part, Trial
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Estimator
from expfam_poco.family.noise import NoiseKey
from expfam_poco.optim import checkpoint
from expfam_poco.optim.base import without_hooks
from expfam_poco.optim.inspection import Inspection
from expfam_poco.optim.resuming import Resuming
from expfam_poco.rule import blr


class PosteriorCorrected(Inspection, Resuming, torch.optim.Optimizer):
    r"""The optimizer of any exponential family: the Bayesian learning rule with posterior correction.

        ĝ = ∇̃L_B(λ_in) − α [∇̃L_B(λ_out) − ḡ_out],      λ ← λ − η (∇̃KL(q_λ ‖ p₀) + N ĝ)     (PC Eq. 13, 18)

    Between steps the model holds the posterior's point (its mean; for Bernoulli the mode). `step(closure)`
    evaluates the closure at weights drawn from q, `refresh(closures)` makes q_out from a mega-batch.

    Args:
        params: parameters, named parameters or groups. A group may have a family and hyperparameters of its own.
        family: an `ExponentialFamily`, its class, or its registered name. A `ProductFamily` makes one group for each of
            its parts, in their order.
        lr: η of the Bayesian learning rule (for the mean, where the family has more than one block).
        ess: N (κ), the number of examples that the mean loss stands for.
        weight_decay: δ on the mean-loss scale: the prior has precision ess·δ around the middle of the support.
        prior: a `State` (or a dictionary of them by parameter name) in place of `weight_decay`.
        alpha: α in [0, 1], a pair for gradient and curvature, a schedule step → α (`schedules`), or "adaptive" (the α
            of least variance, measured for every tensor). No effect before `refresh`.
        rho: ρ in [0, 1) (or a pair) of the mega-batch average, multiplying the old value.
        noise: "shared" (one noise for λ_in and λ_out), "independent" (Alg. 4), "fixed" (one θ_out until the next
            refresh, Alg. 3 and 5), "antithetic" (pairs ±ε), "zero" (the delta method).
        curvature: the estimator's name or object; see `estimators`.
        anchor: "curvature" (the anchor term from the curvature), "stored" (from the mega-batch's dense Hessian
            and products, small models) or "products" (products on the whole mega-batch at every step).
        anchor_weight: weight of the anchor term; None takes the estimator's.
        retraction: "second_order" (always in the domain) or "plain" (the exact rule; refuses to leave it).
        momentum: β₁ on the family's momentum block.
        debias: divide the momentum by 1−β₁ᵗ.
        precision_lr: rate of the other blocks (the precision); None: the same as lr.
        clip_radius: ξ, limit of each entry of the preconditioned step before lr.
        hess_init: initial precision is ess·(hess_init + weight_decay); None: the family's own.
        reanchor_average: move the old mega-batch average to the new λ_out before averaging, with the anchor term's
            weight (False: Alg. 4).
        prior_in_momentum: momentum averages the prior's pull with the gradient, as BayesBiNN does.
        mc_samples: draws (or antithetic pairs) per evaluation.
        max_grad_norm: clip the *corrected* gradient of all groups together to this norm.
        nonfinite: "raise" a `NonFiniteError`, or "skip" the step, when a loss or gradient is NaN or infinite.
        backend: how large models are stepped, "auto", "eager", "mixed" or "compiled"; see `backend`.
        one_pass: between steps the model holds the next step's draw instead of the point, which saves a pass over the
            weights of models that are stepped span by span; evaluate inside `with optimizer.sampled(at_point=True)`.
        stale_after: warn, once, when α > 0 and the last refresh is more steps ago than this; None: never.
        seed: the noise key; None takes one from torch's global generator.
        lr_scale: a constant factor on lr, which named optimizers use for other conventions of lr;
            "initial_hessian" is each group's hess_init + weight_decay, "mean_loss" makes lr the η on the mean loss.

    Example:
        >>> import torch, expfam_poco as poco
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = poco.PosteriorCorrected(
        ...     model.parameters(), "diagonal_gaussian", lr=0.3, ess=64, weight_decay=1e-2, hess_init=1.0)
        >>> closure = lambda: torch.nn.functional.mse_loss(model(x), y)
        >>> _ = opt.refresh([closure])
        >>> losses = [opt.step(closure).item() for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        params: Any,
        family: ExponentialFamily | type[ExponentialFamily] | str,
        lr: float,
        ess: float,
        *,
        weight_decay: float = 0.0,
        prior: Any = None,
        alpha: snapshot.Alpha = 1.0,
        rho: float | tuple[float, float] = 0.0,
        noise: str = "shared",
        curvature: str | Estimator | None = None,
        anchor: str = "curvature",
        anchor_weight: float | None = None,
        retraction: str = "second_order",
        momentum: float = 0.0,
        debias: bool = True,
        precision_lr: float | None = None,
        clip_radius: float = math.inf,
        hess_init: float | None = None,
        reanchor_average: bool = True,
        prior_in_momentum: bool = False,
        mc_samples: int = 1,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        backend: str = "auto",
        one_pass: bool = False,
        stale_after: int | None = 1000,
        seed: int | None = None,
        lr_scale: float | str = 1.0,
    ) -> None:
        settings.check_shell(noise, NOISE_MODES, mc_samples, max_grad_norm, nonfinite, one_pass)
        self.noise = noise
        self.mc_samples = mc_samples
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        NoiseKey(self.seed)
        self.backend = Backend(backend)
        self.one_pass = one_pass
        self._anchor = anchors.Anchor(anchor)
        self._meter = VarianceMeter()
        self._pairs = Pairs(self._anchor)
        self._stale = Staleness(stale_after)
        self._alphas: dict[str, tuple[float, float]] = {}
        self._clock = dict.fromkeys(checkpoint.CLOCK, 0)
        self._blocks: list[Block] = []
        defaults = {
            "family": family,
            "lr": lr,
            "lr_scale": lr_scale,
            "precision_lr": precision_lr,
            "ess": ess,
            "weight_decay": weight_decay,
            "prior": prior,
            "alpha": alpha,
            "rho": rho,
            "curvature": curvature,
            "anchor_weight": anchor_weight,
            "retraction": retraction,
            "momentum": momentum,
            "debias": debias,
            "clip_radius": clip_radius,
            "hess_init": hess_init,
            "reanchor_average": reanchor_average,
            "prior_in_momentum": prior_in_momentum,
        }
        super().__init__(params, defaults)
        settings.check_prior_names(self.param_groups, [block.name for block in self._blocks])

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, and the `step` that a scheduler has wrapped: they belong to this one, not to a copy."""
        return without_hooks(self.__dict__)

    # ---- groups ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or one for each part of a family such as `ProductFamily`.

        Its hyperparameters are checked, all or nothing, and its posterior starts at its next evaluation.
        """
        groups_before, blocks_before = len(self.param_groups), len(self._blocks)
        try:
            for group in settings.split_group(param_group, self.defaults):
                self._add_group(group)
        except Exception:
            del self.param_groups[groups_before:], self._blocks[blocks_before:]
            raise

    def _add_group(self, param_group: dict[str, Any]) -> None:
        settings.translate(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        settings.check_group(group)
        settings.check_noise(self.noise, self.mc_samples, group)
        self._anchor.check_group(group)
        before = [len(g["params"]) for g in self.param_groups[:-1]]
        blocks = make_blocks(group, len(before), sum(before))
        taken = {block.name for block in self._blocks}
        for block in blocks:
            block.name = f"group{len(before)}.{block.name}" if block.name in taken else block.name
            settings.check_prior(block)
            group["curvature"].check_size(block.numel)
        self._blocks.extend(blocks)

    @plainly
    def _active(self) -> list[Block]:
        """The blocks that take part now, with their state made or brought up to date."""
        for block in self._blocks:
            block.check_members()
        active = [block for block in self._blocks if block.active]
        for block in self._blocks:
            if block.drawn is not None and not block.active:
                self._write_point(block)
        for block in active:
            state = self.state[block.params[0]]
            if not state:
                state["posterior"] = settings.initial_posterior(block)
                state.update(momentum=(), outer=None, step=0, refresh=0, in_mega=False, drawn=None)
                block.note_weights()
                continue
            settings.check_device(block, state["posterior"])
            if block.weights_changed() and not buckets.still_drawn(block, state, self.noise, self.backend):
                state["posterior"] = block.reconcile(state["posterior"])
            block.note_weights()
        return active

    def _trainable(self) -> list[Block]:
        """The active blocks, at least one, with hyperparameters in their ranges."""
        for group in self.param_groups:
            settings.check_numbers(group)
        blocks = self._active()
        if not blocks:
            raise ValueError("params: no parameter requires a gradient, so there is nothing to step.")
        return blocks

    def _state(self, block: Block) -> dict[str, Any]:
        state: dict[str, Any] = self.state[block.params[0]]
        return state

    @contextmanager
    def _weights_restored(self, blocks: Sequence[Block], *, clear_grad: bool = True) -> Iterator[None]:
        """Whatever happens inside, the model leaves with the points of its posteriors (and no gradients)."""
        done = False
        try:
            yield
            done = True
        finally:
            for block in blocks:
                if not block.at_point and (block.drawn is None or not done):
                    self._write_point(block)
                if clear_grad:
                    for p in block.params:
                        p.grad = None

    # ---- one inner step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        weights: Sequence[float] | None = None,
        fresh_noise: bool = False,
        scaler: Any = None,
    ) -> Tensor:
        """One step of the Bayesian learning rule, corrected where a `refresh` has made a q_out and α > 0.

        Args:
            closure: returns the mean loss of the mini-batch (see `evaluation`), or is `Batched`; a list of closures
                accumulates the gradients of micro-batches, as if they were one batch.
            weights: the micro-batches' numbers of examples; None counts them equally.
            fresh_noise: draw weights anew for every micro-batch, and average their natural gradients.
            scaler: a `torch.amp.GradScaler` for fp16; a step whose gradients overflow is skipped, and the scaler told.
                Closures return the unscaled loss. Call `scaler.update()` afterwards.

        Returns:
            the mini-batch loss at the sampled weights, averaged over draws.

        Raises:
            TypeError: without a closure: the loss must be evaluated at weights drawn here.
            NonFiniteError: if a loss or gradient is NaN or infinite (with nonfinite="raise"), nothing being changed; or
                after a step in place in which some weights had to keep their values (`docs/speed.md`).
        """
        parts = parts_of(closure, weights, fresh_noise=fresh_noise, scaler=scaler)
        blocks = self._trainable()
        number, loss = self._clock["step"] + 1, NonFiniteError.loss
        try:
            with self._weights_restored(blocks), self._pairs.undone_on_error():
                loss, steps = self._corrected_sites(parts, blocks, number)
                self._advance(steps, number)
        except NonFiniteError as error:
            if error.stepped:  # all weights but some have moved
                self._clock["step"] = number
            if self.nonfinite == "raise" and not isinstance(error, ScaledOverflow):
                raise
            self._clock["skipped"] += 1
        self._clock["step"] = number
        return loss

    def _corrected_sites(
        self, parts: Sequence[tuple[Closure, float]], blocks: Sequence[Block], number: int, *, always: bool = False
    ) -> tuple[Tensor, list[Step]]:
        """Evaluate the pair of every draw of every part, inner first, and correct; `always`: even where α is 0."""
        alphas, probed = self._alphas_at(blocks, number, always)
        correcting = (any(map(any, alphas)) or any(probed)) and self._outer_is_of(blocks)
        plan, refresh = self._plan(blocks), self._clock["refresh"]
        inner: Sequence[Trial] = []
        outer: Sequence[Trial] | None = None
        nothing: list[Trial | None] = [None] * len(blocks)
        total, products = torch.zeros(()), None
        for index, (closure, share) in enumerate(parts):
            several = len(parts) > 1
            places = [Part(index, share, before, several) for before in inner or nothing]
            there = [Part(index, share, before, several) for before in outer or nothing]
            inner = [
                plan.at_inner(b, self._state(b)["posterior"], number, closure, place)
                for b, place in zip(blocks, places, strict=True)
            ]
            if correcting:
                outer = [
                    plan.at_outer(v, self._state(v.block)["outer"].posterior, number, refresh, place)
                    for v, place in zip(inner, there, strict=True)
                ]
            loss, found = self._pairs.evaluate(closure, inner, outer)
            total = total.to(loss) + share * loss
            products = self._anchor.add_products(products, found, share)
        steps = []
        for i, view in enumerate(inner):
            if outer is None or not (any(alphas[i]) or probed[i]):
                if view.used():
                    steps.append(self._step_of(view, None, alphas[i], None))
            elif always or view.used() or (any(alphas[i]) and self._outer_uses(outer[i])):
                steps.append(self._step_of(view, outer[i], alphas[i], None if products is None else products[i]))
        if not any(view.used() for view in inner):
            raise unused_error()
        return total, steps

    def _outer_uses(self, outer: Trial) -> bool:
        """Whether the correction moves a block that the batch at θ_in did not use."""
        return outer.used() or bool(self._state(outer.block)["in_mega"])

    def _alphas_at(
        self, blocks: Sequence[Block], number: int, always: bool
    ) -> tuple[list[tuple[float, float]], list[bool]]:
        """Every block's α (gradient, curvature) at this step, and whether its pair is to be measured anyway."""
        adaptive = [block.name for block in blocks if isinstance(block.group["alpha"], AdaptiveAlpha)]
        alphas, probed = [], []
        for block in blocks:
            alpha, probe = block.group["alpha"], always
            if isinstance(alpha, AdaptiveAlpha):
                pair = self._meter.alpha(block.name, block.family.momentum_block, alpha)
                probe = always or self._meter.probes(number, adaptive, alpha)
            else:
                pair = snapshot.alpha_at(alpha, number)
            alphas.append(pair)
            probed.append(probe)
        self._alphas = {block.name: pair for block, pair in zip(blocks, alphas, strict=True)}
        self._stale.check(any(map(any, alphas)) or any(probed), number - self._clock["refreshed"])
        return alphas, probed

    def _step_of(self, inner: Trial, outer: Trial | None, alpha: tuple[float, float], product: Tensor | None) -> Step:
        """One block's step; `product` is H̄ (m_in − m_out), where the anchor term comes from products."""
        anchor = None
        if product is not None:
            anchor = self._anchor.term(inner.block, product, alpha[1] * settings.anchor_weight(inner.block.group))
        return Step(self._state(inner.block), inner, outer, alpha, anchor)

    def _outer_is_of(self, blocks: Sequence[Block]) -> bool:
        """Whether q_out is one refresh of just these blocks: else (frozen, unfrozen, added) steps are plain."""
        latest = self._clock["refresh"]
        stamped = {b.index for b in self._blocks if self.state.get(b.params[0], {}).get("refresh") == latest}
        return latest > 0 and stamped == {block.index for block in blocks}

    def _advance(self, steps: Sequence[Step], number: int) -> None:
        """Compute every block's new posterior, then commit all of them at once."""
        factor = 1.0
        if self.max_grad_norm is not None and steps:
            factor = float(blr.norm_clip_factor([step.gradient_square() for step in steps], self.max_grad_norm))
        following = NoisePlan(self.noise, self.mc_samples, self.seed).inner_key(number + 1) if self.one_pass else None
        for step in steps:
            step.prepare(factor, following)
        for step in steps:
            alpha = step.block.group["alpha"]
            step.meter(self._meter, number, alpha.keep if isinstance(alpha, AdaptiveAlpha) else None)
        buckets.commit(steps)
        error = buckets.unsound_error(steps)
        if error is not None:
            raise error

    # ---- q_out -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(
        self, closures: Sequence[Closure], weights: Sequence[float] | None = None, *, scaler: Any = None
    ) -> Tensor:
        """Make q_out from a mega-batch: λ_out ← λ_in, ḡ_out ← ρ ḡ_out + (1−ρ) mean over chunks (Eq. 17, 26).

        Args:
            closures: one for each chunk of the mega-batch; each returns the mean loss of its chunk.
            weights: the chunks' numbers of examples; None counts chunks equally.
            scaler: a `torch.amp.GradScaler` for fp16, told of overflows; call `scaler.update()` after the next step.

        Returns:
            the mega-batch's mean loss at the sampled weights; NaN if its scaled gradients overflow.

        On any other error, also with nonfinite="skip", q_out stays as it was and the error is raised.
        """
        try:
            return self._refresh(closures, weights, scaler)
        except ScaledOverflow:
            return NonFiniteError.loss

    def _refresh(self, closures: Sequence[Closure], weights: Sequence[float] | None, scaler: Any) -> Tensor:
        chunks, shares = check_chunks(closures, weights)
        parts = [part for chunk in chunks for part, _ in parts_of(chunk, None, scaler=scaler)]
        blocks = self._trainable()
        refresh = self._clock["refresh"] + 1
        plan = self._plan(blocks)
        views: list[Trial] = []
        before: Sequence[Trial | None] = [None] * len(blocks)
        losses = []
        self._anchor.begin()
        with self._weights_restored(blocks):
            for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
                chunk = self._clock["chunk"] + number + 1
                views = [
                    plan.at_mega(b, self._state(b)["posterior"], chunk, refresh, part, Part(0, share, previous))
                    for b, previous in zip(blocks, before, strict=True)
                ]
                before = views
                losses.append(share * self._pairs.evaluate_chunk(part, views, share))
        if not any(view.used() for view in views):
            raise unused_error()
        for view in views:
            state = self._state(view.block)
            state.update(outer=view.outer(state), refresh=refresh, in_mega=view.used())
        self._anchor.commit()
        self._clock.update(refresh=refresh, refreshed=self._clock["step"], chunk=self._clock["chunk"] + len(parts))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def set_outer(self, state: Mapping[str, Any]) -> None:
        """Make q_out from a stored posterior (knowledge transfer, PC §3.1): its ḡ_out is the one that a fixed
        point of the rule has, −∇̃KL(q_out ‖ p₀)/N.

        Args:
            state: a `State` for every block by name (as `posterior_states()` gives), or the `state_dict()` of an
                optimizer of the same model.
        """
        blocks = self._active()
        self._anchor.check_set_outer()
        states = checkpoint.posteriors_of(state, blocks, self.param_groups)
        self._clock.update(refresh=self._clock["refresh"] + 1, refreshed=self._clock["step"])
        for block in blocks:
            own = fields.map_fields(torch.clone, states[block.name])  # steps in place must not reach the caller's
            outer = snapshot.outer_from_posterior(block.family, own, settings.prior_of(block), block.group["ess"])
            self._state(block).update(outer=outer, refresh=self._clock["refresh"], in_mega=True)

    def _plan(self, blocks: Sequence[Block]) -> NoisePlan:
        """Where noise comes from in a step or refresh of these blocks."""
        return NoisePlan(self.noise, self.mc_samples, self.seed, self._streaming(blocks))

    def _streaming(self, blocks: Sequence[Block]) -> Backend | None:
        """The backend, where the model is stepped span by span."""
        if self._anchor.kind != "curvature":
            return None
        weights = sum(block.numel for block in blocks if can_stream(block))
        if not self.backend.streams(weights):
            return None
        self.backend.assign(blocks)
        return self.backend

    def _write_point(self, block: Block) -> None:
        posterior_state = self._state(block)["posterior"]
        if can_stream(block):
            buckets.write_point(block, posterior_state)
        else:
            block.write(block.family.point(posterior_state))
        block.at_point = True
