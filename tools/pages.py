"""The plain edition's view of a notebook: `#|` options become the cell tags that myst-nb knows."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from contents import BookError, Contents
from notebooks import source

SILENT = {"export", "exporti", "exports", "default_exp", "label", "eval", "warning", "hide"}
TAGS = {
    ("include", False): "remove-cell",
    ("echo", False): "remove-input",
    ("output", False): "remove-output",
    ("code-fold", True): "hide-input",
    ("warning", False): "remove-stderr",
    ("hide", None): "remove-cell",
}
SHOWN = {"include", "echo", "output", "code-fold", "code-summary", "fig-alt", "fig-cap"}
_OPTIONS = re.compile(r"\A(?:[ \t]*#\|.*(?:\n|\Z))+")
_INCLUDE = re.compile(r"^\{\{< include (\S+) >\}\}$", re.MULTILINE)
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def split_options(text: str, where: str) -> tuple[dict, str]:
    """The `#|` options at the head of a cell, and the code without them."""
    match = _OPTIONS.match(text)
    if not match:
        return {}, text
    try:
        options = yaml.safe_load(re.sub(r"^[ \t]*#\| ?", "", match[0], flags=re.MULTILINE))
    except yaml.YAMLError as error:
        raise BookError(f"{where}: cannot read its options: {error}") from None
    if not isinstance(options, dict):
        raise BookError(f"{where}: write options with a colon, as in `#| export:`, not {match[0].splitlines()[0]!r}")
    unknown = sorted(set(options) - SILENT - SHOWN)
    if unknown:
        raise BookError(f"{where}: the option {unknown[0]!r} is unknown; known ones are listed in tools/pages.py")
    return options, text[match.end() :].lstrip("\n")


def for_myst(notebook: dict, name: str) -> dict:
    """Change the notebook in place into what myst-nb should show."""
    for index, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] == "code":
            options, code = split_options(source(cell), f"{name}: cell {index}")
            cell["source"], cell["metadata"] = code, _metadata(options, bool(code.strip()))
    notebook["metadata"] = {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return notebook


def _metadata(options: dict, has_code: bool) -> dict:
    """Tags and settings that say to myst-nb what the options say to Quarto."""
    tags = {tag for (key, value), tag in TAGS.items() if key in options and options[key] is value}
    if not has_code:
        tags.add("remove-cell")
    look: dict = {}
    if "fig-alt" in options:
        look["image"] = {"alt": str(options["fig-alt"])}
    if "fig-cap" in options:
        look["figure"] = {"caption": str(options["fig-cap"])}
    if "code-summary" in options:
        look["code_prompt_show"] = look["code_prompt_hide"] = str(options["code-summary"])
    return {"tags": sorted(tags)} | ({"mystnb": look} if look else {})


def front_page(folder: Path, contents: Contents) -> str:
    """The preface with its inclusions, and the table of contents that fills the sidebar."""
    text = _FRONT.sub("", (folder / contents.preface).read_text(encoding="utf-8"))
    text = _INCLUDE.sub(lambda match: (folder / match[1]).read_text(encoding="utf-8"), text)
    return "\n\n".join([text.strip(), *(_toctree(part.title, part.chapters) for part in contents.parts)]) + "\n"


def lost_page(folder: Path) -> str:
    """The page for addresses that lead nowhere; it stands in no table of contents."""
    text = (folder / "404.qmd").read_text(encoding="utf-8")
    title = yaml.safe_load(text.split("---")[1])["title"]
    body = _FRONT.sub("", text).replace("(index.qmd)", "(index.md)")
    return f"---\norphan: true\nnosearch: true\n---\n\n# {title}\n\n{body.strip()}\n"


def _toctree(title: str, chapters: tuple[str, ...]) -> str:
    caption = [f":caption: {title}"] if title else []
    names = [chapter.rpartition(".")[0] for chapter in chapters]
    return "\n".join(["```{toctree}", ":hidden:", *caption, "", *names, "```"])
