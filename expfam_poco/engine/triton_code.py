"""Triton code of a function that acts on every weight by itself, printed from its graph of ATen operations.

The function has been traced on tensors of N entries. To a kernel each of these is one value of the weight at hand, and
a tensor with a single entry is a value for all weights; so views mean nothing, nor does a sum over an axis of length 1.
What acts on several weights at once, or what Triton has no word for, is refused (`Unprintable`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.bool: "tl.int1",
}
# Operations that leave the values of single weights alone (by the names of their ATen packets).
_SAME = {
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "clone", "alias", "detach", "contiguous",
    "lift_fresh_copy", "permute", "t", "transpose", "select", "slice", "sum", "mean", "prod", "amax", "amin", "all",
    "any", "cat", "stack", "_to_copy", "convert_element_type", "_reshape_alias", "view_as", "expand_as", "flatten",
}  # fmt: skip
_FILLED = {"full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "scalar_tensor", "empty", "empty_like",
           "new_full", "new_zeros", "new_ones", "new_empty"}  # fmt: skip
_NAN = "propagate_nan=tl.PropagateNan.ALL"
# Expressions in operands that have the type of the result …
_FLOATS: dict[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "rsub": "{1} - {0}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "neg": "-{0}", "reciprocal": "1.0 / {0}", "sqrt": "tl.sqrt({0})", "rsqrt": "1.0 / tl.sqrt({0})",
    "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})", "sin": "tl.sin({0})",
    "cos": "tl.cos({0})", "abs": "tl.abs({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))", "erf": "tl.erf({0})", "relu": f"tl.maximum({{0}}, 0.0, {_NAN})",
    "copysign": "tl.where({1} >= 0, tl.abs({0}), -tl.abs({0}))",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, {0}))",
    "maximum": f"tl.maximum({{0}}, {{1}}, {_NAN})", "minimum": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "clamp_min": f"tl.maximum({{0}}, {{1}}, {_NAN})", "clamp_max": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    **{name: f"libdevice.{name}({{0}})" for name in ("log1p", "expm1", "tanh", "atanh", "sinh", "cosh", "asinh",
                                                      "lgamma", "tan", "atan", "erfinv", "erfc", "log10")},
    "special_erfcx": "libdevice.erfcx({0})", "hypot": "libdevice.hypot({0}, {1})", "atan2": "libdevice.atan2({0}, {1})",
}  # fmt: skip
# … in operands of a common type, giving a truth value …
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_QUESTIONS = {"isfinite": "tl.abs({0}) < float('inf')", "isnan": "{0} != {0}", "isinf": "tl.abs({0}) == float('inf')"}
# … and in integers or truth values.
_BITS = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "bitwise_right_shift": ">>", "__rshift__": ">>",
         "logical_and": "&", "logical_or": "|", "logical_xor": "^", "__and__": "&", "__or__": "|",
         "__xor__": "^"}  # fmt: skip


class Unprintable(Exception):
    """The graph does something that a kernel made here cannot do."""


class Value(NamedTuple):
    """A printed value: its name, and its type."""

    name: str
    dtype: torch.dtype


def printed(graph: GraphModule, name: str, size: int, words: Mapping[str, str] | None = None) -> str:
    """The graph as a Triton function of its inputs' values, which returns those of its outputs.

    Args:
        graph: traced; its output is a list of tensors.
        name: of the function.
        size: N, the number of entries that stand for all weights.
        words: for operations in one floating-point argument, in place of those known here.
    """
    return _Printer(graph, name, size, words or {}).text()


class _Printer:
    def __init__(self, graph: GraphModule, name: str, size: int, words: Mapping[str, str]) -> None:
        self._graph, self._name, self._size = graph, name, size
        self._words = {**_FLOATS, **words}
        self._known: dict[Node, Any] = {}
        self._lines: list[str] = []

    def text(self) -> str:
        inputs: list[str] = []
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                self._check(node)
                self._known[node] = Value(node.name, node.meta["val"].dtype)
                inputs.append(node.name)
            elif node.op == "get_attr":
                self._known[node] = self._constant(getattr(self._graph, node.target))
            elif node.op == "output":
                found = [self._known[value].name for value in node.args[0]]
                self._lines.append(f"return {', '.join(found)}")
            else:
                self._known[node] = self._call(node)
        body = "\n    ".join(self._lines)
        return f"@triton.jit\ndef {self._name}({', '.join(inputs)}):\n    {body}\n"

    def _check(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in TYPES or value.numel() not in (1, self._size):
            raise Unprintable(f"{node.target} gives {getattr(value, 'shape', type(value).__name__)}")

    def _constant(self, value: Tensor) -> Value:
        if value.numel() != 1 or value.is_meta or value.dtype not in TYPES:
            raise Unprintable(f"a constant of shape {tuple(value.shape)} on {value.device}")
        return self._let(_literal(value.item(), value.dtype), value.dtype)

    def _let(self, expression: str, dtype: torch.dtype) -> Value:
        name = f"t{len(self._lines)}"
        self._lines.append(f"{name} = {expression}")
        return Value(name, dtype)

    def _call(self, node: Node) -> Any:
        name = _name_of(node.target)
        if name == "getitem":
            return self._known[node.args[0]][node.args[1]]  # type: ignore[index]
        if name == "unbind":
            return self._unbound(node)
        self._check(node)
        dtype = node.meta["val"].dtype
        if name in _SAME:
            return self._same(node, dtype)
        if name in _FILLED:
            return self._let(_literal(_filled(name, node), dtype), dtype)
        return self._let(self._expression(name, node, dtype), dtype)

    def _unbound(self, node: Node) -> list[Value]:
        source = node.args[0]
        if len(node.meta["val"]) != 1:
            raise Unprintable("unbind of several tensors")
        return [self._known[source]]  # type: ignore[index]

    def _same(self, node: Node, dtype: torch.dtype) -> Value:
        source: Any = node.args[0]
        if isinstance(source, list | tuple):
            if len(source) != 1:
                raise Unprintable(f"{node.target} of several tensors")
            (source,) = source
        before, after = source.meta["val"].numel(), node.meta["val"].numel()
        if before != after and before != 1:
            raise Unprintable(f"{node.target} from {before} entries to {after}")
        return Value(self._as(source, dtype), dtype)

    def _expression(self, name: str, node: Node, dtype: torch.dtype) -> str:
        args = list(node.args)
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise Unprintable(f"{node.target} with {dict(node.kwargs)}")
        if dtype == torch.bool and name in ("mul", "add"):
            return f" {'&' if name == 'mul' else '|'} ".join(self._as(value, dtype) for value in args)
        if name in self._words:
            return self._words[name].format(*(self._as(value, dtype) for value in args))
        if name in _COMPARISONS:
            common = _common(args)
            return f" {_COMPARISONS[name]} ".join(self._as(value, common) for value in args)
        if name in _QUESTIONS:
            return _QUESTIONS[name].format(self._as(args[0], args[0].meta["val"].dtype))  # type: ignore[union-attr]
        if name in _BITS:
            return f" {_BITS[name]} ".join(self._as(value, dtype) for value in args)
        special = _SPECIAL.get(name)
        if special is None:
            raise Unprintable(f"no code for {node.target}")
        return special(self, args, dtype)

    def _as(self, value: Any, dtype: torch.dtype) -> str:
        """An operand as this type."""
        if not isinstance(value, Node):
            return _literal(value, dtype)
        known = self._known[value]
        return known.name if known.dtype == dtype else f"{known.name}.to({TYPES[dtype]})"

    # ---- operations of their own kind ----------------------------------------------------------------------

    def _where(self, args: Sequence[Any], dtype: torch.dtype) -> str:
        return f"tl.where({self._as(args[0], torch.bool)}, {self._as(args[1], dtype)}, {self._as(args[2], dtype)})"

    def _clamp(self, args: Sequence[Any], dtype: torch.dtype) -> str:
        low, high = (*args[1:], None, None)[:2]
        text = self._as(args[0], dtype)
        if low is not None:
            text = f"tl.maximum({text}, {self._as(low, dtype)}, {_NAN})"
        return text if high is None else f"tl.minimum({text}, {self._as(high, dtype)}, {_NAN})"

    def _pow(self, args: Sequence[Any], dtype: torch.dtype) -> str:
        base, power = self._as(args[0], dtype), args[1]
        simple = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 1: "{0}", 0.5: "tl.sqrt({0})", -1: "1.0 / {0}",
                  -0.5: "1.0 / tl.sqrt({0})", -2: "1.0 / ({0} * {0})"}  # fmt: skip
        if isinstance(power, int | float) and power in simple:
            return simple[power].format(base)
        return f"libdevice.pow({base}, {self._as(power, dtype)})"

    def _not(self, args: Sequence[Any], dtype: torch.dtype) -> str:
        return f"{self._as(args[0], torch.bool)} == 0"

    def _addcmul(self, args: Sequence[Any], dtype: torch.dtype) -> str:
        return "{} + {} * {}".format(*(self._as(value, dtype) for value in args))


_SPECIAL: dict[str, Callable[[_Printer, Sequence[Any], torch.dtype], str]] = {
    "where": _Printer._where, "clamp": _Printer._clamp, "pow": _Printer._pow, "logical_not": _Printer._not,
    "bitwise_not": _Printer._not, "addcmul": _Printer._addcmul,
}  # fmt: skip


def _name_of(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(target, "__name__", target))


def _filled(name: str, node: Node) -> Any:
    if "zeros" in name or "empty" in name:
        return 0
    if "ones" in name:
        return 1
    return node.args[0] if name == "scalar_tensor" else node.args[-1] if name == "new_full" else node.args[1]


def _literal(value: Any, dtype: torch.dtype) -> str:
    if not isinstance(value, int | float):
        raise Unprintable(f"an operand {value!r}")
    if not dtype.is_floating_point:
        text = str(int(value))
    else:
        text = repr(float(value)) if math.isfinite(value) else f"float('{float(value)}')"
    return f"tl.full([1], {text}, {TYPES[dtype]})"


def _common(args: Sequence[Any]) -> torch.dtype:
    first, second = (value.meta["val"] if isinstance(value, Node) else value for value in args)
    return torch.result_type(first, second)
