"""The rendered book in a headless browser with the network cut off: light and dark, phone, tablet and desk.

The pages are those in `DIFFUSION_BOOK_HTML`, else the committed edition, rendered here once.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import contents
import notebooks
import pytest
from chromium import chromium
from page_scripts import AXE, COLOURS, FACTS, HURRY, LAYOUT, PLAIN_CODE, SETTLED, THEME, TIMES, VISIBLE

pytestmark = [pytest.mark.browser, pytest.mark.timeout(2400)]  # the first test looks at every page six times

PHONE, TABLET, DESK = SIZES = (390, 844), (768, 1024), (1440, 900)
THEMES = ("light", "dark")
PAGE_BYTES, SHARED_BYTES = 3_000_000, 4_000_000


@dataclass
class Book:
    """The rendered pages: where they lie, at which address they are served, and what should be in them."""

    folder: Path
    base: str
    contents: contents.Contents
    chapters: dict[str, dict]

    @property
    def pages(self) -> list[str]:
        """The pages in reading order."""
        return ["index.html", *(path.replace(".ipynb", ".html") for path in self.contents.chapters)]


@dataclass
class Visit:
    """What one page showed in one theme at one width, and what it said to the console and asked of the network."""

    facts: dict[str, Any]
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class Browser:
    """A page at a time, with what it said to the console and asked of the network."""

    def __init__(self, driver: Any):
        self.driver = driver
        self.driver.set_script_timeout(60)

    def open(self, address: str, size: tuple[int, int] = DESK) -> None:
        """Show a page and wait until its formulas are set."""
        self.resize(size)
        self.driver.get(address)
        self.driver.execute_async_script(SETTLED)

    def resize(self, size: tuple[int, int]) -> None:
        """Give the open page another width and height, and time to settle."""
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_async_script(SETTLED)

    def theme(self, name: str) -> None:
        """The theme of the pages that are opened from now on."""
        self.js(THEME, name)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str, within: Any = None) -> list[Any]:
        return (within or self.driver).find_elements("css selector", selector)

    def wait(self, condition: Callable[[], Any], seconds: float = 10) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def errors(self) -> list[str]:
        """What the console has called severe since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def foreign(self, base: str) -> list[str]:
        """The addresses outside `base` that pages have asked for since the last call."""
        asked = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent")
        return [url for url in urls if re.match(r"(https?|wss?|ftp):", url) and not url.startswith(base)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that keeps its log to itself."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield Browser(driver)


@pytest.fixture(scope="session")
def book(browser, root, tmp_path_factory) -> Iterator[Book]:
    """The pages, served on this machine."""
    folder = Path(os.environ.get("DIFFUSION_BOOK_HTML") or tmp_path_factory.mktemp("html") / "book").resolve()
    if not os.environ.get("DIFFUSION_BOOK_HTML"):
        command = [sys.executable, str(root / "tools" / "book.py"), "site", "--output", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    listed = contents.read_contents(root)
    chapters = {path: notebooks.read_notebook(root / path) for path in listed.chapters}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Book(folder, f"http://127.0.0.1:{server.server_port}/", listed, chapters)
        server.shutdown()


Visits = dict[tuple[str, str, tuple[int, int]], Visit]


@pytest.fixture(scope="session")
def visits(browser, book) -> Visits:
    """Every page in both themes at three widths; axe-core looks at it at the widest, where it is installed."""
    source, seen = axe_source(), {}
    for theme in THEMES:
        browser.open(book.base + "index.html")
        browser.theme(theme)
        browser.errors(), browser.foreign(book.base)
        for page in book.pages:
            browser.open(book.base + page, SIZES[0])
            facts = browser.js(TIMES) | browser.js(FACTS) | {"colours": browser.js(COLOURS)}
            for size in SIZES:
                browser.resize(size)
                layout = browser.js(LAYOUT)
                seen[page, theme, size] = Visit(facts | layout, browser.errors(), browser.foreign(book.base))
            if source:
                browser.js(source)
                if page != book.pages[3]:  # the colours of code are the same everywhere, and its words are many
                    browser.js(PLAIN_CODE)
                rules = None if theme == "light" else ["color-contrast"]  # the others do not depend on the theme
                seen[page, theme, size].facts["axe"] = browser.driver.execute_async_script(AXE, rules)
                browser.errors(), browser.foreign(book.base)  # axe asks for style sheets by itself
    browser.js("localStorage.clear()")
    return seen


def axe_source() -> str:
    """The script of axe-core, or nothing where it is not installed."""
    spec = importlib.util.find_spec("axe_playwright_python")
    return Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8") if spec and spec.origin else ""


def complaints(visits: dict, judge: Callable[[str, Visit], Any]) -> list[str]:
    """What `judge` found wrong, with page, theme and width."""
    found = ((*place, judge(place[0], visit)) for place, visit in visits.items())
    return [f"{page}, {theme}, at {size[0]} px: {wrong}" for page, theme, size, wrong in found if wrong]


def markdown(notebook: dict) -> str:
    """The prose of a notebook without its code."""
    text = "\n\n".join(notebooks.source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return re.sub(r"^(`{3,}|~{3,}).*?^\1\s*?$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


# Every page


def test_there_is_a_page_for_every_chapter_and_no_other(book):
    written = {path.relative_to(book.folder).as_posix() for path in book.folder.glob("nbs/**/*.html")}
    assert written == set(book.pages[1:])
    assert (book.folder / "404.html").is_file()


def test_no_page_asks_another_server_for_anything(visits):
    assert complaints(visits, lambda page, visit: visit.foreign) == []


def test_no_page_reports_an_error(visits):
    assert complaints(visits, lambda page, visit: visit.errors) == []


def test_every_page_has_the_title_of_its_chapter(book, visits):
    for path, notebook in book.chapters.items():
        heading = re.search(r"^# (.+)$", markdown(notebook), re.MULTILINE)[1].strip()
        plain = re.sub(r"[*`]", "", heading)
        assert plain in visits[path.replace(".ipynb", ".html"), "light", DESK].facts["title"]


def test_formulas_are_set(book, visits):
    with_formulas = 0
    for path, notebook in book.chapters.items():
        expected = len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", markdown(notebook), re.DOTALL))
        facts = visits[path.replace(".ipynb", ".html"), "light", DESK].facts
        assert facts["formulas"] >= expected, path
        with_formulas += expected > 0
    assert with_formulas
    assert complaints(visits, lambda page, visit: visit.facts["unset"] or visit.facts["broken"]) == []


def test_no_markup_is_left_in_the_text(visits):
    assert complaints(visits, lambda page, visit: visit.facts["raw"]) == []


def test_every_picture_is_there_and_has_a_description(visits):
    def judge(page: str, visit: Visit) -> list[dict]:
        return [image for image in visit.facts["images"] if not (image["alt"] and image["loaded"])]

    assert complaints(visits, judge) == []
    assert sum(len(visit.facts["images"]) for visit in visits.values()) > len(visits)


def test_no_page_is_wider_than_the_screen(visits):
    def judge(page: str, visit: Visit) -> Any:
        scroll, screen = visit.facts["page"]
        return visit.facts["out"] or (scroll > screen and f"{scroll} px of content on {screen} px")

    assert complaints(visits, judge) == []


def test_every_control_has_a_name(visits):
    assert complaints(visits, lambda page, visit: visit.facts["unlabelled"]) == []


def test_the_sidebar_lists_every_chapter(book, visits):
    every = {book.base + page for page in book.pages[1:]}
    assert complaints(visits, lambda page, visit: sorted(every - set(visit.facts["sidebar"]))) == []


def test_previous_and_next_follow_the_contents(book, visits):
    addresses = [book.base + page for page in book.pages]
    for index, page in enumerate(book.pages):
        facts = visits[page, "light", DESK].facts
        assert facts["previous"] == addresses[max(index - 1, 0) : index], page
        assert facts["next"] == addresses[index + 1 : index + 2], page


def test_every_link_inside_the_book_leads_to_a_page_and_a_place_in_it(book, visits):
    texts = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in _texts(book).items()}

    def leads(link: str) -> bool:
        page, _, place = link.removeprefix(book.base).partition("#")
        page = page.partition("?")[0]
        return (book.folder / page).is_file() and (not place or page not in texts or unquote(place) in texts[page])

    def judge(page: str, visit: Visit) -> list[str]:
        return [link for link in visit.facts["links"] if link.startswith(book.base) and not leads(link)]

    assert complaints(visits, judge) == []


def test_a_link_to_a_publication_says_whose_it_is(book, visits):
    links = [link for text in _texts(book).values() for link in re.findall(r'<a[^>]*href="https://arxiv[^>]*>', text)]
    assert len(links) > 100 and all(re.search(r'title="[^"]+ \(\d{4}\)\. ', link) for link in links)


def test_no_picture_moves_the_text_when_it_comes(visits):
    assert complaints(visits, lambda page, visit: visit.facts["unsized"]) == []


def test_pages_show_themselves_within_a_second(browser, book, visits):
    best = {page: min(visits[page, theme, DESK].facts["paint"] for theme in THEMES) for page in book.pages}
    for _ in range(5):  # another program on this machine may have held a page up: the best of a few counts
        for page in (page for page, paint in best.items() if paint >= 1000):
            browser.open(book.base + page)
            best[page] = min(best[page], browser.js(TIMES)["paint"])
    assert {page: paint for page, paint in best.items() if not 0 < paint < 1000} == {}


def test_pages_and_what_they_share_are_light(book, visits):
    heavy, shared = {}, set()
    for page in book.pages:
        loaded = {a.removeprefix(book.base).partition("?")[0] for a in visits[page, "light", DESK].facts["loaded"]}
        common = {path for path in loaded if path.startswith("_static/") or path.startswith("site_libs/")}
        own = sum((book.folder / path).stat().st_size for path in {page, *(loaded - common)})
        shared |= common
        heavy |= {page: own} if own > PAGE_BYTES else {}
    assert heavy == {}
    assert 0 < sum((book.folder / path).stat().st_size for path in shared) <= SHARED_BYTES


# What moves


def figures(browser: Browser, book: Book, kind: str) -> Iterator[tuple[str, Any]]:
    """Every figure of a kind, with its page open."""
    for page in book.pages:
        if f'class="{kind}"' not in (book.folder / page).read_text(encoding="utf-8"):
            continue
        browser.open(book.base + page)
        for figure in browser.find(f"figure.{kind}"):
            browser.js("arguments[0].scrollIntoView({block: 'center'})", figure)
            yield page, figure


def kinds(book: Book, kind: str) -> int:
    """How many figures of a kind the notebooks hold."""
    return sum(json.dumps(notebook).count(f'class=\\"{kind}\\"') for notebook in book.chapters.values())


def press_keys(browser: Browser, page: str, figure: Any) -> None:
    """Move every slider by a key and back: the picture goes with it."""
    from selenium.webdriver.common.keys import Keys

    sliders = browser.find("input[type=range]", figure)
    assert sliders, f"{page}: a figure without a slider"
    for button in browser.find("button", figure):
        if button.text == "Pause":
            button.click()
    for slider in sliders:
        at_end = slider.get_attribute("value") == slider.get_attribute("max")
        there, back = (Keys.ARROW_LEFT, Keys.ARROW_RIGHT) if at_end else (Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
        before = browser.js(VISIBLE, figure)
        slider.send_keys(there)
        after = browser.js(VISIBLE, figure)
        assert before and after and after != before, f"{page}: {slider.accessible_name} moves nothing"
        slider.send_keys(back)
        assert browser.js(VISIBLE, figure) == before, f"{page}: {slider.accessible_name} does not move back"


def play(browser: Browser, page: str, figure: Any) -> None:
    """Play and pause every slider."""
    buttons = browser.find("button", figure)
    assert len(buttons) == len(browser.find("input[type=range]", figure)), f"{page}: a slider without Play"
    for button in buttons:
        assert float(button.get_attribute("data-wait")) > 100
        browser.js(HURRY, button)  # to 100 ms a frame
        if button.text != "Pause":
            button.click()
        first = browser.js(VISIBLE, figure)
        browser.wait(lambda figure=figure, first=first: browser.js(VISIBLE, figure) != first)
        button.click()
        held = browser.js(VISIBLE, figure)
        browser.driver.execute_async_script("setTimeout(arguments[0], 300)")
        assert browser.js(VISIBLE, figure) == held, f"{page}: Pause does not stop it"


@pytest.mark.parametrize("kind", ["explorer", "animation"])
def test_every_slider_changes_the_picture_by_key_and_by_play(browser, book, kind):
    tried = 0
    for page, figure in figures(browser, book, kind):
        press_keys(browser, page, figure)
        play(browser, page, figure)
        tried += 1
    assert tried == kinds(book, kind) > 8
    assert browser.errors() == []


# Search and theme


def found(browser: Browser, base: str, word: str) -> list[str]:
    """The addresses that a search for `word` lists."""
    if (listing := base + "search.html?q=" + word) and "quarto" not in browser.js(
        "return document.querySelector('meta[name=generator]')?.content ?? ''"
    ):
        browser.open(listing)
        return browser.wait(lambda: [a.get_attribute("href") for a in browser.find("#search-results li a")])
    browser.find("#quarto-search button")[0].click()
    browser.wait(lambda: browser.find(".aa-Input"))[0].send_keys(word)
    return browser.wait(lambda: [a.get_attribute("href") for a in browser.find(".aa-Item a")])


def test_the_search_finds_a_word_and_does_not_find_every_word(browser, book):
    holding = {page for page, text in _texts(book).items() if re.search(r"\bschedules?\b", text, re.IGNORECASE)}
    browser.open(book.base + "index.html")
    hits = {url.split("?")[0].split("#")[0].removeprefix(book.base) for url in found(browser, book.base, "schedule")}
    assert hits and hits <= holding
    assert "nbs/03_schedules.html" in hits
    assert browser.errors() == [] and browser.foreign(book.base) == []


def _texts(book: Book) -> dict[str, str]:
    return {page: (book.folder / page).read_text(encoding="utf-8") for page in book.pages}


@pytest.mark.parametrize("theme", THEMES)
def test_pages_are_readable_and_figures_stay_bare(visits, theme):
    def judge(page: str, visit: Visit) -> Any:
        colours = visit.facts["colours"]
        right = colours["ground"] < 0.05 if theme == "dark" else colours["ground"] > 0.8
        bare = theme == "light" or colours["coated"] == 0
        return not (right and bare and colours["contrast"] >= 4.5) and colours

    assert complaints({place: visit for place, visit in visits.items() if place[1] == theme}, judge) == []


def test_the_theme_button_turns_a_page_dark_and_the_next_stays_so(browser, book):
    browser.open(book.base + "index.html")
    button = next(b for b in browser.find(".theme-switch-button, .quarto-color-scheme-toggle") if b.is_displayed())
    button.click()
    for choice in browser.find(".theme-change-button[data-mode=dark]"):  # the plain edition opens a menu
        choice.click()
    for page in ("index.html", book.pages[1]):
        browser.open(book.base + page)
        assert browser.js(COLOURS)["ground"] < 0.05, f"{page} is not dark"
    browser.js("localStorage.clear()")


# With axe-core


@pytest.fixture(scope="session")
def axe() -> str:
    if not (source := axe_source()):
        message = "needs axe-core: pip install --no-deps -r tests/requirements.txt"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return source


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious(axe, visits, theme):
    looked = {place: visit for place, visit in visits.items() if place[1:] == (theme, DESK)}
    assert complaints(looked, lambda page, visit: visit.facts["axe"]) == []


def test_axe_would_notice(browser, axe):
    browser.driver.get(
        "data:text/html,<html lang=en><title>x</title><main><h1>x</h1><img src=x><p style='color:%23aaa'>pale"
    )
    browser.js(axe)
    found = browser.driver.execute_async_script(AXE, None)
    assert sorted(told.partition(" ")[0] for told in found) == ["color-contrast", "image-alt"]


# From a disk


def test_the_book_opens_from_a_disk(browser, book):
    if "quarto" in (book.folder / "index.html").read_text(encoding="utf-8")[:2000]:
        pytest.skip("Quarto's search reads its index over http only")
    base = book.folder.as_uri() + "/"
    browser.errors(), browser.foreign(base)
    path = next(path for path, notebook in book.chapters.items() if "$$" in markdown(notebook))
    browser.open(base + path.replace(".ipynb", ".html"))
    assert browser.js(FACTS)["formulas"]
    assert found(browser, base, "schedule")
    browser.open(base + "index.html")
    assert browser.errors() == [] and browser.foreign(base) == []
