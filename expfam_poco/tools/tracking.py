"""An optimizer's diagnostics in TensorBoard, or in anything that takes scalars as it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch


def log_diagnostics(optimizer: torch.optim.Optimizer, writer: Any, *, every: int = 10, prefix: str = "poco/") -> Any:
    """Write `optimizer.diagnostics()` to a SummaryWriter after every `every`th step.

    Args:
        optimizer: a `PosteriorCorrected` or `AlphaSVRG`.
        writer: has `add_scalar(tag, value, step)`, as `torch.utils.tensorboard.SummaryWriter`.
        every: steps between two entries.
        prefix: of the tags.

    Returns:
        a handle; its `remove()` ends the logging.

    Example:
        >>> import torch, expfam_poco as poco
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         if tag.endswith("/steps"):
        ...             print(tag, value, step)
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = poco.IVON([weight], lr=0.1, ess=100.0)
        >>> handle = poco.log_diagnostics(opt, Printer(), every=2)
        >>> for _ in range(4):
        ...     _ = opt.step(lambda: weight.square().sum())
        poco/steps 2 2
        poco/steps 4 4
    """
    read: Callable[[], Mapping[str, float]] | None = getattr(optimizer, "diagnostics", None)
    if read is None:
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: it has no diagnostics(); give an optimizer of expfam_poco."
        )
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            f"writer={type(writer).__name__}: it has no add_scalar(tag, value, step); give a SummaryWriter."
        )
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every={every!r}: give an integer, 1 or larger.")
    calls = 0

    def after_step(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % every:
            return
        numbers = read()
        for name, value in numbers.items():
            if math.isfinite(value):
                writer.add_scalar(f"{prefix}{name}", value, int(numbers["steps"]))

    return optimizer.register_step_post_hook(after_step)
