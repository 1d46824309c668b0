"""The built-in corrections by name."""

from __future__ import annotations

from collections.abc import Mapping

from expfam_poco.arguments import shown
from expfam_poco.correction.base import Correction
from expfam_poco.correction.recursive import Recursive
from expfam_poco.correction.snapshot import Snapshot
from expfam_poco.correction.stored import Stored
from expfam_poco.correction.transported import Transported

CORRECTIONS: Mapping[str, type[Correction]] = {
    "none": Correction,
    "snapshot": Snapshot,
    "stored": Stored,
    "recursive": Recursive,
    "transported": Transported,
}


def resolve_correction(choice: str | type[Correction] | Correction) -> Correction:
    """A correction from a name, a class or an object.

    Raises:
        ValueError: for an unknown name; the sentence lists the known ones.
        TypeError: for what is no correction.

    Example:
        >>> import expfam_poco as poco
        >>> poco.correction.resolve_correction("transported")
        Transported(gamma=0.1)
    """
    if isinstance(choice, Correction):
        return choice
    if isinstance(choice, str):
        if choice not in CORRECTIONS:
            known = ", ".join(map(repr, CORRECTIONS))
            raise ValueError(f"correction={choice!r} is unknown; give one of {known}, or a Correction.")
        return CORRECTIONS[choice]()
    if not (isinstance(choice, type) and issubclass(choice, Correction)):
        raise TypeError(f"correction={shown(choice)} is neither a name nor a Correction.")
    return choice()
