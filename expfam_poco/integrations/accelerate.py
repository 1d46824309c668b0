"""Accelerate prepares these optimizers as any other; this finds the optimizer behind the prepared one.

A prepared optimizer passes `step(closure)` on, drops the loss, and has no `refresh`. What it wraps has both.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from expfam_poco.optim.alpha_svrg import AlphaSVRG
from expfam_poco.optim.optimizer import PosteriorCorrected

# Kinds of processes that keep whole parameters, by DistributedDataParallel or alone.
_WHOLE = (
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_XPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_MUSA",
    "MULTI_SDAA",
    "MULTI_HPU",
)


def unwrap_optimizer(accelerator: Accelerator, optimizer: Any) -> PosteriorCorrected | AlphaSVRG:
    """The optimizer behind a prepared one, after a check that the accelerator's setting is supported.

    Step with it: `step(closures, weights=…)` returns the loss and takes the micro-batches of accumulation as a list.
    Do not step inside `accelerator.accumulate(model)`: Accelerate calls no closure but the last micro-batch's there.

    Args:
        accelerator: the one that prepared the optimizer.
        optimizer: what `accelerator.prepare` returned, or an optimizer of this package.

    Raises:
        TypeError: if it is no optimizer of this package.
        ValueError: with DeepSpeed, FSDP, or fp16 with a gradient scaler.

    Example:
        >>> import torch, expfam_poco as poco
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Linear(3, 1)
        >>> made = poco.IVON(model.parameters(), lr=0.1, ess=64)
        >>> model, prepared = accelerator.prepare(model, made)
        >>> optimizer = unwrap_optimizer(accelerator, prepared)
        >>> optimizer is made
        True
        >>> loss = optimizer.step(lambda: model(torch.ones(4, 3)).square().mean())
    """
    check_accelerator(accelerator)
    while not isinstance(optimizer, PosteriorCorrected | AlphaSVRG):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"optimizer={type(optimizer).__name__}: give an optimizer of expfam_poco, such as IVON or AlphaSVRG, "
                "which evaluates the loss itself."
            )
        optimizer = inner
    return optimizer


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what would train wrongly without a word.

    Raises:
        ValueError: with DeepSpeed, FSDP, or a gradient scaler.
    """
    if accelerator.distributed_type.value not in _WHOLE:
        raise ValueError(
            f"accelerator.distributed_type={accelerator.distributed_type}: parameters that are spread over processes "
            "are not supported; use plain data parallelism (MULTI_GPU, MULTI_CPU), without DeepSpeed or FSDP."
        )
    if accelerator.scaler is not None:
        raise ValueError(
            f"accelerator.mixed_precision={accelerator.mixed_precision!r}: its gradient scaler scales a backward pass "
            "that it does not see here; use 'bf16' or 'no'."
        )
