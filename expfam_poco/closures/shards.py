"""Parameters that are spread over processes: DTensors, as `torch.distributed.fsdp.fully_shard` makes them.

Every process works on the rows that it has, as on any other tensor; a `Shard` says where in the whole they stand.
Their gradients come from `backward()`, for the hooks of `fully_shard`, which gather weights and average and scatter
gradients, do not see `torch.autograd.grad`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures import caches

_USUAL = {Tensor, Parameter, type(None)}
made: list[str] = []  # the last parameter of which there is a shard: where there never was one, nobody need look


def is_spread(value: Any) -> bool:
    """Whether it is a DTensor."""
    return type(value) not in _USUAL and hasattr(value, "device_mesh")


def any_spread(values: Sequence[Any]) -> bool:
    """Whether one of them is."""
    return not {type(value) for value in values} <= _USUAL and any(map(is_spread, values))


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process has, not a copy; all of it where it is not spread."""
    if not is_spread(value):
        return value
    with torch.no_grad():  # with gradients it would be another tensor
        part: Tensor = value.to_local()  # type: ignore[attr-defined]
    return part


class Shard(NamedTuple):
    """Which rows of a parameter this process has.

    Attributes:
        mesh, placements: of the DTensor.
        shape: of the whole.
        start, rows: the first row here, and how many there are.
        share: what this part counts in a sum over all processes of the mesh; below 1 where others have it, too.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    start: int
    rows: int
    share: float

    @property
    def offset(self) -> int:
        """How many entries of the whole come before this part."""
        return self.start * self.shape[1:].numel()

    def spread(self, value: Tensor, dims: int) -> Tensor:
        """A DTensor of what the processes have for their rows; what has not the first `dims` axes of a part passes.

        Args:
            value: of which the first `dims` axes are the part's own.
            dims: of the axes along which every weight has its own value.
        """
        from torch.distributed.tensor import DTensor  # nobody pays for it who does not spread

        own = torch.Size([self.rows, *self.shape[1:dims]])
        if is_spread(value) or value.shape[:dims] != own:
            return value
        shape = torch.Size([self.shape[0], *value.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        made: Tensor = DTensor.from_local(
            value, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )
        return made

    def cut(self, value: Tensor, dims: int) -> Tensor:
        """The inverse of `spread`; of a tensor that is not spread, but has all rows, this process's."""
        if is_spread(value):
            return local(value)
        if value.ndim < dims or not dims or value.shape[:dims] != self.shape[:dims]:
            return value
        return value.narrow(0, self.start, self.rows)


def shard_of(p: Tensor, name: str) -> Shard | None:
    """Where the rows of a parameter stand; None of one that is not spread.

    Raises:
        ValueError: if it is spread otherwise than by rows.
    """
    if not is_spread(p):
        return None
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Along

    mesh, placements = p.device_mesh, tuple(p.placements)  # type: ignore[attr-defined]
    cut = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(cut) != 1 or type(placements[cut[0]]) is not Along or placements[cut[0]].dim != 0:
        raise ValueError(
            f"params: {name} is spread over processes as {placements}; only whole rows can be (Shard(0)), as "
            "fully_shard has them by itself, beside copies (Replicate())."
        )
    size, place = mesh.size(cut[0]), mesh.get_local_rank(cut[0])
    each = -(-p.shape[0] // size)
    start = min(each * place, p.shape[0])
    rows = min(each, p.shape[0] - start)
    if local(p).shape != torch.Size([rows, *p.shape[1:]]):
        raise ValueError(
            f"params: {name} has {tuple(local(p).shape)} of {tuple(p.shape)} here, where torch would put {rows} rows; "
            "spread it by fully_shard or distribute_tensor."
        )
    made[:] = [name]
    return Shard(mesh, placements, p.shape, start, rows, size / mesh.size())


def require_whole(p: Tensor, name: str, who: str) -> None:
    """Refuse a parameter that is spread, of an optimizer that steps whole ones."""
    if is_spread(p):
        raise ValueError(
            f"params: {name} is spread over processes (fully_shard, DTensor), which {who} cannot step; keep whole "
            "parameters on every process, by DistributedDataParallel."
        )


def group_of(params: Sequence[Tensor]) -> Any:
    """The processes over which parameters are spread; None where they are not.

    Raises:
        ValueError: for parameters on several meshes, or one whose processes are no group.
    """
    meshes = [p.device_mesh for p in params if is_spread(p)]  # type: ignore[attr-defined]
    if not meshes:
        return None
    mesh = meshes[0]
    if any(other != mesh for other in meshes):
        raise ValueError("params: they are spread over several device meshes; use one optimizer for each mesh.")
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() != torch.distributed.get_world_size():
        raise ValueError(
            f"params: they are spread over a mesh of {mesh.ndim} dimensions and {mesh.size()} of "
            f"{torch.distributed.get_world_size()} processes; use all processes, or a mesh of one dimension."
        )
    return torch.distributed.group.WORLD


def watch_copies(params: Sequence[Tensor]) -> None:
    """From now on `forget_weights` drops the gathered copies that modules of `fully_shard` keep."""
    if not any_spread(params):
        return
    from torch.distributed.fsdp import FSDPModule

    known = {link() for link in caches.keepers} - {None}
    known.update(m for m in gc.get_objects() if issubclass(type(m), FSDPModule))
    caches.keepers[:] = map(ref, known)


def gradients(loss: Tensor, params: Sequence[Parameter]) -> list[Tensor | None]:
    """The gradients by `backward()`, of what is spread this process's parts; no `.grad` is other than before.

    Args:
        loss: of one process.
        params: what is differentiated by; they have no gradients.
    """
    others = [(leaf, leaf.grad) for leaf in _leaves(loss)]
    try:
        for leaf, _ in others:
            leaf.grad = None
        loss.backward()
        return own_parts([p.grad for p in params], params)
    finally:
        for leaf, before in others:
            leaf.grad = before
        for p in params:
            p.grad = None


def own_parts(grads: Sequence[Tensor | None], params: Sequence[Parameter]) -> list[Tensor | None]:
    """This process's parts of gradients."""
    return [_part(grad, p) for grad, p in zip(grads, params, strict=True)]


def _part(grad: Tensor | None, p: Parameter) -> Tensor | None:
    if grad is None or not is_spread(grad):
        return grad
    if is_spread(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local(grad)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves of a graph, into which `backward()` writes."""
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        leaf: Any = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        for after, _ in () if node is None else node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
