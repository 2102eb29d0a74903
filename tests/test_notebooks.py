"""Every chapter runs from a clean kernel at preset tiny, offline, within its budget, and installs nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
BUDGET = 60.0 * WORKERS  # 60 seconds a notebook that has two CPU cores to itself; here it shares them
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
NOWHERE = "http://127.0.0.1:9"  # a port that answers nobody
ANSI = re.compile(r"\x1b\[[0-9;]*m")
EXCEPTION = re.compile(r"^Traceback \(most recent call last\)|^(\w+\.)*\w+(Error|Exception)\b", re.MULTILINE)


def lay_out(notebook: Path, folder: Path) -> Path:
    """Copy a notebook, and what it reads beside it, into a folder laid out like the project."""
    for name in ("assets", "results"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
    (folder / "nbs").mkdir()
    return Path(shutil.copy(notebook, folder / "nbs"))


def surroundings(folder: Path) -> dict[str, str]:
    """The kernel's environment: preset tiny, own data and profile folders, no way out to the network."""
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {key: NOWHERE for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    env |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")  # a chapter may serve itself
    return env | {
        "DIFFUSION_BOOK_PRESET": "tiny",
        "DIFFUSION_BOOK_DATA": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": str(threads),
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


def run(
    path: Path,
    folder: Path,
    budget: float = BUDGET,
    kernel: str = "python3",
    extra: Mapping[str, str | None] = MappingProxyType({}),  # for the environment; None takes a variable away
) -> tuple[nbformat.NotebookNode, float]:
    """Run a notebook in place in a fresh kernel; return it with its outputs, and the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=int(budget), kernel_name=kernel, resources=resources)
    if "JUPYTER_PATH" in extra:  # where another kernel is found
        client.create_kernel_manager().kernel_spec_manager.kernel_dirs.append(f"{extra['JUPYTER_PATH']}/kernels")
    environment = surroundings(folder) | extra
    started = time.perf_counter()
    try:
        client.execute(env={name: value for name, value in environment.items() if value is not None})
    except CellExecutionError as error:
        pytest.fail(f"{path.name}, cell {failed_cell(notebook)}:\n{ANSI.sub('', str(error))}", pytrace=False)
    except CellTimeoutError:
        pytest.fail(f"{path.name}: a cell did not end within {budget:g} s at preset tiny", pytrace=False)
    return notebook, time.perf_counter() - started


def failed_cell(notebook: nbformat.NotebookNode) -> int:
    """The number of the cell that holds an error, counted from 1."""
    kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    return next((number for number, kind in enumerate(kinds, start=1) if "error" in kind), 0)


def complaints(notebook: nbformat.NotebookNode, name: str) -> list[str]:
    """Exceptions that cells wrote to stderr without stopping, and a set-up cell that did something."""
    wrong = []
    for number, cell in enumerate(notebook.cells, start=1):
        outputs = cell.get("outputs", [])
        text = ANSI.sub("", "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"))
        if EXCEPTION.search(text):
            wrong.append(f"{name}, cell {number} wrote an exception to stderr:\n{text}")
        if "%pip" in cell.source and outputs:
            wrong.append(
                f"{name}, cell {number}: the set-up cell did something although the library is there: {outputs}"
            )
    return wrong


def moves(chapter: Path) -> bool:
    """Whether a chapter has a figure that moves; tests/test_colab.py runs those, with an older front end."""
    cells = nbformat.read(chapter, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return not chapter.stem.startswith("A5_") and bool(re.search(r"(?<!def )\b(Explorer|animate)\(", code))


# Each chapter runs once: here, or as on Colab. CHAPTERS=all runs all of them here.
STILL = [chapter for chapter in CHAPTERS if os.environ.get("CHAPTERS") == "all" or not moves(chapter)]


def test_there_are_chapters() -> None:
    assert len(CHAPTERS) >= len(STILL) > len(CHAPTERS) / 2


@pytest.mark.slow
@pytest.mark.timeout(4 * BUDGET)
@pytest.mark.parametrize("chapter", STILL, ids=lambda path: path.stem)
def test_chapter_runs(chapter: Path, tmp_path: Path) -> None:
    notebook, seconds = run(lay_out(chapter, tmp_path), tmp_path)
    wrong = complaints(notebook, chapter.name)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    assert seconds < BUDGET, f"{chapter.name} took {seconds:.0f} s at preset tiny, its budget is {BUDGET:.0f} s"


# What the runner must notice


def scratch(folder: Path, *sources: str) -> Path:
    """A notebook of these code cells, in a folder laid out like the project."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "scratch.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return lay_out(path, folder)


def test_kernel_is_clean_and_offline(tmp_path: Path) -> None:
    code = """
import json, os, sys, urllib.request
try:
    urllib.request.urlopen("http://example.com", timeout=5)
    reached = True
except OSError:
    reached = False
import diffusion_book, matplotlib
print(json.dumps([reached, os.getcwd(), os.environ["DIFFUSION_BOOK_PRESET"], matplotlib.get_backend(), sys.executable]))
"""
    notebook, seconds = run(scratch(tmp_path, code), tmp_path)
    reached, folder, preset, backend, executable = json.loads(notebook.cells[0].outputs[0].text)
    assert (reached, preset) == (False, "tiny") and seconds > 0
    assert Path(folder).resolve() == (tmp_path / "nbs").resolve()
    assert "inline" in backend and Path(executable).resolve() == Path(sys.executable).resolve()
    assert (tmp_path / "assets" / "open-in-colab.svg").exists()


def test_failing_cell_is_named(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"scratch.ipynb, cell 2:(.|\n)*ZeroDivisionError"):
        run(scratch(tmp_path, "x = 1", "x / 0"), tmp_path)


def test_endless_cell_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="did not end within 1 s"):
        run(scratch(tmp_path, "import time\ntime.sleep(30)"), tmp_path, budget=1)


def test_quiet_exceptions_and_installs_are_named(tmp_path: Path) -> None:
    thread = "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()"
    stderr = "import sys\nprint('ValueError: lost', file=sys.stderr)"
    setup = "if True:\n    %pip install -q a-package-that-is-nowhere"
    notebook, _ = run(scratch(tmp_path, "print('ValueError: said')", thread, stderr, setup), tmp_path)
    assert [line.split(":")[0] for line in complaints(notebook, "s")] == [
        "s, cell 2 wrote an exception to stderr",
        "s, cell 3 wrote an exception to stderr",
        "s, cell 4",
    ]
