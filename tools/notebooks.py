"""Notebooks as plain dictionaries: reading, writing, and cleaning what a run leaves in them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_book.core import write_whole
from diffusion_book.player import image_bytes

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def read_notebook(path: Path) -> dict:
    """The notebook at `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_notebook(notebook: dict, path: Path) -> None:
    """Write in one move: a reader of `path` sees the old file or the new one, never half of it."""
    write_whole(path, json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def source(cell: dict) -> str:
    """The text of a cell, which the format stores as one string or as a list of lines."""
    return _joined(cell["source"])


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def code_cells(notebook: dict) -> list[dict]:
    """The code cells in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def clean_outputs(notebook: dict) -> None:
    """Keep what a static page can show: no widget views, no widget state, no timing metadata; pictures made small.

    A widget that brings its own HTML (an Explorer) keeps the HTML; one without is a progress bar and goes.
    """
    notebook["metadata"].pop("widgets", None)
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell["metadata"].pop("execution", None)
        cell["execution_count"] = number
        cell["outputs"] = [kept for output in cell["outputs"] if (kept := _static(output)) is not None]
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = small_png(_joined(output["data"]["image/png"]))


def small_png(text: str) -> str:
    """A PNG (base64) with a palette, where that is smaller and every colour of a line or an area stays what it was."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    if image.mode == "P":
        return text
    image = image.convert("RGBA")
    few = _palette_of_common(image)
    small = base64.b64encode(image_bytes(few, optimize=True)).decode()
    return small if len(small) < len(text) and _looks_alike(image, few.convert("RGBA")) else text


def _palette_of_common(image: Image.Image) -> Image.Image:
    """At most 256 colours; each stands for its neighbours and is the commonest of them, not their mean."""
    few = image.quantize(256, method=Image.Quantize.FASTOCTREE)
    colours, inverse, counts = np.unique(
        np.asarray(image).reshape(-1, 4), axis=0, return_inverse=True, return_counts=True
    )
    entry = np.zeros(len(colours), int)
    entry[inverse.reshape(-1)] = np.asarray(few).reshape(-1)
    palette = np.zeros((256, 4), np.uint8)
    order = np.argsort(counts, kind="stable")
    palette[entry[order]] = colours[order]  # the last to write an entry is the commonest
    few.putpalette(palette.tobytes(), "RGBA")
    return few


def _looks_alike(image: Image.Image, few: Image.Image) -> bool:
    """Little change on average, and none to speak of where a colour is common: no two lines become one colour."""
    before, after = (np.asarray(picture.convert("RGBa"), np.int16).reshape(-1, 4) for picture in (image, few))
    change = np.abs(before - after)
    _, inverse, counts = np.unique(before, axis=0, return_inverse=True, return_counts=True)
    common = counts[inverse.reshape(-1)] > len(before) / 2000
    return change.mean() < 2 and change[common].max() <= 32


def _static(output: dict) -> dict | None:
    """The output without its live widget, or None where nothing worth showing is left."""
    data = output.get("data", {})
    if WIDGET_VIEW not in data:
        return output
    if "text/html" not in data:
        return None
    return {**output, "data": {kind: value for kind, value in data.items() if kind != WIDGET_VIEW}}


def graft_outputs(notebook: dict, executed: dict) -> dict:
    """`notebook` with the outputs of `executed`, a run of the same code: prose may have changed since."""
    ran = code_cells(executed)
    if len(ran) != len(code_cells(notebook)):
        raise ValueError(f"{len(ran)} executed code cells for {len(code_cells(notebook))} in the notebook")
    fresh = json.loads(json.dumps(notebook))
    for cell, done in zip(code_cells(fresh), ran, strict=True):
        cell["outputs"], cell["execution_count"] = done["outputs"], done["execution_count"]
    return fresh
