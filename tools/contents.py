"""What the book contains: `_quarto.yml` is the only table of contents, `settings.ini` the only home of the address."""

from __future__ import annotations

import configparser
from dataclasses import dataclass
from pathlib import Path

import yaml


class BookError(Exception):
    """Something a reader or an author can put right; its message says what."""


@dataclass(frozen=True)
class Part:
    """A heading of the sidebar and the chapters under it, as paths from the root."""

    title: str
    chapters: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """The title, the preface, and the parts in reading order."""

    title: str
    preface: str
    parts: tuple[Part, ...]

    @property
    def chapters(self) -> tuple[str, ...]:
        """Every notebook of the book, in reading order."""
        return tuple(chapter for part in self.parts for chapter in part.chapters)


def read_contents(root: Path) -> Contents:
    """The table of contents in `_quarto.yml`. Raises BookError where a file it lists is missing."""
    book = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["book"]
    preface, *entries = book["chapters"]
    parts = [_part(entry) for entry in entries]
    if book.get("appendices"):
        parts.append(Part("Appendix", tuple(book["appendices"])))
    contents = Contents(book["title"], preface, tuple(parts))
    missing = [path for path in (preface, *contents.chapters) if not (root / path).is_file()]
    if missing:
        raise BookError(f"_quarto.yml lists {', '.join(missing)}: no such file. Write it or take it off the list.")
    return contents


def _part(entry: str | dict) -> Part:
    """One entry of `chapters`: a part with its chapters, or a chapter that stands alone."""
    if isinstance(entry, str):
        return Part("", (entry,))
    return Part(entry["part"], tuple(entry["chapters"]))


def read_settings(root: Path) -> dict[str, str]:
    """The package metadata in `settings.ini`."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    if not parser.read(root / "settings.ini", encoding="utf-8"):
        raise BookError(f"{root / 'settings.ini'} not found: is this the root of the repository?")
    return dict(parser["DEFAULT"])


def repository_url(settings: dict[str, str]) -> str:
    """The address of the repository, computed from `user` and `repo`."""
    return f"https://github.com/{settings['user']}/{settings['repo']}"
