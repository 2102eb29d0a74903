"""The staging folder: the book as a renderer finds it, laid out like the repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

from citations import by_address, read_entries
from contents import BookError, Contents, read_settings, repository_url
from notebooks import source, write_notebook

COPIED = ("_quarto.yml", "404.qmd", "settings.ini", "references.bib", "LICENSE")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
_BADGE = re.compile(r"\[!\[[^\]]*\]\(https?://[^)]*\)\]\([^)]*\)[ \t]*\n?|!\[[^\]]*\]\(https?://[^)]*\)[ \t]*\n?")
_LINK = re.compile(
    r"(?P<skip>^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*\s*?$|(?P<tick>`+).+?(?P=tick)|\$\$.+?\$\$|\$[^$\n]+\$)"
    r"|(?P<head>!?\[(?:[^\[\]]|\[[^\[\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\()(?P<target>[^()\s]+)(?P<tail>[^()]*\))"
    r"|(?P<html>\b(?:href|src)=\")(?P<address>[^\"]+)(?P<quote>\")",
    re.MULTILINE | re.DOTALL,
)


def stage_book(root: Path, folder: Path, contents: Contents, notebooks: dict[str, dict]) -> None:
    """Write the pages to `folder`: links to files of the repository lead to its web address, and each is checked."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "nbs").mkdir(parents=True)
    links = Links(root, contents)
    for path, notebook in notebooks.items():
        write_notebook(_linked(notebook, path, links), folder / path)
    for name in COPIED:
        if (root / name).is_file():
            shutil.copy2(root / name, folder / name)
    if (root / "assets").is_dir():
        shutil.copytree(root / "assets", folder / "assets")
    readme = _BADGE.sub("", (root / "README.md").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(links.resolve(readme, "README.md"), encoding="utf-8")
    shutil.copy2(root / contents.preface, folder / contents.preface)
    links.check()


def _linked(notebook: dict, path: str, links: Links) -> dict:
    """The notebook with the links in its Markdown resolved."""
    fresh = json.loads(json.dumps(notebook))
    for cell in fresh["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = links.resolve(source(cell), path)
    return fresh


class Links:
    """Where the links of a page lead: to a chapter, a picture, a file of the repository on the web, or a publication.

    A link to a publication of references.bib gets its authors, year and place as a tooltip.
    """

    def __init__(self, root: Path, contents: Contents):
        settings = read_settings(root)
        self.broken: list[str] = []
        self.root = root.resolve()
        self.pages = {self.root / path for path in contents.chapters}
        references = self.root / "references.bib"
        self.publications = by_address(read_entries(references)) if references.is_file() else {}
        self.web = f"{repository_url(settings)}/blob/{settings.get('branch', 'main')}"

    def resolve(self, text: str, page: str) -> str:
        """`text` of `page` with its links resolved; those that lead nowhere are noted for `check`."""
        return _LINK.sub(lambda match: self._replace(match, page), text)

    def check(self) -> None:
        """Raise BookError if a link that was resolved leads nowhere."""
        if self.broken:
            raise BookError("\n".join(self.broken))

    def _replace(self, match: re.Match[str], page: str) -> str:
        if match["skip"]:
            return match[0]
        if match["html"]:
            target = self._target(match["address"], page, image=match["html"].startswith("src"))
            return f"{match['html']}{target}{match['quote']}"
        head = match["head"]
        if not head.startswith("!") and "![" in head:  # a picture that is a link: both addresses count
            head = "[" + self.resolve(head[1:-2], page) + "]("
        tail = match["tail"]
        if (entry := self.publications.get(match["target"])) and tail == ")":
            tail = f' "{entry.full.replace(chr(34), chr(39))}")'
        return f"{head}{self._target(match['target'], page, image=head.startswith('!'))}{tail}"

    def _target(self, target: str, page: str, image: bool) -> str:
        """The address to write for `target`."""
        if _REMOTE.match(target):
            if image and not target.startswith("data:"):
                self.broken.append(f"{page}: the picture {target} lies on another server; put it into assets/")
            return target
        name = unquote(target.partition("#")[0])
        file = (self.root / page).parent.joinpath(name).resolve() if name else self.root / page
        if not file.is_relative_to(self.root) or not file.exists():
            self.broken.append(f"{page}: the link to {target} leads nowhere")
            return target
        if image or not name or file in self.pages:
            return target
        return f"{self.web}/{file.relative_to(self.root).as_posix()}"
