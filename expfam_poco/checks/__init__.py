"""Does a family, an estimator or a correction keep its laws?

`check_family` runs every law on a family and says which fails, by how much, and where to look; `FamilyLaws` is the same
as tests for pytest, and `check_correction` does it for a correction. Imports `family`, `rule` and `correction`.
"""

from expfam_poco.checks.correction_laws import CORRECTION_LAWS, check_correction
from expfam_poco.checks.pytest_laws import FamilyLaws
from expfam_poco.checks.suite import LAWS, LawResult, Report, check_family
from expfam_poco.errors import LawError

__all__ = [
    "CORRECTION_LAWS",
    "LAWS",
    "FamilyLaws",
    "LawError",
    "LawResult",
    "Report",
    "check_correction",
    "check_family",
]
