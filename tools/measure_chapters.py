"""Cells, code, prose, figures and bytes of every chapter: python tools/measure_chapters.py [NOTEBOOK ...].

Words are those of the Markdown outside code blocks; an inline formula counts as one word, a displayed one as none.
Lines of code are those that the book shows: not blank, not in a cell with `#| include: false`, directives left out.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from notebooks import code_cells, read_notebook, source

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*?$|\$\$.+?\$\$", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"\$[^$\n]+\$")
_ADDRESS = re.compile(r"\]\([^)]*\)|<[^>]+>")
_WORD = re.compile(r"[^\W\d_][\w'’-]*|\d[\d.,]*")


class Measures(NamedTuple):
    """What one notebook holds."""

    cells: int
    lines: int  # of code that the book shows
    words: int
    figures: int  # pictures, animations and Explorers
    explorers: int
    output_bytes: int

    @property
    def words_per_line(self) -> float:
        """Prose beside code."""
        return self.words / max(self.lines, 1)


def count_words(markdown: str) -> int:
    """Words of prose; an inline formula is one."""
    text = _FORMULA.sub(" formula ", _FENCE.sub("", markdown))
    return len(_WORD.findall(_ADDRESS.sub(" ", text)))


def shown_lines(cell: dict) -> int:
    """Lines of code that a reader of the book sees."""
    if re.search(r"^#\|\s*include:\s*false", source(cell), re.MULTILINE):
        return 0
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source(cell).splitlines())


def measure(notebook: dict) -> Measures:
    """The measures of a notebook."""
    code = code_cells(notebook)
    prose = "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    shown = [output.get("data", {}) for cell in code for output in cell["outputs"]]
    html = ["".join(data.get("text/html", "")) for data in shown]
    explorers = sum('class="explorer"' in text for text in html)
    drawn = sum("image/png" in data or "image/svg+xml" in data for data in shown)
    pictures = drawn + sum(
        "<figure" in text and "image/png" not in data for text, data in zip(html, shown, strict=True)
    )
    size = sum(len(json.dumps(cell["outputs"], ensure_ascii=False).encode()) for cell in code)
    return Measures(len(notebook["cells"]), sum(map(shown_lines, code)), count_words(prose), pictures, explorers, size)


def row(name: str, found: Measures) -> str:
    """One line of the table."""
    size = f"{found.output_bytes / 1000:.0f}"
    told = (name, found.cells, found.lines, found.words, f"{found.words_per_line:.1f}", found.figures, found.explorers)
    return "| " + " | ".join(map(str, (*told, size))) + " |"


def main(names: list[str]) -> None:
    """Print a table in Markdown, the chapters first."""
    paths = [Path(name) for name in names] or sorted((ROOT / "nbs").glob("*.ipynb"))
    print("| notebook | cells | lines | words | words per line | figures | Explorers | outputs, KB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    found = {path.stem: measure(read_notebook(path)) for path in paths}
    for name, measures in found.items():
        print(row(name, measures))
    ratios = [measures.words_per_line for name, measures in found.items() if name[0].isdigit()]
    if len(ratios) > 1:
        print(f"\nchapters: {len(ratios)}, words per line: median {statistics.median(ratios):.1f}, ", end="")
        print(f"from {min(ratios):.1f} to {max(ratios):.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
