"""Pages that a tool writes: notebooks of prose with the header of every chapter, kept in step by `--check`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import chapter_header
from contents import read_contents
from notebooks import read_notebook, source, write_notebook

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def written_page(name: str, title: str, texts: Sequence[str]) -> dict:
    """A notebook: its title and subtitle with the badge, the set-up cell, and a cell for each text."""
    badge = chapter_header.badge(name, chapter_header.settings())
    cells = [_markdown(text) for text in (f"{title}\n\n{badge}", *texts)]
    notebook = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    return chapter_header.corrected(notebook, name, chapter_header.settings())


def _markdown(text: str) -> dict:
    name = hashlib.sha256(text[:200].encode()).hexdigest()[:8]
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}


def write_or_check(path: Path, fresh: dict, tool: str) -> int:
    """Write the page, or with --check on the command line say whether it is up to date; the exit status."""
    if "--check" not in sys.argv:
        write_notebook(fresh, path)
        return 0
    same = path.is_file() and read_notebook(path) == fresh
    print(f"{path.name} is up to date" if same else f"{path.name} is old: run python tools/{tool}")
    return 0 if same else 1


def prose(path: str) -> str:
    """The Markdown of a chapter, named as in the table of contents."""
    cells = read_notebook(ROOT / path)["cells"]
    return "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")


def titles() -> dict[str, str]:
    """The title of each chapter by its path, in reading order."""
    found = {}
    for path in read_contents(ROOT).chapters:
        heading = next(line for line in prose(path).splitlines() if line.startswith("# "))
        found[path] = heading.removeprefix("# ").removeprefix("▶ ")
    return found
