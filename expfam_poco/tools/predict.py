"""Prediction with a trained posterior: averages over draws, the draws themselves, and how sure they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from expfam_poco import arguments
from expfam_poco.closures.caches import fresh_caches
from expfam_poco.closures.effects import ModuleState
from expfam_poco.closures.shards import is_spread
from expfam_poco.optim.optimizer import PosteriorCorrected

Transform = Callable[[Any], Tensor]

# One vmap pass wins only where calling the model costs more than computing it (measured, docs/prediction.md).
CPU_WEIGHTS, CPU_INPUTS, OTHER_WEIGHTS = 2**20, 2**12, 2**24


class ClassPrediction(NamedTuple):
    """Averaged class probabilities and, in nats, how uncertain they are; see `predict_classes`.

    Attributes:
        probabilities: the mean over draws of softmax(logits).
        entropy: of the mean probabilities: all uncertainty.
        mutual_information: between class and weights, the entropy of the mean minus the mean entropy: the part of the
            uncertainty that comes from not knowing the weights, and that more data would remove.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 3)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=10.0)
        >>> found = poco.predict_classes(model, opt, torch.randn(5, 2))
        >>> bool((found.mutual_information <= found.entropy).all())
        True
    """

    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor


def predict(
    model: nn.Module,
    optimizer: PosteriorCorrected,
    inputs: Any,
    *,
    samples: int = 16,
    transform: Transform | None = None,
    seed: int = 0,
    batched: bool | None = None,
) -> Tensor:
    """Posterior-averaged output E_q[transform(model(inputs))].

    Args:
        model: the trained module, evaluated in evaluation mode. Whatever happens, its modes, weights, buffers and
            gradients and torch's generators are then as they were (the weights: the posterior's point).
        optimizer: the optimizer that holds its posterior.
        inputs: the batch; a tuple is passed as several arguments, a dictionary as keyword arguments.
        samples: draws from q; 0 evaluates once at the posterior's point.
        transform: applied to each output before averaging, e.g. `lambda z: z.softmax(-1)` for probabilities, or
            `lambda output: output.logits` where the output is no tensor.
        seed: draw number k is that of `optimizer.sampled(seed + k)`.
        batched: evaluate all draws in one `vmap` pass, which holds `samples` copies of the weights (True), or one
            after the other (False); None does what is faster. The results agree to rounding.

    Returns:
        the average, of the shape of one (transformed) output.

    Raises:
        TypeError: if the optimizer has no posterior, or the (transformed) output is not a tensor.
        ValueError: for bad arguments, and with batched=True if `vmap` cannot run the model.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=100.0)
        >>> poco.predict(model, opt, torch.randn(5, 2), samples=8).shape
        torch.Size([5, 1])
    """
    mean = _Mean()
    _each_output(model, optimizer, inputs, mean.add, samples, transform, seed, batched)
    return mean.value()


def predict_samples(
    model: nn.Module,
    optimizer: PosteriorCorrected,
    inputs: Any,
    *,
    samples: int = 16,
    transform: Transform | None = None,
    seed: int = 0,
    batched: bool | None = None,
) -> Tensor:
    """The outputs at each draw, of which `predict` gives the mean, with its errors.

    Args:
        model: as all further arguments, see `predict`.
        optimizer: of the model.
        inputs: a batch, or a loader of batches.
        samples: draws of the weights.
        transform: of each output.
        seed: of the draws.
        batched: by vmap.

    Returns:
        draws × one output (one "draw", the point, with samples=0).

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=100.0)
        >>> poco.predict_samples(model, opt, torch.randn(5, 2), samples=8).std(0).shape
        torch.Size([5, 1])
    """
    outputs: list[Tensor] = []
    _each_output(model, optimizer, inputs, outputs.append, samples, transform, seed, batched)
    return torch.stack(outputs)


def predict_classes(
    model: nn.Module,
    optimizer: PosteriorCorrected,
    inputs: Any,
    *,
    samples: int = 16,
    transform: Transform | None = None,
    seed: int = 0,
    batched: bool | None = None,
    dim: int = -1,
) -> ClassPrediction:
    """Class probabilities averaged over the posterior, their entropy and mutual information, from a model's logits.

    The mutual information is the BALD score of Houlsby et al. (2011), "Bayesian active learning for classification and
    preference learning", Eq. 2. With samples=0 it is 0.

    Args:
        model: as for `predict`, as all arguments but `transform` and `dim`.
        transform: makes the logits from the model's output, where that is something else.
        dim: the dimension of the classes.

    Returns:
        a `ClassPrediction`; its last two are without the dimension of the classes.

    Raises:
        TypeError: as `predict`.
        ValueError: as `predict`, and for outputs with fewer than two classes.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Linear(2, 3)
        >>> opt = poco.IVON(model.parameters(), lr=0.1, ess=100.0)
        >>> probabilities, entropy, mutual_information = poco.predict_classes(model, opt, torch.randn(5, 2))
        >>> probabilities.shape, entropy.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    arguments.whole("dim", dim)
    probabilities, entropies = _Mean(), _Mean()

    def take(logits: Tensor) -> None:
        if not -logits.ndim <= dim < logits.ndim or logits.shape[dim] < 2:
            raise ValueError(
                f"dim={dim}: outputs of shape {tuple(logits.shape)} have no two classes there; name the dimension of "
                "the classes (for one logit z per example give transform=lambda z: torch.cat([0 * z, z], -1))."
            )
        p = logits.softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))
        probabilities.add(p)
        entropies.add(_entropy(p, dim))

    _each_output(model, optimizer, inputs, take, samples, transform, seed, batched)
    mean = probabilities.value()
    entropy = _entropy(mean, dim)
    return ClassPrediction(mean, entropy, (entropy - entropies.value()).clamp_min(0.0))  # below 0 only by rounding


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    return torch.special.entr(probabilities).sum(dim).clamp_min(0.0)


