"""The rendered book in a headless browser with the network cut off, on a desk and on a phone.

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

import contents
import notebooks
import pytest
from chromium import chromium

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

DESK, PHONE = (1280, 900), (390, 844)
SETTLED = """
const done = arguments[arguments.length - 1];
const mathjax = window.MathJax?.startup?.promise ?? Promise.resolve();
mathjax.then(() => document.fonts.ready).then(() => requestAnimationFrame(() => setTimeout(done, 0)));
"""
FACTS = r"""
const main = document.querySelector('article.bd-article') ?? document.querySelector('main');
const width = document.documentElement.clientWidth;
const name = e => e.tagName.toLowerCase() + (e.className.baseVal ?? e.className ? '.' + e.className : '');
const scrolls = e => {
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible') return true;
  return false;
};
const sticksOut = e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.height > 1 && box.right > width + 1 && !scrolls(e);
};
const prose = main.cloneNode(true);
prose.querySelectorAll('pre, code, script, style, mjx-container, math').forEach(e => e.remove());
const at = s => [...document.querySelectorAll(s)].map(a => a.href.split('#')[0]);
return {
  title: main.querySelector('h1')?.innerText ?? '',
  formulas: main.querySelectorAll('mjx-container').length || main.querySelectorAll('math').length,
  unset: [...main.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container, math')).length,
  broken: main.querySelectorAll('mjx-merror, merror').length,
  raw: prose.textContent.match(/\$\$|\\\(|\\\[|\\begin\{|\{\{<|^#\||```|\| *(—|-{3}):? *\|/m)?.[0] ?? '',
  images: [...document.querySelectorAll('img')].map(
    i => ({src: i.src.slice(0, 90), alt: i.alt.trim(), loaded: i.complete && i.naturalWidth > 0})),
  page: [document.documentElement.scrollWidth, width],
  out: [...main.querySelectorAll('*')].filter(sticksOut).slice(0, 3).map(name),
  sidebar: at('.bd-sidebar-primary nav a, #quarto-sidebar .sidebar-item a'),
  previous: at('a.left-prev, .nav-page-previous a'),
  next: at('a.right-next, .nav-page-next a'),
  links: [...main.querySelectorAll('a[href]')].map(a => a.href),
  unlabelled: [...main.querySelectorAll('input, button')].filter(
    e => !(e.labels?.length || e.ariaLabel || e.title || e.innerText.trim())).map(name),
};
"""
VISIBLE = """
return [...arguments[0].querySelectorAll('img, canvas')].filter(e => e.checkVisibility()).map(
  e => e.toDataURL ? e.toDataURL() : e.src + e.style.cssText).join();
"""
COLOURS = r"""
const channels = text => text.match(/[\d.]+/g).map(Number);
const solid = e => {
  for (let p = e; p; p = p.parentElement) {
    const c = channels(getComputedStyle(p).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const light = c => {
  const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const text = document.querySelector('main p');
const [a, b] = [light(channels(getComputedStyle(text).color)), light(solid(text))];
return {
  ground: b,
  contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
  coated: [...document.querySelectorAll('main .cell_output img, main .cell-output img, main figure')].filter(e => {
    const s = getComputedStyle(e), c = channels(s.backgroundColor);
    return s.filter !== 'none' || c.length < 4 || c[3] > 0;
  }).length,
};
"""


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
    """What one page showed at one width, and what it said to the console and asked of the network."""

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
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get(address)
        self.driver.execute_async_script(SETTLED)

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


@pytest.fixture(scope="session")
def visits(browser, book) -> dict[tuple[str, tuple[int, int]], Visit]:
    """Every page at both widths."""
    browser.errors(), browser.foreign(book.base)
    seen = {}
    for page in book.pages:
        for size in (DESK, PHONE):
            browser.open(book.base + page, size)
            facts = browser.js(FACTS) | {"colours": browser.js(COLOURS)}
            seen[page, size] = Visit(facts, browser.errors(), browser.foreign(book.base))
    return seen


def complaints(visits: dict, judge: Callable[[str, Visit], Any]) -> list[str]:
    """What `judge` found wrong, with page and width."""
    found = ((page, size[0], judge(page, visit)) for (page, size), visit in visits.items())
    return [f"{page} at {width} px: {wrong}" for page, width, wrong in found if wrong]


def markdown(notebook: dict) -> str:
    """The prose of a notebook without its code."""
    text = "\n\n".join(notebooks.source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return re.sub(r"^(`{3,}|~{3,}).*?^\1\s*?$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


# Every page


def test_there_is_a_page_for_every_chapter_and_no_other(book):
    written = {path.relative_to(book.folder).as_posix() for path in book.folder.glob("nbs/**/*.html")}
    assert written == set(book.pages[1:])


def test_no_page_asks_another_server_for_anything(visits):
    assert complaints(visits, lambda page, visit: visit.foreign) == []


def test_no_page_reports_an_error(visits):
    assert complaints(visits, lambda page, visit: visit.errors) == []


def test_every_page_has_the_title_of_its_chapter(book, visits):
    for path, notebook in book.chapters.items():
        heading = re.search(r"^# (.+)$", markdown(notebook), re.MULTILINE)[1].strip()
        plain = re.sub(r"[*`]", "", heading)
        assert plain in visits[path.replace(".ipynb", ".html"), DESK].facts["title"]


def test_formulas_are_set(book, visits):
    with_formulas = 0
    for path, notebook in book.chapters.items():
        expected = len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", markdown(notebook), re.DOTALL))
        facts = visits[path.replace(".ipynb", ".html"), DESK].facts
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
        facts = visits[page, DESK].facts
        assert facts["previous"] == addresses[max(index - 1, 0) : index], page
        assert facts["next"] == addresses[index + 1 : index + 2], page


def test_every_link_inside_the_book_leads_to_a_page(book, visits):
    def judge(page: str, visit: Visit) -> list[str]:
        inside = [link.split("#")[0] for link in visit.facts["links"] if link.startswith(book.base)]
        return [link for link in inside if not (book.folder / link.removeprefix(book.base).split("?")[0]).is_file()]

    assert complaints(visits, judge) == []


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


@pytest.mark.parametrize("kind", ["explorer", "animation"])
def test_every_slider_changes_the_picture(browser, book, kind):
    from selenium.webdriver.common.keys import Keys

    moved = 0
    for page, figure in figures(browser, book, kind):
        sliders = browser.find("input[type=range]", figure)
        assert sliders, f"{page}: a figure without a slider"
        playing = [button for button in browser.find("button", figure) if button.text == "Pause"]
        for button in playing:
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
        moved += 1
    assert moved == kinds(book, kind)
    assert browser.errors() == []


def test_play_runs_and_pauses_every_animation(browser, book):
    played = 0
    for page, figure in figures(browser, book, "animation"):
        (button,) = browser.find("button", figure)
        if button.text != "Pause":
            button.click()
        first = browser.js(VISIBLE, figure)
        browser.wait(lambda figure=figure, first=first: browser.js(VISIBLE, figure) != first)
        button.click()
        held = browser.js(VISIBLE, figure)
        wait = float(button.get_attribute("data-wait") or 250)
        browser.driver.execute_async_script("setTimeout(arguments[1], arguments[0])", 2 * wait + 100)
        assert browser.js(VISIBLE, figure) == held, f"{page}: Pause does not stop it"
        played += 1
    assert played == kinds(book, "animation")
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


def test_light_pages_are_readable(visits):
    def judge(page: str, visit: Visit) -> Any:
        colours = visit.facts["colours"]
        return (colours["ground"] < 0.8 or colours["contrast"] < 4.5) and colours

    assert complaints(visits, judge) == []


def test_the_theme_button_turns_every_page_dark_and_figures_stay_bare(browser, book):
    browser.open(book.base + "index.html")
    button = next(b for b in browser.find(".theme-switch-button, .quarto-color-scheme-toggle") if b.is_displayed())
    button.click()
    for choice in browser.find(".theme-change-button[data-mode=dark]"):  # the plain edition opens a menu
        choice.click()
    for page in book.pages:
        browser.open(book.base + page)
        colours = browser.js(COLOURS)
        assert colours["ground"] < 0.05, f"{page} is not dark"
        assert colours["contrast"] >= 4.5, f"{page}: text cannot be read in the dark"
        assert colours["coated"] == 0, f"{page}: {colours['coated']} pictures with a ground or a filter"
    browser.js("localStorage.clear()")


# With axe-core


AXE = """
const done = arguments[arguments.length - 1];
const told = v => `${v.id} (${v.impact}): ${v.nodes.length} times, such as ${v.nodes[0].html.slice(0, 150)}`;
axe.run({exclude: arguments[0]}, {resultTypes: ['violations']}).then(
  found => done(found.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(told)));
"""
THEME = """
for (const key of ['mode', 'theme']) localStorage.setItem(key, arguments[0]);
localStorage.setItem('quarto-color-scheme', arguments[0] === 'dark' ? 'alternate' : 'default');
"""


@pytest.fixture(scope="session")
def axe() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or not spec.origin:
        message = "needs axe-core: pip install --no-deps -r tests/requirements.txt"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, book, axe, theme):
    browser.open(book.base + "index.html")
    browser.js(THEME, theme)
    found = []
    for page in book.pages:
        browser.open(book.base + page)
        assert (browser.js(COLOURS)["ground"] < 0.05) == (theme == "dark"), f"{page} is not {theme}"
        browser.js(axe)
        aside = [] if page == book.pages[3] else [[".highlight"]]  # the colours of code are the same everywhere
        found += [f"{page}: {told}" for told in browser.driver.execute_async_script(AXE, aside)]
    browser.js("localStorage.clear()")
    assert found == []


def test_axe_would_notice(browser, axe):
    browser.driver.get(
        "data:text/html,<html lang=en><title>x</title><main><h1>x</h1><img src=x><p style='color:%23aaa'>pale"
    )
    browser.js(axe)
    found = browser.driver.execute_async_script(AXE, [])
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
