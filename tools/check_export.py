"""Check, in a copy of the project, that the exported modules are in step with the notebooks and the notebooks clean.

Every module is deleted from the copy and exported anew, so a module that no notebook exports is found as well.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BY_HAND = {"__init__.py", "__main__.py"}  # the Python files of the package that no notebook writes


def copy_project(root: Path, target: Path) -> None:
    """Copy what nbdev reads: its configuration, the notebooks and the package."""
    for name in ("pyproject.toml", "settings.ini", "setup.py"):
        if (root / name).exists():
            shutil.copy2(root / name, target)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "weights")
    for name in ("nbs", "diffusion_book"):
        shutil.copytree(root / name, target / name, ignore=ignore)


def run_nbdev(command: str, folder: Path) -> None:
    """Run an nbdev command of this Python's environment in `folder`. Raises CalledProcessError with its output."""
    module, function = {"nbdev-export": ("doclinks", "nbdev_export"), "nbdev-clean": ("clean", "nbdev_clean")}[command]
    code = f"from nbdev.{module} import {function}; {function}()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    """File contents by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def first_difference(a: bytes, b: bytes) -> str:
    """Say where two texts part."""
    left, right = a.decode().splitlines(), b.decode().splitlines()
    for number, (x, y) in enumerate(zip(left, right, strict=False), start=1):
        if x != y:
            return f"line {number}: {x.strip()[:80]!r} here, {y.strip()[:80]!r} expected"
    return f"{len(left)} lines here, {len(right)} expected"


def differences(here: dict[str, bytes], expected: dict[str, bytes], what: str) -> list[str]:
    """One complaint for every file that is missing, left over or different."""
    complaints = [f"{what} {name}: nothing in the notebooks makes it" for name in here if name not in expected]
    complaints += [f"{what} {name}: missing" for name in expected if name not in here]
    for name in sorted(here.keys() & expected.keys()):
        if here[name] != expected[name]:
            complaints.append(f"{what} {name}: {first_difference(here[name], expected[name])}")
    return complaints


def check(root: Path = ROOT) -> list[str]:
    """Export and clean a copy of the project at `root`; return what differs from what is there."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        copy_project(root, target)
        for path in (target / "diffusion_book").glob("*.py"):
            if path.name not in BY_HAND:
                path.unlink()
        run_nbdev("nbdev-export", target)
        modules = contents(root / "diffusion_book", "*.py"), contents(target / "diffusion_book", "*.py")
        complaints = differences(*modules, "module")
        run_nbdev("nbdev-clean", target)
        notebooks = contents(root / "nbs", "*.ipynb"), contents(target / "nbs", "*.ipynb")
        return complaints + differences(*notebooks, "notebook, not clean:")


def main() -> int:
    """Print the complaints; the exit status is 1 if there are any."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    complaints = check()
    print(*complaints, sep="\n") if complaints else print("modules in step with the notebooks, notebooks clean")
    if complaints:
        print("`make fix` exports and cleans; a module edited by hand is overwritten by its notebook")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