class _Mean:
    """A running mean, in float32 at least."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        if self.total is None:
            number = value.is_floating_point() or value.is_complex()
            self.dtype = value.dtype if number else torch.get_default_dtype()
            self.total = torch.zeros_like(value, dtype=torch.promote_types(self.dtype, torch.float32))
        self.total += value
        self.count += 1

    def value(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.count).to(self.dtype)


class _NotATensorError(TypeError):
    """Not the fault of vmap."""


class _Call(nn.Module):
    """The model with its inputs and the transform: a module whose call gives the tensor to average.

    Being one module, a transform that uses a part of the model sees the same draw as the model.
    """

    def __init__(self, model: nn.Module, inputs: Any, transform: Transform | None) -> None:
        super().__init__()
        self.model = model
        self.arguments, self.keywords = arguments_of(inputs)
        self.transform = transform

    def forward(self) -> Tensor:
        output = self.model(*self.arguments, **self.keywords)
        if self.transform is not None:
            output = self.transform(output)
        if not isinstance(output, Tensor):
            what = "the model returned" if self.transform is None else "it returned"
            raise _NotATensorError(
                f"transform: {what} a {type(output).__name__}, not a tensor; give a function that takes the tensor out "
                "of the output, such as transform=lambda output: output.logits."
            )
        return output


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is several arguments, a mapping keywords, all else one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _each_output(
    model: nn.Module,
    optimizer: PosteriorCorrected,
    inputs: Any,
    take: Callable[[Tensor], None],
    samples: int,
    transform: Transform | None,
    seed: int,
    batched: bool | None,
) -> None:
    """Hand the output at each draw to `take`, and leave the model as it was."""
    arguments.module(model)
    arguments.whole("samples", samples, 0)
    arguments.whole("seed", seed, 0)
    arguments.function("transform", transform, "give a function of the model's output, or None")
    if batched is not None and not isinstance(batched, bool):
        raise ValueError(
            f"batched={arguments.shown(batched)}: give True (vmap), False (a loop) or None (what is faster)."
        )
    call = _Call(model, inputs, transform)
    drawn = _drawn(call, optimizer)
    if samples == 0 or all(group["family"].levels is None for group in optimizer.param_groups):
        remind_of_recalibration(model, optimizer)  # draws of discrete weights are far from the point, as in training
    if any(map(is_spread, drawn.values())):
        if batched:
            raise ValueError(
                "batched=True: parameters are spread over processes (fully_shard, DTensor), which vmap cannot gather; "
                "give batched=None or False."
            )
        batched = False
    if samples > 0 and (batched or (batched is None and _is_small(drawn, call, samples))):
        outputs = _in_one_pass(call, optimizer, drawn, samples, seed, insist=batched is True)
        if outputs is not None:
            for output in outputs:
                take(output)
            return
    with left_as_found(call, seed) as restore_buffers:
        for number in range(max(samples, 1)):
            with optimizer.sampled(None if samples == 0 else seed + number, at_point=samples == 0), fresh_caches():
                output = call()
            restore_buffers()  # every draw starts from the same buffers
            take(output)


def _drawn(call: _Call, optimizer: PosteriorCorrected) -> dict[str, Tensor]:
    """The model's parameters that have a posterior, by name."""
    if not isinstance(optimizer, PosteriorCorrected):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: it has no posterior to draw from; call the model itself, in "
            "evaluation mode, or train with IVON, IVONPoCo or another PosteriorCorrected optimizer."
        )
    known = {p for group in optimizer.param_groups for p in group["params"]}
    mine = {name: p for name, p in call.named_parameters() if p in known}
    if not mine:
        raise ValueError("optimizer: it holds none of the model's parameters; give the optimizer of this model.")
    return {name: p for name, p in mine.items() if p.requires_grad}


