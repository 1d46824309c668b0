r"""Tables of what quadrature finds, for families of one number a weight and one statistic.

A(λ), its derivatives and the quantile x(λ, u) of such a family are smooth functions of one or two numbers. They are
interpolated by Chebyshev polynomials on *cells*: in a coordinate y of λ in which the domain is the line (asinh λ where
λ is free, log |λ − bound| where it is not), `WIDE` each, and in t = log u − log(1 − u). A cell is filled when a weight
first falls into it, by quadrature at its nodes, and **verified** at points between the nodes. Where the error is
larger than `BOUND`, or quadrature has no number, the cell stays empty and is halved; in the end quadrature has its
weights. A draw's error is measured in inter-quartile ranges, and counts less in the tails beyond e^−8, which are rarer;
that of a derivative of A in powers of the standard deviation of T.

What is tabulated beside A are its derivatives, the cumulants of T,

    A′ = μ = E[T],    A″ = E[(T − μ)²],    A‴ = E[(T − μ)³],

so that `log_partition` has derivatives up to the third without any being taken of a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

WIDE = 0.25  # of a cell in y
DEGREE, DEGREE_U, DEGREE_A = 8, 10, 12  # nodes of a cell in y, in t, and in y for A
LEVELS = 4  # a cell that stays empty is halved so often
CHUNK = 2**12  # weights at a time
REACH = 24  # |t| of the last draws is 23
BOUND = 1e-8
ORDERS = 4  # A and three derivatives


class Cells:
    """The filled cells of one function of y, side by side.

    Args:
        fill: from a number of a cell, its values as a tensor of any shape, or None where it stays empty.

    Example:
        >>> import torch
        >>> from expfam_poco.family.tables import Cells
        >>> cells = Cells(lambda number: torch.tensor([float(number)]) if number else None)
        >>> cells.rows(torch.tensor([3, 0, 3]))
        tensor([ 0, -1,  0])
    """

    def __init__(self, fill: Callable[[int], Tensor | None]) -> None:
        self._fill, self._rows = fill, dict[int, int]()
        self._parts = list[Tensor]()
        self.values: Tensor | None = None

    def rows(self, cells: Tensor) -> Tensor:
        """Where in `values` these cells are; −1: empty."""
        numbers, which = cells.unique(return_inverse=True)
        known = [self._row(number) for number in numbers.tolist()]
        return torch.tensor(known, dtype=torch.int64)[which]

    def _row(self, number: int) -> int:
        if number not in self._rows:
            values = self._fill(number)
            self._rows[number] = -1 if values is None else len(self._parts)
            if values is not None:
                self._parts.append(values)
                self.values = torch.stack(self._parts)
        return self._rows[number]


class Tables:
    """A family's tables.

    Args:
        domain: the constraint on λ, or None.
        cumulants: (λ, order) of A or a derivative, by quadrature.
        quantile: (λ, u) to x and ∂x/∂λ, along a new first axis, by quadrature.
    """

    def __init__(
        self,
        domain: constraints.Constraint | None,
        cumulants: Callable[[Tensor], Tensor],
        quantile: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        free = domain is None or isinstance(domain, type(constraints.real))
        self._bound = None if free else biject_to(domain)
        self._cumulants, self._quantile = cumulants, quantile
        self._sums = [Cells(partial(self._summed, level)) for level in range(LEVELS)]
        self._draws = [Cells(partial(self._drawn, level)) for level in range(LEVELS)]

    def cumulant(self, nat: Tensor, order: int) -> Tensor:
        """A(λ) or its derivative of this order."""
        found = torch.full_like(nat, math.nan).reshape(-1)

        def look_up(values: Tensor, rows: Tensor, place: Tensor, which: Tensor) -> None:
            found[which] = (values[rows, order] * _basis(place, DEGREE_A)).sum(-1)

        rest = self._looked_up(self._sums, nat.reshape(-1), look_up)
        if len(rest):
            found[rest] = self._cumulants(nat.reshape(-1)[rest])[order]
        return found.reshape(nat.shape)

    def quantile(self, nat: Tensor, u: Tensor) -> Tensor:
        """x and ∂x/∂λ along a new first axis, for λ of some shape and u of K × the same."""
        flat, inner = nat.expand(u.shape[1:]).reshape(-1), u.reshape(len(u), -1)
        found = u.new_full((2, *inner.shape), math.nan)
        t = (inner.log() - torch.log1p(-inner)).clamp(-REACH, REACH)
        column = t.floor().clamp(-REACH, REACH - 1)

        def look_up(values: Tensor, rows: Tensor, place: Tensor, which: Tensor) -> None:
            own = values[rows, (column[:, which] + REACH).long()]  # K × N × 2 × y × t
            across = _basis(2.0 * (t - column)[:, which] - 1.0, DEGREE_U)
            along = (own @ across[..., None, :, None]).squeeze(-1)
            found[:, :, which] = (along @ _basis(place, DEGREE)[:, :, None]).squeeze(-1).movedim(-1, 0)

        rest = self._looked_up(self._draws, flat, look_up)
        if len(rest):
            found[:, :, rest] = self._quantile(flat[rest], inner[:, rest])
        return found.reshape(2, *u.shape)

    # ---- cells ---------------------------------------------------------------------------------------------

    def _looked_up(self, levels: list[Cells], nat: Tensor, look_up: Callable[..., None]) -> Tensor:
        """Call look_up(values, rows, places, weights) for those in filled cells, the widest there are; the others."""
        y = torch.asinh(nat) if self._bound is None else self._bound.inv(nat)
        inside = torch.isfinite(y) & torch.isfinite(nat)
        rest, outside = inside.nonzero().squeeze(-1), (~inside).nonzero().squeeze(-1)
        for level, cells in enumerate(levels):
            if not len(rest):
                break
            scaled = y[rest].clamp(-1e6, 1e6) * (2**level / WIDE)
            number = scaled.floor()
            rows = cells.rows(number.long())
            for some in (rows >= 0).nonzero().squeeze(-1).split(CHUNK):
                if cells.values is not None and len(some):
                    look_up(cells.values, rows[some], 2.0 * (scaled - number)[some] - 1.0, rest[some])
            rest = rest[rows < 0]
        return torch.cat([rest, outside])

    def _nats(self, level: int, number: int, places: Tensor) -> Tensor:
        y = WIDE / 2**level * (number + 0.5 * (places + 1.0))
        return y.sinh() if self._bound is None else torch.as_tensor(self._bound(y))

    def _summed(self, level: int, number: int) -> Tensor | None:
        nodes, between = _nodes(DEGREE_A), _between(DEGREE_A)
        values = self._cumulants(self._nats(level, number, torch.cat((nodes, between))))  # orders × places
        made = values[:, :DEGREE_A] @ _analysis(DEGREE_A).T
        error = (made @ _basis(between, DEGREE_A).T - values[:, DEGREE_A:]).abs().amax(-1)
        size, spread = values.abs().amax(-1), values[2].amax().sqrt() ** torch.arange(ORDERS)
        allowed = BOUND * spread * 10.0 ** torch.arange(ORDERS) + 1e-13 * size
        return made if bool((error <= allowed).all()) else None

    def _drawn(self, level: int, number: int) -> Tensor | None:
        nodes, between = _nodes(DEGREE), _between(DEGREE)
        nats = self._nats(level, number, torch.cat((nodes, between)))
        columns = torch.arange(-REACH, REACH, dtype=torch.float64)[:, None]
        places = torch.cat((_nodes(DEGREE_U), _between(DEGREE_U)))
        t = columns + 0.5 * (places + 1.0)
        u = torch.sigmoid(t).reshape(-1, 1).expand(-1, len(nats))
        found = self._quantile(nats, u).reshape(2, *t.shape, len(nats)).movedim(1, 0).transpose(2, 3)
        made = torch.einsum("cfnt,mn,st->cfms", found[:, :, :DEGREE, :DEGREE_U], _analysis(DEGREE), _analysis(DEGREE_U))
        again = torch.einsum("cfms,nm,ts->cfnt", made, _basis(between, DEGREE), _basis(_between(DEGREE_U), DEGREE_U))
        error = (again - found[:, :, DEGREE:, DEGREE_U:]).abs()
        range_ = (found[REACH + 1, 0] - found[REACH - 2, 0]).abs().amax()  # quartiles lie at |t| = 1.1
        slope = found[REACH - 2 : REACH + 2, 1].abs().amax()
        rare = (8.0 - columns.abs()).clamp_max(0.0).exp()
        worst = (error.amax(2) * rare[:, :, None]).amax((0, 2))
        return made if bool(worst[0] <= BOUND * range_) and bool(worst[1] <= 100.0 * BOUND * slope) else None


class Tabulated(torch.autograd.Function):
    """A(λ) or a derivative from a table; its own derivative is the next one."""

    @staticmethod
    def forward(nat: Tensor, tables: Tables, order: int) -> Tensor:
        """The number for every weight."""
        return tables.cumulant(nat, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep λ."""
        nat, ctx.tables, ctx.order = inputs
        ctx.save_for_backward(nat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Times the next derivative."""
        (nat,) = ctx.saved_tensors
        if ctx.order + 1 >= ORDERS:
            raise NotImplementedError("log_partition: derivatives beyond the third are not tabulated; give A.")
        return grads[0] * cumulant(nat, ctx.tables, ctx.order + 1), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], nat: Tensor, tables: Tables, order: int
    ) -> tuple[Tensor, int | None]:
        """Entry by entry, whatever the axes are."""
        return cumulant(nat, tables, order), in_dims[0]


def cumulant(nat: Tensor, tables: Tables, order: int) -> Tensor:
    """A(λ) or its derivative of this order, with its derivatives."""
    value: Tensor = Tabulated.apply(nat, tables, order)
    return value


# ---- Chebyshev polynomials on [−1, 1] -----------------------------------------------------------------------------


@cache
def _nodes(count: int) -> Tensor:
    return torch.tensor(np.cos(np.pi * (np.arange(count) + 0.5) / count)[::-1].copy())


@cache
def _between(count: int) -> Tensor:
    """Where the error of interpolation is looked at: near the middle and at an end, where it is largest."""
    nodes = _nodes(count)
    return torch.stack((0.5 * (nodes[count // 2] + nodes[count // 2 - 1]), nodes[0] * 0.0 - 1.0))


@cache
def _analysis(count: int) -> Tensor:
    """From values at the nodes to coefficients."""
    return torch.linalg.inv(_basis(_nodes(count), count))


def _basis(places: Tensor, count: int) -> Tensor:
    """The polynomials of degree below `count`, along a new last axis."""
    rows = [torch.ones_like(places), places]
    while len(rows) < count:
        rows.append(2.0 * places * rows[-1] - rows[-2])
    return torch.stack(rows, -1)
