"""Scripts as a user runs them, but in this process, where what they import has been imported already."""

import importlib.util
import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch


class Done(NamedTuple):
    """What a script leaves."""

    returncode: int
    stdout: str
    stderr: str


def run_script(path: Path, *options: str) -> Done:
    """Run a script as `__main__` with these options; warnings are errors, as in every test."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", [str(path), *options]),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:  # as the interpreter treats its code
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    return Done(code, out.getvalue(), err.getvalue())


def load_script(path: Path) -> ModuleType:
    """A script as a module, for tests of its functions; its processes find it by name."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
