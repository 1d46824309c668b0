"""A pass over a leafwise block as one Triton kernel, made from the functions that define the family and the correction.

What such a pass needs on a GPU is beyond `torch.compile`: there the words of the noise go through memory, because one
evaluation of the generator serves four weights, which is a change of shape in the middle of a kernel; and gradients and
weights, which are many tensors, have to be gathered first and scattered after. So a pass is traced here for a single
weight (`triton_code`), and a kernel is put around it that looks noise up in registers, for four weights at a time, and
finds gradients and weights by their addresses. What cannot be traced or printed so is left to `torch.compile`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from expfam_poco.engine.triton_code import TYPES, Unprintable, printed
from expfam_poco.family.noise import TILE, NoiseKey, kind_of
from expfam_poco.family.philox import MULTIPLIERS, ROUNDS, WEYL
from expfam_poco.family.transfer import on_device

BLOCKS = 128  # of noise, that a program works on; four weights each
WARPS = 4
SIZE = 1009  # how many weights a pass is traced for: no number that a family would use


class Programs:
    """How the weights of a block are dealt out to the programs of a kernel, each of which has weights of one member.

    Args:
        starts: where the members begin in flat storage.
        sizes: their numbers of weights.
        parameters: their numbers, by which noise is looked up.
        device: of all.

    Attributes:
        each: how many weights a program has, at most.
    """

    def __init__(
        self, starts: Sequence[int], sizes: Sequence[int], parameters: Sequence[int], device: torch.device
    ) -> None:
        self.each = 4 * BLOCKS
        counts = np.array([-(-size // self.each) for size in sizes])
        member = np.repeat(np.arange(len(sizes)), counts)
        number = np.arange(len(member)) - (counts.cumsum() - counts)[member]
        self.device = device
        self.table = torch.tensor(np.stack((member, number), 1), dtype=torch.int32, device=device)
        self.members = torch.tensor(list(zip(starts, sizes, parameters, strict=True)), device=device)

    def __len__(self) -> int:
        return len(self.table)


class Places:
    """Tensors that stand for one member of a block each, wherever they lie; None: a member has none."""

    def __init__(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        self.dtype = next((t.dtype for t in tensors if t is not None), dtype)
        self._tensors = [t if t is None or self._is_plain(t) else t.to(self.dtype).contiguous() for t in tensors]

    def _is_plain(self, value: Tensor) -> bool:
        return value.dtype is self.dtype and value.is_contiguous()

    def addresses(self) -> list[int]:
        """Of all members; 0 where there is none."""
        return [0 if t is None else t.data_ptr() for t in self._tensors]


class Pass(NamedTuple):
    """A function to be made a kernel.

    Attributes:
        function: of an empty tensor that stands for the weights, and of the arguments; gives the new values of the
            targets (None: unchanged), and what is to be summed over all weights (None: nothing).
        key: what it is made for.
        kind: of its noise.
        dtype: of the posterior.
    """

    function: Callable[..., tuple[Sequence[Tensor | None], Tensor | None]]
    key: Hashable
    kind: str
    dtype: torch.dtype


@functools.cache
def is_at_hand(device: torch.device) -> bool:
    """Whether kernels can be made for this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def run(what: Pass, programs: Programs, targets: Sequence[Tensor | Places], *arguments: Any) -> Tensor:
    """Run a pass; its new values go into the targets, and every program's sum is returned.

    Arguments are nested tuples of tensors (contiguous, with all weights, or without dimensions), `Places`, numbers, and
    `NoiseKey`s in place of noise.

    Raises:
        Unprintable: if it cannot be made a kernel; nothing has been run.
    """
    leaves: list[Any] = []
    spec = _flattened(arguments, leaves)
    operands = tuple([_operand(leaf, what.dtype) for leaf in leaves])
    aims = tuple([_operand(target, what.dtype) for target in targets])
    key = (what.key, what.dtype, spec, operands, aims)
    kernel = KERNELS.get(key)
    if kernel is not None:
        return kernel(programs, leaves, targets)
    try:
        kernel = Kernel(what, spec, operands, aims)
        sums = kernel(programs, leaves, targets)
    except Exception as error:  # of functions that look at values, of the tracer, of Triton's compiler: nothing has run
        raise Unprintable(
            f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        ) from error
    KERNELS[key] = kernel
    return sums


