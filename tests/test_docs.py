"""Everything the documentation shows is executed: the pages' snippets and the doctests of every module.

In README.md and docs/ every ```python, ```pycon, ```bash and ```console snippet runs, in the order of its
page and in one empty folder. The Python snippets of a page share one namespace; one whose first line is the
comment `# name.py` is the content of that file instead, which later ones import. A ```bash or ```console
snippet calls `expfam-poco` or pytest; output shown in a ```console or ```pycon snippet is compared, and may be
shortened by `...`. A shell snippet that cannot run here says why, directly above it:

    <!-- not run: the reason -->
"""

import doctest
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = {
    ".".join((installed, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder, installed in (("expfam_poco", "expfam_poco"), ("families", "expfam_poco.families"))
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__main__.py"
}
LOOPS_OF_OTHERS = re.compile(r"^\s*(?:>>> )?(?:from|import) (?:accelerate|lightning|peft|transformers)\b", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NOT_RUN = re.compile(r"<!--\s*not run:\s*\S.*-->", re.DOTALL)


class Snippet(NamedTuple):
    """A fenced block of a page that is to be executed."""

    language: str
    source: str
    line: int


def snippets(page: Path) -> Iterator[Snippet]:
    """The page's snippets in order, without those marked as not run."""
    above = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        language = token.info.split()[0] if token.info.split() else ""
        if token.type == "fence" and language in {"python", "pycon", "bash", "console"}:
            assert token.map is not None
            line = token.map[0] + 2
            comment = above.content.strip() if above is not None and above.type == "html_block" else ""
            if NOT_RUN.fullmatch(comment) is None:
                yield Snippet(language, token.content, line)
            elif language in {"python", "pycon"}:
                raise ValueError(f"{page.name}:{line}: only shell snippets may be marked as not run")
        above = token


def run_doctest(test: doctest.DocTest) -> None:
    """Run the examples of one docstring and fail with doctest's own account of what differs."""
    account: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=account.append, clear_globs=False)
    assert not runner.failures, "".join(account)


def run_shell(command: str, folder: Path) -> str:
    """Output of a command in the environment of the tests; it must succeed without a warning."""
    environment = os.environ | {
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))),
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Warning:" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stdout


def run_console(text: str, folder: Path) -> None:
    """Run the lines after `$ `, and compare the output shown after each, if any."""
    for block in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = block.partition("\n")
        printed = run_shell(command, folder)
        if shown.strip():
            same = doctest.OutputChecker().check_output(shown.strip() + "\n", printed.strip() + "\n", FLAGS)
            assert same, f"$ {command}\nshown:\n{shown}\nprinted:\n{printed}"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; what the code registers or draws is forgotten afterwards."""
    registry = importlib.import_module("expfam_poco.family.registry")
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def grouped(value: Any, name: str, text: str) -> Any:
    """A parameter; what imports the packages of others' loops is left to the one worker that has them."""
    marks = [pytest.mark.xdist_group("loops of others")] if LOOPS_OF_OTHERS.search(text) else []
    return pytest.param(value, id=name, marks=marks)


@pytest.mark.parametrize(
    "page", [grouped(page, page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")) for page in PAGES]
)
def test_snippets_of_page_run(page: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = types.ModuleType(f"snippets_of_{page.stem.lower().replace('-', '_')}")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)
    for language, source, line in snippets(page):
        where = f"{page.relative_to(ROOT)}:{line}"
        file = re.match(r"# (\w+\.py)\n", source)
        if language == "python" and file is not None:
            (scratch / file[1]).write_text(source, encoding="utf-8")
        elif language == "python":
            # The empty lines make tracebacks, and inspect.getsource, point at the page.
            code = compile("\n" * (line - 1) + source, str(page), "exec", dont_inherit=True)
            exec(code, vars(namespace))
        elif language == "pycon":
            parsed = doctest.DocTestParser().get_doctest(source, vars(namespace), where, str(page), line - 1)
            run_doctest(parsed)
        else:
            first = source.removeprefix("$ ") if language == "console" else source
            assert first.startswith(("expfam-poco", "python -m pytest")), (
                f"{where}: a {language} snippet calls expfam-poco or pytest, or says above why it is not run: "
                "<!-- not run: reason -->"
            )
            if language == "bash":
                run_shell(source, scratch)
            else:
                run_console(source, scratch)


@pytest.mark.parametrize(
    "name", [grouped(name, name, MODULES[name].read_text(encoding="utf-8")) for name in sorted(MODULES)]
)
def test_doctests_of_module(name: str, scratch: Path) -> None:
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module):
        run_doctest(test)


def test_reader_of_pages(tmp_path: Path) -> None:
    """The reader of pages itself: languages, marks, line numbers."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nx = 1\n```\n\n<!-- not run: long -->\n```bash\nexpfam-poco compare\n```\n\n"
        "```bash\nexpfam-poco families\n```\n\n```text\nno\n```\n",
        encoding="utf-8",
    )
    found = list(snippets(page))
    assert found == [Snippet("python", "x = 1\n", 4), Snippet("bash", "expfam-poco families\n", 13)]
