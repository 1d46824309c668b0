"""What can be asked of an optimizer: draws and distributions of its posterior, its objective, its numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expfam_poco.closures.caches import fresh_caches
from expfam_poco.closures.evaluate import Closure, Request, check_chunks, evaluate
from expfam_poco.correction import snapshot
from expfam_poco.correction.alpha import AdaptiveAlpha, MegaBatchAlpha, Pace, Staleness
from expfam_poco.correction.paired_variance import PairedVariance
from expfam_poco.correction.worth import BatchLaw, Pairs, worth_of
from expfam_poco.engine.beginning import prior_of
from expfam_poco.engine.block import Block, singular_error
from expfam_poco.engine.noise_plan import ELBO, SAMPLE, draw_noise
from expfam_poco.engine.round import draw_into
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields
from expfam_poco.family.noise import NoiseKey
from expfam_poco.optim.base import Shell
from expfam_poco.rule.estimators import Reparameterised

Summed = Callable[[Sequence[float]], list[float]]  # over processes, where they have parts of parameters


class Objective(NamedTuple):
    """The evidence lower bound −(N E_q[ℓ] + KL(q ‖ p₀)) with its Monte Carlo standard error, and its two parts.

    With `maximize` −ℓ stands for ℓ in the bound; `expected_loss` is of the loss as it is.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=8.0, weight_decay=0.1)
        >>> found = opt.objective([lambda: model(torch.ones(8, 2)).square().mean()], samples=4)
        >>> abs(found.elbo + 8.0 * found.expected_loss + found.kl) < 1e-6
        True
    """

    elbo: float
    standard_error: float
    expected_loss: float
    kl: float


def objective(
    blocks: Sequence[Block],
    states: Mapping[str, Any],
    closures: Sequence[Closure],
    weights: Sequence[float] | None,
    *,
    samples: int,
    seed: int,
    summed: Summed,
) -> Objective:
    """Monte Carlo estimate of the objective over `samples` draws; the caller restores the weights."""
    closures, shares = check_chunks(closures, weights)
    if samples < 2:
        raise ValueError(f"samples={samples}: a standard error needs 2 draws or more.")
    signs = {-1.0 if block.settings.maximize else 1.0 for block in blocks}
    if len(signs) != 1:
        raise ValueError("maximize: the groups differ, so there is no one objective; give all one maximize.")
    (sign,) = signs
    sizes = {block.settings.ess * block.settings.kl_weight for block in blocks}
    if len(sizes) != 1:
        raise ValueError(f"ess: the groups differ ({sorted(sizes)}), so there is no one objective; give all one ess.")
    (ess,) = sizes
    terms = [block.settings.kl_weight * block.share * _kl(block, states[block.name]) for block in blocks]
    (kl,) = summed([sum(terms)])
    noises = [draw_noise(b, "shared", samples, NoiseKey(seed, ELBO)) for b in blocks]
    params = [p for block in blocks for p in block.params]

    def loss(closure: Closure) -> Tensor:
        return evaluate(closure, params, Request(gradient=False)).loss

    losses = []
    for number in range(samples):
        for block, noise in zip(blocks, noises, strict=True):
            block.write(block.family.sample(states[block.name], noise[number : number + 1])[0])
        losses.append(sum(share * float(value) for share, value in zip(shares, map(loss, closures), strict=True)))
    count, *losses = summed([1.0, *losses])
    draws = torch.tensor(losses, dtype=torch.float64) / count
    mean, error = float(draws.mean()), float(draws.std() / samples**0.5)
    return Objective(-(ess * sign * mean + kl), ess * error, mean, kl)


def sum_of_stddevs(distribution: Any) -> tuple[float, int]:
    """The sum of the standard deviations of all weights, and their number; 0 where the distribution has no variance."""
    try:
        deviation = distribution.variance.sqrt()
    except (NotImplementedError, AttributeError):
        return 0.0, 0
    return float(deviation.sum()), deviation.numel()


def _kl(block: Block, state: Any) -> float:
    value = float(block.family.kl(state, prior_of(block)).sum())
    if not math.isfinite(value):
        raise ValueError(
            f"weight_decay={block.settings.weight_decay}: the KL divergence from the prior of {block.name!r} is "
            f"{value}; the objective needs a proper prior."
        )
    return value


def distribution_of(block: Block, state: Any) -> Any:
    """q of a block as a Pyro distribution.

    Raises:
        NonFiniteError: where rounding has made its matrix too near to singular for that.
    """
    try:
        return block.family.distribution(state)
    except (torch.linalg.LinAlgError, ValueError):  # the latter where Pyro looks at its arguments
        raise singular_error(block) from None


def _marginals(block: Block, state: Any) -> dict[str, Any]:
    """What a joint q says of every parameter by itself."""
    from expfam_poco.family.distribution import Reshaped  # Pyro takes long to import

    made, start = {}, 0
    for name, p in zip(block.names, block.params, strict=True):
        made[name] = Reshaped(block.family.marginal(state, start, start + p.numel()), p.shape)
        start += p.numel()
    return made


class Inspection(Shell):
    """The questions that a `PosteriorCorrected` answers; mixed into it."""

    _noise_seen: tuple[Pairs, float] | None = None
    """What `poco.worth` has last measured here, and N_b, the mini-batches of the data (infinite: none comes twice)."""

    @contextmanager
    def sampled(self, seed: int | None = None, *, at_point: bool = False) -> Iterator[None]:
        """Inside, the weights are a draw from q (with `at_point`, the point); outside, the point again.

        Args:
            seed: fixes the draw; None takes the next of the optimizer's own.
            at_point: no draw at all.
        """
        blocks = self._active()
        if seed is None and not at_point:
            self._clock["sample"] += 1
        key = NoiseKey(self.seed, SAMPLE, self._clock["sample"]) if seed is None else NoiseKey(seed, SAMPLE)
        with self._weights_restored(blocks, evaluating=False), fresh_caches():
            for block in blocks:
                state = self._state(block)["posterior"]
                if at_point:
                    self._write_point(block)
                else:
                    draw_into(block, state, Reparameterised(), self._plan(blocks), key)
            yield

    def posterior(self) -> dict[str, Any]:
        """The trained q as Pyro distributions, by parameter name (by "group<i>" for joint families).

        Of a parameter that is spread over processes (`fully_shard`), of the rows that this process has.
        """
        here = filter(_has_weights, self._active())
        return {b.name: distribution_of(b, _copied(self._state(b)["posterior"])) for b in here}

    def marginals(self) -> dict[str, Any]:
        """The trained q of every parameter by its name and in its shape: a joint family's marginals, else `posterior`.

        Raises:
            NotImplementedError: a joint family has no marginals.
        """
        made: dict[str, Any] = {}
        for block in filter(_has_weights, self._active()):
            state = _copied(self._state(block)["posterior"])
            made |= _marginals(block, state) if block.family.joint else {block.name: distribution_of(block, state)}
        return made

    def posterior_states(self) -> dict[str, Any]:
        """The trained q as `State`s by the same names: a prior for the next task, or q_out for `set_outer`."""
        return {b.name: fields.map_fields(b.whole_of, _copied(self._state(b)["posterior"])) for b in self._active()}

    @torch.no_grad()
    def objective(
        self,
        closures: Sequence[Closure],
        weights: Sequence[float] | None = None,
        *,
        samples: int = 32,
        seed: int = 0,
    ) -> Objective:
        """The evidence lower bound −(N E_q[ℓ] + T KL(q ‖ p₀)), T = `kl_weight`, with its standard error over draws.

        Args:
            closures: chunks that together are the data, each giving its mean loss.
            weights: their numbers of examples.
            samples: draws from q, at least 2.
            seed: of the draws.
        """
        blocks = self._active()
        params = [p for block in blocks for p in block.params]
        with self._weights_restored(blocks), self._evaluator.undone(params, check_chunks(closures, weights)[0]):
            states = {b.name: self._state(b)["posterior"] for b in blocks}
            summed = functools.partial(self._summed, blocks=blocks)
            return objective(blocks, states, closures, weights, samples=samples, seed=seed, summed=summed)

    def diagnostics(self) -> dict[str, float]:
        """Plain numbers worth logging. With parameters that are spread over processes, all of these have to ask.

        Steps, refreshes and skipped steps; α of the last step; per field of the sites the ratio of squared deviations
        corrected/plain ("variance_ratio.…") and the α that would minimise it ("optimal_alpha.…"), averaged over
        every eleventh corrected step; "predicted_worth" of the present α and refreshes by the noise that `poco.worth`
        has last measured with this optimizer, chunks being mini-batches (docs/worth.md; not before the second refresh,
        nor of a correction that states no law, and not kept in checkpoints);
        the seconds spent on compiling; "mean_stddev", where the family's distribution has one. Of weights of few
        levels (binary ones) "mean_abs_lambda", how sure they are, and "flips", the share that has another level than
        at the last step with a call; a warning tells, once, if none has flipped in 100 steps of calls, or about half
        between calls 10 steps apart, or less, twice in a row.
        """
        self._settle(raising=False)
        numbers: dict[str, float] = {
            "steps": self._clock["step"],
            "refreshes": self._clock["refresh"],
            "skipped_steps": self._clock["skipped"],
        }
        for i, group in enumerate(self.param_groups):
            suffix = f".group{i}" if len(self.param_groups) > 1 else ""
            used = self._mean_alpha(i, group)
            numbers[f"alpha{suffix}"] = used[0]
            apart = set(group["family"].Site._fields) - set(group["family"].momentum_block)
            if used[1] != used[0] and apart:
                numbers[f"alpha_curvature{suffix}"] = used[1]
            if (worth := self._predicted_worth(group, used[0])) is not None:
                numbers[f"predicted_worth{suffix}"] = worth
        numbers.update(self._meter.read())
        numbers["compile_seconds"] = self.backend.compile_seconds
        blocks = self._active()
        states = {b.name: self._state(b)["posterior"] for b in blocks}
        summed = functools.partial(self._summed, blocks=blocks)
        numbers.update(self._flips.read(self._clock["step"], blocks, states, summed))
        square, deviation, count = 0.0, 0.0, 0.0
        for block in filter(_has_weights, blocks):
            square += block.share * weight_norm(block.tensors) ** 2
            try:
                own, known = sum_of_stddevs(distribution_of(block, states[block.name]))
            except NonFiniteError:
                own, known = math.nan, 1
            deviation, count = deviation + block.share * own, count + block.share * known
        square, deviation, count = summed([square, deviation, count])
        numbers["weight_norm"] = math.sqrt(square)
        if count and not math.isnan(deviation):
            numbers["mean_stddev"] = deviation / count
        return numbers

    def _predicted_worth(self, group: Mapping[str, Any], alpha: float) -> float | None:
        """Of the present setting, where the noise has been measured and the correction states its law."""
        if self._noise_seen is None:
            return None
        pairs, batches = self._noise_seen
        if self.correction.compares and alpha == 0.0:
            return worth_of(BatchLaw(), pairs)
        pace = Pace.of(self._clock, self._clock["step"])
        if isinstance(group["alpha"], MegaBatchAlpha) and group["alpha"].mini_batches is not None:
            pace = pace._replace(chunks=round(group["alpha"].mini_batches))
        if pace.chunks and not self._clock["every"]:
            return None  # the first loop has not ended: its length is not known
        law = self.correction.law(alpha, group["momentum"], pace, batches)
        return worth_of(law, pairs) if law is not None and law.is_known(pairs) else None

    def _settle(self, *, raising: bool) -> None:
        """Look at what all steps have left to be noticed: count it, raise it, or keep the error for the next step."""
        skipping = self.nonfinite == "skip"
        self._clock["skipped"] += self._watch.settle(self._clock["step"] + 1, skipping=skipping, raising=raising)

    def _mean_alpha(self, number: int, group: dict[str, Any]) -> tuple[float, float]:
        """α of the last step, the mean over a group's weights (adaptive ones differ from tensor to tensor)."""
        blocks = [b for b in self._blocks if b.group_number == number and b.name in self._alphas]
        weights = sum(b.whole for b in blocks)
        if not blocks:
            if isinstance(group["alpha"], AdaptiveAlpha):
                return 0.0, 0.0
            return snapshot.alpha_at(group["alpha"], 1, Pace.of(self._clock, self._clock["step"] + 1))
        pairs = [self._alphas[b.name] for b in blocks]
        if len(set(pairs)) == 1:
            return pairs[0]
        first, second = (sum(p[k] * b.whole for p, b in zip(pairs, blocks, strict=True)) / weights for k in (0, 1))
        return first, second

    @torch.no_grad()
    def measure_variance(self, closures: Sequence[Closure]) -> dict[str, float]:
        """The variances, at the present q_in and q_out, of plain and corrected estimates over mini-batches.

        Nothing is changed: the pair is evaluated for every closure, with the noise of a step of its own. All numbers
        are for the q_out that there is: the error of a mega-batch's own mean, α² Var(ḡ_out), is not in them. With M
        mini-batches in it that is about α²/M of the plain variance.

        Args:
            closures: mini-batches, at least two (some twenty for a useful number).

        Returns:
            for every field of the sites ("gradient" and "curvature" of Gaussians): "variance.…" of the plain estimate,
            "variance_ratio.…" corrected/plain, "anchored_variance_ratio.…" with the anchor term, "optimal_alpha.…"
            (Cov/Var) and "optimal_variance_ratio.…" with it. Variances are summed over all weights.

        Raises:
            ValueError: with fewer than two closures, or without a q_out to correct with.
        """
        chunks, _ = check_chunks(closures, None)
        blocks = self._trainable()
        if any(block.shard is not None for block in blocks):
            raise ValueError(
                "params: parameters are spread over processes (fully_shard, DTensor), whose variances are not put "
                "together; diagnostics() has those of the steps."
            )
        if len(chunks) < 2:
            raise ValueError(f"closures: a variance needs two mini-batches or more, not {len(chunks)}.")
        if not self._memory_is_of(blocks):
            raise ValueError("closures: there is no q_out of the present parameters; call refresh(closures) first.")
        collected, alphas, known = PairedVariance(), self._alphas, self._stale
        self._stale = Staleness(None)
        params = [p for block in blocks for p in block.params]
        try:
            with self._weights_restored(blocks), self._evaluator.undone(params, chunks):
                for number, closure in enumerate(chunks, self._clock["step"] + 1):
                    collected.add(self._measured([(closure, 1.0)], blocks, number, always=True)[1])
        finally:
            self._alphas, self._stale = alphas, known
        return collected.read()


def weight_norm(params: Iterable[Tensor]) -> float:
    """The Euclidean norm of all weights together."""
    found = [p.detach() for p in params if p.numel()]
    return math.sqrt(sum(float(norm) ** 2 for norm in torch._foreach_norm(found))) if found else 0.0


def _has_weights(block: Block) -> bool:
    """Whether any weights of it are here, not all on other processes."""
    return block.numel > 0


def _copied(state: Any) -> Any:
    """A state that later steps, which may work in place, do not reach."""
    return fields.map_fields(torch.clone, state)
