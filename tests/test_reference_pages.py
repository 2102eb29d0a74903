"""The pages one looks things up in: every record is listed, every slip is shown, every term leads to a chapter."""

from __future__ import annotations

import json
import re

from conftest import ROOT


def cells(name: str) -> list[tuple[str, str]]:
    """Kind and text of each cell of a notebook."""
    notebook = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the Markdown tables in a text, without headings."""
    found = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    rules = [i for i, row in enumerate(found) if set(row[0]) <= {"-", " ", ":"}]
    return [row for i, row in enumerate(found) if i not in rules and i + 1 not in rules]


def test_every_record_is_on_the_results_page() -> None:
    (text,) = [text.partition("chapters = {")[2] for _, text in cells("A6_reproduce") if "chapters = {" in text]
    listed = dict(re.findall(r'^    "([\w\- ]+)": "(\w+)",$', text, flags=re.MULTILINE))
    names = [name for several in listed for name in several.split()]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "results").glob("*.json"))
    assert all((ROOT / "nbs" / f"{chapter}.ipynb").is_file() for chapter in listed.values())


def test_every_slip_is_shown_somewhere() -> None:
    found = cells("A7_errata")
    shown = [(row, i) for i, (kind, text) in enumerate(found) if kind == "markdown" for row in rows(text)]
    assert len(shown) > 50
    for (said, holds, where), place in shown:
        assert said and holds, where
        if where.startswith("below"):
            assert found[place + 1][0] == "code" and "assert " in found[place + 1][1], said
        else:
            assert re.search(r"\]\(\w+\.ipynb#[^)]+\)", where), f"{said}: name the section"


def test_terms_are_in_order_and_lead_to_a_chapter() -> None:
    text = "\n".join(text for kind, text in cells("A8_glossary") if kind == "markdown")
    lines = [line for line in text.splitlines() if line.startswith("- **")]
    terms = [re.fullmatch(r"- \*\*(.+?)\.\*\* (.+) → \[.+\]\((\w+)\.ipynb\)", line).groups() for line in lines]
    names = [name for name, _, _ in terms]
    assert names == sorted(names, key=str.lower) and len(set(names)) == len(names) > 40
    assert all((ROOT / "nbs" / f"{chapter}.ipynb").is_file() for _, _, chapter in terms)
