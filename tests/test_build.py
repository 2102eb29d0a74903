"""The builder on small fake books: what it runs, what it skips, how it fails, and what it makes of a notebook."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import book
import contents
import execute
import notebooks
import numpy as np
import pages
import pytest
import render
import stage
from PIL import Image, ImageDraw

BOOK = """\
project: {type: book}
book:
  title: "A small book"
  chapters:
    - index.qmd
    - part: "Part I: Numbers"
      chapters: [nbs/01_one.ipynb, nbs/02_two.ipynb]
  appendices: [nbs/A1_more.ipynb]
"""
CHAPTERS = ["nbs/01_one.ipynb", "nbs/02_two.ipynb", "nbs/A1_more.ipynb"]
VIEW = notebooks.WIDGET_VIEW
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "id": f"m{zlib.crc32(text.encode())}", "metadata": {}, "source": text}


def code(text: str, *outputs: dict) -> dict:
    cell = {"cell_type": "code", "id": f"c{zlib.crc32(text.encode())}", "metadata": {}, "source": text}
    return {**cell, "outputs": list(outputs), "execution_count": None}


def shown(**data: str) -> dict:
    kinds = {"html": "text/html", "text": "text/plain", "png": "image/png", "view": VIEW}
    return {"output_type": "display_data", "metadata": {}, "data": {kinds[key]: value for key, value in data.items()}}


def notebook(*cells: dict) -> dict:
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {"cells": list(cells), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def small(tmp_path: Path, root: Path) -> Path:
    """A repository with three chapters, a module and a result."""
    for folder in ("nbs", "assets", "results", "diffusion_book"):
        (tmp_path / folder).mkdir()
    for name in ("settings.ini", "pyproject.toml", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    shutil.copy(root / "assets" / "favicon.svg", tmp_path / "assets")
    (tmp_path / "_quarto.yml").write_text(BOOK)
    (tmp_path / "index.qmd").write_text("---\nlang: en\n---\n{{< include README.md >}}\n")
    (tmp_path / "README.md").write_text(
        "# A small book\n\nBegin with [one](nbs/01_one.ipynb); see the [terms](LICENSE).\n"
    )
    (tmp_path / "diffusion_book" / "__init__.py").write_text("")
    (tmp_path / "diffusion_book" / "core.py").write_text("SIZE = 1\n")
    (tmp_path / "results" / "run.json").write_text("{}")
    for number, path in enumerate(CHAPTERS, start=1):
        cells = markdown(f"# Chapter {number}\n\n> a line"), code(f"print({number})")
        notebooks.write_notebook(notebook(*cells), tmp_path / path)
    return tmp_path


class Runner:
    """Stands in for the kernel: notes which chapters it was given, fails at those it was told to."""

    def __init__(self, *failing: str):
        self.ran: list[str] = []
        self.failing = failing

    def __call__(self, given: dict, name: str, folder: Path, root: Path) -> dict:
        self.ran.append(name)
        if name in self.failing:
            raise contents.BookError(f"{name}: cell 2 of 2 failed")
        done = json.loads(json.dumps(given))
        for cell in notebooks.code_cells(done):
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": f"out of {name}\n"}]
            cell["execution_count"] = 1
        return done


def ran(small: Path) -> list[str]:
    runner = Runner()
    execute.execute_all(small, small / "_build", CHAPTERS, runner)
    return runner.ran


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# The table of contents


def test_contents_keep_the_order_and_the_captions(small):
    book_of = contents.read_contents(small)
    assert [part.title for part in book_of.parts] == ["Part I: Numbers", "Appendix"]
    assert list(book_of.chapters) == CHAPTERS
    assert (book_of.title, book_of.preface) == ("A small book", "index.qmd")


def test_a_missing_chapter_is_named(small, capsys):
    (small / CHAPTERS[1]).unlink()
    assert book.main(["--root", str(small), "site"]) == 1
    assert "nbs/02_two.ipynb" in capsys.readouterr().err
    assert not (small / "_book").exists()


def test_quarto_and_settings_agree(root, settings):
    import yaml

    quarto = yaml.safe_load((root / "_quarto.yml").read_text())
    given = quarto["book"]
    assert given["title"] == settings["title"]
    assert given["description"] == settings["description"]
    assert given["repo-url"] == contents.repository_url(settings)
    assert given["repo-url"] == f"https://github.com/{settings['user']}/{settings['repo']}"
    assert given["repo-branch"] == settings["branch"]
    assert set(given["repo-actions"]) == {"edit", "issue", "source"}
    assert f'title: "{settings["title"]}"' in (root / "index.qmd").read_text()
    assert quarto["execute"]["enabled"] is False
    for theme in (name for names in quarto["format"]["html"]["theme"].values() for name in names if "/" in name):
        assert (root / theme).is_file()


# What runs and what is skipped


def test_the_second_build_runs_nothing(small, capsys):
    assert ran(small) == ["01_one", "02_two", "A1_more"]
    assert ran(small) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[ 1/3] 01_one ... ") and lines[0].endswith(" s")
    assert lines[-3:] == ["[ 1/3] 01_one ... unchanged", "[ 2/3] 02_two ... unchanged", "[ 3/3] A1_more ... unchanged"]


def test_changed_code_runs_its_chapter_again(small):
    ran(small)
    edit(small / CHAPTERS[1], "print(2)", "print(22)")
    assert ran(small) == ["02_two"]


def test_changed_prose_runs_nothing_and_is_shown(small):
    ran(small)
    edit(small / CHAPTERS[1], "a line", "another line")
    runner = Runner()
    done = execute.execute_all(small, small / "_build", CHAPTERS, runner)
    assert runner.ran == []
    assert "another line" in done[CHAPTERS[1]]["cells"][0]["source"]
    assert done[CHAPTERS[1]]["cells"][1]["outputs"][0]["text"] == "out of 02_two\n"


@pytest.mark.parametrize(
    "name", ["diffusion_book/core.py", "diffusion_book/new.py", "results/run.json", "diffusion_book/weights/w.json"]
)
def test_a_change_around_the_chapters_runs_them_all(small, name):
    ran(small)
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text('"changed"')
    assert ran(small) == ["01_one", "02_two", "A1_more"]


def test_preset_torch_and_python_are_part_of_the_key(small, monkeypatch):
    keys = {execute.surroundings(small)}
    monkeypatch.setenv("DIFFUSION_BOOK_PRESET", "tiny")
    keys.add(execute.surroundings(small))
    monkeypatch.setattr(execute, "version", lambda name: "0.0.0")
    keys.add(execute.surroundings(small))
    monkeypatch.setattr(execute.platform, "python_version", lambda: "9.9.9")
    keys.add(execute.surroundings(small))
    assert len(keys) == 4


def test_quick_is_the_default_preset(monkeypatch):
    monkeypatch.delenv("DIFFUSION_BOOK_PRESET", raising=False)
    assert execute.preset() == "quick"


def test_cells_cannot_be_mistaken_for_one_another():
    together = execute.chapter_key(notebook(code("a\nb")), "")
    apart = execute.chapter_key(notebook(code("a"), code("b")), "")
    assert together != apart


def test_a_failure_keeps_what_was_done_and_the_next_call_resumes(small):
    runner = Runner("02_two")
    with pytest.raises(contents.BookError, match="02_two: cell 2"):
        execute.execute_all(small, small / "_build", CHAPTERS, runner)
    assert runner.ran == ["01_one", "02_two"]
    assert ran(small) == ["02_two", "A1_more"]


def test_a_damaged_copy_is_run_again(small):
    ran(small)
    (small / "_build" / "executed" / "01_one.ipynb").write_text('{"cells": [')
    assert ran(small) == ["01_one"]


def test_the_chapters_themselves_stay_untouched(small):
    before = {path: (small / path).read_bytes() for path in CHAPTERS}
    ran(small)
    assert {path: (small / path).read_bytes() for path in CHAPTERS} == before


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    notebooks.write_notebook(notebook(code("1")), path)
    before = path.read_bytes()

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        notebooks.write_notebook(notebook(code("2")), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ipynb"]


# A real kernel


def test_a_chapter_runs_in_this_interpreter_with_its_preset(small, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BOOK_PRESET", "tiny")
    text = "import os, sys, pathlib, diffusion_book.core as core\n" + "\n".join(
        f"print({what})"
        for what in ("sys.executable", "os.environ['DIFFUSION_BOOK_PRESET']", "core.__file__", "pathlib.Path.cwd()")
    )
    execute.stage_run(small, small / "_build" / "run")
    cells = code(text, shown(text="old")), code("1 + 1")
    done = execute.run_chapter(notebook(*cells), "01_one", small / "_build" / "run" / "nbs", small)
    printed = done["cells"][0]["outputs"][0]["text"].split()
    assert printed[0] == sys.executable
    assert printed[1] == "tiny"
    assert Path(printed[2]) == small / "diffusion_book" / "core.py"
    assert Path(printed[3]) == small / "_build" / "run" / "nbs"
    assert done["cells"][1]["outputs"][0]["data"]["text/plain"] == "2"
    assert len(done["cells"][0]["outputs"]) == 1
    assert "execution" not in done["cells"][0]["metadata"]


def test_a_failing_chapter_ends_the_build_with_chapter_cell_and_error(small, capsys):
    cells = markdown("# Two"), code("good = 1"), code("values = [1, 2]\nvalues[good + 7]")
    notebooks.write_notebook(notebook(*cells), small / CHAPTERS[1])
    assert book.main(["--root", str(small), "build"]) == 1
    said = capsys.readouterr()
    assert "[ 1/3] 01_one ... " in said.out and "A1_more" not in said.out
    assert "02_two: cell 3 of 3 failed" in said.err
    assert "values[good + 7]" in said.err
    assert "IndexError: list index out of range" in said.err
    assert "\x1b" not in said.err
    assert (small / "_build" / "executed" / "01_one.ipynb").is_file()
    assert not (small / "_book").exists()


def test_a_cell_that_hangs_is_stopped(small, monkeypatch):
    monkeypatch.setattr(execute, "CELL_SECONDS", 1)
    hanging = notebook(code("1"), code("import time\ntime.sleep(60)"))
    with pytest.raises(contents.BookError, match=r"01_one: cell 2 of 2 failed(.|\n)*not finished after 1 s"):
        execute.run_chapter(hanging, "01_one", small / "nbs", small)


def test_a_kernel_that_dies_is_named(small):
    text = "import os\nos.write(2, b'no room left')\nos._exit(1)"
    with pytest.raises(contents.BookError, match=r"01_one: cell 1 of 1 failed(.|\n)*kernel died(.|\n)*no room left"):
        execute.run_chapter(notebook(code(text)), "01_one", small / "nbs", small)


def test_an_interrupted_build_says_so_and_leaves_no_kernel(small):
    sleeping = notebook(
        code("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)")
    )
    notebooks.write_notebook(sleeping, small / CHAPTERS[0])
    command = [sys.executable, str(Path(book.__file__)), "--root", str(small), "build"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as building:
        started, mark = time.monotonic(), small / "_build" / "run" / "nbs" / "pid"
        while not (mark.is_file() and mark.read_text()) and time.monotonic() - started < 60:
            time.sleep(0.1)
        building.send_signal(signal.SIGINT)
        said = building.communicate(timeout=30)[1]
    assert building.returncode == 130, said
    assert "goes on from there" in said and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_kernel_that_was_interrupted_first_is_no_failure(small):
    notebooks.write_notebook(notebook(code("raise KeyboardInterrupt")), small / CHAPTERS[0])
    assert book.main(["--root", str(small), "build"]) == 130


def test_execute_write_leaves_what_nbdev_clean_leaves(small):
    path = small / CHAPTERS[0]
    cells = [markdown("# One"), code("#| fig-alt: a number\n1 + 1"), code("print('<object at 0x12>')")]
    for cell in cells[1:]:
        cell["metadata"] = {"tags": ["x"], "execution": {"iopub.status.busy": "now"}}
    del cells[0]["id"]
    notebooks.write_notebook(notebook(*cells), path)
    others = [(small / other).read_bytes() for other in CHAPTERS[1:]]
    assert book.main(["--root", str(small), "execute", "--write", "01_one"]) == 0
    written = path.read_bytes()
    done = json.loads(written)
    assert done["cells"][1]["outputs"][0]["data"]["text/plain"] in ("2", ["2"])
    assert done["cells"][1]["metadata"] == {} and done["cells"][1]["execution_count"] is None
    assert done["cells"][1]["id"] == cells[1]["id"]
    assert [(small / other).read_bytes() for other in CHAPTERS[1:]] == others
    clean = "import sys; from nbdev.clean import nbdev_clean; nbdev_clean(fname=sys.argv[1])"
    subprocess.run([sys.executable, "-c", clean, str(path)], cwd=small, check=True)
    assert path.read_bytes() == written
    assert book.main(["--root", str(small), "execute", "--write", "01_one"]) == 0
    assert path.read_bytes() == written


def test_prose_written_while_a_chapter_runs_is_kept_and_changed_code_refused(small, monkeypatch):
    path, runner = small / CHAPTERS[0], Runner()

    def busy(given: dict, *rest) -> dict:
        edit(path, *change)
        return runner(given, *rest)

    monkeypatch.setattr(execute, "run_chapter", busy)
    monkeypatch.setattr(execute, "_nbdev_clean", lambda *_: None)
    change = ("a line", "another line")
    execute.rewrite_chapters(small, small / "_build", CHAPTERS[:1])
    assert "another line" in path.read_text() and "out of 01_one" in path.read_text()
    change = ("print(1)", "print(11)")
    with pytest.raises(contents.BookError, match="its code has changed while it ran"):
        execute.rewrite_chapters(small, small / "_build", CHAPTERS[:1])


def test_execute_names_must_exist(small, capsys):
    assert book.main(["--root", str(small), "execute", "03_three"]) == 1
    assert "03_three" in capsys.readouterr().err


# Cleaning


def test_progress_bars_go_and_explorers_keep_their_html():
    bar = shown(view="{}", text="  0%|")
    explorer = shown(view="{}", html="<figure></figure>", png=DOT)
    picture = shown(png=DOT, text="<Figure>")
    given = notebook(code("run()", bar, explorer, picture), markdown("x"), code("1"))
    given["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    given["cells"][0]["metadata"] = {"execution": {}}
    notebooks.clean_outputs(given)
    kept = [set(output["data"]) for output in given["cells"][0]["outputs"]]
    assert kept == [{"text/html", "image/png"}, {"image/png", "text/plain"}]
    assert "widgets" not in given["metadata"]
    assert given["cells"][0]["metadata"] == {}
    assert [given["cells"][index]["execution_count"] for index in (0, 2)] == [1, 2]


def test_outputs_of_another_notebook_are_refused():
    with pytest.raises(ValueError, match="2 executed code cells for 1"):
        notebooks.graft_outputs(notebook(code("1")), notebook(code("1"), code("2")))


# The #| options


@pytest.mark.parametrize(
    "line, tags",
    [
        ("include: false", ["remove-cell"]),
        ("echo: false", ["remove-input"]),
        ("output: false", ["remove-output"]),
        ("code-fold: true", ["hide-input"]),
        ("warning: false", ["remove-stderr"]),
        ("include: true", []),
        ("code-fold: false", []),
        ("export:", []),
        ("label: fig-one", []),
    ],
)
def test_options_become_tags_and_are_not_shown(line, tags):
    cell = pages.for_myst(notebook(code(f"#| {line}\nx = 1  #| stays")), "nbs/one")["cells"][0]
    assert cell["metadata"]["tags"] == tags
    assert cell["source"] == "x = 1  #| stays"


def test_alt_text_reaches_the_pictures_of_the_cell():
    text = '#| export:\n#| fig-alt: "A curve: it \\"falls\\""\n#| code-fold: true\n\ny = 2'
    cell = pages.for_myst(notebook(code(text)), "nbs/one")["cells"][0]
    assert cell["metadata"]["mystnb"]["image"]["alt"] == 'A curve: it "falls"'
    assert cell["metadata"]["tags"] == ["hide-input"]
    assert cell["source"] == "y = 2"


def test_a_cell_of_options_alone_is_hidden():
    cell = pages.for_myst(notebook(code("#| default_exp: schedule\n")), "nbs/one")["cells"][0]
    assert cell["metadata"]["tags"] == ["remove-cell"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("#| export\nx = 1", "nbs/one: cell 2: write options with a colon"),
        ("#| export:\n#| hide\nx = 1", "nbs/one: cell 2: cannot read its options"),
        ("#| fig-atl: oops\nx = 1", "nbs/one: cell 2: the option 'fig-atl' is unknown"),
    ],
)
def test_options_that_would_be_lost_are_refused(text, message):
    with pytest.raises(contents.BookError, match=message):
        pages.for_myst(notebook(markdown("# One"), code(text)), "nbs/one")


# Links


@pytest.fixture
def links(small):
    (small / "assets" / "a b.png").write_bytes(b"")
    return stage.Links(small, contents.read_contents(small))


WEB = "https://github.com/diffusion-book/diffusion-book/blob/main"


@pytest.mark.parametrize(
    "given, expected",
    [
        ("[two](02_two.ipynb)", None),
        ("[two](02_two.ipynb#part 'title')", None),
        ("[here](#part)", None),
        ("[web](https://example.org/a_(b)) [mail](mailto:a@b.c)", None),
        ("![x](../assets/favicon.svg)", None),
        ("![x](../assets/a%20b.png)", None),
        ("`x[0](y)` and $a[b](c)$ and\n```python\nf[0](g)\n```\n", None),
        ("[terms](../LICENSE)", f"[terms]({WEB}/LICENSE)"),
        ("[![x](../assets/favicon.svg)](../LICENSE)", f"[![x](../assets/favicon.svg)]({WEB}/LICENSE)"),
        ("[`core.SIZE[0]`](../diffusion_book/core.py)", f"[`core.SIZE[0]`]({WEB}/diffusion_book/core.py)"),
        ('<a href="../LICENSE">terms</a>', f'<a href="{WEB}/LICENSE">terms</a>'),
    ],
)
def test_links_lead_to_pages_pictures_or_the_repository(links, given, expected):
    assert links.resolve(given, "nbs/01_one.ipynb") == (given if expected is None else expected)
    links.check()


@pytest.mark.parametrize(
    "given, message",
    [
        ("[x](03_three.ipynb)", "nbs/01_one.ipynb: the link to 03_three.ipynb leads nowhere"),
        ("[x](../../outside.md)", "leads nowhere"),
        ("![x](../assets/none.png)", "leads nowhere"),
        ("[![x](../assets/none.png)](https://example.org)", "leads nowhere"),
        ('<img src="https://example.org/x.png">', "lies on another server"),
        ("![x](https://example.org/x.png)", "lies on another server"),
    ],
)
def test_links_that_lead_nowhere_stop_the_build(links, given, message):
    links.resolve(given, "nbs/01_one.ipynb")
    with pytest.raises(contents.BookError, match=message):
        links.check()


def test_all_broken_links_are_told_at_once(small):
    edit(small / CHAPTERS[0], "a line", "[x](none.md)")
    edit(small / "README.md", "(LICENSE)", "(LICENCE)")
    book_of = contents.read_contents(small)
    staged = {path: notebooks.read_notebook(small / path) for path in CHAPTERS}
    with pytest.raises(contents.BookError, match=r"01_one.ipynb: .* none.md leads nowhere\nREADME.md: .* LICENCE"):
        stage.stage_book(small, small / "out", book_of, staged)


def test_badges_of_other_servers_stay_out_of_the_book(small):
    badge = "[![tests](https://example.org/badge.svg)](https://example.org)\n"
    edit(small / "README.md", "# A small book\n", f"# A small book\n\n{badge}")
    stage.stage_book(small, small / "out", contents.read_contents(small), {})
    assert "example.org" not in (small / "out" / "README.md").read_text()


# Rendering


def test_new_pages_replace_old_ones_whole(tmp_path):
    new, output = tmp_path / "new", tmp_path / "_book"
    for folder, name in ((new, "index.html"), (output, "old.html"), (tmp_path / "_book.old", "left.html")):
        folder.mkdir()
        (folder / name).write_text("x")
    render.swap(new, output)
    assert os.listdir(output) == ["index.html"]
    assert os.listdir(tmp_path) == ["_book"]


def test_a_failed_rendering_leaves_the_old_pages(small, monkeypatch, capsys):
    (small / "_book").mkdir()
    (small / "_book" / "index.html").write_text("old")

    def fail(*args):
        raise contents.BookError("Sphinx failed")

    monkeypatch.setattr(render, "_quarto", fail)
    monkeypatch.setattr(render, "_plain", fail)
    assert book.main(["--root", str(small), "site"]) == 1
    assert "Sphinx failed" in capsys.readouterr().err
    assert (small / "_book" / "index.html").read_text() == "old"


@pytest.fixture
def instant(monkeypatch):
    """A renderer that only counts its calls."""
    calls: list[Path] = []

    def fake(stage: Path, build: Path, pages: Path, *rest: object) -> None:
        calls.append(pages)
        pages.mkdir()
        (pages / "index.html").write_text("a page")

    monkeypatch.setattr(render, "_quarto", fake)
    monkeypatch.setattr(render, "_plain", fake)
    return calls


def test_unchanged_pages_are_not_rendered_again(small, instant, capsys):
    command = ["--root", str(small), "site"]
    assert book.main(command) == 0 and len(instant) == 1
    assert "index.html" in capsys.readouterr().out.splitlines()[-1]
    assert book.main(command) == 0 and len(instant) == 1
    edit(small / CHAPTERS[0], "a line", "another line")
    assert book.main(command) == 0 and len(instant) == 2
    (small / "_book" / "index.html").unlink()
    assert book.main(command) == 0 and len(instant) == 3
    assert book.main([*command, "--output", str(small / "elsewhere")]) == 0 and len(instant) == 4
    assert (small / "elsewhere" / "index.html").is_file()


def test_the_work_folder_stays_out_of_git_and_holds_no_rest(small, instant):
    assert book.main(["--root", str(small), "site"]) == 0
    assert os.listdir(small / "_build") == [".gitignore"]
    assert (small / "_build" / ".gitignore").read_text() == "*\n"


def test_quarto_is_used_where_it_is_on_the_path(small, tmp_path_factory, monkeypatch):
    tools = tmp_path_factory.mktemp("bin")
    page = (
        '<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="x"></script>\n'
        "<script type=\"application/javascript\">define('jquery', [],function() {return window.jQuery;})</script>\n"
        '<link href="https://fonts.example.org/a.css" rel="stylesheet"><script src="site_libs/a.js"></script>'
        '<a href="https://example.org">kept</a>'
    )
    script = tools / "quarto"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        "if sys.argv[1] == '--version': sys.exit(print('1.2.3'))\n"
        "assert sys.argv[1] == 'render' and pathlib.Path(sys.argv[2], 'nbs/01_one.ipynb').is_file(), sys.argv\n"
        "assert '# A small' not in pathlib.Path(sys.argv[2], 'README.md').read_text()\n"
        "out = pathlib.Path(sys.argv[2], '_book'); out.mkdir()\n"
        f"(out / 'index.html').write_text({page!r})\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    assert render.edition() == "Quarto 1.2.3"
    assert book.main(["--root", str(small), "site"]) == 0
    html = (small / "_book" / "index.html").read_text()
    assert html.strip() == '<script src="site_libs/a.js"></script><a href="https://example.org">kept</a>'


@pytest.fixture
def no_quarto(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **rest: None if name == "quarto" else which(name, **rest))


def test_the_plain_edition_shows_what_it_should(small, no_quarto):
    text = "See [two](02_two.ipynb#a-heading) and $x^2$."
    png = DOT
    cells = markdown(f"# One\n\n{text}"), code("#| fig-alt: A dot\nplot()", shown(png=png))
    hidden = code("#| include: false\nsecret = 1"), code("#| export:\npublic = 2")
    notebooks.write_notebook(notebook(*cells, *hidden), small / CHAPTERS[0])
    edit(small / CHAPTERS[1], "a line", "a line\\n\\n## A heading")
    assert book.main(["--root", str(small), "site"]) == 0
    page = (small / "_book" / "nbs" / "01_one.html").read_text()
    assert 'href="02_two.html#a-heading"' in page
    assert 'alt="A dot"' in page
    assert "public" in page and "secret" not in page and "#|" not in page
    front = (small / "_book" / "index.html").read_text()
    assert 'href="nbs/01_one.html"' in front and f'href="{WEB}/LICENSE"' in front
    assert "Part I: Numbers" in front and "Appendix" in front
    handed_out = json.loads((small / "_book" / "_sources" / "nbs" / "01_one.ipynb").read_text())
    assert "#| export:" in handed_out["cells"][3]["source"]


def test_a_link_to_a_heading_that_is_not_there_stops_the_plain_edition(small, no_quarto, capsys):
    edit(small / CHAPTERS[0], "a line", "a [link](02_two.ipynb#nowhere)")
    assert book.main(["--root", str(small), "site"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (small / "_book").exists()


def test_the_references_are_complete(root):
    entries = re.split(r"^@", (root / "references.bib").read_text(), flags=re.MULTILINE)[1:]
    keys = [re.match(r"\w+\{([^,]+),", entry)[1] for entry in entries]
    assert len(keys) == len(set(keys)) >= 27
    for key, entry in zip(keys, entries, strict=True):
        fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.+?)\},?$", entry, re.MULTILINE | re.DOTALL))
        missing = {"title", "author", "year", "url"} - set(fields)
        assert not missing, f"{key} lacks {missing}"
        assert fields["year"] in key
        assert entry.count("{") == entry.count("}")
        if "eprint" in fields:
            assert fields["url"] == f"https://arxiv.org/abs/{fields['eprint']}"
        if "doi" in fields:
            assert fields["url"] == f"https://doi.org/{fields['doi']}"


# Small pictures


def png(image: Image.Image) -> str:
    image.save(buffer := io.BytesIO(), "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_figure_gets_a_palette_and_looks_the_same() -> None:
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    ImageDraw.Draw(image).line([(0, 0), (150, 190), (299, 3)], fill=(0, 119, 187, 255), width=3)
    image = image.resize((200, 133), Image.Resampling.LANCZOS)  # soft edges, as a plot has them
    text = png(image)
    small = Image.open(io.BytesIO(base64.b64decode(notebooks.small_png(text))))
    assert len(notebooks.small_png(text)) < len(text) and small.mode == "P"
    before, after = (np.asarray(i.convert("RGBA").convert("RGBa"), np.int16) for i in (image, small))
    assert np.abs(before - after).mean() < 1 and before.any()
    assert notebooks.small_png(notebooks.small_png(text)) == notebooks.small_png(text)


def test_a_picture_of_many_colours_is_left_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    text = png(Image.fromarray(noise))
    assert notebooks.small_png(text) == text
