"""Layers that keep their weights in 1, 2 or 4 bits, in memory too, and the models that are made of them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expfam_poco import arguments
from expfam_poco.tools import packed_kernel
from expfam_poco.tools.binary_layers import BinaryConv2d, BinaryLinear

# Layers of other classes may do something else with their weights.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, BinaryLinear, BinaryConv2d)
MOST = 16  # levels of 4 bits
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Coded(NamedTuple):
    """A weight (out, n) in `bits` each: codes, row by row in whole bytes, the lowest bits first.

    With one bit the weight is scaleₒ (2c − 1) (scale None: 1), with more it is levels[c].
    """

    bits: int
    codes: Tensor
    levels: Tensor | None
    scale: Tensor | None


def coded(weight: Tensor) -> Coded | None:
    """The weight (out, n) in the fewest bits that hold it exactly; None where it has more than 16 values.

    One bit: every row consists of ±a of its own. Two bits: 4 values in all; four bits: 16.

    Example:
        >>> import torch
        >>> from expfam_poco.tools.packed import coded
        >>> coded(torch.tensor([[1.0, -1.0, 1.0]])).codes
        tensor([[5]], dtype=torch.uint8)
        >>> coded(torch.tensor([[1.0, 0.0, -1.0]])).bits
        2
    """
    size = weight.abs()
    scale = size[:, 0].clone()
    if bool((size == scale.unsqueeze(1)).all()):
        return Coded(1, _packed(weight > 0.0, 1), None, None if bool((scale == 1.0).all()) else scale)
    levels = weight[:1].unique()  # most weights of many values have them in their first row already
    levels = weight.unique() if len(levels) <= MOST else levels
    if len(levels) > MOST or not bool(levels.isfinite().all()):
        return None
    bits = 2 if len(levels) <= 4 else 4
    table = F.pad(levels, (0, 2**bits - len(levels)))
    return Coded(bits, _packed(torch.searchsorted(levels, weight.contiguous()), bits), table, None)


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, (out, n), in bytes (out, ⌈n bits/8⌉)."""
    per = 8 // bits
    whole = F.pad(numbers.to(torch.uint8), (0, -numbers.shape[1] % per)).unflatten(1, (-1, per))
    places = 2 ** (bits * torch.arange(per, dtype=torch.uint8, device=numbers.device))
    return (whole * places).sum(-1, dtype=torch.uint8)


