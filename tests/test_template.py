"""Every chapter has what a chapter has: picture, goals, what could go wrong, summary, exercises, further reading."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import measure_chapters
import pytest
from conftest import ROOT

ALL = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
CHAPTERS = [name for name in ALL if name[0].isdigit()]
APPENDIX = [name for name in ALL if re.match(r"A[1-4]_", name)]  # modules too; pages to look things up in are not
WORDS_PER_LINE = (6.0, 12.0)
Notebook = Mapping[str, Any]


def source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def prose(notebook: Notebook) -> str:
    return "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def section(text: str, title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def shows_a_picture(cell: Mapping[str, Any]) -> bool:
    """Whether a cell is, or has, a figure; the badge is none."""
    if cell["cell_type"] == "markdown":
        return bool(re.search(r"(?<!\[)!\[[^\]]+\]\(\.\./assets/", source(cell)))
    kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
    return bool(kinds & {"image/png", "image/jpeg", "image/svg+xml"})


def opening(notebook: Notebook) -> list[str]:
    """Goals, what the chapter builds on, what it exports and how long it takes."""
    head = prose(notebook).partition("\n## ")[0]
    goals = re.search(r"\*\*You will be able to\*\*\n\n((?:- .+\n(?:  .+\n)*)+)", head + "\n")
    count = len(re.findall(r"^- ", goals[1], re.MULTILINE)) if goals else 0
    wrong = [] if count == 3 else [f"{count} goals, three wanted"]
    return wrong + [
        f"the opening lacks **{word}**" for word in ("Builds on", "Exports", "Takes") if f"**{word}**" not in head
    ]


def picture_first(notebook: Notebook) -> list[str]:
    """There is a picture before the first section."""
    for cell in notebook["cells"]:
        before = source(cell).partition("\n## ")[0] if not source(cell).startswith("## ") else ""
        if shows_a_picture({**cell, "source": before} if cell["cell_type"] == "markdown" else cell):
            return []
        if cell["cell_type"] == "markdown" and re.search(r"^## ", source(cell), re.MULTILINE):
            break
    return ["no picture before the first section"]


def ending(notebook: Notebook) -> list[str]:
    """What could go wrong, as a table; a summary; four to six exercises; where to read on: in this order."""
    text, wrong = prose(notebook), []
    titles = ["What could go wrong", "Summary", "Exercises", "Further reading"]
    places = [text.find(f"\n## {title}\n") for title in titles]
    if -1 in places or places != sorted(places):
        wrong.append(f"the ends should be {', '.join(titles)}")
    if "| symptom | cause | cure |" not in section(text, titles[0]):
        wrong.append("what could go wrong has no table of symptom, cause and cure")
    if not section(text, "Summary"):
        wrong.append("the summary is empty")
    count = len(re.findall(r"^\d+\. ", section(text, "Exercises"), re.MULTILINE))
    if not 4 <= count <= 6:
        wrong.append(f"{count} exercises, four to six wanted")
    if not re.search(r"^- .*\]\(https?://", section(text, "Further reading"), re.MULTILINE):
        wrong.append("further reading leads nowhere")
    return wrong


@pytest.mark.parametrize("name", CHAPTERS + APPENDIX)
def test_the_opening(name: str) -> None:
    assert opening(ALL[name]) == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_picture_comes_first(name: str) -> None:
    assert picture_first(ALL[name]) == []


@pytest.mark.parametrize("name", CHAPTERS + APPENDIX)
def test_the_end(name: str) -> None:
    assert ending(ALL[name]) == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_nobody_is_left_alone_with_code(name: str) -> None:
    least, most = WORDS_PER_LINE
    assert least <= measure_chapters.measure(ALL[name]).words_per_line <= most


def test_explorers_are_in_every_part() -> None:
    homes = {name for name in CHAPTERS if measure_chapters.measure(ALL[name]).explorers}
    assert len(homes) >= 8
    assert {name[0] for name in homes} >= set("02345")  # the first digit tells the part, 46 and later are tools


@pytest.mark.parametrize("name", CHAPTERS)
def test_explorers_say_what_to_try(name: str) -> None:
    shown = [output.get("data", {}) for cell in ALL[name]["cells"] for output in cell.get("outputs", [])]
    figures = [text for data in shown if 'class="explorer"' in (text := "".join(data.get("text/html", "")))]
    assert all("<figcaption>" in text for text in figures)


# What is noticed


def cell(text: str, kind: str = "markdown", *outputs: dict) -> dict:
    made = {"cell_type": kind, "source": text, "metadata": {}}
    return made | {"outputs": list(outputs)} if kind == "code" else made


GOALS = "**You will be able to**\n\n- a;\n- b;\n- c.\n\n**Builds on** x · **Exports** y · **Takes** a minute."
END = (
    "## What could go wrong\n\n| symptom | cause | cure |\n| --- | --- | --- |\n| a | b | c |\n\n## Summary\n\nAll.\n\n"
    "## Exercises\n\n1. a\n2. b\n3. c\n4. d\n\n## Further reading\n\n- [x](https://example.org)"
)
PICTURE = cell("plot()", "code", {"output_type": "display_data", "data": {"image/png": ""}})


def whole(*cells: dict) -> dict:
    return {"cells": [cell("# T\n\n> s\n\n[![Open](../assets/x.svg)](y)"), *cells]}


def test_a_whole_chapter_passes() -> None:
    good = whole(cell(GOALS), PICTURE, cell("## One"), cell(END))
    assert opening(good) == picture_first(good) == ending(good) == []
    assert picture_first(whole(cell("![A tree](../assets/x.svg)\n\n## One"))) == []


@pytest.mark.parametrize(
    "rule, broken",
    [
        (opening, whole(cell(GOALS.replace("- b;\n", "")))),
        (opening, whole(cell(GOALS.replace("**Takes**", "takes")))),
        (opening, whole(cell(f"## One\n\n{GOALS}"))),
        (picture_first, whole(cell("## One"), PICTURE)),
        (picture_first, whole(cell("## One\n\n![A tree](../assets/x.svg)"))),
        (picture_first, whole(cell("text"))),
        (ending, whole(cell(END.replace("## Summary\n\nAll.", "")))),
        (ending, whole(cell(END.replace("All.", "")))),
        (ending, whole(cell(END.replace("4. d\n", "")))),
        (ending, whole(cell(END.replace("| symptom", "| sign")))),
        (ending, whole(cell(END.replace("[x](https://example.org)", "none")))),
    ],
)
def test_what_is_missing_is_noticed(rule, broken) -> None:
    assert rule(broken)


def test_words_and_lines_are_counted() -> None:
    page = whole(
        cell("Two words and $x^2$.\n\n$$a + b$$\n\n```\nno prose here\n```"), cell("#| x: y\n\na = 1\nb = 2", "code")
    )
    found = measure_chapters.measure(page)
    assert (found.words, found.lines, found.words_per_line) == (7, 2, 3.5)  # T, s, Open and four more
