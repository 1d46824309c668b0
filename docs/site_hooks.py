"""What MkDocs is told beyond its settings: pages that live outside of docs/, and links to files that are no pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]*)(#[^)]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the benchmarks' results, and their pictures, as a page."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "benchmarks.md", content=results))
    for picture in sorted((ROOT / "benchmarks").rglob("*.png")):
        where = picture.relative_to(ROOT / "benchmarks").as_posix()
        files.append(File.generated(config, where, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Let links to RESULTS.md find its page, and name other files of the repository instead of linking to them."""

    def turned(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if target == "benchmarks/RESULTS.md":
            return f"[{label}](benchmarks.md{anchor})"
        return match[0] if (ROOT / "docs" / target).exists() else f"{label} (`{target}`)"

    return OUTSIDE.sub(turned, markdown)
