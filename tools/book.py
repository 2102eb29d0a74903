"""Build the book.

`python tools/book.py build` runs copies of the chapters and renders _book/index.html; `site` renders the committed
outputs and executes nothing; `execute --write` runs chapters and stores their outputs in nbs/ (for maintainers).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from contents import BookError, Contents, read_contents
from execute import execute_all, preset, rewrite_chapters
from notebooks import clean_outputs, read_notebook
from render import edition, is_rendered, render, render_key
from stage import stage_book

ROOT = Path(__file__).resolve().parent.parent


def build(root: Path, output: Path) -> None:
    """Run what has changed, render it, say where it is."""
    started, contents = time.perf_counter(), read_contents(root)
    print(f"Running {len(contents.chapters)} chapters at preset {preset()} (copies; nbs/ stays as it is)", flush=True)
    publish(root, output, contents, execute_all(root, work_folder(root), contents.chapters))
    print(f"The book is at {_shown(output / 'index.html')} ({_minutes(time.perf_counter() - started)})")


def site(root: Path, output: Path) -> None:
    """Render the committed outputs."""
    started, contents = time.perf_counter(), read_contents(root)
    notebooks = {path: read_notebook(root / path) for path in contents.chapters}
    for notebook in notebooks.values():
        clean_outputs(notebook)
    publish(root, output, contents, notebooks)
    print(f"The book is at {_shown(output / 'index.html')} ({_minutes(time.perf_counter() - started)})")


def execute(root: Path, names: list[str], write: bool) -> None:
    """Run the named chapters (all, where none is named), in place or as copies."""
    contents = read_contents(root)
    unknown = set(names) - {Path(path).stem for path in contents.chapters}
    if unknown:
        raise BookError(f"no chapter {', '.join(sorted(unknown))}; a name is a file of nbs/ without .ipynb")
    chapters = [path for path in contents.chapters if not names or Path(path).stem in names]
    (rewrite_chapters if write else execute_all)(root, work_folder(root), chapters)


def publish(root: Path, output: Path, contents: Contents, notebooks: dict[str, dict]) -> None:
    """Stage the notebooks and render them, unless `output` holds these very pages."""
    started, look = time.perf_counter(), edition()
    with tempfile.TemporaryDirectory(prefix="pages-", dir=work_folder(root)) as temporary:
        folder = Path(temporary)
        stage_book(root, folder / "stage", contents, notebooks)
        key = render_key(folder / "stage", look)
        print(f"Rendering ({look}) ... ", end="", flush=True)
        if is_rendered(output, key):
            print("unchanged")
            return
        render(folder / "stage", folder, output, contents, key)
    print(f"{time.perf_counter() - started:.1f} s")


def work_folder(root: Path) -> Path:
    """The folder for executed copies and staged pages, which ignores itself in git."""
    folder = root / "_build"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return folder


def _shown(path: Path) -> str:
    """`path` as seen from here, if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the book.")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {"build": "run copies of the chapters and render them", "site": "render the committed outputs"}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--output", type=Path, help="where the pages go (default: _book)")
    command = commands.add_parser("execute", help="run chapters")
    command.add_argument("names", nargs="*", help="chapters such as 03_schedules (default: all)")
    command.add_argument("--write", action="store_true", help="store the outputs in nbs/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    arguments = _arguments(argv)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    root = arguments.root.resolve()
    try:
        if arguments.command == "execute":
            execute(root, arguments.names, arguments.write)
        else:
            output = (arguments.output or root / "_book").resolve()
            {"build": build, "site": site}[arguments.command](root, output)
    except BookError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was done is kept, and the next call goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
