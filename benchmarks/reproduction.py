"""Every number of docs/reproduction.md: from the output folder of `expfam-poco reproduce` into the repository.

    expfam-poco reproduce all --tune --workers 16 --output figures     # minutes on 16 cores, about an hour on two
    python benchmarks/reproduction.py figures                          # all figures that are there

Each figure's runs (thinned) go to `results/reproduction/NAME.json`, its picture to `docs/figures/`, its tables into the
page, and the rates that `--tune` has found to `expfam_poco/reproduce/rates.json`. Without a folder the tables alone are
written anew, from the JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expfam_poco.reproduce import table
from expfam_poco.reproduce.figures import FIGURES

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, PICTURES = ROOT / "benchmarks/results/reproduction", ROOT / "docs/reproduction.md", ROOT / "docs/figures"
RATES = ROOT / "expfam_poco/reproduce/rates.json"
KEPT = 12
"""Points of a curve that the repository keeps; the output folder has all."""


def thinned(content: dict[str, Any]) -> dict[str, Any]:
    """Every curve at so many points, the last among them."""
    for runs in content["runs"].values():
        for run in runs:
            for name, values in run["points"].items():
                every = -(-len(values) // KEPT)
                run["points"][name] = values[::-1][::every][::-1]
    return content


def take(folder: Path) -> list[str]:
    """Copy what a run of the command has left; the names of the figures found."""
    found = []
    shipped: dict[str, Any] = json.loads(RATES.read_text(encoding="utf-8")) if RATES.is_file() else {}
    for name in FIGURES:
        own = folder / f"{name}-small"
        if not (own / "results.json").is_file():
            continue
        content = thinned(json.loads((own / "results.json").read_text(encoding="utf-8")))
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(table.json_text(content), encoding="utf-8")
        PICTURES.mkdir(exist_ok=True)
        shutil.copy(own / f"{name}.png", PICTURES / f"{name}.png")
        if (own / "rates.json").is_file():
            shipped[name] = json.loads((own / "rates.json").read_text(encoding="utf-8"))
        found.append(name)
    RATES.write_text(table.json_text(shipped), encoding="utf-8")
    return found


def stored() -> dict[str, table.Results]:
    """All figures whose runs are in the repository."""
    paths = {name: RESULTS / f"{name}.json" for name in FIGURES}
    contents = {n: json.loads(p.read_text(encoding="utf-8")) for n, p in paths.items() if p.is_file()}
    return {name: table.from_content(FIGURES[name], content) for name, content in contents.items()}


def tables(known: Mapping[str, table.Results]) -> dict[str, str]:
    """The page's tables by name."""
    found = {"summary": table.markdown(summary(known))}
    for name, results in known.items():
        parts = [
            f"![{results.figure.title}](figures/{name}.png)",
            f"{results.scale.about[0].upper()}{results.scale.about[1:]}. {len(results.seeds)} seeds.",
        ]
        if results.scale.cells:
            parts.append(table.markdown(table.cell_rows(results)))
        parts += [table.markdown(table.claim_rows(results)), table.markdown(table.curve_rows(results))]
        found[name] = "\n\n".join(parts)
    return found


def summary(known: Mapping[str, table.Results]) -> list[list[str]]:
    """Every claim and its verdict."""
    rows = [["claim", "where", "verdict"]]
    for results in known.values():
        paper = "VSGD-G " if results.figure.name.startswith("vsgd") else ""
        for claim in results.figure.claims:
            rows.append([claim.text, paper + claim.place, f"**{table.verdict(results, claim)}**"])
    return rows


def write(found: Mapping[str, str], page: Path = PAGE) -> None:
    """Put the tables between their comments."""
    text = page.read_text(encoding="utf-8")
    for name, content in found.items():
        pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, content=content: f"{m[1]}\n{content}\n\n{m[2]}", text)
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Take what is there, and write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the --output of `expfam-poco reproduce`")
    folder = parser.parse_args().folder
    if folder is not None:
        names = take(folder)
        if not names:
            sys.exit(f"{folder}: no figure is there; run `expfam-poco reproduce all --output {folder}` first.")
        print("taken:", ", ".join(names))
    write(tables(stored()))


if __name__ == "__main__":
    main()
