"""The library builds, installs and imports as promised: light, typed, and by the set-up cell of every chapter."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import chapter_header
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_structure import EXPORTED, NOTEBOOKS, project_files

MODULES = ["diffusion_book", *(f"diffusion_book.{name}" for name in EXPORTED)]
HEAVY = (
    "nbdev",
    "fastcore",
    "IPython",
    "ipywidgets",
    "sklearn",
    "scipy",
    "accelerate",
    "pooch",
    "matplotlib",
    "PIL",
    "tqdm",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
ABOUT: dict[str, set[str]] = {}  # what a module may import because it is about it
IMPORT_BUDGET = 0.050  # seconds, on top of torch
NEEDED = ("torch",)  # all that importing the library takes


def python(*args: str, executable: str | Path = sys.executable, **env: str) -> str:
    """Run Python outside the project's folder and return what it prints; on failure show what it said."""
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    done = subprocess.run(
        [str(executable), *args], cwd=Path(sys.prefix), env=surroundings, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"python {' '.join(args)[:300]}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def copy_project(target: Path) -> Path:
    """A copy of the files that are tracked or would be."""
    for name, path in project_files().items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / name)
    return target


def closure(names: Iterable[str]) -> dict[str, Path]:
    """Distributions that these ones require, themselves included, with the folders that they are installed in."""
    found: dict[str, Path] = {}
    wanted = list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # required elsewhere only: other systems, extras
        found[name] = Path(str(installed.locate_file("")))
        requirements = map(Requirement, installed.requires or [])
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def top_level(name: str) -> set[str]:
    """First path parts of a distribution's files in site-packages."""
    files = distribution(name).files or []
    return {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}


def bare_environment(folder: Path, *names: str) -> Path:
    """A new environment that holds these distributions of the present one and what they require, nothing else."""
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    for name, home in closure(names).items():
        for part in top_level(name):
            if not (site / part).exists():
                (site / part).symlink_to(home / part)
    return Path(sysconfig.get_path("scripts", "venv", vars=scheme)) / "python"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source distribution of the project, and the wheel built from it."""
    source = copy_project(tmp_path_factory.mktemp("project"))
    target = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", str(target), str(source))
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


# What is in the distributions


@pytest.mark.slow
def test_sdist_holds_what_building_needs(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "diffusion_book/py.typed"}
    assert wanted - names == set()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built: dict[str, Path], settings: dict[str, str]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
        (commands,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert commands.split() == ["[console_scripts]", "diffusion-book", "=", "diffusion_book.cli:main"]
    tracked = {name for name in project_files() if name.startswith("diffusion_book/")}
    assert {name for name in names if ".dist-info/" not in name} == tracked
    assert "diffusion_book/py.typed" in tracked
    assert f"Version: {settings['version']}\n" in metadata
    assert f"License-Expression: {settings['license_spdx']}\n" in metadata
    assert f"Requires-Python: >={settings['min_python']}\n" in metadata
    assert "https://github.com/{user}/{repo}".format(**settings) in metadata, "[project.urls] agrees with settings.ini"


def test_requirements_are_lower_bounds_that_the_constraints_meet(settings: dict[str, str]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {re.sub(r"[-_.]+", "-", pin.name).lower(): str(pin.specifier) for pin in pins}
    assert all(re.fullmatch(r"==[^,*+@ ]+", pin) for pin in exact.values()) and exact["torch"] == "==2.13.0"
    runtime = [text for key in ("", "notebook_", "export_") for text in settings[f"{key}requirements"].split()]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", text) for text in runtime), (
        "lower bounds only, so that a reader's set stays"
    )
    for requirement in map(Requirement, [*runtime, *settings["dev_requirements"].split()]):
        pin = exact[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(pin.removeprefix("==")), (
            f"{requirement} and the constraint {pin} disagree"
        )


# Importing


@pytest.mark.slow
def test_wheel_imports_beside_torch_alone(built: dict[str, Path], tmp_path: Path, settings: dict[str, str]) -> None:
    bare = bare_environment(tmp_path / "bare", *NEEDED)
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(built["wheel"]), executable=bare)
    code = f"""
import importlib, importlib.util, json
modules = [importlib.import_module(name) for name in {MODULES}]
heavy = [name for name in {HEAVY} if importlib.util.find_spec(name)]
print(json.dumps([sorted(module.__file__ for module in modules), modules[0].__version__, heavy]))
"""
    files, version, heavy = json.loads(python("-W", "error::ImportWarning", "-c", code, executable=bare))
    assert version == settings["version"] and heavy == [], "nothing heavy was there to import"
    assert all(Path(file).is_relative_to(tmp_path) for file in files), "the wheel was imported, not this checkout"
    (command,) = bare.parent.glob("diffusion-book*")  # what a reader types after pip install
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == 0 and "usage: diffusion-book" in done.stdout, done.stderr


@pytest.mark.slow
def test_imports_are_light() -> None:
    code = f"""
