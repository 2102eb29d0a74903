"""What the published edition needs beside its chapters: pictures, downloads, a page for lost readers, drawn figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import contents
import draw_figures
import drawings
import pages
import pytest
import render
import stills
import yaml
from PIL import Image

from diffusion_book.viz import COLORS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def quarto(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def downloads(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "_quarto-downloads.yml").read_text(encoding="utf-8"))


# _quarto.yml


def test_every_file_that_quarto_is_told_of_is_there(root, quarto, downloads):
    book, html = quarto["book"], quarto["format"]["html"]
    files = [
        book["favicon"],
        book["cover-image"],
        book["image"],
        quarto["bibliography"],
        *quarto["project"]["resources"],
    ]
    files += [name for names in html["theme"].values() for name in names if "/" in name]
    files += [downloads["format"]["epub"]["epub-cover-image"]]
    files += [name for made in downloads["format"].values() for name in made["ipynb-filters"]]
    assert [name for name in files if not (root / name).exists()] == []


def test_quarto_knows_every_key(quarto, downloads):
    """Quarto refuses a book with a key that it does not know; these are the ones used here that it does."""
    known = (
        "title description chapters appendices favicon site-url cover-image cover-image-alt image image-alt open-graph"
    )
    known += " twitter-card repo-url repo-branch repo-actions search page-navigation back-to-top-navigation page-footer"
    assert set(quarto["book"]) <= set(known.split()) and set(downloads) == {"book", "format"}
    assert set(quarto) == {"project", "book", "bibliography", "execute", "format"}


def test_search_themes_buttons_and_cards(quarto, root, settings):
    book, html = quarto["book"], quarto["format"]["html"]
    assert book["search"] is True and set(html["theme"]) == {"light", "dark"}
    assert set(book["repo-actions"]) == {"edit", "issue", "source"} and book["repo-url"].startswith("https://")
    assert book["open-graph"] is True and book["twitter-card"]["card-style"] == "summary_large_image"
    assert book["image-alt"] and book["cover-image-alt"] and settings["license_spdx"] in book["page-footer"]
    homepage = re.search(r'^Homepage = "(.+)"', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert book["site-url"] == homepage[1]
    assert Image.open(root / book["image"]).size == (1200, 630)  # what other sites show of a link
    assert Image.open(root / book["cover-image"]).size == (1200, 1600)


def test_downloads_are_a_profile_that_the_workflow_names(downloads, root):
    assert downloads["book"]["downloads"] == ["pdf", "epub"] and set(downloads["format"]) == {"typst", "epub"}
    assert "quarto render --profile downloads" in (root / ".github/workflows/book.yml").read_text(encoding="utf-8")


def test_what_moves_becomes_still_on_paper(tmp_path):
    still = {"output_type": "display_data", "data": {"text/html": "<figure>", "image/png": "x"}}
    table = {"output_type": "display_data", "data": {"text/html": "<table>"}}
    cells = [{"cell_type": "code", "outputs": [still, table]}, {"cell_type": "markdown"}]
    command = [sys.executable, stills.__file__]
    done = subprocess.run(command, input=json.dumps({"cells": cells}), capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout)["cells"][0]["outputs"]
    assert first["data"] == {"image/png": "x"} and second == table


# The page for lost readers


def test_the_page_for_addresses_that_lead_nowhere(root):
    text = pages.lost_page(root)
    assert text.startswith("---\norphan: true") and "# This page does not exist" in text
    assert "(index.md)" in text and ".qmd" not in text


# Sizes of pictures


def test_pictures_get_their_sizes(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a b.png")
    (tmp_path / "c.svg").write_text('<svg width="40.2" height="10">')
    (tmp_path / "d.svg").write_text('<svg viewBox="0 0 1 1">')
    given = (
        '<img alt="x" src="a%20b.png"><img src="c.svg"><img src="d.svg"><img src="none.png">'
        '<img src="a%20b.png" width="5"><img src="data:image/png;base64,x"><img src="https://example.org/a.png">'
    )
    sized = re.findall(r"<img[^>]*>", render.with_sizes(given, tmp_path))
    assert sized[:2] == [
        '<img width="30" height="20" alt="x" src="a%20b.png">',
        '<img width="40" height="10" src="c.svg">',
    ]
    assert "".join(sized[2:]) == "".join(re.findall(r"<img[^>]*>", given)[2:])


# Drawn figures


@pytest.mark.parametrize("name", draw_figures.drawn())
def test_drawings_are_what_their_code_draws(root, name):
    drawn, kept = draw_figures.drawn()[name], (root / "assets" / name).read_text(encoding="utf-8")
    assert re.sub(r"\d+", "", drawn) == re.sub(r"\d+", "", kept)  # the last digit may differ between machines
    tree = ElementTree.fromstring(kept)
    assert tree.get("role") == "img" and tree.find(f"{SVG}title").text


def test_the_map_has_a_stop_for_each_chapter_and_says_where_you_are(root):
    listed = contents.read_contents(root)
    parts = [part for part in listed.parts if part.title != "Appendix"]
    tree = ElementTree.fromstring(drawings.book_map(listed, "Part II:"))
    stops = len(tree.findall(f"{SVG}circle")) - 2  # two more explain what the dots are
    assert stops == sum(len(part.chapters) for part in parts)
    words = [text.text for text in tree.findall(f"{SVG}text")]
    assert [part.title for part in parts] == [word for word in words if word in {part.title for part in parts}]
    here = [text for text in tree.findall(f"{SVG}text") if text.get("fill") == COLORS["blue"]]
    assert [text.text for text in here] == ["Part II: Digits and the U-Net", "you are here"]


def test_every_part_begins_with_its_map(root):
    openers = [part.chapters[0] for part in contents.read_contents(root).parts if part.title != "Appendix"]
    for number, path in enumerate(openers, start=1):
        assert f"(../assets/map-{number}.svg)" in (root / path).read_text(encoding="utf-8"), path
