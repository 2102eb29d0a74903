"""Chapters as Colab runs them: its older front end, the library installed by the set-up cell, nothing else changed.

By itself this runs the chapters whose figures move, since that is what a front end can break;
`COLAB_CHAPTERS=all` (or a few names) runs others: `make colab`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import chapter_header
import nbformat
import pytest
from conftest import ROOT
from test_notebooks import BUDGET, CHAPTERS, complaints, lay_out, moves, run, surroundings
from test_structure import project_files

PINS = ROOT / "tests" / "colab.txt"
ASKED = os.environ.get("COLAB_CHAPTERS", "")
CHOSEN = [path for path in CHAPTERS if ASKED == "all" or path.stem in ASKED.split() or (not ASKED and moves(path))]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Colab:
    """An environment with Colab's packages, and the kernel that runs in it."""

    python: Path
    jupyter: Path  # a JUPYTER_PATH that knows the kernel
    kernel: str = "colab"

    def packages(self) -> dict[str, str]:
        """Names and versions of what is installed."""
        command = [str(self.python), "-m", "pip", "list", "--format", "json"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return {package["name"].lower(): package["version"] for package in found}


def pinned() -> dict[str, str]:
    """The versions that Colab has."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", PINS.read_text(encoding="utf-8"), re.MULTILINE))


def torch_pin() -> str:
    """The torch of constraints.txt; Colab's own has no build for every machine."""
    return re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Colab:
    """Colab's packages without the library."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-r", str(PINS), torch_pin()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spec = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec | {"display_name": "Colab"}))
    return Colab(python, folder / "jupyter")


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """The working tree as a repository with the branch that the set-up cell names."""
    folder = tmp_path_factory.mktemp("origin")
    for name, path in project_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def colab(bare, repository, settings, tmp_path_factory) -> Colab:
    """The environment after a chapter's set-up cell has run in it."""
    before = bare.packages()
    assert {name: before[name] for name in pinned()} == pinned()
    folder = tmp_path_factory.mktemp("setup")
    home = f"https://github.com/{settings['user']}/{settings['repo']}"
    (folder / "gitconfig").write_text(f'[url "{repository.as_uri()}"]\n\tinsteadOf = {home}\n')
    cells = nbformat.read(CHAPTERS[0], as_version=4).cells[:2]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "setup.ipynb")
    extra = {"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), **online()}
    run(lay_out(folder / "setup.ipynb", folder), folder, BUDGET * 5, kernel=bare.kernel, extra=extra | paths(bare))
    after = bare.packages()
    assert after.pop(settings["lib_name"].replace("_", "-"), after.pop(settings["lib_name"], "")) == settings["version"]
    assert {name: after[name] for name in before} == before, "the set-up cell changed what was there"
    return bare


def online() -> dict[str, str | None]:
    """What `surroundings` sets to keep a kernel from the network, put back as it is here."""
    names = [name for name in surroundings(ROOT) if name.lower().endswith("_proxy") or name == "PIP_NO_INDEX"]
    return {name: os.environ.get(name) for name in names}


def paths(colab: Colab) -> dict[str, str | None]:
    """The kernel's own packages and no others: the library is the installed one."""
    return {"JUPYTER_PATH": str(colab.jupyter), "PYTHONPATH": None}


def test_the_set_up_cell_installs_the_library_and_changes_nothing_else(colab):
    command = [str(colab.python), "-c", "import diffusion_book; print(diffusion_book.__file__)"]
    done = subprocess.run(command, cwd=colab.jupyter, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(colab.python.parent.parent)
    assert sys.prefix not in done.stdout


@pytest.mark.parametrize("chapter", CHOSEN, ids=lambda path: path.stem)
def test_a_chapter_runs_as_on_colab(chapter: Path, colab: Colab, tmp_path: Path, settings: dict[str, str]) -> None:
    if extra := chapter_header.EXTRAS.get(chapter.name):  # its own set-up cell would have asked for these
        command = [str(colab.python), "-m", "pip", "install", "--quiet", *settings[f"{extra}_requirements"].split()]
        subprocess.run(command, check=True, capture_output=True)
    notebook, _ = run(lay_out(chapter, tmp_path), tmp_path, 2 * BUDGET, kernel=colab.kernel, extra=paths(colab))
    assert complaints(notebook, chapter.name) == []
