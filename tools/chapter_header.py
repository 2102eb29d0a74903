"""The badge line and the set-up cell of every chapter, computed from settings.ini: check them, or write them.

python tools/chapter_header.py --check        names what is wrong, exit status 1 if anything is
python tools/chapter_header.py --write        puts the right lines into the notebooks
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BADGE_START = "[![Open in Colab]"
SETUP_MARK = "%pip install"
EXTRAS = {"54_export.ipynb": "export", "A5_5_solutions.ipynb": "export"}  # what these need beside "notebook"
Notebook = dict[str, Any]


def settings(root: Path = ROOT) -> dict[str, str]:
    """The metadata in settings.ini."""
    parser = ConfigParser(interpolation=None)
    if not parser.read(root / "settings.ini", encoding="utf-8"):
        raise FileNotFoundError(f"no settings.ini in {root}")
    return dict(parser["DEFAULT"])


def badge(name: str, cfg: dict[str, str]) -> str:
    """The badge line of the notebook file `name`, such as 03_schedules.ipynb."""
    where = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{name}"
    return f"{BADGE_START}(../assets/open-in-colab.svg)](https://colab.research.google.com/github/{where})"


def pip_requirement(name: str, cfg: dict[str, str]) -> str:
    """What the set-up cell of a notebook file asks pip for: the library and its extras, from the main branch."""
    extras = ",".join(["notebook", *filter(None, [EXTRAS.get(name)])])
    return f"{cfg['lib_name']}[{extras}] @ git+https://github.com/{cfg['user']}/{cfg['repo']}@{cfg['branch']}"


def setup_source(name: str, cfg: dict[str, str]) -> str:
    """The set-up cell: installs the library where it is missing, touches nothing where it is there."""
    return "\n".join(
        [
            "#| include: false",
            "import importlib.util",
            "",
            f'if importlib.util.find_spec("{cfg["lib_name"]}") is None:',
            f'    {SETUP_MARK} -q "{pip_requirement(name, cfg)}"',
        ]
    )


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def complaints(notebook: Notebook, name: str, cfg: dict[str, str]) -> list[str]:
    """What is wrong with the first two cells of a notebook."""
    cells = notebook["cells"]
    if len(cells) < 2 or cells[0]["cell_type"] != "markdown" or cells[1]["cell_type"] != "code":
        return [f"{name}: the first cell must be Markdown (title, subtitle, badge) and the second the set-up code"]
    wrong = []
    lines = [line for line in source(cells[0]).splitlines() if line.strip()]
    if not lines or not lines[0].startswith("# "):
        wrong.append(f"{name}: the first line must be the title, '# …'")
    if len(lines) < 2 or not lines[1].startswith("> "):
        wrong.append(f"{name}: the second line must be the subtitle, '> …'")
    badges = [line for cell in cells for line in source(cell).splitlines() if line.startswith(BADGE_START)]
    if badges != [badge(name, cfg)] or badge(name, cfg) not in lines:
        wrong.append(f"{name}: the first cell, and no other, must hold the badge {badge(name, cfg)}; found {badges}")
    if source(cells[1]) != setup_source(name, cfg):
        wrong.append(f"{name}: the second cell is not the set-up cell")
    if cells[1].get("outputs"):
        wrong.append(f"{name}: the set-up cell has outputs, so it installed something; run the notebook again")
    if any(SETUP_MARK in source(cell) for cell in cells[2:] if cell["cell_type"] == "code"):
        wrong.append(f"{name}: only the set-up cell may install anything")
    return wrong


def corrected(notebook: Notebook, name: str, cfg: dict[str, str]) -> Notebook:
    """A copy of the notebook with the right badge and set-up cell. The title and subtitle stay the author's."""
    notebook = copy.deepcopy(notebook)
    cells = notebook["cells"]
    if not cells or cells[0]["cell_type"] != "markdown":
        raise ValueError(f"{name}: the first cell must be Markdown and hold the title; write it first")
    lines = source(cells[0]).splitlines()
    if any(line.startswith(BADGE_START) for line in lines):
        lines = [badge(name, cfg) if line.startswith(BADGE_START) else line for line in lines]
    else:
        lines += ["", badge(name, cfg)]
    cells[0]["source"] = "\n".join(lines).splitlines(keepends=True)
    text = setup_source(name, cfg).splitlines(keepends=True)
    if len(cells) > 1 and cells[1]["cell_type"] == "code" and 'find_spec("' in source(cells[1]):
        cells[1].update(source=text, outputs=[])
    else:
        name_hash = hashlib.sha256(f"{name}/setup".encode()).hexdigest()[:8]
        fields = {"cell_type": "code", "execution_count": None, "id": name_hash, "metadata": {}, "outputs": []}
        cells.insert(1, {**fields, "source": text})
    return notebook


def main(argv: list[str] | None = None) -> int:
    """Check or write the notebooks named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true")
    group.add_argument("--write", action="store_true")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    args = parser.parse_args(argv)
    cfg = settings()
    wrong = []
    for path in args.notebooks or sorted((ROOT / cfg["nbs_path"]).glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if args.write:
            changed = corrected(notebook, path.name, cfg)
            if changed != notebook:
                text = json.dumps(changed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
                path.write_text(text, encoding="utf-8")
                print(f"{path.name}: header written")
            notebook = changed
        wrong += complaints(notebook, path.name, cfg)
    print(*wrong, sep="\n") if wrong else print("headers agree with settings.ini")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
