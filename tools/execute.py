"""Run copies of the chapters from clean kernels, and skip those whose code and surroundings have not changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from contents import BookError
from notebooks import clean_outputs, code_cells, graft_outputs, read_notebook, source, write_notebook

CELL_SECONDS = 600
WATCHED = ("diffusion_book/*.py", "diffusion_book/weights/*", "results/*.json", "assets/*.mplstyle")


def preset() -> str:
    """The size at which chapters run: quick, unless `DIFFUSION_BOOK_PRESET` says otherwise."""
    return os.environ.get("DIFFUSION_BOOK_PRESET") or "quick"


def surroundings(root: Path) -> str:
    """A digest of all that a chapter's outputs depend on beside its own code."""
    digest = hashlib.sha256(f"{preset()} torch {version('torch')} python {platform.python_version()}".encode())
    for path in sorted(path for pattern in WATCHED for path in root.glob(pattern)):
        digest.update(f"\n{path.relative_to(root)} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def chapter_key(notebook: dict, around: str) -> str:
    """The name of a run: the same key means the same code in the same surroundings."""
    digest = hashlib.sha256(around.encode())
    for cell in code_cells(notebook):
        digest.update(f"\n{len(source(cell))}\n{source(cell)}".encode())
    return digest.hexdigest()


def stage_run(root: Path, folder: Path) -> None:
    """A fresh copy of what chapters look at by relative path, so that no run writes into the repository."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("nbs", "assets", "results"):
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name)


def run_chapter(notebook: dict, name: str, folder: Path, root: Path) -> dict:
    """The notebook executed in `folder` by this interpreter. Raises BookError naming the chapter and the cell."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    fresh = nbformat.from_dict(notebook)
    for cell in fresh["cells"]:
        cell["source"] = source(cell)
    for cell in code_cells(fresh):
        cell["outputs"], cell["execution_count"] = [], None
    at: list[int] = []
    client = NotebookClient(
        fresh,
        km=_own_kernel(),
        timeout=CELL_SECONDS,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        on_cell_execute=lambda cell, cell_index: at.append(cell_index),
    )
    with tempfile.TemporaryFile("w+", errors="replace") as last_words:
        try:
            client.execute(env=_environment(root), cleanup_kc=True, stderr=last_words)
        except CellTimeoutError:
            raise BookError(_failure(name, fresh, at, f"not finished after {CELL_SECONDS} s")) from None
        except CellExecutionError as error:
            if error.ename == "KeyboardInterrupt":  # Ctrl-C reached the kernel, too, and it answered first
                raise KeyboardInterrupt from None
            raise BookError(_failure(name, fresh, at, _plain(error.traceback))) from None
        except (DeadKernelError, AssertionError) as error:
            if hasattr(client, "_async_cleanup_kernel_future"):  # nbclient saw Ctrl-C and has stopped the kernel
                raise KeyboardInterrupt from None
            if isinstance(error, AssertionError):
                raise
            last_words.seek(0)
            reason = f"the kernel died (out of memory?)\n{_plain(last_words.read())}"
            raise BookError(_failure(name, fresh, at, reason)) from None
    clean_outputs(fresh)
    return fresh


def _own_kernel():
    """A kernel of the running interpreter, whatever kernels are registered on this machine."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def _environment(root: Path) -> dict[str, str]:
    """The environment of a kernel: the preset, and the library of this checkout before any other."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    own = {"DIFFUSION_BOOK_PRESET": preset(), "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    return {**os.environ, **own}


def _failure(name: str, notebook: dict, at: list[int], reason: str) -> str:
    """What failed and where, short enough to read in a terminal."""
    index = at[-1] if at else 0
    code = source(notebook["cells"][index]).splitlines()
    shown = [f"    {line}" for line in code[:12]] + (["    ..."] if len(code) > 12 else [])
    return "\n".join([f"{name}: cell {index + 1} of {len(notebook['cells'])} failed", *shown, "", reason.strip()])


def _plain(traceback: str, lines: int = 25) -> str:
    """The end of a traceback without terminal colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", traceback).strip().splitlines()
    return "\n".join(["...", *text[-lines:]] if len(text) > lines else text)


Run = Callable[[dict, str, Path, Path], dict]


def execute_all(root: Path, build: Path, chapters: Iterable[str], run: Run = run_chapter) -> dict[str, dict]:
    """The chapters with fresh outputs, by path. What ran is kept in `build`, so a second call goes on from there."""
    chapters = list(chapters)
    around, cache = surroundings(root), build / "executed"
    cache.mkdir(parents=True, exist_ok=True)
    stage_run(root, build / "run")
    done = {}
    for number, path in enumerate(chapters, start=1):
        notebook, kept = read_notebook(root / path), cache / Path(path).name
        key, started = chapter_key(notebook, around), time.perf_counter()
        _say(f"[{number:2}/{len(chapters)}] {Path(path).stem} ... ", end="")
        executed = _cached(kept, key)
        if executed is None:
            executed = run(notebook, Path(path).stem, build / "run" / Path(path).parent, root)
            executed["metadata"]["book_key"] = key
            write_notebook(executed, kept)
            _say(f"{time.perf_counter() - started:.1f} s")
        else:
            _say("unchanged")
        done[path] = graft_outputs(notebook, executed)
    return done


def _cached(path: Path, key: str) -> dict | None:
    """The executed copy at `path` if it is a run under the same key."""
    try:
        executed = read_notebook(path)
    except (FileNotFoundError, ValueError):
        return None
    return executed if executed["metadata"].get("book_key") == key else None


def rewrite_chapters(root: Path, build: Path, chapters: Iterable[str]) -> None:
    """Execute the notebooks and store the outputs in place, as `nbdev-clean` leaves them."""
    chapters = list(chapters)
    stage_run(root, build / "run")
    for number, path in enumerate(chapters, start=1):
        started = time.perf_counter()
        _say(f"[{number:2}/{len(chapters)}] {Path(path).stem} ... ", end="")
        notebook = read_notebook(root / path)
        executed = run_chapter(notebook, Path(path).stem, build / "run" / Path(path).parent, root)
        now = read_notebook(root / path)  # prose may have been edited meanwhile
        if list(map(source, code_cells(now))) != list(map(source, code_cells(notebook))):
            raise BookError(f"{path}: its code has changed while it ran; nothing is written, execute it again")
        fresh = graft_outputs(now, executed)
        for index, cell in enumerate(fresh["cells"]):
            cell.setdefault("id", hashlib.sha256(f"{path} {index}".encode()).hexdigest()[:8])
        write_notebook(fresh, root / path)
        _nbdev_clean(root, path)
        _say(f"{time.perf_counter() - started:.1f} s")


def _nbdev_clean(root: Path, path: str) -> None:
    """`nbdev-clean` on one notebook, under the settings in `root`."""
    from nbdev.clean import nbdev_clean

    with contextlib.chdir(root):
        nbdev_clean(fname=path)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True, file=sys.stdout)
