"""Families by name: the built-in ones and third parties' through entry points, one's own by a decorator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from expfam_poco.family import hyperparameters
from expfam_poco.family.base import ExponentialFamily

GROUP = "expfam_poco.families"
FamilyClass = TypeVar("FamilyClass", bound=type[ExponentialFamily])

_registered: dict[str, type[ExponentialFamily]] = {}
# Those found by an entry point before: reading what all installed packages offer takes milliseconds.
_installed: dict[str, type[ExponentialFamily]] = {}


def register(name: str) -> Callable[[FamilyClass], FamilyClass]:
    """Class decorator that registers a family under `name`.

    Raises:
        ValueError: if another class has the name already, or it is not a Python identifier in lower case.
        TypeError: if the class is not an `ExponentialFamily`.

    Example:
        >>> import expfam_poco as poco
        >>> base = poco.get_family("diagonal_gaussian")
        >>> @poco.register("my_gaussian")
        ... class MyGaussian(base): pass
        >>> "my_gaussian" in poco.families_available()
        True
    """
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier() or name != name.lower():
        raise ValueError(f"name={name!r}: use a lower-case identifier such as 'my_family'.")

    def decorate(cls: FamilyClass) -> FamilyClass:
        if not (isinstance(cls, type) and issubclass(cls, ExponentialFamily)):
            raise TypeError(f"register({name!r}) decorates {cls!r}, which is not an ExponentialFamily class.")
        known = _find(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"name={name!r} is taken by {known.__module__}.{known.__qualname__}; choose another name.")
        _registered[name] = cls
        return cls

    return decorate


def families_available() -> list[str]:
    """The names of all registered families, in alphabetical order.

    Example:
        >>> import expfam_poco as poco
        >>> "bernoulli" in poco.families_available()
        True
    """
    return sorted({*_registered, *(point.name for point in entry_points(group=GROUP))})


def get_family(name: str) -> type[ExponentialFamily]:
    """The class registered under `name`.

    Raises:
        ValueError: for an unknown name; the sentence lists the known ones.

    Example:
        >>> import expfam_poco as poco
        >>> poco.get_family("bernoulli").__name__
        'Bernoulli'
    """
    found = _find(name)
    if found is None:
        known = ", ".join(families_available()) or "none; reinstall expfam_poco"
        raise ValueError(f"family={name!r} is not registered; known families: {known}.")
    return found


def resolve_family(choice: str | type[ExponentialFamily] | ExponentialFamily) -> ExponentialFamily:
    """A family instance from a name, a class or an instance.

    Example:
        >>> import expfam_poco as poco
        >>> poco.resolve_family("full_gaussian")
        FullGaussian()

    Raises:
        ValueError: for an unknown name.
        TypeError: for what is no family, or has hyperparameters that cannot be told apart (`hyperparameters.check`).
    """
    if isinstance(choice, ExponentialFamily):
        hyperparameters.check(choice)
        return choice
    cls = get_family(choice) if isinstance(choice, str) else choice
    if not (isinstance(cls, type) and issubclass(cls, ExponentialFamily)):
        raise TypeError(f"family={choice!r} is neither a registered name nor an ExponentialFamily.")
    return cls()


def name_of(family: ExponentialFamily) -> str:
    """The registered name of a family's class, or its import path if it has none."""
    for name, cls in _registered.items():
        if cls is type(family):
            return name
    return _installed_name(type(family))


@cache
def _installed_name(cls: type[ExponentialFamily]) -> str:
    module = cls.__module__
    for point in entry_points(group=GROUP):
        # Only the family's own package is imported: another one may be slow, or broken.
        if point.module.partition(".")[0] == module.partition(".")[0] and point.load() is cls:
            return point.name
    return f"{module}:{cls.__qualname__}"


def _find(name: str) -> type[ExponentialFamily] | None:
    for known in (_registered, _installed):
        if name in known:
            return known[name]
    for point in entry_points(group=GROUP):
        if point.name == name:
            loaded = point.load()
            if not (isinstance(loaded, type) and issubclass(loaded, ExponentialFamily)):
                raise TypeError(f"entry point {name!r} gives {loaded!r}, which is not an ExponentialFamily.")
            _installed[name] = loaded
            return loaded
    return None
