"""Several processes that train one model, each with a part of every batch (torch.distributed).

Gradients taken inside a closure are not seen by the hooks of DistributedDataParallel. Here every evaluation is
averaged over the processes, in one message: under one noise (that of all processes unless told otherwise) a natural
gradient is made of the gradient of the whole batch, as one process would that had all of it. What each process has made
of a noise of its own, or of its part of a mega-batch, is averaged as natural gradients.

Parameters that are spread over processes (`fully_shard`) bring gradients that have been averaged, each process its part
of them; what is then left to send is the loss, gradients of whole parameters beside, and sums over parts.

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

from expfam_poco.closures.evaluate import Measured, NoBatchError, Request, require_sound
from expfam_poco.closures.fp16 import ScaledOverflow
from expfam_poco.closures.shards import group_of, is_spread
from expfam_poco.errors import NonFiniteError

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
        spread: whether parameters are spread over them.
    """

    def __init__(self, group: Any, device: torch.device, *, spread: bool = False) -> None:
        self.group, self.device, self.spread = group, device, spread
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
    def failing_together(self, *, stepped: bool = False) -> Iterator[None]:
        """An error of one process inside the block is raised on all; `stepped`: weights have been changed already."""
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        self._raise(error, self.totals(_kinds(error)), stepped=stepped)

    def _raise(self, error: Exception | None, failed: Sequence[float], *, stepped: bool = False) -> None:
        """Raise this process's error, or one of the kind that others have.

        Args:
            error: this process's, if any.
            failed: the sums of all processes' `_kinds`.
            stepped: whether weights have been changed already.
        """
        if error is not None:
            raise error
        every, *special = failed
        if not every:
            return
        kind = next((own for own, count in zip(_SKIPPED, special, strict=True) if count == every), RuntimeError)
        made = kind(
            f"{'step' if stepped else 'closure'}: it failed on {every:.0f} of {self.size} processes, not on this one; "
            f"their errors say why. {'What was sound here was stepped.' if stepped else 'Nothing was changed.'}"
        )
        if stepped and isinstance(made, NonFiniteError):
            made.stepped = True
        raise made

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
        if self.spread:
            return self._average_spread(evaluate, params, request)
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
        head = torch.tensor([weight, loss, *_kinds(error), *used], dtype=dtype)
        summed, *found = self._sums([head, *sent], [head.shape, *like], dtype, weight)
        total, loss, *failed = summed[: 2 + KINDS].tolist()
        used = summed[2 + KINDS :].tolist()
        self._raise(error, failed)
        if total <= 0.0:
            raise ValueError("closure: no process has a batch; give at least one of them closures, or stop the loop.")
        values = iter(torch._foreach_div(found, total) if found else [])
        grads = [next(values) if request.gradient else None for _ in params]
        kept = [grad if by_any else None for grad, by_any in zip(grads, used, strict=True)]
        products = [[next(values) for _ in params] for _ in request.vectors]
        hessians = {key: next(values) for key in blocks}
        return Measured(torch.tensor(loss / total, dtype=dtype, device=self.device), kept, products, hessians)

    def _average_spread(
        self, evaluate: Callable[[], Measured], params: Sequence[Parameter], request: Request
    ) -> Measured:
        """The same where gradients of what is spread come averaged, and processes count equally.

        An error before the last collective call of the model stops this process alone: the others wait for it inside.
        """
        error: Exception | None = None
        part = Measured(torch.zeros(()), [None] * len(params), [], {})
        try:
            with _reached(inside=True):
                part = evaluate()
            require_sound(part)
        except NonFiniteError as own:
            error = own
        whole = [place for place, p in enumerate(params) if not is_spread(p)] if request.gradient else []
        dtype = torch.float32
        for p in params:
            dtype = torch.promote_types(dtype, p.dtype)
        used = [0.0 if part.grads[place] is None else 1.0 for place in whole]
        head = torch.tensor([0.0 if error else float(part.loss), *_kinds(error), *used], dtype=dtype)
        shapes = [head.shape, *(params[place].shape for place in whole)]
        summed, *found = self._sums([head, *(part.grads[place] for place in whole)], shapes, dtype, 1.0)
        loss, *failed = summed[: 1 + KINDS].tolist()
        self._raise(error, failed)
        grads = list(part.grads)
        for place, by_any, grad in zip(whole, summed[1 + KINDS :].tolist(), found, strict=True):
            grads[place] = grad / self.size if by_any else None
        return part._replace(loss=torch.tensor(loss / self.size, dtype=dtype, device=self.device), grads=grads)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sums over processes of numbers."""
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with _reached():
            dist.all_reduce(message, group=self.group)
        summed: list[float] = message.tolist()
        return summed

    def each(self, number: int) -> list[int]:
        """The numbers of all processes."""
        own = [0.0] * self.size
        own[self.rank] = float(number)
        return [round(value) for value in self.totals(own)]

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


_SKIPPED = (NonFiniteError, ScaledOverflow)  # errors of which optimizers skip steps, with their subclasses
KINDS = 1 + len(_SKIPPED)


def _kinds(error: Exception | None) -> list[float]:
    """Whether there is an error, and whether it is exactly of each kind of `_SKIPPED`."""
    return [float(error is not None), *(float(type(error) is kind) for kind in _SKIPPED)]


@contextmanager
def _reached(*, inside: bool = False) -> Iterator[None]:
    """Say it in a sentence where others do not answer; `inside` of a closure not every error is of that kind."""
    try:
        yield
    except RuntimeError as error:
        if inside and not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
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
        group: a process group, where one is given; else it is that of a DistributedDataParallel among the modules;
            neither matters where parameters are spread, which is over a group of its own.
        modules: what a closure may call.
        params: what is trained.

    """
    if not AVAILABLE or not dist.is_initialized():
        if group is not None:
            raise ValueError(
                "process_group: torch.distributed has not been initialised; call init_process_group first."
            )
        return None
    device = params[0].device
    over = group_of(params)
    if over is not None:
        return Processes(over, device, spread=True) if dist.get_world_size(over) > 1 else None
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
