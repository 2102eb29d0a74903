"""The page "References", from references.bib and the chapters: python tools/references.py writes it, --check compares."""

from __future__ import annotations

import sys
from pathlib import Path

from citations import Entry, links, read_entries
from written import ROOT, prose, titles, write_or_check, written_page

PAGE = ROOT / "nbs" / "A9_references.ipynb"
TITLE = "# References\n\n> Every publication that the book leads to, and the chapters that do"
HEAD = """\
**You will be able to**

- find a paper that a chapter names, with all its authors and the place where it appeared;
- go from a paper to the chapters that use it.

**Builds on** all chapters · **Exports** nothing · **Takes** no time.

Papers change their year: a preprint comes before the proceedings. The year here is that of the version that is named,
and the link leads to one that everybody can read where there is one."""
HOME = """\
## How to cite this book

```bibtex
@misc{diffusionbook,
  title        = {Diffusion Book},
  author       = {{The authors of Diffusion Book}},
  howpublished = {https://github.com/diffusion-book/diffusion-book}
}
```"""


def cited_in(entries: list[Entry]) -> dict[str, list[str]]:
    """For each entry the chapters that lead to it, as links."""
    found: dict[str, list[str]] = {entry.url: [] for entry in entries}
    for path, title in titles().items():
        if path.endswith(PAGE.name):
            continue
        addresses = {address for _, _, address in links(prose(path))}
        for address in addresses & found.keys():
            found[address].append(f"[{title}]({Path(path).name})")
    return found


def item(entry: Entry, chapters: list[str]) -> str:
    """One line of the list."""
    place = f" {entry.place}." if entry.place else ""
    where = f" In {', '.join(chapters)}." if chapters else ""
    return f"- {', '.join(entry.authors)} ({entry.year}). [{entry.title}]({entry.url}).{place}{where}"


def page() -> dict:
    """The notebook."""
    entries = sorted(read_entries(ROOT / "references.bib"), key=lambda e: (e.surnames[0].lower(), e.year, e.title))
    chapters = cited_in(entries)
    items = "\n".join(item(entry, chapters[entry.url]) for entry in entries)
    return written_page(PAGE.name, TITLE, [HEAD, f"## Publications\n\n{items}", HOME])


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(), "references.py"))