class PackedLayer(nn.Module):
    """A layer whose weight, seen as (out, n), is kept as `Coded`; for inference.

    `weight` unpacks it all. Of every output Σᵢ wᵢ xᵢ is computed by a C++ kernel from the bits where these are signs,
    and everywhere else, on a GPU, in other dtypes and where gradients are asked for, from unpacked tiles.
    """

    codes: Tensor
    levels: Tensor | None
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Coded, shape: torch.Size, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.shape = weight.bits, shape  # of the weight with what is summed over behind the outputs
        self.register_buffer("codes", weight.codes)
        self.register_buffer("levels", weight.levels)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def terms(self) -> int:
        """How many weights go into one output."""
        return math.prod(self.shape[1:])

    def rows(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Some outputs' weights (rows, n), without their scale, from the codes."""
        if self.bits == 1 and packed_kernel.available(codes.device, dtype):
            return packed_kernel.unpacked(codes, self.terms)
        per = 8 // self.bits
        byte = torch.arange(256, device=codes.device).unsqueeze(1)
        number = byte // 2 ** (self.bits * torch.arange(per, device=codes.device)) % 2**self.bits
        table = (2 * number - 1).to(dtype) if self.levels is None else self.levels.to(dtype)[number]
        return F.embedding(codes.int(), table).flatten(1)[:, : self.terms]

    def tiles(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All outputs' weights, as many at a time as are bounded memory; whole where the model is traced."""
        whole = torch.compiler.is_compiling() or torch.jit.is_tracing()
        for part in [self.codes] if whole else self.codes.split(max(1, packed_kernel.TILE // self.terms)):
            yield self.rows(part, dtype)

    def finished(self, sums: Tensor, dim: int) -> Tensor:
        """scale · sums + bias, of outputs along the axis `dim`."""
        ends = (1,) * (sums.ndim - 1 - dim % sums.ndim)
        if self.scale is not None:
            sums = sums * self.scale.view(-1, *ends)
        return sums if self.bias is None else sums + self.bias.view(-1, *ends)

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked, in its shape."""
        dtype = next((t.dtype for t in (self.levels, self.scale, self.bias) if t is not None), torch.float32)
        weight = self.rows(self.codes, dtype)
        return self.shaped(weight if self.scale is None else weight * self.scale.unsqueeze(1))

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows (out, n) in the shape that torch's function takes."""
        return rows

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{tuple(self.shape)}, bits={self.bits}"


class PackedLinear(PackedLayer):
    """`nn.Linear` with packed weights, see `PackedLayer`.

    Example:
        >>> import torch, expfam_poco as poco
        >>> layer = torch.nn.Linear(64, 32)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.where(layer.weight >= 0.0, 1.0, -1.0))
        >>> poco.pack_weights(layer)
        PackedLinear((32, 64), bits=1)
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if not x.ndim or x.shape[-1] != self.terms:
            raise ValueError(
                f"input: it is of shape {tuple(x.shape)}; give one whose last axis has {self.terms} entries."
            )
        flat = x.reshape(-1, self.terms)
        sums = packed_kernel.product(flat, self.codes) if self.bits == 1 and packed_kernel.usable(x) else None
        if sums is None:
            sums = torch.cat([F.linear(flat, tile) for tile in self.tiles(x.dtype)], -1)
        return self.finished(sums, -1).reshape(*x.shape[:-1], self.shape[0])


class PackedConv(PackedLayer):
    """A convolution of one to three dimensions with packed weights, see `PackedLayer`.

    Bits multiply where activations are −1, 0 and 1 (channels a multiple of 8; neither groups nor dilation): what
    padding adds are zeros. Elsewhere a tile of output channels is unpacked and convolved, with groups all of them.

    Args:
        weight: with the channels last, (out, *kernel, in).
        layer: the convolution.
    """

    def __init__(self, weight: Coded, shape: torch.Size, layer: nn.modules.conv._ConvNd) -> None:
        super().__init__(weight, shape, layer.bias)
        self.stride, self.padding, self.dilation, self.groups, self.padding_mode = (
            layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode,
        )  # fmt: skip
        self.pads: list[int] = list(layer._reversed_padding_repeated_twice)
        plain = self.groups == 1 and set(self.dilation) == {1} and shape[-1] % 8 == 0
        self.countable = plain and self.bits == 1

    def shaped(self, rows: Tensor) -> Tensor:
        """(out, n) as (out, in, *kernel)."""
        return rows.unflatten(1, self.shape[1:]).movedim(-1, 1).contiguous()  # else the output has channels last

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, …) to (N, out, …), or both without N."""
        dims = len(self.shape) - 2
        if x.ndim == dims + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        channels = self.shape[-1] * self.groups
        if x.ndim != dims + 2 or x.shape[1] != channels:
            raise ValueError(
                f"input: it is of shape {tuple(x.shape)}; give one with {channels} channels, (N, {channels}, …)."
            )
        padding, pads = self.padding, self.pads
        if self.padding_mode != "zeros" or isinstance(padding, str):
            x = F.pad(x, pads, mode=self.padding_mode.replace("zeros", "constant"))
            padding, pads = 0, [0] * len(pads)  # type: ignore[assignment]
        sums = self._counted(x, pads) if self.countable and packed_kernel.usable(x) else None
        if sums is None:
            tiles = self.tiles(x.dtype) if self.groups == 1 else iter([self.rows(self.codes, x.dtype)])
            choices = (None, self.stride, padding, self.dilation, self.groups)
            sums = torch.cat([_CONVOLVE[dims](x, self.shaped(tile), *choices) for tile in tiles], 1)  # type: ignore
        return self.finished(sums, 1)

    def _counted(self, x: Tensor, pads: list[int]) -> Tensor | None:
        """By XNOR and popcount on patches of bits; None where activations have other values."""
        last = x.detach().movedim(1, -1).contiguous()
        packed = packed_kernel.packed_activations(last.flatten(0, -2))
        if packed is None:
            return None
        signs, there = packed
        if there is None and any(pads):
            there = torch.full_like(signs, 255)
        patches = [None if t is None else self._patches(t.view(*last.shape[:-1], -1), pads) for t in (signs, there)]
        assert patches[0] is not None
        sizes = patches[0].shape[:-1]
        flat = [None if t is None else t.flatten(0, -2) for t in patches]
        assert flat[0] is not None
        y = packed_kernel.agreements(flat[0], flat[1], self.codes, self.terms)
        return y.view(*sizes, -1).movedim(-1, 1).contiguous()

    def _patches(self, plane: Tensor, pads: list[int]) -> Tensor:
        """(N, *positions, bytes of a patch) of (N, *sizes, bytes of a position)."""
        plane = F.pad(plane, [0, 0, *pads])
        dims = len(self.shape) - 2
        for axis, (size, step) in enumerate(zip(self.shape[1:-1], self.stride, strict=True), 1):
            plane = plane.unfold(axis, size, step)
        return plane.movedim(1 + dims, -1).flatten(1 + dims).contiguous()


def pack_weights(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """A copy of the model for inference whose linear and convolutional layers keep weights of few values in bits.

    A layer is packed if every output's weights are ±a (1 bit, and a where it is not 1), or all its weights have at most
    4 or 16 values (2, 4 bits); those of `BinaryLinear` and `BinaryConv2d` are what they multiply by. All else stays.
    In float32 on the CPU weights of one bit are multiplied as they are, by a C++ kernel that is built at first use (a
    warning tells if it cannot be): sums with the weights' signs, and XNOR and popcount where activations are ±1 or 0.
    Otherwise a tile at a time is unpacked.

    Args:
        model: the network; it is not changed.
        names: of the weights to pack; None: all that can be. For those that cannot be a warning is given.

    Raises:
        ValueError: no layer can be packed.

    Example:
        >>> import torch, expfam_poco as poco
        >>> model = torch.nn.Sequential(poco.BinaryLinear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> packed = poco.pack_weights(model)
        >>> packed[0], packed[0].codes.numel(), packed[2]
        (PackedLinear((64, 64), bits=1), 512, Linear(in_features=64, out_features=3, bias=True))
        >>> x = torch.randn(5, 64)
        >>> torch.allclose(packed(x), model(x), atol=1e-5)
        True
    """
    arguments.module(model)
    made: dict[int, nn.Module] = {}
    known: dict[tuple[int, bool], Coded | None] = {}
    packed: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        own = f"{name}.weight".removeprefix(".")
        layer = made.get(id(module)) or (_packed_layer(module, known) if names is None or own in names else None)
        if layer is not None:
            made[id(module)] = layer
            packed.add(own)
    if not made:
        raise ValueError(
            "model: none of these weights can be packed; give a model with linear or convolutional layers of torch's "
            "own classes, without hooks, whose weights have at most 16 values."
        )
    left = sorted(set(names or ()) - packed)
    if left:
        warnings.warn(
            f"model: {', '.join(left[:4])}{', …' if len(left) > 4 else ''} stay unpacked: they are not the weights of "
            "linear or convolutional layers of torch's own classes without hooks, or have more than 16 values.",
            stacklevel=2,
        )
    return copy.deepcopy(model, dict(made))  # wherever the model refers to a layer, the copy has the packed one


def _packed_layer(module: nn.Module, known: dict[tuple[int, bool], Coded | None]) -> PackedLayer | None:
    """The layer in bits, or None where it cannot be; weights that are tied stay so."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module) not in LAYERS or any(hooks):
        return None
    convolves = isinstance(module, nn.modules.conv._ConvNd)
    key = (id(module.weight), getattr(module, "scaled", False))
    weight = module.binary_weight() if isinstance(module, BinaryLinear | BinaryConv2d) else module.weight
    weight = weight.detach().movedim(1, -1) if convolves else weight.detach()
    if key not in known:
        found = coded(weight.flatten(1)) if weight.numel() else None
        known[key] = found if found is not None and _bytes(found[1:]) < _bytes([weight]) else None
    found = known[key]
    if found is None:
        return None
    layer: PackedLayer
    if isinstance(module, nn.Linear):
        layer = PackedLinear(found, weight.shape, module.bias)
    else:
        layer = PackedConv(found, weight.shape, module)
    return layer.train(module.training)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
