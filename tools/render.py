"""From the staging folder to web pages: Quarto where it is installed, else the plain edition by Sphinx."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

from contents import BookError, Contents
from pages import front_page, lost_page
from PIL import Image

TOOLS = Path(__file__).resolve().parent
OWN = ("citations.py", "contents.py", "notebooks.py", "pages.py", "render.py", "stage.py")
STAMP = ".rendered"
_SPHINX = ("sphinx", "myst-nb", "myst-parser", "sphinx-book-theme", "pydata-sphinx-theme", "sphinx-mathjax-offline")
_REMOTE_TAGS = re.compile(
    r"<script\b[^>]*\bsrc=\"(?:https?:)?//[^\"]*\"[^>]*>\s*</script>\s*"
    r"|<link\b[^>]*\bhref=\"(?:https?:)?//[^\"]*\"[^>]*\brel=\"(?:stylesheet|preconnect|preload)\"[^>]*>\s*"
    r"|<link\b[^>]*\brel=\"(?:stylesheet|preconnect|preload)\"[^>]*\bhref=\"(?:https?:)?//[^\"]*\"[^>]*>\s*"
    r"|<script\b[^>]*>\s*define\('jquery'.*?</script>\s*",
    re.DOTALL,
)


def edition() -> str:
    """Which renderer this machine has, with its version."""
    quarto = shutil.which("quarto")
    if quarto:
        done = subprocess.run([quarto, "--version"], capture_output=True, text=True, check=False)
        return f"Quarto {done.stdout.strip()}"
    return f"plain edition, Sphinx {version('sphinx')}"


def render_key(stage: Path, look: str) -> str:
    """A digest of all that the pages depend on."""
    digest = hashlib.sha256(f"{look} {' '.join(version(name) for name in _SPHINX)}".encode())
    own = [TOOLS / name for name in OWN] + [path for path in (TOOLS / "plain").rglob("*") if path.suffix != ".pyc"]
    for path in sorted(own) + sorted(stage.rglob("*")):
        if path.is_file():
            digest.update(f"\n{path.relative_to(TOOLS if path in own else stage)} ".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_rendered(output: Path, key: str) -> bool:
    """Whether `output` holds the pages of this key."""
    stamp = output / STAMP
    return (output / "index.html").is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == key


def render(stage: Path, build: Path, output: Path, contents: Contents, key: str) -> None:
    """Render `stage` in the fresh folder `build`, then put the pages at `output` in one move.

    A failure leaves the old pages as they are.
    """
    pages = build / "html"
    if shutil.which("quarto"):
        _quarto(stage, pages)
    else:
        _plain(stage, build, pages, contents)
    if not (pages / "index.html").is_file():
        raise BookError("the renderer ended without an error and without an index.html")
    (pages / STAMP).write_text(f"{key}\n", encoding="utf-8")
    swap(pages, output)


def _quarto(stage: Path, pages: Path) -> None:
    """Quarto's edition, without the scripts that it would fetch from other servers."""
    readme = stage / "README.md"  # the preface has its title in its front matter, so the heading goes
    readme.write_text(re.sub(r"\A\s*# .+\n", "", readme.read_text(encoding="utf-8")), encoding="utf-8")
    _call(["quarto", "render", str(stage), "--to", "html"], stage, "Quarto", QUARTO_PYTHON=sys.executable)
    shutil.move(stage / "_book", pages)
    for path in pages.rglob("*.html"):
        text = without_remote(path.read_text(encoding="utf-8"))
        path.write_text(with_sizes(text, path.parent), encoding="utf-8")


def without_remote(html: str) -> str:
    """The page without scripts and style sheets of other servers (Quarto adds require.js and jQuery for HTML outputs)."""
    return _REMOTE_TAGS.sub("", html)


def with_sizes(html: str, folder: Path) -> str:
    """The page with width and height on every picture of its own, so that the text stays where it is when they come."""

    def sized(match: re.Match[str]) -> str:
        tag = match[0]
        address = re.search(r'\bsrc="([^":]+)"', tag)
        if not address or re.search(r"\b(width|height)=", tag):
            return tag
        size = picture_size(folder / unquote(address[1]))
        return f'<img width="{size[0]}" height="{size[1]}"{tag[4:]}' if size else tag

    return re.sub(r"<img\b[^>]*>", sized, html)


def picture_size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels, or None where nothing says so."""
    if not path.is_file():
        return None
    if path.suffix == ".svg":
        head = path.read_text(encoding="utf-8")[:1000]
        found = [re.search(rf'\b{name}="([\d.]+)"', head) for name in ("width", "height")]
        return (round(float(found[0][1])), round(float(found[1][1]))) if found[0] and found[1] else None
    with Image.open(path) as image:
        return image.size


def _plain(stage: Path, build: Path, pages: Path, contents: Contents) -> None:
    """The plain edition: every warning is an error, so a broken link stops the build."""
    (stage / "index.md").write_text(front_page(stage, contents), encoding="utf-8")
    if (stage / "404.qmd").is_file():
        (stage / "404.md").write_text(lost_page(stage), encoding="utf-8")
    options = [
        "-b",
        "html",
        "-q",
        "-E",
        "-W",
        "--keep-going",
        "-c",
        str(TOOLS / "plain"),
        "-d",
        str(build / "doctrees"),
    ]
    command = [sys.executable, "-m", "sphinx", *options, str(stage), str(pages)]
    _call(command, stage, "Sphinx", DIFFUSION_BOOK_STAGE=str(stage))
    for path in pages.rglob("*.html"):
        path.write_text(with_sizes(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")
    if (stage / "assets").is_dir():
        shutil.copytree(stage / "assets", pages / "assets", dirs_exist_ok=True)


def _call(command: list[str], folder: Path, name: str, **environment: str) -> None:
    """Run a renderer; its output is shown only where it fails."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise BookError(f"{name} failed:\n{done.stdout.strip()}")


def swap(new: Path, output: Path) -> None:
    """Put the folder `new` in the place of `output`; at no time is there a half-written `output`."""
    beside, old = output.with_name(f"{output.name}.new"), output.with_name(f"{output.name}.old")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(new, beside)  # a rename, or a copy to another disk
    if output.exists():
        output.rename(old)
    beside.rename(output)
    shutil.rmtree(old, ignore_errors=True)
