"""The tensors that families see, with their posteriors: one parameter, or all parameters of a joint group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import Parameter

from expfam_poco.closures.effects import is_waiting
from expfam_poco.closures.shards import Shard, local, shard_of, watch_copies
from expfam_poco.engine.backend import plainly
from expfam_poco.engine.fused import Programs
from expfam_poco.engine.settings import Settings
from expfam_poco.errors import NonFiniteError
from expfam_poco.family import fields, hyperparameters
from expfam_poco.family.base import ExponentialFamily
from expfam_poco.family.noise import NoiseKey
from expfam_poco.family.transfer import Answer, all_of, are_near, told

# Of a tensor with more weights than WHOLE every SPARSE-th is compared with the posterior's point, each time others, and
# LOOKED_AT of them at most: to read all would take as long as two thirds of AdamW's step.
WHOLE, SPARSE, LOOKED_AT = 2**16, 63, 2**20
LOOKS, LOOK_AGAIN = 16, 128  # on an accelerator: at so many first uses, and every so many afterwards
NEEDS = {"hvp": "second derivatives", "hessian": "second derivatives", "variations": "every weight by itself"}
_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Record(TypedDict):
    """What the optimizer keeps for a block: plain entries of `optimizer.state`.

    * `posterior`: q, a State.
    * `momentum`: the average of each momentum field, or ().
    * `memory`: the correction's, or None.
    * `step`: the number of steps in the momentum's average.
    * `ages`: the same for every row of a local parameter, or None.
    * `stamp`: the number of the memory that this one is a part of; blocks of one stamp belong together.
    * `in_mega`: whether the mega-batch depended on the block.
    * `drawn`: the key of the draw that the model holds between steps, if any.
    * `header`: None; in a checkpoint, of the first record, what belongs to no record.
    """

    posterior: Any
    momentum: tuple[Tensor, ...]
    memory: Any
    step: int
    ages: Tensor | None
    stamp: int
    in_mega: bool
    drawn: NoiseKey | None
    header: None


def new_record(posterior: Any) -> Record:
    """The record of a block that has not been stepped."""
    return Record(
        posterior=posterior,
        momentum=(),
        memory=None,
        step=0,
        ages=None,
        stamp=0,
        in_mega=False,
        drawn=None,
        header=None,
    )


class Block:
    """One tensor with one posterior: reads the model's weights, and writes points and samples into them.

    Attributes:
        params: the parameters it consists of (several only for joint families and blocks laid side by side).
        tensors: where their values lie: the parameters, or the parts that this process has of them.
        shard: which part that is; None: all.
        is_part: whether it is one, or holds blocks that are.
        offset: how many of the parameter's entries come before it, in noise as in the whole.
        share: what sums over the block count in sums over processes.
        index: number of its first parameter in the optimizer; with the key it determines the noise.
        name: the parameter's name, or the group's for a joint block.
        names: of the parameters, one by one.
        group_number: which group it is in.
        settings: what the group says now.
        family: the group's family, as it is for a parameter of this shape.
        at_point: whether the model is known to hold the posterior's point.
        drawn: the key of the draw that the model holds, if it is known to hold one.
        provisional: whether its posterior is there to be shown, and will begin anew at the first step.
        record: what `optimizer.state` holds for it; looked up whenever the optimizer looks for its active blocks.
        constants: those of its kernels by the kind of noise, under the present settings.
    """

    settings: Settings
    family: ExponentialFamily
    record: Record

    def __init__(
        self,
        params: Sequence[Parameter],
        settings: Settings,
        index: int,
        name: str,
        group_number: int,
        names: Sequence[str] | None = None,
    ) -> None:
        self.params = list(params)
        self.tensors = [local(p) for p in self.params]
        self.shard: Shard | None = None
        self.offset, self.share, self.is_part = 0, 1.0, False
        self.index = index
        self.name = name
        self.names = [name] if names is None else list(names)
        self.group_number = group_number
        self.at_point = False
        self.drawn: NoiseKey | None = None
        self.provisional = False
        self._sizes = [p.numel() for p in self.tensors]
        self.numel = sum(self._sizes)
        self._seen: list[tuple[int, ...]] | None = None
        self._looks = 0
        self._fitted: ExponentialFamily | None = None
        self.known_prior: tuple[Any, Any] | None = None
        self._programs: Programs | None = None
        self.record = new_record(None)
        self.constants: dict[str, Any] = {}
        self.adopt(settings)

    def take_part(self, shard: Shard | None) -> None:
        """Be the part of a parameter that is spread over processes; None: it is not.

        Raises:
            ValueError: for what has to see the whole parameter.
        """
        if shard is None:
            return
        self.shard, self.offset, self.share, self.is_part = shard, shard.offset, shard.share, True
        self.fit()
        family, needs = self.family, self.settings.estimator.needs
        if not self.batch:
            raise ValueError(
                f"params: a posterior of {type(family).__name__} is of all of {self.name!r}, which is spread over "
                "processes (fully_shard, DTensor); use a family of single weights, or DistributedDataParallel."
            )
        if needs not in ("gradient", "loss"):
            raise ValueError(
                f"curvature: {type(self.settings.estimator).__name__} needs {NEEDS.get(needs, needs)}, which there are "
                f"not of {self.name!r}, which is spread over processes (fully_shard, DTensor); use 'reparam' or "
                "'gradsq', or DistributedDataParallel."
            )

    def adopt(self, settings: Settings) -> None:
        """Go by the group's new settings."""
        self.settings = settings
        self.constants.clear()
        if self._fitted is not settings.family:
            self._fitted = settings.family
            joint = settings.family.joint
            self.family = settings.family if joint else settings.family.for_shape(self.tensors[0].shape)
            self.shape = torch.Size([self.numel]) if joint else self.tensors[0].shape
            self.batch = self.shape[: len(self.shape) - self.family.event_dim]
            self.fit()

    def fit(self) -> None:
        """Have the family's own tensors, if there are any, in the block's shape and where its parameters are."""
        if not hyperparameters.tensors(self.family):
            return
        family = self._fitted if self._fitted is None or self._fitted.joint else self._fitted.for_shape(self.shape)
        whole = self.batch if self.family.joint else self.params[0].shape[: len(self.batch)]
        family = hyperparameters.fitted(family, whole, self.name, dtype=self.dtype, device=self.device)
        self.family = hyperparameters.mapped(family, self.part_of)
        self.constants.clear()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the posterior: that of the weights, but at least float32."""
        dtype = torch.float32
        for p in self.params:
            dtype = _DTYPES[p.dtype] if dtype is torch.float32 and p.dtype in _DTYPES else torch.float64
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.params[0].device

    @property
    def members(self) -> Sequence[Block]:
        """The blocks that it is made of."""
        return (self,)

    @property
    def active(self) -> bool:
        """Whether it takes part: a frozen or empty tensor gets no noise, no decay, no step.

        An empty part of one that other processes have parts of does, so that all do the same.
        """
        there = self.numel > 0 or (self.is_part and self.whole > 0)
        return there and all([p.requires_grad for p in self.params])

    @property
    def whole(self) -> int:
        """The number of weights on all processes."""
        return self.numel if self.shard is None else self.shard.shape.numel()

    def check_gradients(self) -> None:
        """Refuse gradients that wait for a step, which would be thrown away."""
        for p in self.params:
            if p.grad is not None and is_waiting(local(p.grad)):
                raise RuntimeError(
                    f"closure: gradients wait in .grad (of {self.name!r}), which would be thrown away, for the "
                    "optimizer evaluates the loss itself, at weights of its own; accumulate micro-batches by "
                    "step([closure, closure, …]), or call zero_grad() first."
                )

    def check_members(self, params: Sequence[Parameter]) -> None:
        """A joint posterior is over the parameters that were trainable when it was made; refuse another set."""
        if not self.family.joint:
            return
        now = [p for p in params if p.requires_grad]
        if now and [id(p) for p in now] != [id(p) for p in self.params]:
            raise ValueError(
                f"params: {type(self.family).__name__} is joint over the parameters of {self.name!r} that were "
                "trainable at first; freeze all of them or none, or make a new optimizer."
            )

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """One tensor per parameter → the family's tensor, in the posterior's dtype. None if all are None."""
        if all([tensor is None for tensor in tensors]):
            return None
        dtype = self.dtype
        if not self.family.joint:
            (tensor,) = tensors
            return None if tensor is None else tensor.to(dtype)
        parts = [
            p.new_zeros(p.numel(), dtype=dtype) if t is None else t.reshape(-1).to(dtype)
            for t, p in zip(tensors, self.tensors, strict=True)
        ]
        return torch.cat(parts)

    def split(self, value: Tensor) -> list[Tensor]:
        """The family's tensor → one tensor per parameter (in the shape and dtype of each)."""
        if not self.family.joint:
            return [value.to(self.params[0].dtype)]
        parts = value.split_with_sizes(self._sizes)
        return [part.reshape(p.shape).to(p.dtype) for part, p in zip(parts, self.tensors, strict=True)]

    def part_of(self, value: Tensor) -> Tensor:
        """Of a tensor with all weights of a parameter that is spread over processes, those that are here."""
        return value if self.shard is None else self.shard.cut(value, len(self.batch))

    def whole_of(self, value: Tensor) -> Tensor:
        """The inverse of `part_of`, as a DTensor."""
        return value if self.shard is None else self.shard.spread(value, len(self.batch))

    def read(self) -> Tensor:
        """The model's present weights."""
        value = self.gather([p.detach() for p in self.tensors])
        assert value is not None
        return value.clone(memory_format=torch.contiguous_format)

    @plainly
    def write(self, value: Tensor) -> None:
        """Put values into the model. Version counters change, so that another optimizer on it notices."""
        self.at_point, self.drawn = False, None  # first, so that an interrupt does not leave them wrong
        torch._foreach_copy_(self.tensors, self.split(value))
        self.note_weights()

    @contextmanager
    def rewritten(self) -> Iterator[Tensor]:
        """A contiguous tensor to write the weights of a leafwise block into, in the parameter's dtype."""
        (p,) = self.tensors
        out = p.data if p.is_contiguous() else torch.empty(p.shape, dtype=p.dtype, device=p.device)
        self.at_point, self.drawn = False, None
        try:
            yield out
        finally:
            if not p.is_contiguous():
                p.data.copy_(out)
            torch.autograd.graph.increment_version(p)
            self.note_weights()

    @property
    def programs(self) -> Programs:
        """How a kernel deals out the weights of a leafwise block."""
        if self._programs is None or self._programs.device != self.device:
            self._programs = Programs(*self._members_laid(), self.device)
        return self._programs

    def _members_laid(self) -> tuple[list[int], list[int], list[int]]:
        """Where the members begin, their numbers of weights, and of their parameters."""
        return [0], [self.numel], [self.index]

    @contextmanager
    def rewritten_apart(self) -> Iterator[list[Tensor]]:
        """A contiguous tensor for every parameter of a leafwise block, to write its weights into."""
        for block in (self, *self.members):
            block.at_point, block.drawn = False, None
        dense = [p.is_contiguous() for p in self.tensors]
        pairs = zip(self.tensors, dense, strict=True)
        out: list[Tensor] = [p if ok else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p, ok in pairs]
        yield out
        for p, value, ok in zip(self.tensors, out, dense, strict=True):
            if not ok:
                p.data.copy_(value)
        torch.autograd.graph.increment_version(self.tensors)
        for block in self.members:
            block.note_weights()

    def note_weights(self) -> None:
        """Remember that the present weights are known here, to notice later changes from outside."""
        self._seen = [(p._version, p.data_ptr()) for p in self.tensors] if self.shard is None else self._versions()

    def forget_weights(self) -> None:
        """Compare weights and posterior at the next use, as after loading a checkpoint."""
        self._seen = None
        self.at_point, self.drawn = False, None

    def weights_changed(self) -> bool:
        """Whether somebody else may have written to the weights (e.g. `model.load_state_dict`)."""
        if self.shard is None:
            return self._seen != [(p._version, p.data_ptr()) for p in self.tensors]
        return self._seen != self._versions()

    def _versions(self) -> list[tuple[int, ...]]:
        """What changes when somebody writes to a part, or to the DTensor, but for writes through `p.data`."""
        pairs = zip(self.params, self.tensors, strict=True)
        return [(p._version, part._version, part.data_ptr()) for p, part in pairs]

    def has_moved(self) -> bool:
        """Whether this process's parts lie elsewhere than before (`fully_shard` may lay them anew); found again."""
        if self.shard is None:
            return False
        before, self.tensors = self.tensors, [local(p) for p in self.params]
        return any(old is not new for old, new in zip(before, self.tensors, strict=True))

    def holds_point(self, state: Any) -> Answer:
        """Whether the model holds q's point, as it should; a write through `p.data` leaves no other trace.

        Looks at some weights of a large tensor, each time at others; on an accelerator, which has to be waited for, at
        the first uses and then now and again.
        """
        if not self.at_point:
            return True
        self._looks += 1
        if self.device.type != "cpu" and self._looks > LOOKS and self._looks % LOOK_AGAIN:
            return True
        if self.family.joint or not self.batch:
            pairs = zip(self.split(self.family.point(state)), self.tensors, strict=True)
            return all_of(are_near(point, p, 0.0, 0.0) for point, p in pairs)
        count = self.batch.numel()
        # An odd stride, or it would meet the same columns again and again.
        stride = 1 if count <= WHOLE else max(SPARSE, count // LOOKED_AT + 1 | 1)
        (p,), some, present, family = self.tensors, state, self.tensors[0].detach(), self.family
        if stride > 1:
            some, present, family = (self._every(values, stride) for values in (state, present, family))
        point = family.point(some).to(p.dtype)
        return are_near(present, point, 16 * torch.finfo(p.dtype).eps, 0.0)  # a compiled kernel may round otherwise

    def _every(self, values: Any, stride: int) -> Any:
        """Every so many weights of tensors that have them along their first axes, beginning elsewhere each time."""
        dims = len(self.batch)

        def some(value: Tensor) -> Tensor:
            if value.shape[:dims] != self.batch:
                return value
            return value.reshape(-1, *value.shape[dims:])[self._looks % stride :: stride]

        if isinstance(values, ExponentialFamily):
            return hyperparameters.mapped(values, some)
        return fields.map_leaves(some, values)

    def reconcile(self, state: Any) -> Any:
        """The posterior with its centre moved to where somebody else has put the weights."""
        if [p.numel() for p in self.tensors] != self._sizes or (
            not self.family.joint and self.tensors[0].shape != self.shape
        ):
            raise ValueError(
                f"params: {self.name!r} has another shape than its posterior, by an assignment to its .data; make a "
                "new optimizer for the new parameters."
            )
        self.at_point, self.drawn = False, None
        rounded = self.gather(self.split(self.family.point(state)))
        present = self.read()
        assert rounded is not None
        if torch.equal(rounded, present):
            return state
        changed = rounded != present
        if self.family.fixed_point:
            raise ValueError(
                f"params: somebody has written to {self.name!r}, but every {type(self.family).__name__} has its point "
                "where it was; put the weights back."
            )
        new = self.family.recentre(state, torch.where(changed, present, self.family.point(state)))
        if self.family.joint:
            return new
        touched = changed.flatten(len(self.batch)).any(-1) if self.family.event_dim else changed
        return fields.map_fields(lambda old, own: _mixed(touched, own, old), state, new)

    def follow(self, record: Record) -> None:
        """Centre the posterior where another optimizer has just put the weights."""
        record["posterior"] = self.family.recentre(record["posterior"], self.read())
        self.note_weights()


def touched(blocks: Sequence[Block]) -> list[Block]:
    """The blocks whose weights, as far as is looked, somebody else has written; their records hold posteriors.

    However many they are, a device is waited for once at most.
    """
    held = told([not b.weights_changed() and b.holds_point(b.record["posterior"]) for b in blocks])
    return [block for block, holds in zip(blocks, held, strict=True) if not holds]


def _mixed(touched: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the weights that were touched; a field without the weights' axes is the family's constant."""
    if new.ndim < touched.ndim:
        return new
    return torch.where(touched.reshape(touched.shape + (1,) * (new.ndim - touched.ndim)), new, old)


def make_blocks(group: dict[str, Any], settings: Settings, number: int, start: int) -> list[Block]:
    """The blocks of the `number`th group, whose first parameter is the optimizer's `start`th."""
    names = group.get("param_names") or [f"group{number}.param{i}" for i in range(len(group["params"]))]
    for p, name in zip(group["params"], names, strict=True):
        check_parameter(p, name)
    shards = [shard_of(p, name) for p, name in zip(group["params"], names, strict=True)]
    watch_copies(group["params"])
    parts = [local(p) for p in group["params"]]
    places = [p.data_ptr() for p in parts if p.numel() and p.data_ptr()]
    if len(set(places)) < len(places):
        raise ValueError(
            "params: two parameters of a group share their storage; tie weights by using one Parameter twice in the "
            "model instead."
        )
    if not settings.family.joint:
        pairs = enumerate(zip(group["params"], names, strict=True))
        blocks = [Block([p], settings, start + i, name, number) for i, (p, name) in pairs]
        for block, shard in zip(blocks, shards, strict=True):
            block.take_part(shard)
            if block.family.event_dim > len(block.shape):
                raise ValueError(
                    f"params: a weight of {type(block.family).__name__} has {block.family.event_dim} axes, but "
                    f"{block.name} has shape {tuple(block.shape)}; give it to another family in a group of its own."
                )
        warn_of_levels(blocks)
        return blocks
    if any(shard is not None for shard in shards):
        raise ValueError(
            f"params: {type(settings.family).__name__} is joint over all weights of a group, which are spread over "
            "processes (fully_shard, DTensor); use a family of single weights such as 'diagonal_gaussian', or "
            "DistributedDataParallel."
        )
    named = [(p, name) for p, name in zip(group["params"], names, strict=True) if p.requires_grad]
    members = [p for p, _ in named]
    if len({p.device for p in members}) > 1:
        raise ValueError(
            f"params: a joint family ({type(settings.family).__name__}) needs all parameters of its group on one "
            "device; make a group for each device."
        )
    if not members:
        return []
    return [Block(members, settings, start, f"group{number}", number, [name for _, name in named])]


def singular_error(block: Block) -> NonFiniteError:
    """The error where a matrix of a posterior cannot be factored; torch's own does not say whose."""
    return NonFiniteError(
        f"posterior: that of {block.name!r} ({type(block.family).__name__}) is too near to singular to be factored in "
        f"{block.dtype}; lower lr or precision_lr, raise weight_decay, or use float64 parameters. Nothing was changed."
    )


def warn_of_levels(blocks: Sequence[Block]) -> None:
    """Biases and normalisation scales beside matrices are hardly meant to have a family's few values."""
    vectors = [block.name for block in blocks if block.params[0].ndim < 2]
    if not vectors or len(vectors) == len(blocks) or blocks[0].family.levels is None:
        return
    shown = ", ".join(vectors[:4]) + (", …" if len(vectors) > 4 else "")
    low, *_, high = blocks[0].family.levels
    warnings.warn(
        f"params: {shown} have fewer than two axes, as biases and normalisation scales do, and become values from "
        f"{low:g} to {high:g} like the weights beside them; poco.binarize_groups(model) makes groups in which they "
        "stay real.",
        stacklevel=2,
    )


def check_parameter(p: Tensor, name: str) -> None:
    """Refuse tensors that no family can be about."""
    if p.is_complex():
        raise ValueError(f"params: {name} is complex; split it into real and imaginary parts.")
    if not p.is_floating_point():
        raise ValueError(f"params: {name} has dtype {p.dtype}; only floating-point parameters have posteriors.")
    if p.layout != torch.strided:
        raise ValueError(f"params: {name} has layout {p.layout}; only dense (strided) parameters are supported.")
