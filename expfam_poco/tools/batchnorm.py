"""Running statistics of batch normalisation, recomputed for the weights that the model now has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from expfam_poco.arguments import function, instance, module
from expfam_poco.closures.caches import fresh_caches
from expfam_poco.errors import NonFiniteError
from expfam_poco.tools.predict import arguments_of, batchnorm_layers, left_as_found, mark_recalibrated


def recalibrate_batchnorm(
    model: nn.Module, loader: Iterable[Any], *, inputs: Callable[[Any], Any] | None = None
) -> int:
    """Recompute the running statistics of all BatchNorm layers at the present weights, in one pass over `loader`.

    Statistics become the plain average over batches, each counting equally, as in `torch.optim.swa_utils.update_bn`.
    Unlike there only the BatchNorm layers are in training mode (no dropout), and if anything fails the old statistics
    are back. Modes and torch's generators are left as they were.

    Args:
        model: the module; a layer that no batch reaches, or that keeps no running statistics, is left alone.
        loader: training batches. A tensor or a mapping (keyword arguments) is given to the model as it is; of a tuple
            or list the first item is.
        inputs: takes the model's inputs out of a batch in place of that rule; a tuple it returns is passed as several
            arguments.

    Returns:
        the number of layers that have new statistics; 0, without looking at the loader, if the model has none.

    Raises:
        ValueError: if the loader is empty.
        NonFiniteError: if a statistic would be NaN or infinite.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> poco.recalibrate_batchnorm(model, torch.randn(8, 16, 2))  # eight batches
        1
    """
    module(model)
    function("inputs", inputs, "give a function that takes the model's inputs out of a batch, or None")
    instance("loader", loader, Iterable, "give an iterable of batches")
    layers = batchnorm_layers(model)
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    count = 0
    try:
        with left_as_found(model), fresh_caches():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the cumulative average
                layer.train()
            for batch in loader:
                arguments, keywords = arguments_of(_first(batch) if inputs is None else inputs(batch))
                model(*arguments, **keywords)
                count += 1
            reached = [layer for layer in layers if layer.num_batches_tracked]
            fresh = [(b, b.clone()) for layer in reached for b in layer.buffers(recurse=False)]
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    # The old statistics are back.
    if count == 0:
        raise ValueError("loader: it gives no batches; give training data (an iterator may be used up).")
    if not all(bool(value.isfinite().all()) for _, value in fresh):
        raise NonFiniteError(
            "loader: with its batches a running statistic is NaN or infinite; look for such inputs or weights. The old "
            "statistics are kept."
        )
    with torch.no_grad():
        for buffer, value in fresh:
            buffer.copy_(value)
    mark_recalibrated(reached)
    return len(reached)


def _first(batch: Any) -> Any:
    """The inputs among (inputs, targets, …)."""
    if not isinstance(batch, tuple | list):
        return batch
    if not batch:
        raise ValueError("loader: a batch is empty; give batches whose first item is the model's input.")
    return batch[0]
