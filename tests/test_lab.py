"""The live half of an Explorer: JupyterLab in a browser, and a key press that runs Python."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium

CELL = """\
from PIL import Image
from diffusion_book.widgets import Explorer

calls = []

def draw(red, green):
    calls.append((red, green))
    return Image.new("RGB", (60, 40), (red, green, len(calls)))

Explorer(draw, red=[50, 60, 70], green=[40, 80], alt="A colour")
"""  # blue counts the calls: above 6, the number of stored frames, only a live call can have drawn it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(what: str, check: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            if found := check():
                return found
        time.sleep(0.1)
    pytest.fail(f"not within {seconds:g} s: {what}")


def write_notebook(path: Path) -> None:
    cell = {"cell_type": "code", "id": "one", "source": CELL, "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook), encoding="utf-8")


@contextlib.contextmanager
def jupyterlab(folder: Path, root: Path) -> Iterator[str]:
    """The address of a notebook opened in a JupyterLab of its own, which knows no user settings."""
    token, port = secrets.token_hex(16), free_port()
    homes = {name: str(folder / name) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    options = {
        "IdentityProvider.token": token,
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": folder,
        "LabApp.extension_manager": "readonly",
        "LabApp.news_url": None,
    }
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", *(f"--{k}={v}" for k, v in options.items())]
    with open(folder / "server.log", "w") as log:
        environment = {**os.environ, **homes, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        up = f"{address}/api/status?token={token}"
        wait("JupyterLab answers", lambda: urllib.request.urlopen(up, timeout=1).status == 200, 30)
        yield f"{address}/doc/tree/explore.ipynb?reset&token={token}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def requests(driver: Any) -> list[str]:
    """Addresses that the page has asked for so far, other than its own server's."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if url.startswith("http") and not url.startswith("http://127.0.0.1:")]


PROMPT = ".jp-Notebook .jp-CodeCell .jp-InputPrompt"


def run_cell(driver: Any) -> list[Any]:
    """Answer a question that JupyterLab asks, run the cell if it has not run; the pictures of live views there are."""
    from selenium.webdriver.common.keys import Keys

    if questions := driver.find_elements("css selector", ".jp-Dialog .jp-mod-accept"):
        questions[0].click()
    elif driver.find_element("css selector", PROMPT).text.strip() == "[ ]:":
        driver.find_element("css selector", ".jp-Notebook .cm-content").send_keys(Keys.SHIFT, Keys.ENTER)
        time.sleep(0.5)
    return driver.find_elements("css selector", "img.widget-image")


def color(driver: Any, picture: Any) -> list[int]:
    """Red, green and blue in the middle of a picture."""
    script = """const c = document.createElement('canvas').getContext('2d');
    c.drawImage(arguments[0], 0, 0); return Array.from(c.getImageData(20, 20, 1, 1).data).slice(0, 3)"""
    return driver.execute_script(script, picture)


@pytest.mark.lab
def test_a_key_press_and_play_in_jupyterlab_call_draw(tmp_path, root):
    pytest.importorskip("jupyterlab")
    from selenium.webdriver.common.keys import Keys

    write_notebook(tmp_path / "explore.ipynb")
    with chromium(tmp_path / "profile") as driver, jupyterlab(tmp_path, root) as address:
        driver.get(address)
        wait("the notebook opens", lambda: driver.find_elements("css selector", PROMPT), 30)
        picture = wait("the live view appears", lambda: run_cell(driver), 30)[0]
        assert color(driver, picture) == [50, 40, 1], "the first combination, as the first call drew it"
        red, green = driver.find_elements("css selector", ".noUi-handle")
        red.send_keys(Keys.ARROW_RIGHT)
        wait("a seventh call of draw shows", lambda: color(driver, picture) == [60, 40, 7], 15)
        green.send_keys(Keys.ARROW_RIGHT)
        wait("an eighth call of draw shows", lambda: color(driver, picture) == [60, 80, 8], 15)
        driver.find_elements("css selector", ".widget-play button")[0].click()  # of the first slider
        wait("Play moves on by itself", lambda: color(driver, picture) == [70, 80, 9], 15)
        assert requests(driver) == []
