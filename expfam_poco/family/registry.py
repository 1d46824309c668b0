"""Families by name: the built-in ones and third parties' through entry points, one's own by a decorator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from expfam_poco.arguments import shown
from expfam_poco.family import hyperparameters
from expfam_poco.family.base import ExponentialFamily

GROUP = "expfam_poco.families"
FamilyClass = TypeVar("FamilyClass", bound=type[ExponentialFamily])


class FamilyImportError(ValueError, ImportError):
    """An installed package offers a family that cannot be imported.

    Example:
        >>> from expfam_poco.family.registry import FamilyImportError
        >>> issubclass(FamilyImportError, ValueError)
        True
    """


_registered: dict[str, type[ExponentialFamily]] = {}
# Those found by an entry point before: reading what all installed packages offer takes milliseconds.
_installed: dict[str, type[ExponentialFamily]] = {}


def register(name: str) -> Callable[[FamilyClass], FamilyClass]:
    """Class decorator that registers a family under `name`.

    Args:
        name: a Python identifier in lower case.

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
        taken = _taken(name, cls)
        if taken is not None:
            raise ValueError(f"name={name!r} is taken by {taken}; choose another name.")
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

    Args:
        name: one of `families_available()`.

    Raises:
        ValueError: for an unknown name; the sentence lists the known ones. As `FamilyImportError` for a plug-in that
            cannot be imported, which leaves the others alone.

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

    Args:
        choice: a registered name, a class that takes no arguments, or a family.

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
        raise TypeError(f"family={shown(choice)} is neither a registered name nor an ExponentialFamily.")
    lacking = sorted(getattr(cls, "__abstractmethods__", ()))
    if lacking:
        raise TypeError(f"family: {cls.__name__} lacks {', '.join(lacking)}; write it (docs/add-a-family.md).")
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
        if _package(point.module) == _package(module) and point.attr.rpartition(".")[2] == cls.__name__:
            try:
                if point.load() is cls:
                    return point.name
            except Exception:  # a broken module of the same package, or one that is being imported
                continue
    return f"{module}:{cls.__qualname__}"


def _package(module: str) -> str:
    return module.partition(".")[0]


def _taken(name: str, cls: type[ExponentialFamily]) -> str | None:
    """What else has this name, if anything has.

    An entry point of the class's own package is not loaded: its module is being imported just now, if the class is
    registered in it.
    """
    for known in (_registered.get(name), _installed.get(name)):
        if known is not None:
            same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
            return None if same else f"{known.__module__}.{known.__qualname__}"
    for point in entry_points(group=GROUP):
        if point.name != name:
            continue
        if _package(point.module) == _package(cls.__module__):
            return None if point.attr == cls.__qualname__ else point.value.replace(":", ".")
        try:
            known = _find(name)
        except Exception:  # it is broken, and has the name all the same
            return point.value.replace(":", ".")
        return None if known is None else f"{known.__module__}.{known.__qualname__}"
    return None


def _find(name: str) -> type[ExponentialFamily] | None:
    for known in (_registered, _installed):
        if name in known:
            return known[name]
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                loaded = point.load()
            except Exception as error:
                where = "" if point.dist is None else f" of the package {point.dist.name}"
                raise FamilyImportError(
                    f"family={name!r}: {point.value}{where} cannot be imported ({type(error).__name__}: {error}); mend "
                    "or uninstall it. Other families are not touched."
                ) from error
            if not (isinstance(loaded, type) and issubclass(loaded, ExponentialFamily)):
                raise TypeError(f"entry point {name!r} gives {loaded!r}, which is not an ExponentialFamily.")
            _installed[name] = loaded
            return loaded
    return None
