"""Every publication that a chapter names is in references.bib, as the chapter says, and no entry is idle."""

from __future__ import annotations

import re

import api
import citations
import contents
import notebooks
import pytest
import references
import stage
from conftest import ROOT
from written import prose

ENTRIES = citations.read_entries(ROOT / "references.bib")
CHAPTERS = contents.read_contents(ROOT).chapters
HO = citations.Entry(
    "ho2020denoising",
    ("Jonathan Ho", "Ajay Jain", "Pieter Abbeel"),
    ("Ho", "Jain", "Abbeel"),
    "Denoising Diffusion Probabilistic Models",
    "2020",
    "Advances in Neural Information Processing Systems",
    "https://arxiv.org/abs/2006.11239",
)
LINE = "- Ho, Jain, Abbeel (2020), [Denoising diffusion probabilistic models](https://arxiv.org/abs/2006.11239): all of it."


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_links_to_publications_agree_with_the_list(chapter: str) -> None:
    assert citations.disagreements(prose(chapter), ENTRIES) == []


@pytest.mark.parametrize("chapter", [chapter for chapter in CHAPTERS if "A9_" not in chapter])
def test_works_named_in_the_text_are_listed(chapter: str) -> None:
    known = {(surname, entry.year) for entry in ENTRIES for surname in entry.surnames[:1]}
    named = citations.named_works(prose(chapter).partition("## Further reading")[0])
    assert named - known == set()


def test_every_entry_is_used() -> None:
    used = {
        address for chapter in CHAPTERS if "A9_" not in chapter for _, _, address in citations.links(prose(chapter))
    }
    assert [entry.key for entry in ENTRIES if entry.url not in used] == []


def test_the_pages_made_from_the_modules_and_from_the_list_are_up_to_date() -> None:
    assert notebooks.read_notebook(api.PAGE) == api.page()
    assert notebooks.read_notebook(references.PAGE) == references.page()


def test_every_public_name_is_on_its_page() -> None:
    text = prose("nbs/A8_1_api.ipynb")
    for path in (ROOT / "diffusion_book").glob("[a-z]*.py"):
        listed = re.search(r"^__all__ = \[([^\]]*)\]", path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in re.findall(r"'(\w+)'", listed[1] if listed else ""):
            assert f"\n### {name}\n" in text, f"{path.stem}.{name}"


# What is noticed


def test_an_entry_reads_as_people_write_it() -> None:
    by_key = {entry.key: entry for entry in ENTRIES}
    assert by_key["ho2020denoising"] == HO and HO.short == "Ho, Jain, Abbeel (2020)"
    assert by_key["vaswani2017attention"].short == "Vaswani et al. (2017)"
    assert "Łukasz Kaiser" in by_key["vaswani2017attention"].authors
    assert by_key["binkowski2018demystifying"].surnames[0] == "Bińkowski"


@pytest.mark.parametrize(
    "line, complaint",
    [
        (LINE, None),
        (LINE.replace("2006.11239", "2006.11230"), "is not in references.bib"),
        (LINE.replace("2020", "2021"), "references.bib has Ho, Jain, Abbeel"),
        (LINE.replace("Ho, Jain", "Jain, Ho").replace("Ho, A", "Hu, A"), "references.bib has Ho, Jain, Abbeel"),
        (LINE.replace("probabilistic", "improbable"), "references.bib has 'Denoising Diffusion"),
        ("see [the code](https://example.org/x)", None),
    ],
)
def test_disagreements_are_noticed(line: str, complaint: str | None) -> None:
    found = citations.disagreements(line, [HO])
    assert (len(found) == 1 and complaint in found[0]) if complaint else found == []


def test_named_works() -> None:
    text = "Ho et al. (2020, section 4), (Song, Meng and Ermon 2021), Nichol and Dhariwal (2021), but not July 2021."
    assert citations.named_works(text) == {("Ho", "2020"), ("Song", "2021"), ("Nichol", "2021")}


def test_a_link_to_a_publication_gets_its_tooltip() -> None:
    links = stage.Links(ROOT, contents.read_contents(ROOT))
    resolved = links.resolve(LINE, "nbs/03_schedules.ipynb")
    assert '(https://arxiv.org/abs/2006.11239 "Jonathan Ho, Ajay Jain, Pieter Abbeel (2020). Denoising' in resolved


def test_an_entry_without_a_year_is_refused(tmp_path) -> None:
    (tmp_path / "a.bib").write_text("@misc{x, author = {A. B}, title = {T}, url = {u}}")
    with pytest.raises(ValueError, match="x lacks year"):
        citations.read_entries(tmp_path / "a.bib")
