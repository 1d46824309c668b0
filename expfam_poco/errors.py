"""What can go wrong, as exceptions."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was NaN or infinite; the weights and the posterior are as they were, unless `stepped`.

    `stepped` is true after a step in place (of a large model) that was taken but for some weights whose new numbers
    would not have been finite.

    Example:
        >>> import torch, expfam_poco as poco
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> opt = poco.IVON([weight], lr=0.1, ess=8.0)
        >>> try:
        ...     opt.step(lambda: (weight / 0.0).sum())
        ... except poco.NonFiniteError:
        ...     print(weight.data)
        tensor([0., 0.])
    """

    loss: Tensor = torch.tensor(float("nan"))
    stepped: bool = False


class CheckpointError(ValueError):
    """A state_dict does not belong to this optimizer; the sentence names the entry. Nothing was loaded.

    Example:
        >>> import torch, expfam_poco as poco
        >>> opt = poco.IVON([torch.nn.Parameter(torch.zeros(2))], lr=0.1, ess=8.0)
        >>> try:
        ...     opt.load_state_dict({"state": {}, "param_groups": []})
        ... except poco.CheckpointError as error:
        ...     print(str(error).split(":")[0])
        state_dict['poco']
    """


class LawError(AssertionError):
    """A family breaks a law; `report` holds all results.

    Example:
        >>> import expfam_poco as poco
        >>> issubclass(poco.LawError, AssertionError)
        True
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class InputError(ValueError):
    """Wrong input from the user: one sentence that names the argument, its value and the remedy.

    Example:
        >>> import expfam_poco.errors
        >>> issubclass(expfam_poco.errors.InputError, ValueError)
        True
    """


class Skips:
    """Counts steps that were skipped one after the other, and says so once there are many: training stands still."""

    MANY = 10

    def __init__(self) -> None:
        self._in_a_row = 0

    def stepped(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def skipped(self, error: Exception) -> None:
        """A step was skipped because of this."""
        self._in_a_row += 1
        if self._in_a_row == self.MANY:
            warnings.warn(
                f"nonfinite='skip': the last {self.MANY} steps were all skipped, so that nothing is trained; the last "
                f"one because: {error}",
                UserWarning,
                stacklevel=4,
            )
