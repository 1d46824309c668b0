"""Who imports whom, read from the sources: what the tests of the structure share."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
IMPORTERS = {"import_module", "__import__", "find_spec", "resolve_name", "run_module"}


class Import(NamedTuple):
    """One import in a file: its line, the absolute `module` or `module.name`, and whether only type checkers see it."""

    line: int
    module: str
    for_types: bool


def installed(path: Path) -> tuple[str, ...]:
    """The parts of the name under which a file of the checkout is imported, `__init__` among them."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("expfam_poco", *parts) if parts[0] == "families" else parts


def called_name(call: ast.Call) -> str:
    """`f` of f(…), a.f(…) and a.b.f(…)."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def imports_of(path: Path, source: str | None = None) -> Iterator[Import]:
    """Every import statement in a file, wherever it stands, and every import by a string that stands there."""
    package = installed(path)[:-1]
    tree = ast.parse(source if source is not None else path.read_text(encoding="utf-8"), str(path))
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        typing = id(node) in for_types
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from (Import(node.lineno, f"{module}.{alias.name}", typing) for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in IMPORTERS:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                if isinstance(argument, ast.JoinedStr) and argument.values:
                    argument = argument.values[0]
                value = constants.get(argument.id) if isinstance(argument, ast.Name) else None
                value = argument.value if isinstance(argument, ast.Constant) else value
                if isinstance(value, str):
                    name = ".".join((*package, value[1:])) if value.startswith(".") else value
                    yield Import(node.lineno, name, typing)


def is_family(module: str) -> bool:
    """Whether this is the package of the built-in families, or something in it."""
    return re.match(r"(expfam_poco\.)?families(\.|$)", module) is not None


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other (those that reach themselves along more than one arrow)."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, waiting = set[str](), [start]
        while waiting:
            new = set(arrows.get(waiting.pop(), ())) - seen
            seen |= new
            waiting.extend(new)
        reached[start] = seen
    found = {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in arrows
        if node in reached[node]
    }
    return sorted(map(sorted, found))
