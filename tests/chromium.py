"""A headless Chromium for tests: no outside network, and one line that says why where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def _program(variable: str, names: tuple[str, ...]) -> str | None:
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def chromium(profile: Path, *flags: str) -> Iterator[Any]:
    """A Selenium driver. Any name but localhost resolves to nothing. Skips without Chromium; fails where CI is set."""
    browser = _program("CHROME_BIN", BROWSERS)
    service = _program("CHROMEDRIVER", ("chromedriver",))
    if not browser or not service:
        message = f"needs Chromium and chromedriver; found browser {browser} and driver {service}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    fixed = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
    )
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
    for flag in (*fixed, offline, "--window-size=1100,900", f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=service))
    try:
        yield driver
    finally:
        driver.quit()
