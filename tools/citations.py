"""References: what references.bib holds, how an entry reads, and which chapters lead to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pybtex.database import Person, parse_file
from pybtex.richtext import Text

PAPERS = re.compile(r"https?://(arxiv\.org/abs|doi\.org|proceedings\.|papers\.n|openreview\.net|jmlr\.org)[^\s)]*")
PLACES = ("journal", "booktitle", "publisher", "school", "institution", "howpublished")


class Entry(NamedTuple):
    """One publication."""

    key: str
    authors: tuple[str, ...]  # first names and surname, or an organisation
    surnames: tuple[str, ...]
    title: str
    year: str
    place: str  # journal, proceedings or publisher
    url: str

    @property
    def short(self) -> str:
        """As in "Ho, Jain, Abbeel (2020)": up to four surnames, else the first."""
        names = ", ".join(self.surnames) if len(self.surnames) <= 4 else f"{self.surnames[0]} et al."
        return f"{names} ({self.year})"

    @property
    def full(self) -> str:
        """One line with everything but the address."""
        end = "" if self.title.endswith("?") else "."
        told = f"{', '.join(self.authors)} ({self.year}). {self.title}{end}"
        return f"{told} {self.place}." if self.place else told


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file of references. ValueError for one without author, title, year or address."""
    found = []
    for key, entry in parse_file(str(path)).entries.items():
        fields, persons = entry.fields, entry.persons.get("author", [])
        missing = [name for name in ("title", "year", "url") if name not in fields]
        if missing or not persons:
            raise ValueError(f"{path.name}: {key} lacks {', '.join(missing or ['author'])}")
        place = next((_plain(fields[name]) for name in PLACES if name in fields), "")
        surnames = tuple(_surname(person) for person in persons)
        authors = tuple(map(_name, persons))
        found.append(Entry(key, authors, surnames, _plain(fields["title"]), fields["year"], place, fields["url"]))
    return found


def _plain(latex: str) -> str:
    return " ".join(str(Text.from_latex(latex)).split())


def _surname(person: Person) -> str:
    return _plain(" ".join(person.prelast_names + person.last_names))


def _name(person: Person) -> str:
    return _plain(" ".join(person.first_names + person.middle_names + person.prelast_names + person.last_names))


def by_address(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries by their address."""
    return {entry.url: entry for entry in entries}


def links(markdown: str) -> list[tuple[str, str, str]]:
    """What stands before a link in its line, its text and its address, for every web link of a text."""
    return re.findall(r"([^\n]*?)\[([^\[\]]+)\]\((https?://(?:[^()\s]|\([^()\s]*\))+)\)", markdown)


def disagreements(markdown: str, entries: Iterable[Entry]) -> list[str]:
    """Links to papers that are not listed, and those whose text has another year, author or title."""
    known, wrong = by_address(entries), []
    for before, words, address in links(markdown):
        entry = known.get(address)
        if entry is None:
            wrong += [f"{address} ({words}) is not in references.bib"] if PAPERS.match(address) else []
            continue
        item = re.search(r"(?:^- |; )([^()]*?)\((\d{4})\),? $", before)
        if item and (item[2] != entry.year or entry.surnames[0] not in item[1]):
            wrong.append(f"{item[0].strip()} [{words}]: references.bib has {entry.short}")
        if item and not same_title(words, entry.title):
            wrong.append(f"{item[0].strip()} [{words}]: references.bib has {entry.title!r}")
    return wrong


def same_title(words: str, title: str) -> bool:
    """Whether two titles agree, capitals and marks left out; a subtitle may be missing."""
    short, long = ("".join(re.findall(r"\w+", text.lower())) for text in (words, title))
    return long.startswith(short)


def named_works(markdown: str) -> set[tuple[str, str]]:
    """First surname and year of works named in running text, as in "Ho et al. (2020)" or "(Song et al. 2020)"."""
    name = r"([A-Z][\w'’-]+)(?:(?:, [A-Z][\w'’-]+)*,? and [A-Z][\w'’-]+| et al\.|(?:, [A-Z][\w'’-]+)+)"
    return set(re.findall(rf"{name},? \(?((?:19|20)\d\d)\b", markdown))
