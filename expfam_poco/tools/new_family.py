"""What `expfam-poco new-family` writes: a small family that keeps the laws, every line with what to change in it."""

from __future__ import annotations

import builtins
import keyword
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from expfam_poco.errors import InputError

TAKEN = ("ClassVar", "FamilyLaws", "NamedTuple", "Tensor")  # what the two files import

FAMILY = '''"""The NAME family; say here what its weights are.

Written below is the exponential density q(θ) = r e^(−rθ) of positive weights. In the general form

    q(θ) = h(θ) exp(⟨λ, T(θ)⟩ − A(λ))

it has T(θ) = θ, λ = −r, A(λ) = −log(−λ) and h = 1. Write your density in this form, change the lines below as
their comments say, and run `python -m pytest test_MODULE.py`, which names the first law that does not hold.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

import expfam_poco as poco


class CLASSStatistics(NamedTuple):
    """The fields of T(θ), which are those of λ, too."""

    theta: Tensor  # one line for each statistic; name θ itself theta, others as you like


@poco.register("NAME")  # the name that optimizers know it by
@dataclass(frozen=True)  # hyperparameters, if any, become fields: `width: float = 0.1`
class CLASS(poco.ExponentialFamily):
    """Positive weights, exponentially distributed."""

    Statistics = CLASSStatistics  # the type above
    support = constraints.positive  # where θ lives: constraints.real, positive, unit_interval, …
    domain: ClassVar = {"theta": constraints.less_than(0.0)}  # where λ lives, field by field; leave out what is real
    noise_kind = "uniform"  # what `sample` transforms: "normal", "uniform" in (0, 1), or "logistic"

    def statistics(self, theta):
        """T(θ)."""
        return CLASSStatistics(theta)  # one value for each field

    def log_base_measure(self, theta):
        """log h(θ)."""
        return torch.zeros_like(theta)  # whatever of log q depends on θ alone

    def expected_log_base_measure(self, state):
        """E_q[log h(θ)]."""
        return torch.zeros_like(state.theta)  # the mean of the line above, as a function of λ

    def log_partition(self, nat):
        """A(λ)."""
        return -torch.log(-nat.theta)  # with its constants; its gradient must be E_q[T], which is not yours to write

    def sample(self, state, noise):
        """θ ~ q, a function of λ and the noise."""
        return torch.log(noise) / state.theta  # differentiable in λ, and inside the support for every noise

    def centred_at(self, theta, precision=None):
        """The member whose point is θ; with a `precision`, the prior of that strength around θ (0: no pull)."""
        strength = 1.0 if precision is None else precision  # what `weight_decay` becomes: ess · weight_decay
        return CLASSStatistics(-strength / theta)  # λ

    def point(self, state):
        """What the model holds between steps."""
        return -1.0 / state.theta  # the mean, the median or the mode; `centred_at` must come back to it
'''

TESTS = '''"""The laws of the NAME family, one test for each, and a search for members near the edges that break one."""

from MODULE import CLASS

from expfam_poco.checks import FamilyLaws


class TestCLASS(FamilyLaws):
    """Run by `python -m pytest test_MODULE.py`."""

    family = CLASS()
    # strengths = (1e-3, 1e3)  # the precisions that the family is meant for, where 1e-6 to 1e6 are too many
'''


def write_family(name: str, folder: Path) -> tuple[str, Path, Path]:
    """Write a starting family and its tests.

    Args:
        name: what optimizers will call the family, in lower case; the module has it with _ for -.
        folder: where both files go.

    Returns:
        the name of the class, the family's file, and its tests' file.

    Raises:
        InputError: for a name that is taken or no name, a folder that is missing, or files that exist.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made, family, tests = write_family("half-normal", Path(folder))
        ...     made, family.name, tests.name
        ('HalfNormal', 'half_normal.py', 'test_half_normal.py')
    """
    module = name.replace("-", "_")
    _check_name(name, module)
    if not folder.is_dir():
        raise InputError(f"--folder {folder}: there is no such folder; make it first.")
    files = folder / f"{module}.py", folder / f"test_{module}.py"
    for file in files:
        if os.path.lexists(file):  # a link to nowhere, too
            raise InputError(f"{file} exists, and is not overwritten; choose another name or another --folder.")
    made = "".join(word.capitalize() for word in module.split("_"))
    _check_free(name, module, made)
    written: list[Path] = []
    for file, template in zip(files, (FAMILY, TESTS), strict=True):
        text = template.replace("NAME", name).replace("MODULE", module).replace("CLASS", made)
        try:
            with file.open("x", encoding="utf-8") as opened:
                written.append(file)
                opened.write(text)
        except OSError as error:
            for half in written:
                half.unlink(missing_ok=True)
            raise InputError(f"{file}: cannot be written ({error.strerror}); choose another --folder.") from error
    return made, *files


def _check_name(name: str, module: str) -> None:
    words = name == name.lower() and module.isascii() and module.isidentifier() and not keyword.iskeyword(module)
    if not words or not module[0].isalpha() or module.startswith("test_"):
        raise InputError(f"name {name!r}: use lower-case letters, digits, - and _, such as 'half-normal'.")


def _check_free(name: str, module: str, made: str) -> None:
    """A file of a module's name would hide the module, and a class another one."""
    from expfam_poco.family.registry import families_available

    if name in families_available():
        raise InputError(f"name {name!r}: a family of this name is registered already; choose another one.")
    if keyword.iskeyword(made) or keyword.issoftkeyword(module) or hasattr(builtins, made):
        raise InputError(f"name {name!r}: Python itself has {made!r} or {module!r}; choose another name.")
    if module == "conftest" or made in TAKEN:
        raise InputError(f"name {name!r}: the files it writes use this name for something else; choose another one.")
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise InputError(f"name {name!r}: {module}.py would hide the module {module!r}; choose another name.")