def _flattened(value: Any, leaves: list[Any]) -> Hashable:
    """Append the leaves of nested tuples; what `_rebuilt` makes the tuples of again."""
    if isinstance(value, tuple):
        return type(value), tuple([_flattened(part, leaves) for part in value])
    leaves.append(value)
    return None


def _rebuilt(spec: Any, leaves: Iterator[Any]) -> Any:
    if spec is None:
        return next(leaves)
    kind, parts = spec
    made = [_rebuilt(part, leaves) for part in parts]
    return kind(*made) if hasattr(kind, "_fields") else tuple(made)


class Operand(NamedTuple):
    """What a leaf of a pass's arguments is to its kernel, and its dtype."""

    kind: str  # "flat", "one" (a tensor without dimensions), "places", "number", "noise" or "nothing" (None)
    dtype: torch.dtype


def _operand(leaf: Any, dtype: torch.dtype) -> Operand:
    if isinstance(leaf, Tensor):
        return Operand("flat" if leaf.ndim else "one", leaf.dtype)
    if isinstance(leaf, Places):
        return Operand("places", leaf.dtype)
    if leaf is None:
        return Operand("nothing", dtype)
    return Operand("noise", dtype) if isinstance(leaf, NoiseKey) else Operand("number", torch.float64)


class Kernel:
    """A pass as a Triton kernel.

    With every launch a small tensor goes to the device, its *head*: the numbers (as bits), then seed, step and draw of
    every noise, then for every member the addresses of its places.
    """

    def __init__(self, what: Pass, spec: Any, operands: Sequence[Operand], aims: Sequence[Operand]) -> None:
        self._traced = _Traced(what, spec, operands, aims)
        self.source = _kernel_text(self._traced)
        self._launched = _loaded(self.source)

    def __call__(self, programs: Programs, leaves: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        """Launch it; every program's sum."""
        traced, device = self._traced, programs.device
        numbers, keys, tensors, places = list[float](), list[int](), list[Tensor](), list[list[int]]()
        involved = [leaves[i] for i in traced.used] + [targets[i] for i in traced.stored]
        for leaf in involved:
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
            elif isinstance(leaf, Places):
                places.append(leaf.addresses())
            elif isinstance(leaf, NoiseKey):
                seed = leaf.seed - 2**64 if leaf.seed >= 2**63 else leaf.seed
                keys += [seed, leaf.step, leaf.stream * 2**24 + leaf.draw]
            else:
                numbers.append(float(leaf))
        bits = np.array(numbers, np.float64).view(np.int64).tolist()
        head = [*bits, *keys, *itertools.chain(*zip(*places, strict=True))] or [0]
        sums = torch.empty(len(programs), dtype=traced.summed or torch.int32, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            arguments = (*tensors, on_device(head, torch.int64, device), programs.table, programs.members, sums)
            self._launched[(len(programs),)](*arguments, BLOCKS=programs.each // 4, num_warps=WARPS)
        return sums


KERNELS: dict[Hashable, Kernel] = {}


class _Traced:
    """A pass as a graph on single weights.

    Attributes:
        used: the numbers of the leaves that it reads.
        stored: the numbers of the targets that it changes.
        summed: the dtype of its sums, or None.
        text: Triton functions `body`, of the used leaves, and `noise`, of two words, if there is any.
    """

    def __init__(self, what: Pass, spec: Any, operands: Sequence[Operand], aims: Sequence[Operand]) -> None:
        self.operands, self.aims, self.dtype = operands, aims, what.dtype
        self.stored: list[int] = []
        self.summed: torch.dtype | None = None

        present = [number for number, (kind, _) in enumerate(operands) if kind != "nothing"]

        def flat(*given: Any) -> list[Tensor]:
            like = torch.empty(SIZE, dtype=what.dtype, device="meta")
            leaves = dict(zip(present, given, strict=True))
            arguments = _rebuilt(spec, iter([leaves.get(n) for n in range(len(operands))]))
            values, summed = what.function(like, *arguments)
            self.stored = [number for number, value in enumerate(values) if value is not None]
            self.summed = None if summed is None else torch.int32 if summed.dtype == torch.bool else summed.dtype
            return [value for value in (*values, summed) if value is not None]

        sizes = [(() if operands[n].kind in ("one", "number") else (SIZE,), operands[n].dtype) for n in present]
        graph = _graph(flat, sizes)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.used = [number for number, node in zip(present, inputs, strict=True) if node.users]
        for node in inputs:
            if not node.users:
                graph.graph.erase_node(node)
        self.text = printed(graph, "body", SIZE)
        if any(operands[number].kind == "noise" for number in self.used):
            noise = _graph(
                lambda a, b: [v.to(what.dtype) for v in kind_of(what.kind).from_words(a, b, what.dtype)],
                [((SIZE,), torch.int64)] * 2,
            )
            single = what.dtype == torch.float32
            self.text += "\n" + printed(noise, "noise", SIZE, _SMALL_ANGLES if single else None)


def _graph(function: Callable[..., list[Tensor]], inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> GraphModule:
    """The graph of a function of tensors of these shapes and dtypes."""
    examples = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in inputs]
    with torch.inference_mode(False), torch.no_grad():
        graph: GraphModule = make_fx(function, decomposition_table=_decompositions())(*examples)
    graph.graph.eliminate_dead_code()
    return graph


@functools.cache
def _decompositions() -> dict[Any, Any]:
    """What makes simple operations of others, less what `triton_code` has a word for."""
    table = dict(torch._decomp.core_aten_decompositions())
    for name in ("isfinite", "isinf", "isnan"):
        table.pop(getattr(torch.ops.aten, name).default, None)
    return table


_HEAD = f"""\
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range({ROUNDS}):
        high0 = tl.umulhi(c0, tl.full([1], {MULTIPLIERS[0]}, tl.uint32))
        high2 = tl.umulhi(c2, tl.full([1], {MULTIPLIERS[1]}, tl.uint32))
        low0 = c0 * tl.full([1], {MULTIPLIERS[0]}, tl.uint32)
        low2 = c2 * tl.full([1], {MULTIPLIERS[1]}, tl.uint32)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = k0 + tl.full([1], {WEYL[0]}, tl.uint32)
        k1 = k1 + tl.full([1], {WEYL[1]}, tl.uint32)
    return c0.to(tl.int64), c1.to(tl.int64), c2.to(tl.int64), c3.to(tl.int64)


"""
# Sine and cosine of the angles of noise, in [0, 2π): CUDA's own are ready for angles of any size, which costs more than
# the rest of a pass. x = k π/2 + r with |r| <= π/4; polynomials as of Cephes (sinf, cosf).
_ANGLES = """\
@triton.jit
def turn(x):
    k = tl.floor(x * 0.6366197723675814 + 0.5)
    r = tl.fma(k, tl.full([1], -1.57079601287841796875, tl.float32), x)
    r = tl.fma(k, tl.full([1], -3.1391647326017846e-07, tl.float32), r)
    r = tl.fma(k, tl.full([1], -5.390302529957765e-15, tl.float32), r)
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    return k.to(tl.int32), s, c


@triton.jit
def sine(x):
    k, s, c = turn(x)
    y = tl.where((k & 1) == 0, s, c)
    return tl.where((k & 2) == 0, y, -y)


@triton.jit
def cosine(x):
    k, s, c = turn(x)
    y = tl.where((k & 1) == 0, c, s)
    return tl.where(((k + 1) & 2) == 0, y, -y)


"""
_SMALL_ANGLES = {"sin": "sine({0})", "cos": "cosine({0})"}
_PROGRAM = f"""\
    program = tl.program_id(0)
    member = tl.load(table + 2 * program).to(tl.int64)
    first = tl.load(table + 2 * program + 1).to(tl.int64) * (4 * BLOCKS)
    begin = tl.multiple_of(tl.load(members + 3 * member) + first, {4 * TILE})
    left = tl.minimum(tl.load(members + 3 * member + 1) - first, 4 * BLOCKS).to(tl.int32)
    i = tl.arange(0, BLOCKS)
    j0 = {4 * TILE} * (i // {TILE}) + i % {TILE}
    j1, j2, j3 = j0 + {TILE}, j0 + {2 * TILE}, j0 + {3 * TILE}
"""


def _kernel_text(traced: _Traced) -> str:
    """The source of a module with the kernel around a traced pass.

    A program has `BLOCKS` blocks of noise; lane l of a block belongs to the weight 64 l behind lane 0 (`family.noise`).
    """
    operands = [(f"a{n}", *traced.operands[n]) for n in traced.used]
    targets = [(f"b{n}", *traced.aims[n]) for n in traced.stored]
    count = {kind: [name for name, k, _ in operands + targets if k == kind] for kind in ("number", "noise", "places")}
    tensors = [name for name, kind, _ in operands + targets if kind in ("flat", "one")]
    fixed, lanes = len(count["number"]) + 3 * len(count["noise"]), range(4)
    lines = [f"    {name}_v = tl.load({name} + tl.arange(0, 1))" for name, kind, _ in operands if kind == "one"]
    for n, name in enumerate(count["number"]):
        lines.append(f"    {name}_v = tl.load(head + {n} + tl.arange(0, 1)).to(tl.float64, bitcast=True)")
    for name, kind, dtype in operands + targets:
        if kind == "places":
            at = f"head + {fixed} + {len(count['places'])} * member + {count['places'].index(name)}"
            lines += [
                f"    {name}_p = tl.load({at}).to(tl.pointer_type({TYPES[dtype]})) + first",
                f"    {name}_n = tl.where(tl.load({at}) == 0, 0, left)",
            ]
    for name, kind, _ in operands:
        for lane in lanes:
            if kind == "flat":
                lines.append(f"    {name}_{lane} = tl.load({name} + begin + j{lane}, j{lane} < left, other=0)")
            elif kind == "places":
                lines.append(f"    {name}_{lane} = tl.load({name}_p + j{lane}, j{lane} < {name}_n, other=0)")
    if count["noise"]:
        lines += [
            "    c0 = (first // 4 + i).to(tl.uint32)",
            "    c1 = tl.zeros_like(c0) + tl.load(members + 3 * member + 2).to(tl.uint32)",
        ]
    for n, name in enumerate(count["noise"]):
        own = len(count["number"]) + 3 * n
        lines += [
            f"    c2 = tl.zeros_like(c0) + tl.load(head + {own + 1}).to(tl.uint32)",
            f"    c3 = tl.zeros_like(c0) + tl.load(head + {own + 2}).to(tl.uint32)",
            f"    seed = tl.load(head + {own})",
            "    s0, s1 = tl.zeros_like(c0) + seed.to(tl.uint32), tl.zeros_like(c0) + (seed >> 32).to(tl.uint32)",
            "    w0, w1, w2, w3 = philox(c0, c1, c2, c3, s0, s1)",
            f"    {name}_0, {name}_1 = noise(w0, w1)",
            f"    {name}_2, {name}_3 = noise(w2, w3)",
        ]
    sums = ["y"] if traced.summed is not None else []
    for lane in lanes:
        given = ", ".join(f"{name}_{'v' if kind in ('one', 'number') else lane}" for name, kind, _ in operands)
        lines.append(f"    {', '.join(f'{v}_{lane}' for v in [n for n, *_ in targets] + sums)} = body({given})")
    for name, kind, dtype in targets:
        for lane in lanes:
            to = f"{name} + begin" if kind == "flat" else f"{name}_p"
            lines.append(f"    tl.store({to} + j{lane}, {name}_{lane}.to({TYPES[dtype]}), j{lane} < left)")
    if traced.summed is not None:
        zero = f"tl.full([1], 0, {TYPES[traced.summed]})"
        parts = [f"tl.where(j{lane} < left, y_{lane}.to({TYPES[traced.summed]}), {zero})" for lane in lanes]
        lines += [f"    y = {' + '.join(parts)}", "    tl.store(sums + program, tl.sum(y, 0))"]
    signature = ", ".join([*tensors, "head", "table", "members", "sums", "BLOCKS: tl.constexpr"])
    return (
        f"{_HEAD}{_ANGLES}{traced.text}\n\n@triton.jit\ndef kernel({signature}):\n{_PROGRAM}" + "\n".join(lines) + "\n"
    )


def _loaded(source: str) -> Any:
    """The kernel of a module's source. Triton reads functions from files, and keeps what it compiles by their text."""
    name = f"expfam_poco_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory(prefix="expfam_poco_") as folder:
        path = Path(folder) / "kernel.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.kernel
