"""The one exception that the command line shows as a sentence."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input from the user: one sentence that names the argument, its value and the remedy."""
