"""What all tests share: the project's folder and its settings, and surroundings that do not depend on the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tools", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

if "PYTEST_XDIST_WORKER" in os.environ:  # with more threads than cores, all of them wait for each other
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
os.environ["MPLBACKEND"] = "Agg"  # figures drawn by tests open no window
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # kernels come from this environment, not from the user's folder

LONGEST = ("test_notebooks", "test_colab", "test_book")  # a file stays with one worker: begun last, it ends alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others fill the gaps."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def settings() -> dict[str, str]:
    """The metadata in settings.ini."""
    import chapter_header

    return chapter_header.settings(ROOT)