import sys, json, importlib, torch
there, pulled = set(sys.modules), {{}}
for name in {MODULES}:
    importlib.import_module(name)
    new = [heavy for heavy in {HEAVY} if heavy in sys.modules and heavy not in there]
    pulled[name] = new
    there |= set(new)
print(json.dumps(pulled))
"""
    pulled = {name: set(new) - ABOUT.get(name, set()) for name, new in json.loads(python("-c", code)).items()}
    assert {name: new for name, new in pulled.items() if new} == {}


@pytest.mark.slow
def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    package = tmp_path / "heavy_example"
    package.mkdir()
    (package / "__init__.py").write_text("import matplotlib")
    code = "import sys, torch, heavy_example; print('matplotlib' in sys.modules)"
    assert python("-c", code, PYTHONPATH=str(tmp_path)).strip() == "True"
    assert python("-c", "import sys, torch; print('matplotlib' in sys.modules)").strip() == "False"


def import_seconds(statement: str, repeats: int, **env: str) -> float:
    """Seconds that an import takes on top of torch, in a fresh Python: the best of several."""
    code = f"import time, torch; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return min(float(python("-c", code, **env)) for _ in range(repeats))


@pytest.mark.slow
def test_import_takes_no_time() -> None:
    seconds = import_seconds("from diffusion_book.schedule import DiscreteSchedule", repeats=3)
    assert 0 < seconds < IMPORT_BUDGET, f"on top of torch: {seconds * 1000:.0f} ms"


@pytest.mark.slow
def test_a_slow_import_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "slow_example.py").write_text(f"import time; time.sleep({IMPORT_BUDGET})")
    assert import_seconds("import slow_example", repeats=1, PYTHONPATH=str(tmp_path)) > IMPORT_BUDGET


@pytest.mark.parametrize("name", EXPORTED)
def test_star_names_exist(name: str) -> None:
    module = importlib.import_module(f"diffusion_book.{name}")
    assert [public for public in getattr(module, "__all__", []) if not hasattr(module, public)] == []


# The set-up cell of a chapter


def pip_command(notebook: dict) -> list[str]:
    """The arguments of pip in a notebook's set-up cell."""
    (line,) = re.findall(r"^\s*%pip (.*)$", "".join(notebook["cells"][1]["source"]), flags=re.MULTILINE)
    return shlex.split(line)


def git(folder: Path, *args: str) -> None:
    """Run git in a folder, with a name for the commits that does not come from the machine."""
    who = {f"GIT_{role}_{what}": "book" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = os.environ | who | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", *args], cwd=folder, env=env, check=True, capture_output=True)


def test_set_up_cells_run_one_command(settings: dict[str, str]) -> None:
    for name, notebook in NOTEBOOKS.items():
        assert pip_command(notebook) == ["install", "-q", chapter_header.pip_requirement(name, settings)]
    assert set(chapter_header.EXTRAS) <= set(NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_set_up_cell_installs_the_library(tmp_path: Path, settings: dict[str, str]) -> None:
    origin = copy_project(tmp_path / "origin")
    git(origin, "init", "--quiet", "--initial-branch", settings["branch"])
    git(origin, "add", "--all", "--force")
    git(origin, "commit", "--quiet", "--message", "a copy of the working tree")
    address = "https://github.com/{user}/{repo}".format(**settings)
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }
    bare = bare_environment(tmp_path / "bare", *NEEDED)
    before = json.loads(python("-m", "pip", "list", "--format", "json", executable=bare))
    command = pip_command(next(iter(NOTEBOOKS.values())))
    python("-m", "pip", *command, "--no-deps", executable=bare, **redirect)
    after = json.loads(python("-m", "pip", "list", "--format", "json", executable=bare))
    new = [entry for entry in after if entry not in before]
    assert [(entry["name"], entry["version"]) for entry in new] == [(settings["lib_name"], settings["version"])]
    assert [entry for entry in before if entry not in after] == [], "nothing that was there is touched"
    code = "import diffusion_book.schedule as s; print(s.DiscreteSchedule(s.linear_beta_schedule(100)).T, s.__file__)"
    steps, file = python("-c", code, executable=bare).split(maxsplit=1)
    assert steps == "100" and Path(file.strip()).is_relative_to(tmp_path)
