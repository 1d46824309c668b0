"""The optimizer of any exponential family: groups, closures, noise keys, and what a step does in which order.

It holds no mathematics: what a step computes stands in `rule` and `correction`, what is measured in estimators and the
family, how tensors are laid and stepped in `engine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from expfam_poco.closures.effects import mark_used
from expfam_poco.closures.evaluate import Closure, parts_of
from expfam_poco.closures.fp16 import ScaledOverflow
from expfam_poco.closures.shards import made
from expfam_poco.correction import Correction, resolve_correction, transported
from expfam_poco.correction.alpha import Pace, Staleness
from expfam_poco.correction.snapshot import Alpha
from expfam_poco.correction.transported import check_transport
from expfam_poco.correction.variance import VarianceMeter
from expfam_poco.engine import beginning, settings
from expfam_poco.engine.backend import Backend, plainly
from expfam_poco.engine.beginning import Beginning
from expfam_poco.engine.block import Block, Record, make_blocks, new_record, touched
from expfam_poco.engine.evaluator import Evaluator
from expfam_poco.engine.flat import FlatBlock, follow
from expfam_poco.engine.flips import Flips
from expfam_poco.engine.interrupts import Uninterrupted
from expfam_poco.engine.layout import Layout, Restored, write_point
from expfam_poco.engine.noise_plan import NOISE_MODES, NoisePlan, draws_of
from expfam_poco.engine.products import Products
from expfam_poco.engine.rehearsal import Rehearsal
from expfam_poco.engine.round import Pair, Round, holds_draw
from expfam_poco.engine.rows import are_local
from expfam_poco.engine.step import Step, clip_factor, hold_together, prepare, show_meter
from expfam_poco.engine.watch import Watch
from expfam_poco.engine.width import StartingWidth, check_reach
from expfam_poco.errors import NonFiniteError, Skips
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.draws import Estimator, require_draws
from expfam_poco.family.noise import NoiseKey
from expfam_poco.optim.base import without_hooks
from expfam_poco.optim.captured import Capturing
from expfam_poco.optim.inner_loop import Looping
from expfam_poco.optim.inspection import Inspection
from expfam_poco.optim.outer import Refreshing
from expfam_poco.optim.records import CLOCK, Resuming
from expfam_poco.optim.travelled import only_makes_state


class PosteriorCorrected(Refreshing, Capturing, Looping, Inspection, Resuming, torch.optim.Optimizer):
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
        prior: a `State` (or a dictionary of them by name) in place of `weight_decay`.
        correction: of natural gradients, an object or a name ("snapshot": by the posterior of the last refresh;
            "stored", "recursive", "transported", "none"); see `correction`.
        transport: γ in [0, 1]: evaluate beyond λ by this share of momentum's lag (`correction.Transported`), where
            nothing else corrects (alpha=0); off unless given.
        alpha: α in [0, 1], a pair for gradient and curvature, a schedule step → α, "adaptive" (of least variance, by
            tensor), or "mega_batch" (`MegaBatchAlpha`). No effect before `refresh`.
        rho: ρ in [0, 1) (or a pair) of the mega-batch average, multiplying the old value.
        noise: "shared" (one noise for λ_in, λ_out), "independent" (Alg. 4), "fixed" (one θ_out until the next refresh,
            Alg. 3, 5), "antithetic" (pairs ±ε), "zero" (the delta method).
        curvature: the estimator, by name or as an object; see `estimators`.
        anchor: "curvature" (the anchor term from it), "stored" (from the mega-batch's dense Hessian and products, small
            models) or "products" (products on the whole mega-batch at every step).
        anchor_weight: weight of the anchor term; None takes the estimator's.
        retraction: "second_order" (always in the domain) or "plain" (the exact rule; refuses to leave it).
        momentum: β₁ on the family's momentum block.
        square_momentum: β₂ of an average of squared natural gradients, which gives every weight a rate of its own, as
            Adam's; no scale of the loss then matters (`rule.blr.own_rates`). None: one rate. Not for families whose
            precision scales their steps.
        kl_weight: T of the objective N E_q[ℓ] + T KL(q ‖ p₀): a posterior at temperature T, colder than Bayes' below 1.
            N/T stands for N everywhere; p₀ by `weight_decay` has precision (N/T)·δ, so that its minimum stays.
            The same as ess/T.
        debias: divide the momentum by 1−β₁ᵗ.
        precision_lr: rate of the other blocks (the precision); None: lr.
        clip_radius: ξ, limit of each entry of the step before lr.
        hess_init: initial precision is ess·(hess_init + weight_decay); None: the family's own.
        reanchor_average: move the old mega-batch average to the new λ_out, by the anchor's weight (False: Alg. 4).
        prior_in_momentum: momentum averages the prior's pull with the gradient, as BayesBiNN does.
        own_site: the posterior's own site is a control variate, which takes the draws' noise (`rule.own_site`).
        mc_samples: draws (or antithetic pairs) per evaluation.
        max_grad_norm: clip the *corrected* gradient of all groups together to this norm.
        nonfinite: "raise" a `NonFiniteError` or "skip" the step if it is not finite (docs/speed.md).
        backend: of large models, "auto", "eager", "mixed" or "compiled" (docs/speed.md).
        one_pass: a model that is stepped in place holds the next draw between steps, which saves a pass over its
            weights; evaluate inside `with optimizer.sampled(at_point=True)`.
        stale_after: warn, once, when α > 0 and the last refresh is more steps ago; None: never.
        seed: the noise key; None takes one from torch's global generator.
        process_group: of `torch.distributed`, whose processes train one model (docs/scaling.md); None: that of a
            DistributedDataParallel around the parameters or within the closure, if there is one.
        noise_per_rank: every process has draws of its own, whose natural gradients are averaged, in place of one draw.
        lr_scale: a factor on lr, for other conventions of it: a number, "initial_hessian" (each group's hess_init +
            weight_decay) or "mean_loss" (lr is the η on the mean loss); in a group it is called `lr_convention`.
        maximize: make the loss large in place of small; a group may differ.

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
        correction: str | type[Correction] | Correction = "snapshot",
        transport: float = 0.0,
        alpha: Alpha = 1.0,
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
        square_momentum: float | None = None,
        kl_weight: float = 1.0,
        own_site: bool = False,
        mc_samples: int = 1,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        backend: str = "auto",
        one_pass: bool = False,
        stale_after: int | None = 1000,
        seed: int | None = None,
        process_group: Any = None,
        noise_per_rank: bool = False,
        lr_scale: float | str = 1.0,
        maximize: bool = False,
    ) -> None:
        settings.check_shell(params, noise, NOISE_MODES, mc_samples, nonfinite, one_pass, lr_scale)
        self.noise = noise
        self.correction = transported(resolve_correction(correction), transport, alpha)
        self.mc_samples = mc_samples
        self.max_grad_norm = settings.checked_max_grad_norm(max_grad_norm)
        self.nonfinite = nonfinite
        self.seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        NoiseKey(self.seed)
        self._start_together(process_group, noise_per_rank, seed is not None)
        self.backend = Backend(backend)
        self.one_pass = one_pass
        self._rehearsal = Rehearsal(one_pass and not self.correction.moves, max_grad_norm is not None)
        self._products = Products(anchor)
        self._evaluator = Evaluator(self._products)
        self._meter = VarianceMeter()
        self._stale, self._skips = Staleness(stale_after), Skips()
        self._committed: tuple[int, set[int]] = 0, set()
        self._begun: list[Beginning] = []
        self._width = StartingWidth()
        self._flips = Flips()
        self._alphas: dict[str, tuple[float, float]] = {}
        self._clock = dict.fromkeys(CLOCK, 0)
        self._blocks: list[Block] = []
        self._readings: list[settings.Reading] = []
        self._layout = Layout()
        self._watch = Watch()
        defaults = {
            "family": family,
            "lr": lr,
            "lr_convention": lr_scale,
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
            "square_momentum": square_momentum,
            "kl_weight": kl_weight,
            "debias": debias,
            "clip_radius": clip_radius,
            "hess_init": hess_init,
            "reanchor_average": reanchor_average,
            "prior_in_momentum": prior_in_momentum,
            "own_site": own_site,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        settings.check_prior_names(self.param_groups, [block.name for block in self._blocks])
        check_transport(transport, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, and the `step` that a scheduler has wrapped: they belong to this one, not to a copy."""
        return {**without_hooks(self.__dict__), "_process_group": None}

    # ---- groups ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or one for each part of a family such as `ProductFamily`.

        Its hyperparameters are checked, all or nothing, and its posterior starts at its next evaluation.
        """
        groups_before, blocks_before = len(self.param_groups), len(self._blocks)
        settings.check_foreign(param_group, self._wide())
        try:
            for group in settings.split_group(param_group, self.defaults):
                self._add_group(group)
        except Exception:
            del self.param_groups[groups_before:], self._readings[groups_before:], self._blocks[blocks_before:]
            raise

    def _add_group(self, param_group: dict[str, Any]) -> None:
        settings.translate(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        settings.check_group(group)
        settings.check_noise(self.noise, self.mc_samples, group)
        own = (reading := settings.Reading()).of(group)
        self._products.check_group(own.family, own.maximize)
        before = [len(g["params"]) for g in self.param_groups[:-1]]
        blocks = make_blocks(group, own, len(before), sum(before))
        taken = {block.name for block in self._blocks}
        for block in blocks:
            block.name = f"group{len(before)}.{block.name}" if block.name in taken else block.name
            beginning.check_prior(block, own.prior)
            own.estimator.check_size(block.numel)
            require_draws(own.estimator, block.family, block.shape, draws_of(self.noise, self.mc_samples))
            for p in block.params:
                mark_used(p.grad)
        self._readings.append(reading)
        self._blocks.extend(blocks)

    def _read_settings(self) -> None:
        """Let all blocks go by what their groups say now."""
        present = [reading.of(group) for reading, group in zip(self._readings, self.param_groups, strict=True)]
        for block in self._blocks:
            if block.settings is not present[block.group_number]:
                block.adopt(present[block.group_number])

    @plainly
    def _active(self) -> list[Block]:
        """The blocks that take part now, with their records made or brought up to date."""
        self._layout.recover()
        self._read_settings()
        if made and any([block.has_moved() for block in self._blocks if block.is_part]):
            self._layout = Layout()
        active, known = [], list[Block]()
        for block in self._blocks:
            block.check_members(self.param_groups[block.group_number]["params"])
            block.record = self.state.get(block.params[0]) or new_record(None)
            if block.active:
                active.append(block)
            elif block.drawn is not None:
                self._write_point(block)
        for block in active:
            if block.record["posterior"] is None or block.provisional:
                self._begun.append(Beginning(block, self.state))
            else:
                known.append(block)
                beginning.check_device(block, block.record["posterior"])
        for block in touched(known):
            self._reconcile(block, block.record)
        return active

    def _reconcile(self, block: Block, record: Record) -> None:
        """Follow weights that somebody else has written; a memory of earlier steps is about others."""
        if not holds_draw(block, record, self._plan(None), self.backend):
            moved = block.reconcile(record["posterior"])
            if moved is not record["posterior"] and self.correction.follows_steps:
                record["memory"], record["stamp"] = None, 0
            record["posterior"] = moved
        block.note_weights()

    def _follow(self, blocks: Sequence[Block]) -> None:
        """Take the weights for the centres of the posteriors, where another optimizer has stepped them."""
        for block, record in self._layout.units(blocks, self.correction, in_place=False):
            follow(block, record, self.correction)

    def _trainable(self) -> list[Block]:
        """The active blocks, at least one, with hyperparameters in their ranges and no gradients waiting."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("closure: no gradients can be taken inside torch.inference_mode(); call it outside.")
        blocks = self._active()
        if not blocks:
            raise ValueError("params: no parameter requires a gradient, so there is nothing to step.")
        for block in blocks:
            block.check_gradients()
        return blocks

    def _state(self, block: Block) -> Record:
        record: Record = self.state[block.params[0]]
        return record

    def _weights_restored(self, blocks: Sequence[Block], *, evaluating: bool = True) -> AbstractContextManager[None]:
        return Restored(self._layout, blocks, self._begun if evaluating else None)

    def _begin_all(self) -> None:
        """Show every posterior that has not begun as it would now; the weights stay as they are."""
        blocks = self._active()
        for begun in self._begun:
            begun.block.provisional = True
        self._begun.clear()
        for block in blocks:
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
            closure: returns the mean loss of the mini-batch (`closures.evaluate`), or is `Batched` or `Rows`; a list of
                closures accumulates the gradients of micro-batches, as if they were one batch.
            weights: the micro-batches' numbers of examples; None counts them (and processes) equally.
            fresh_noise: draw weights anew for every micro-batch, and average their natural gradients.
            scaler: a `torch.amp.GradScaler` for fp16; a step whose gradients overflow is skipped, and the scaler told.
                Closures return the unscaled loss. Call `scaler.update()` afterwards.

        Returns:
            the mini-batch loss at the sampled weights, averaged over draws.

        Raises:
            TypeError: without a closure: the loss must be evaluated at weights drawn here. Where all gradients and
                learning rates are zero, as torch.distributed.checkpoint has them, posteriors begin, and nothing moves.
            NonFiniteError: if a loss or gradient is not finite (with nonfinite="raise"), nothing being changed; or
                after a step in place in which some weights had to keep their values (`docs/speed.md`).
        """
        if only_makes_state(closure, self.param_groups):
            self._begin_all()
            return NonFiniteError.loss
        parts = parts_of(closure, weights, fresh_noise=fresh_noise, scaler=scaler)
        blocks = self._trainable()
        number, loss = self._clock["step"] + 1, NonFiniteError.loss
        self._join(parts, blocks, "a step", weights)
        try:
            with self._weights_restored(blocks), self._evaluator.undone_on_error(watched=True):
                drawn_first = self.noise != "zero" and number == 1
                at_weights = self._width.loss(parts, blocks, self._evaluator) if drawn_first else None
                loss, steps = self._measured(parts, blocks, number)
                if at_weights is not None:
                    self._width.compare(float(loss), at_weights)
                self._advance(steps, number)
        except NonFiniteError as error:
            self._fell(error, number)
        else:
            self._skips.stepped()
            check_reach(number, blocks)
        finally:
            self._layout.recover()
        return loss

    def _fell(self, error: NonFiniteError, number: int) -> None:
        """Count a step that was none, or raise its error."""
        if self.nonfinite == "raise" and not isinstance(error, ScaledOverflow):
            raise error
        self._skips.skipped(error)
        self._clock.update(step=number, skipped=self._clock["skipped"] + 1)

    def _measured(
        self,
        parts: Sequence[tuple[Closure, float]],
        blocks: Sequence[Block],
        number: int,
        *,
        always: bool = False,
    ) -> tuple[Tensor, list[Step]]:
        """Evaluate both draws of every pair of every part, and make steps of them; `always`: even where α is 0."""
        now = self._round(blocks, number, apart=are_local(parts, blocks))
        alphas, wanted = self._choices(now, blocks, always=always)
        return now.evaluate(parts, self._evaluator, alphas, wanted, self._clock["refresh"], always)

    def _choices(
        self, now: Round, blocks: Sequence[Block], *, always: bool = False
    ) -> tuple[list[Pair], list[bool] | None]:
        """Every unit's α, and whether its pair is measured even where that is 0; None: nothing is evaluated twice."""
        alphas, wanted = now.alphas(self._meter, Pace.of(self._clock, now.number), always=always)
        self._alphas = now.alphas_by_name(alphas)
        asked = any(map(any, alphas)) or any(wanted)
        self._stale.check(asked and self.correction.compares, now.number - self._clock["refreshed"])
        comparing = asked and self.correction.compares and self._memory_is_of(blocks)
        return alphas, wanted if comparing else None

    def _memory_is_of(self, blocks: Sequence[Block]) -> bool:
        """Whether the memories are of one refresh of just these blocks; else (frozen, added) steps are plain."""
        latest = self._clock["memory"]
        return latest > 0 and [b for b in self._blocks if b.record["stamp"] == latest] == list(blocks)

    def _advance(self, steps: Sequence[Step], number: int) -> None:
        """Compute every block's new posterior, then commit all of them at once."""
        most = self.max_grad_norm
        spread = self._evaluator.spread
        factor: float | Tensor = clip_factor(steps, most, spread) if most is not None and steps else 1.0
        following = self._plan(None).step_key(number + 1) if self._rehearsal.ahead else None
        if spread is None:
            prepare(steps, factor, following)
        else:
            with spread.failing_together():
                prepare(steps, factor, following)
        hold_together(steps, spread)
        show_meter(self._meter, steps, number, self._blocks, spread)
        with Uninterrupted():
            self._commit(steps, number)
        unsound = [step.unsound for step in steps if step.unsound is not None]
        if spread is None:
            self._watch.take(unsound, number)
        else:
            with spread.failing_together(stepped=True):
                self._watch.take(unsound, number)

    def _commit(self, steps: Sequence[Step], number: int) -> None:
        """Make the new posteriors the blocks', and the step the last; where that fails half-way, the next goes on."""
        if self._committed[0] != number:
            self._committed = number, set()
        for step in steps:
            if step.block.index in self._committed[1]:
                continue
            try:
                step.commit()
            except BaseException as error:
                error.add_note(
                    f"step: {step.block.name!r} was being stepped in place, after {len(self._committed[1])} of "
                    f"{len(steps)} tensors; the next step moves the others alone."
                )
                raise
            finally:
                if step.begun:
                    self._committed[1].add(step.block.index)
        for step in steps:
            if isinstance(step.block, FlatBlock):
                step.block.settle()
        if self.correction.follows_steps and self.correction.compares:
            self._stamp(steps)
        self._clock["step"] = number

    def _stamp(self, steps: Sequence[Step]) -> None:
        """Memories that follow steps belong together after a step of all blocks."""
        stepped = [block for step in steps for block in step.block.members]
        if any(self._state(block)["memory"] is None for block in stepped):
            return  # only a refresh makes one
        active = [block for block in self._blocks if block.active]
        if {block.index for block in stepped} == {block.index for block in active} and not self._memory_is_of(active):
            self._clock["memory"] += 1
            for block in stepped:
                self._state(block)["stamp"] = self._clock["memory"]

    def _round(self, blocks: Sequence[Block], number: int, *, apart: bool = False) -> Round:
        apart = apart or self._products.kind != "curvature"
        plan = self._plan(None if apart else blocks)
        return Round(self._layout, blocks, plan, number, self._rehearsal, apart=apart)

    def _plan(self, blocks: Sequence[Block] | None) -> NoisePlan:
        """Where noise comes from in a step or refresh of these blocks, and whether they are stepped in place."""
        backend = None if blocks is None or self._products.kind != "curvature" else self.backend
        if backend is not None and not self._layout.in_place(backend, blocks or ()):
            backend = None
        return NoisePlan(self.noise, self.mc_samples, self.seed, self.correction, backend)

    def _write_point(self, block: Block) -> None:
        write_point(block, self._state(block)["posterior"])
