"""A filter for notebooks on their way to paper: what moves is replaced by its still picture.

Quarto calls it (`ipynb-filters`): the notebook comes on standard input as JSON and leaves on standard output.
"""

from __future__ import annotations

import json
import sys


def stilled(notebook: dict) -> dict:
    """The notebook without the HTML of figures that bring a still picture along."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data or "image/svg+xml" in data:
                data.pop("text/html", None)
    return notebook


if __name__ == "__main__":
    json.dump(stilled(json.load(sys.stdin)), sys.stdout)
