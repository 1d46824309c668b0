"""A user's CSV file as features and labels, read with the standard library; every defect is one clear sentence."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expfam_poco.errors import InputError

DELIMITERS = ",;\t"
MOST_CLASSES = 50
MISSING = frozenset(("", "nan", "-nan", "na", "n/a", "#n/a", "#na", "<na>", "none", "null", "nil", "nat", "?"))
"""How people and programs write that there is no label, in lower case."""
SHOWN_COLUMNS = 20


class Table(NamedTuple):
    """Features (N × d), labels (N class numbers), names of the classes, names of columns left out as constant."""

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    constant: tuple[str, ...]


def read_table(path: Path, target: str) -> Table:
    """Read a CSV file with a header line, numeric features and any labels in column `target`.

    The delimiter is the one of comma, semicolon and tab that the header line has most of. Columns that hold one
    value only say nothing beside the intercept and are left out.

    Raises:
        InputError: for whatever is wrong with the file, with line and column.
    """
    header, rows = _read_rows(path)
    if target not in header:
        shown = ", ".join(header[:SHOWN_COLUMNS]) + (", …" if len(header) > SHOWN_COLUMNS else "")
        raise InputError(f"--target {target!r}: {path} has no such column; its columns are {shown}.")
    where = header.index(target)
    names = [name for name in header if name != target]
    if not names:
        raise InputError(f"--data {path}: the target {target!r} is its only column; add feature columns.")
    features = np.empty((len(rows), len(names)))
    texts = []
    for index, (line, cells) in enumerate(rows):
        texts.append(_label(cells[where], path, line, target))
        values = cells[:where] + cells[where + 1 :]
        features[index] = [_number(cell, path, line, name) for cell, name in zip(values, names, strict=True)]
    labels, classes = _classes(texts, path, target)
    varies = np.ptp(features, axis=0) > 0.0
    if not varies.any():
        raise InputError(f"--data {path}: every feature column is constant; add columns that vary.")
    constant = tuple(name for name, keep in zip(names, varies, strict=True) if not keep)
    return Table(features[:, varies], labels, classes, constant)


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and every row that is not blank with its line number; rows are as long as the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"--data {path}: there is no such file; check the path.") from None
    except IsADirectoryError:
        raise InputError(f"--data {path}: this is a folder; give a CSV file.") from None
    except UnicodeDecodeError:
        raise InputError(f"--data {path}: this is not UTF-8 text; save it as a UTF-8 CSV file.") from None
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error.strerror}); check it and its rights.") from None
    first = text.lstrip().partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except csv.Error as error:
        raise InputError(f"--data {path}, line {reader.line_num}: not CSV ({error}); repair that line.") from None
    if len(lines) < 2:
        raise InputError(f"--data {path}: there are no rows below a header line; give at least two.")
    header = lines[0][1]
    _check_header(header, path)
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(
                f"--data {path}, line {line}: {len(cells)} cells where the header has {len(header)}; repair that line."
            )
    return header, lines[1:]


def _check_header(header: Sequence[str], path: Path) -> None:
    if not all(header):
        raise InputError(f"--data {path}: column {list(header).index('') + 1} has no name; name every column.")
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise InputError(f"--data {path}: column {twice[0]!r} appears twice; give every column its own name.")


def _label(cell: str, path: Path, line: int, target: str) -> str:
    if cell.lower() in MISSING:
        said = f" ({cell!r})" if cell else ""
        raise InputError(
            f"--data {path}, line {line}, column {target!r}: the label is missing{said}; fill it in or drop the row."
        )
    return cell


def _number(cell: str, path: Path, line: int, name: str) -> float:
    place = f"--data {path}, line {line}, column {name!r}"
    try:
        value = float(cell)
    except ValueError:
        if cell == "":
            raise InputError(f"{place}: the cell is empty; fill it in or drop the row.") from None
        raise InputError(f"{place}: {cell!r} is not a number; encode the column as numbers or drop it.") from None
    if not math.isfinite(value):
        raise InputError(f"{place}: {cell!r} is not a finite number; fill it in or drop the row.")
    return value


def _classes(texts: Sequence[str], path: Path, target: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and names; names are sorted as numbers where all of them are."""
    try:
        names = sorted(set(texts), key=float)
    except ValueError:
        names = sorted(set(texts))
    if len(names) < 2:
        raise InputError(
            f"--target {target!r}: every row of {path} has the label {names[0]!r}; "
            "classification needs at least two classes."
        )
    if len(names) > MOST_CLASSES:
        raise InputError(
            f"--target {target!r}: {len(names)} different values in {path} are no classes; "
            f"choose a column with at most {MOST_CLASSES}."
        )
    number = {name: index for index, name in enumerate(names)}
    return np.array([number[text] for text in texts]), tuple(names)