def _is_small(drawn: Mapping[str, Tensor], call: _Call, samples: int) -> bool:
    """Whether one vmap pass is likely to be faster than a loop."""
    weights = samples * sum(p.numel() for p in drawn.values())
    if any(p.device.type != "cpu" for p in drawn.values()):
        return weights <= OTHER_WEIGHTS
    given = [*call.arguments, *call.keywords.values()]
    return weights <= CPU_WEIGHTS and sum(x.numel() for x in given if isinstance(x, Tensor)) <= CPU_INPUTS


def _in_one_pass(
    call: _Call, optimizer: PosteriorCorrected, drawn: Mapping[str, Tensor], samples: int, seed: int, *, insist: bool
) -> Tensor | None:
    """The outputs at all draws from one vmap pass; None where vmap cannot run the model, unless `insist`."""
    stacks = {name: p.new_empty((samples, *p.shape)) for name, p in drawn.items()}
    with torch.no_grad():
        for number in range(samples):
            with optimizer.sampled(seed + number):
                for name, p in drawn.items():
                    stacks[name][number].copy_(p)

    def at(weights: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(call, weights, ())
        return output

    with left_as_found(call, seed), fresh_caches():
        if not drawn:  # all frozen: every draw is the same
            return torch.stack([call()] * samples)
        try:
            with _slow_vmap_is_an_error():
                outputs: Tensor = torch.func.vmap(at)(stacks)
        except _NotATensorError:
            raise
        except Exception as error:
            if not insist:
                return None  # the loop gives the right answer, or the model's own error
            raise ValueError(
                f"batched=True: the model did not run under vmap ({type(error).__name__}: {error}); give "
                "batched=None or False."
            ) from error
        return outputs


@contextmanager
def _slow_vmap_is_an_error() -> Iterator[None]:
    """Operations without a batching rule, which vmap would loop over with a warning, raise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


@contextmanager
def left_as_found(model: nn.Module, seed: int | None = None) -> Iterator[Callable[[], None]]:
    """Evaluation mode, no gradients, torch's generators seeded (None: not); then modes, buffers, generators are back.

    Yields:
        a function that puts the buffers back at once.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = ModuleState([model])
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
        try:
            model.eval()
            yield buffers.restore
        finally:
            buffers.restore()
            for module, training in modes.items():
                module.training = training


# ---- BatchNorm ---------------------------------------------------------------------------------------------

# Of layers that `recalibrate_batchnorm` has seen, the number of batches that they then had tracked.
_recalibrated: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_reminded: WeakSet[nn.Module] = WeakSet()


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def mark_recalibrated(layers: Iterable[_BatchNorm]) -> None:
    """Their statistics are those of the present weights."""
    _recalibrated.update({layer: _tracked(layer) for layer in layers})


def remind_of_recalibration(model: nn.Module, optimizer: PosteriorCorrected) -> None:
    """Warn, once for a model, if its running statistics were collected along the way, at weights of other steps.

    A layer that was not recalibrated in this process, as one that was loaded, has tracked a batch in each step of the
    optimizer if training has moved its statistics, and fewer if those of a few batches were taken in their place.
    """
    layers = [layer for layer in batchnorm_layers(model) if layer.weight is None or layer.weight.requires_grad]
    if not layers or any(layer in _reminded for layer in layers):
        return
    new = [layer for layer in layers if layer not in _recalibrated]
    if new:
        steps = optimizer.diagnostics()["steps"]
        mark_recalibrated(layer for layer in new if steps == 0 or _tracked(layer) < steps)
    if all(_recalibrated.get(layer) == _tracked(layer) for layer in layers):
        return
    _reminded.add(layers[0])
    warnings.warn(
        "model: its BatchNorm layers have running statistics of weights that were drawn in training; before you "
        "evaluate, call poco.recalibrate_batchnorm(model, loader), which often predicts much better. (Said once for a "
        "model.)",
        stacklevel=4,
    )


def _tracked(layer: _BatchNorm) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
