"""Docstrings as the site's reader takes them: their examples are code."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Calls the section `Example:` what Griffe parses as code, `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of every object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
