"""A closure that says which rows of local parameters its batch has used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from expfam_poco.arguments import shown
from expfam_poco.closures.evaluate import Accumulated


class Rows:
    """A batch's closure, and the rows of *local* parameters that it has used: those of a plate of which it is a part.

    Only these rows are decayed and stepped; all others keep their posterior. The loss is the batch's mean as always, an
    estimate of the mean over all G rows, so that ess times it counts each of the batch's B rows G/B times; for the rows
    themselves this is undone.

    Args:
        closure: returns the mean loss of the batch.
        rows: by parameter or its name, the numbers of the rows (along the first axis), each once.

    Example:
        >>> import torch, expfam_poco as poco
        >>> z = torch.nn.Parameter(torch.zeros(100))                # one latent of each of 100 groups
        >>> y = torch.ones(100)
        >>> opt = poco.PosteriorCorrected([("z", z)], "diagonal_gaussian", lr=0.5, ess=100.0, weight_decay=0.01, seed=0)
        >>> batch = torch.tensor([3, 7])
        >>> _ = opt.step(poco.Rows(lambda: (z[batch] - y[batch]).square().mean(), {"z": batch}))
        >>> (opt.posterior_states()["z"].precision != 1.0).nonzero().flatten()
        tensor([3, 7])
    """

    def __init__(self, closure: Callable[[], Any], rows: Mapping[Any, Tensor]) -> None:
        if not callable(closure):
            raise TypeError(f"closure={shown(closure)}: give a function that returns the batch's mean loss.")
        if not isinstance(rows, Mapping) or not rows:
            raise TypeError(f"rows={shown(rows)}: give a dictionary from parameters, or their names, to row numbers.")
        for name, numbers in rows.items():
            whole = isinstance(numbers, Tensor) and numbers.ndim == 1 and not numbers.is_floating_point()
            if not whole or numbers.dtype.itemsize == 1:
                raise TypeError(f"rows[{shown(name)}]={shown(numbers)}: give a tensor of row numbers, with one axis.")
        self.closure, self.rows = closure, dict(rows)

    def __call__(self) -> Any:
        """The closure's loss."""
        return self.closure()


def rows_of(closure: Any) -> list[Mapping[Any, Tensor]]:
    """What a closure, or each of those that are accumulated, says of rows; {} where it says nothing."""
    if isinstance(closure, Accumulated):
        return [rows for part in closure.closures for rows in rows_of(part)]
    return [closure.rows if isinstance(closure, Rows) else {}]
