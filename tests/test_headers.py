"""Badges and set-up cells agree with settings.ini, and the tool that writes them does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import chapter_header
import pytest
from conftest import ROOT

CFG = {"lib_name": "mylib", "user": "someone", "repo": "somewhere", "branch": "trunk", "nbs_path": "nbs"}
BADGE = (
    "[![Open in Colab](../assets/open-in-colab.svg)]"
    "(https://colab.research.google.com/github/someone/somewhere/blob/trunk/nbs/07_x.ipynb)"
)
SETUP = """#| include: false
import importlib.util

if importlib.util.find_spec("mylib") is None:
    %pip install -q "mylib[notebook] @ git+https://github.com/someone/somewhere@trunk\""""


def cell(kind: str, text: str) -> dict:
    """A cell as it stands in a notebook file."""
    made = {"cell_type": kind, "id": "a0", "metadata": {}, "source": text.splitlines(keepends=True)}
    return made | {"outputs": [], "execution_count": None} if kind == "code" else made


def chapter(badge: str = BADGE, setup: str = SETUP, more: tuple = ()) -> dict:
    """A notebook that consists of a header."""
    head = cell("markdown", f"# Title\n\n> Subtitle\n\n{badge}")
    return {"cells": [head, cell("code", setup), *more], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_chapters_have_their_header(path: Path, settings: dict[str, str]) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert chapter_header.complaints(notebook, path.name, settings) == []


def test_badge_image_is_there(root: Path) -> None:
    assert (root / "assets" / "open-in-colab.svg").read_text(encoding="utf-8").startswith("<svg")


def test_right_header_is_accepted() -> None:
    assert chapter_header.complaints(chapter(), "07_x.ipynb", CFG) == []


@pytest.mark.parametrize(
    ("notebook", "said"),
    [
        (chapter(badge=BADGE.replace("trunk", "main")), "badge"),
        (chapter(badge=BADGE.replace("07_x", "08_x")), "badge"),
        (chapter(badge=""), "badge"),
        (chapter(more=(cell("markdown", BADGE),)), "badge"),
        (chapter(setup=SETUP.replace("-q", "-q -U")), "not the set-up cell"),
        (chapter(setup="import torch"), "not the set-up cell"),
        (chapter(more=(cell("code", "%pip install torch"),)), "only the set-up cell"),
        ({"cells": chapter()["cells"][1:]}, "first cell must be Markdown"),
        ({"cells": [cell("markdown", f"Title\n\n> Subtitle\n\n{BADGE}"), cell("code", SETUP)]}, "must be the title"),
        ({"cells": [cell("markdown", f"# Title\n\n{BADGE}"), cell("code", SETUP)]}, "must be the subtitle"),
        ({"cells": [chapter()["cells"][0], cell("code", SETUP) | {"outputs": [{}]}]}, "has outputs"),
    ],
)
def test_wrong_header_is_named(notebook: dict, said: str) -> None:
    found = chapter_header.complaints(notebook, "07_x.ipynb", CFG)
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    "notebook",
    [
        chapter(badge=BADGE.replace("trunk", "main"), setup=SETUP.replace("trunk", "main")),
        chapter(badge="", setup="import torch"),
        {"cells": [cell("markdown", "# Title\n\n> Subtitle")]},
    ],
)
def test_write_corrects_and_is_idempotent(notebook: dict) -> None:
    before = json.dumps(notebook)
    fixed = chapter_header.corrected(notebook, "07_x.ipynb", CFG)
    assert chapter_header.complaints(fixed, "07_x.ipynb", CFG) == []
    assert chapter_header.corrected(fixed, "07_x.ipynb", CFG) == fixed
    assert json.dumps(notebook) == before, "the notebook given is not changed"


def test_write_keeps_the_authors_cells() -> None:
    fixed = chapter_header.corrected({"cells": [cell("markdown", "# T\n\n> S"), cell("code", "1 + 1")]}, "a.ipynb", CFG)
    assert ["".join(c["source"]) for c in fixed["cells"]][2:] == ["1 + 1"]


def test_write_without_a_title_is_refused() -> None:
    with pytest.raises(ValueError, match="hold the title"):
        chapter_header.corrected({"cells": [cell("code", "1 + 1")]}, "07_x.ipynb", CFG)
