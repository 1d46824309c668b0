"""Several processes that train one model, each with a part of every batch (torch.distributed).

Gradients taken inside a closure are not seen by the hooks of DistributedDataParallel. Here every evaluation is
averaged over the processes, in one message: under one noise (that of all processes unless told otherwise) a natural
gradient is made of the gradient of the whole batch, as one process would that had all of it. What each process has made
of a noise of its own, or of its part of a mega-batch, is averaged as natural gradients.

Whatever fails on one process fails on all: an error travels with the message that the others wait for, and before every
step the processes compare what they are about to do.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from expfam_poco.closures.evaluate import Measured, NoBatchError, Request

AVAILABLE = dist.is_available()
BUCKET = 2**23  # numbers in a message; larger models send several, of which the first travel while the next are laid


class Processes:
    """The processes of one group.

    Args:
        group: of `torch.distributed`.
        device: of the messages.

    Attributes:
        rank, size: of this process, and how many there are.
        weight: what this process's part of the batch counts.
        own_noise: whether each has draws of its own, whose natural gradients are averaged.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.weight = 1.0
        self.own_noise = False

    # ---- agreement ---------------------------------------------------------------------------------------

    def first(self, number: int) -> int:
        """The number (of 62 bits) that the first process has."""
        message = torch.tensor([number], dtype=torch.int64, device=self.device)
        with _reached():
            dist.broadcast(message, dist.get_global_rank(self.group, 0), group=self.group)
        return int(message)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Go on if all processes say the same.

        Args:
            facts: what is compared, by what it is called; whole numbers are shown, anything else is compared alone.

        Raises:
            RuntimeError: on every process, which names what differs.
        """
        known = [value if isinstance(value, int) else zlib.crc32(repr(value).encode()) for value in facts.values()]
        message = torch.tensor([*known, *(-value for value in known)], dtype=torch.int64, device=self.device)
        with _reached():
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self.group)
        largest, least = message.view(2, -1).tolist()
        differing = [
            f"{name} (here {value}, elsewhere from {-low} to {high})" if isinstance(value, int) else name
            for (name, value), high, low in zip(facts.items(), largest, least, strict=True)
            if high != -low
        ]
        if differing:
            raise RuntimeError(
                f"processes: {self.size} of them train one model but disagree about {'; '.join(differing)}; give all "
                "the same model, optimizer and number of steps and refreshes. Nothing was changed."
            )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error of one process inside the block is raised on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        message = torch.tensor([0.0 if error is None else 1.0], device=self.device)
        with _reached():
            dist.all_reduce(message, group=self.group)
        self._raise(error, float(message))

    def _raise(self, error: Exception | None, failed: float) -> None:
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(
                f"closure: it failed on {failed:.0f} of {self.size} processes, not on this one; their errors say why. "
                "Nothing was changed."
            )

    # ---- averages ----------------------------------------------------------------------------------------

    def average(self, evaluate: Callable[[], Measured], params: Sequence[Parameter], request: Request) -> Measured:
        """An evaluation of all processes' parts of a batch, weighted by `weight`; an unused parameter is so for all.

        Args:
            evaluate: makes this process's part.
            params: what is differentiated by.
            request: what is measured.

        Raises:
            RuntimeError: if another process's part has failed; this one's error is raised as it is.
        """
        error, part = None, Measured(torch.zeros(()), [None] * len(params), [], {})
        weight = 0.0
        try:
            part, weight = evaluate(), self.weight
        except NoBatchError:
            pass
        except Exception as own:
            error = own
        used = [0.0 if grad is None or not weight else 1.0 for grad in part.grads]
        sizes = {key: sum(params[i].numel() for i in where) for key, (where, _) in request.hessian.items()}
        blocks = {key: (n, n) if request.hessian[key][1] else (n,) for key, n in sizes.items()}
        sent: list[Tensor | None] = list(part.grads) if request.gradient else []
        like: list[Any] = [p.shape for p in params] if request.gradient else []
        for number in range(len(request.vectors)):
            sent += part.products[number] if part.products else [None] * len(params)
            like += [p.shape for p in params]
        for key, shape in blocks.items():
            sent.append(part.hessians.get(key))
            like.append(shape)
        dtype = torch.float32
        for p in params:
            dtype = torch.promote_types(dtype, p.dtype)
        loss = float(part.loss) * weight if weight else 0.0
        head = torch.tensor([weight, loss, float(error is not None), *used], dtype=dtype)
        summed, *found = self._sums([head, *sent], [head.shape, *like], dtype, weight)
        total, loss, failed, *used = summed.tolist()
        self._raise(error, failed)
        if total <= 0.0:
            raise ValueError("closure: no process has a batch; give at least one of them closures, or stop the loop.")
        values = iter(torch._foreach_div(found, total) if found else [])
        grads = [next(values) if request.gradient else None for _ in params]
        kept = [grad if by_any else None for grad, by_any in zip(grads, used, strict=True)]
        products = [[next(values) for _ in params] for _ in request.vectors]
        hessians = {key: next(values) for key in blocks}
        return Measured(torch.tensor(loss / total, dtype=dtype, device=self.device), kept, products, hessians)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sums over processes of numbers."""
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with _reached():
            dist.all_reduce(message, group=self.group)
        summed: list[float] = message.tolist()
        return summed

    def before(self, number: int) -> int:
        """The sum of the numbers of the processes before this one."""
        own = [0.0] * self.size
        own[self.rank] = float(number)
        return round(sum(self.totals(own)[: self.rank]))

    def sums(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
        """The sums over processes of tensors times each process's `weight`."""
        dtype = torch.float32
        for value in tensors:
            dtype = torch.promote_types(dtype, value.dtype)
        head = torch.empty(0, dtype=dtype)
        return self._sums([head, *tensors], [head.shape, *(v.shape for v in tensors)], dtype, weight)[1:]

    def _sums(
        self, tensors: Sequence[Tensor | None], shapes: Sequence[Any], dtype: torch.dtype, weight: float
    ) -> list[Tensor]:
        """Sums over processes, of the first tensor as it is and of the others times `weight`; None is zero."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        messages: list[tuple[Tensor, Any, int, int]] = []
        start = 0
        while start < len(tensors):
            stop, size = start + 1, sizes[start]
            while stop < len(tensors) and size + sizes[stop] <= BUCKET:
                size += sizes[stop]
                stop += 1
            flat = torch.zeros(size, dtype=dtype, device=self.device)
            for place, value in zip(flat.split(sizes[start:stop]), tensors[start:stop], strict=True):
                if value is not None and place.numel():
                    place.copy_(value.reshape(-1))
            if weight != 1.0:
                flat[sizes[0] if start == 0 else 0 :].mul_(weight)
            with _reached():
                work = dist.all_reduce(flat, group=self.group, async_op=True)
            messages.append((flat, work, start, stop))
            start = stop
        made: list[Tensor] = []
        for flat, work, start, stop in messages:
            with _reached():
                work.wait()
            pieces = zip(flat.split(sizes[start:stop]), shapes[start:stop], strict=True)
            made += [piece.view(shape) for piece, shape in pieces]
        return made


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise RuntimeError(
            f"processes: another one did not answer ({reason}). It has stopped, failed, or takes fewer steps: give all "
            "processes as many batches, or an empty list of closures to those that have none. Nothing was changed."
        ) from error


def are_many(group: Any) -> bool:
    """Whether there may be other processes."""
    if group is not None:
        return True
    return AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1


def find(group: Any, modules: Callable[[], Sequence[nn.Module]], params: Sequence[Parameter]) -> Processes | None:
    """The processes that train these parameters together, if there are several.

    Args:
        group: a process group, where one is given; else it is that of a DistributedDataParallel among the modules.
        modules: what a closure may call.
        params: what is trained.

    Raises:
        ValueError: for models whose parameters are spread over processes.
    """
    if not AVAILABLE or not dist.is_initialized():
        if group is not None:
            raise ValueError(
                "process_group: torch.distributed has not been initialised; call init_process_group first."
            )
        return None
    device = params[0].device
    if group is not None:
        return Processes(group, device) if dist.get_world_size(group) > 1 else None
    for module in modules():
        if isinstance(module, DistributedDataParallel):
            found = module.process_group
            return Processes(found, device) if dist.get_world_size(found) > 1 else None
    warnings.warn(
        f"processes: torch.distributed runs {dist.get_world_size()} of them, and nothing tells this optimizer to "
        "average their gradients, so each trains a model of its own; wrap the model in DistributedDataParallel, or "
        "give process_group=torch.distributed.group.WORLD.",
        UserWarning,
        stacklevel=5,
    )
    return None
