"""The limits of tests/structure_rules.py hold in this project, and each of them complains when it is broken."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import chapter_header
import check_export
import pytest
import structure_rules as rules
import yaml
from conftest import ROOT

NOTEBOOKS = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
MODULES = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / "diffusion_book").glob("*.py"))}
EXPORTED = {name: text for name, text in MODULES.items() if name not in rules.GENERATED}
MACHINERY = {p.name: p.read_text(encoding="utf-8") for d in ("tools", "tests") for p in sorted((ROOT / d).glob("*.py"))}


def project_files() -> dict[str, Path]:
    """Files that are tracked, or would be if they were added; without git, all but hidden and built folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        built = re.compile(
            r"(^|/)(\.(?!ci/|git)[^/]+|_book|_build|_site|build|dist|__pycache__|[^/]+\.egg-info)(/|$)|^\.git/"
        )
        found = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
        found = [path for path in found if not built.search(path)]
    return {path: ROOT / path for path in found if path and (ROOT / path).is_file()}


def none(complaints: list[str]) -> None:
    """Fail with the complaints, each on its line."""
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def badge_path(notebook: dict) -> str | None:
    """The path in the repository that a notebook's badge leads to."""
    text = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    match = re.search(r"colab\.research\.google\.com/github/[^/]+/[^/]+/blob/[^/]+/([^)\s]+)", text)
    return match.group(1) if match else None


# The project keeps the limits


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("rule", [rules.module_length, rules.public_names, rules.import_levels, rules.kept_apart])
def test_module(rule: Callable, name: str) -> None:
    none(rule(name, EXPORTED[name]))


@pytest.mark.parametrize("name", EXPORTED)
def test_function_bodies(name: str) -> None:
    none(rules.function_bodies(name, EXPORTED[name]))


@pytest.mark.parametrize("name", [*MODULES, *MACHINERY])
def test_no_star_imports_in_python(name: str) -> None:
    none(rules.star_imports(name, (MODULES | MACHINERY)[name]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_star_imports_in_notebooks(name: str) -> None:
    text = "\n".join(rules.code_of(cell).replace("from __future__ import annotations", "")
                     for cell in rules.code_cells(NOTEBOOKS[name]))  # fmt: skip
    none(rules.star_imports(name, text))


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize(
    "rule",
    [
        rules.cell_count,
        rules.end_is_last,
        rules.cell_lengths,
        rules.assertions_per_name,
        rules.output_bytes,
        rules.player_bytes,
        rules.widget_free,
        rules.error_free,
        rules.figures_described,
    ],
)
def test_notebook(rule: Callable, name: str) -> None:
    none(rule(name, NOTEBOOKS[name]))


def test_names_and_modules_have_one_home() -> None:
    exports = {name: rules.exported_names(notebook) for name, notebook in NOTEBOOKS.items()}
    none(rules.repeated_names(exports))
    none(rules.repeated_default_exp(NOTEBOOKS))


def test_modules_and_notebooks_agree() -> None:
    exports = [module for module in map(rules.module_of, NOTEBOOKS.values()) if module is not None]
    none(rules.modules_agree(MODULES, exports))


def test_outputs_together() -> None:
    none(rules.all_output_bytes(NOTEBOOKS))


def test_versions_agree(settings: dict[str, str]) -> None:
    none(rules.versions_agree(settings["version"], version(settings["lib_name"])))


def test_contents_agree() -> None:
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    badges = {f"nbs/{name}": badge_path(notebook) for name, notebook in NOTEBOOKS.items()}
    none(rules.contents_agree(quarto, badges, badges))


def test_no_data_files() -> None:
    none(rules.data_free({name: path.stat().st_size for name, path in project_files().items()}))


def test_no_machine_in_any_text() -> None:
    complaints = []
    for name, path in project_files().items():
        try:
            complaints += rules.machine_free(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    none(complaints)


# Each rule complains when it is broken, and not before


def cell(text: str, outputs: tuple = (), kind: str = "code") -> dict:
    """A cell as it stands in a notebook file."""
    made = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return made | {"outputs": list(outputs)} if kind == "code" else made


def notebook(*cells: dict, **metadata: object) -> dict:
    """A notebook of these cells."""
    return {"cells": list(cells), "metadata": metadata}


def shown(**data: str) -> dict:
    """An output with these MIME types, a double underscore for the slash."""
    return {"output_type": "display_data", "data": {key.replace("__", "/"): value for key, value in data.items()}}


def lines(n: int) -> str:
    """Code of n lines."""
    return "\n".join(f"x = {i}" for i in range(n))


def function(n: int, doc: str = "") -> str:
    """A function whose body has n lines, after a docstring."""
    body = "\n".join(f"    x = {i}" for i in range(n))
    return f"def f(\n    a,  # one\n    b,  # two\n):\n{doc}{body}\n"


IDEA = cell("#| default_exp: idea")
EXPORT = cell("#| export:\ndef f(x):\n    return x\n\n\ndef g(x):\n    return x")
VIEW = {"data": {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}}
QUARTO = {
    "book": {"chapters": ["index.qmd", {"part": "I", "chapters": ["nbs/01_a.ipynb"]}], "appendices": ["nbs/A1_b.ipynb"]}
}
BADGES = {"nbs/01_a.ipynb": "nbs/01_a.ipynb", "nbs/A1_b.ipynb": "nbs/A1_b.ipynb"}
CLASS = "#| export:\nclass A:\n" + "\n".join(f"    x{i} = 0" for i in range(89))

BROKEN = [
    (rules.module_length, ("m", lines(201))),
    (rules.public_names, ("m", "\n".join(f"def f{i}(): ..." for i in range(11)))),
    (rules.public_names, ("m", "\n".join(f"X{i}: int = 0" for i in range(11)))),
    (rules.function_bodies, ("m", function(31))),
    (rules.function_bodies, ("m", "class A:\n" + "".join("    " + line for line in function(31).splitlines(True)))),
    (rules.star_imports, ("m", "from math import *")),
    (rules.star_imports, ("m", "def f():\n    if True:\n        from diffusion_book.core import *")),
    (rules.import_levels, ("core", "from diffusion_book.toy import spiral")),
    (rules.import_levels, ("embed", "def f():\n    from .core import device")),
    (rules.import_levels, ("sampling", "import diffusion_book.ddim as d")),
    (rules.import_levels, ("toy", "from . import train")),
    (rules.import_levels, ("toy", "from diffusion_book import train")),
    (rules.import_levels, ("nowhere", "")),
    (rules.import_levels, ("toy", "from .nowhere import x")),
    (rules.import_levels, ("toy", "import importlib\nimportlib.import_module('diffusion_book.cli')")),
    (rules.kept_apart, ("sampling", "from diffusion_book.mlp import TimeMLP")),
    (rules.kept_apart, ("fit", "from .guidance import Guided")),
    (rules.repeated_names, ({"a.ipynb": ["f", "g"], "b.ipynb": ["f"]},)),
    (rules.repeated_names, ({"a.ipynb": ["f", "f"]},)),
    (rules.repeated_default_exp, ({"a.ipynb": notebook(IDEA), "b.ipynb": notebook(IDEA)},)),
    (rules.repeated_default_exp, ({"a.ipynb": notebook(IDEA, cell("#| default_exp: other"))},)),
    (rules.cell_count, ("a", notebook(*[cell("", kind="markdown")] * 71))),
    (rules.end_is_last, ("a", notebook(cell("## Exercises\n\n1. Try", kind="markdown"), IDEA))),
    (rules.cell_lengths, ("a", notebook(cell(lines(31))))),
    (rules.cell_lengths, ("a", notebook(cell(CLASS + "\n    y = 0")))),
    (rules.cell_lengths, ("a", notebook(cell(CLASS.replace("#| export:\n", ""))))),
    (rules.assertions_per_name, ("a", notebook(IDEA, EXPORT, cell("assert f(1) == 1\nassert f(2) == 2\nassert g(3)")))),
    (rules.assertions_per_name, ("a", notebook(IDEA, EXPORT, cell("\n".join(["assert f(1) == 1"] * 9))))),
    (rules.assertions_per_name, ("a", notebook(EXPORT, cell("assert 1\nassert 2\nassert 3\nassert 4\nf(g(1))")))),
    (rules.assertions_per_name, ("a", notebook(cell("#| export:\nF = table[3] | {}"), cell("assert 1\nassert 2")))),
    (rules.output_bytes, ("a", notebook(IDEA, cell("", (shown(text__plain="x" * 300_000),))))),
    (rules.output_bytes, ("a", notebook(cell("", (shown(text__plain="x" * 700_000),))))),
    (rules.all_output_bytes, ({str(i): notebook(cell("", (shown(text__plain="x" * 600_000),))) for i in range(17)},)),
    (rules.player_bytes, ("a", notebook(cell("", (shown(text__html="x" * 150_000),))))),
    (rules.widget_free, ("a", notebook(cell("", (VIEW,))))),
    (rules.widget_free, ("a", notebook(widgets={"state": {}}))),
    (rules.error_free, ("a", notebook(cell("1 / 0", ({"output_type": "error", "ename": "ZeroDivisionError"},))))),
    (rules.figures_described, ("a", notebook(cell("draw()", (shown(image__png=""),))))),
    (rules.figures_described, ("a", notebook(cell('#| fig-alt: ""\ndraw()', (shown(image__png=""),))))),
    (rules.versions_agree, ("0.1.0", "0.1.1")),
    (rules.contents_agree, (QUARTO, ["nbs/01_a.ipynb"], BADGES)),
    (rules.contents_agree, (QUARTO, [*BADGES, "nbs/02_c.ipynb"], BADGES | {"nbs/02_c.ipynb": "nbs/02_c.ipynb"})),
    (rules.contents_agree, (QUARTO, BADGES, BADGES | {"nbs/01_a.ipynb": "nbs/A1_b.ipynb"})),
    (rules.contents_agree, ({"book": {"chapters": ["nbs/01_a.ipynb"] * 2}}, ["nbs/01_a.ipynb"], BADGES)),
    (rules.modules_agree, (["core", "orphan"], ["core"])),
    (rules.modules_agree, (["core"], ["core", "lost"])),
    (rules.data_free, ({"nbs/train-images-idx3-ubyte": 9},)),
    (rules.data_free, ({"assets/cifar.npz": 9},)),
    (rules.data_free, ({"diffusion_book/weights/a.pt": 9},)),
    (rules.data_free, ({"diffusion_book/weights/a.safetensors": 13_000_000},)),
    (rules.data_free, ({"assets/large.png": 1_000_001},)),
    (rules.machine_free, ("a", "see /" + "home/somebody/file")),
    (rules.machine_free, ("a", "C:\\" + "Users\\somebody")),
    (rules.machine_free, ("a", "/" + "tmp/ipykernel_7/123.py:3: UserWarning")),
    (rules.machine_free, ("a", "pip install --" + "extra-index-url https://somewhere")),
    (rules.machine_free, ("a", "https://pypi." + "org/simple")),
]

ALIAS = cell("#| export:\nF = str | Callable[[int], int]\n\n\ndef f(x: F) -> F:\n    return x")

KEPT = [
    (rules.module_length, ("m", lines(200))),
    (rules.public_names, ("m", "__all__ = []\nimport os\n" + "\n".join(f"def f{i}(): ...\ndef _f{i}(): ..." for i in range(10)))),
    (rules.function_bodies, ("m", function(30, '    """A.\n\n    B.\n    """\n'))),
    (rules.star_imports, ("m", "from math import pi as tau")),
    (rules.import_levels, ("sampling", "from . import __version__\nfrom .diffusion import Step\nfrom diffusion_book.core import device")),
    (rules.import_levels, ("data", "import importlib\nimportlib.import_module('diffusion_book.flowers')")),
    (rules.kept_apart, ("fit", "from .train import train_steps\nfrom .ema import EMA")),
    (rules.repeated_names, ({"a.ipynb": ["f"], "b.ipynb": ["g"]},)),
    (rules.repeated_default_exp, ({"a.ipynb": notebook(IDEA), "b.ipynb": notebook(EXPORT)},)),
    (rules.cell_count, ("a", notebook(*[IDEA] * 70))),
    (rules.end_is_last, ("a", notebook(IDEA, cell("## Exercises\n\n1. Try", kind="markdown")))),
    (rules.cell_lengths, ("a", notebook(cell(lines(30)), cell(CLASS), cell("%pip install x\n!ls")))),
    (rules.assertions_per_name, ("a", notebook(IDEA, EXPORT, cell("a = f(1)\nb = a + g(2)"), cell("assert a\nassert b\nassert 2 * b\nassert 3 * b")))),
    (rules.assertions_per_name, ("a", notebook(EXPORT, cell("with raises(ValueError):\n    f(g(1))\nnp.testing.assert_allclose(f(1), g(1))"), cell("assert 1\nassert 2")))),
    (rules.assertions_per_name, ("a", notebook(ALIAS, cell("\n".join(["assert f(1)"] * 4))))),
    (rules.output_bytes, ("a", notebook(cell("", (shown(text__plain="x" * 600_000),))))),
    (rules.all_output_bytes, ({"a": notebook(cell("", (shown(text__plain="x" * 600_000),)))},)),
    (rules.player_bytes, ("a", notebook(cell("", (shown(text__html="x" * 140_000),))))),
    (rules.widget_free, ("a", notebook(cell("", (shown(text__html="<p>"),)), kernelspec={}))),
    (rules.error_free, ("a", notebook(cell("1", (shown(text__plain="1"),))))),
    (rules.figures_described, ("a", notebook(cell('#| fig-alt: "A curve falls."\ndraw()', (shown(image__png=""),))))),
    (rules.versions_agree, ("0.1.0", "0.1.0")),
    (rules.contents_agree, (QUARTO, BADGES, BADGES)),
    (rules.modules_agree, (["__init__", "_modidx", "core"], ["core"])),
    (rules.data_free, ({"diffusion_book/weights/a.safetensors": 2_000_000, "assets/a.png": 10_000},)),
    (rules.machine_free, ("a", "/usr/bin/env, ../home/x, https://a.b/home/c, /content/runs, $HOME/opt/x")),
]  # fmt: skip


def rule_name(case: object) -> str:
    """A test's name."""
    return getattr(case, "__name__", "")


@pytest.mark.parametrize(("rule", "args"), BROKEN, ids=rule_name)
def test_broken_limit_is_named(rule: Callable, args: tuple) -> None:
    complaints = rule(*args)
    assert complaints and all(isinstance(line, str) for line in complaints)


@pytest.mark.parametrize(("rule", "args"), KEPT, ids=rule_name)
def test_kept_limit_is_silent(rule: Callable, args: tuple) -> None:
    assert rule(*args) == []


def test_every_rule_was_seen_to_complain_and_to_be_silent() -> None:
    assert {rule for rule, _ in BROKEN} == set(rules.RULES)
    assert {rule for rule, _ in KEPT} == set(rules.RULES)


def test_every_rule_runs_over_the_project() -> None:
    text = Path(__file__).read_text(encoding="utf-8").split("# Each rule complains")[0]
    assert [rule.__name__ for rule in rules.RULES if f"rules.{rule.__name__}" not in text] == []


# The check that modules and notebooks are in step


def scratch_project(folder: Path) -> Path:
    """A project of one notebook, exported and clean."""
    (folder / "nbs").mkdir()
    (folder / "diffusion_book").mkdir()
    (folder / "diffusion_book" / "__init__.py").write_text('"""A package."""\n')
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    cells = [cell("# Title", kind="markdown"), IDEA, EXPORT]
    made = [c | {"id": f"c{i}"} | ({"execution_count": None} if "outputs" in c else {}) for i, c in enumerate(cells)]
    content = {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "nbs" / "01_idea.ipynb").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    check_export.run_nbdev("nbdev-export", folder)
    check_export.run_nbdev("nbdev-clean", folder)
    return folder


def test_export_in_step(tmp_path: Path) -> None:
    project = scratch_project(tmp_path)
    module = project / "diffusion_book" / "idea.py"
    assert "def f(x)" in module.read_text() and check_export.check(project) == []
    text = module.read_text()
    assert text.startswith("# AUTOGENERATED") or "http" not in text.split("# %%")[0], "no address in the docstring"

    module.write_text(text.replace("return x", "return 2 * x", 1))
    assert [line.split(":")[0] for line in check_export.check(project)] == ["module idea.py"]
    module.write_text(text)

    (project / "diffusion_book" / "orphan.py").write_text("")
    assert check_export.check(project) == ["module orphan.py: nothing in the notebooks makes it"]
    (project / "diffusion_book" / "orphan.py").unlink()

    path = project / "nbs" / "01_idea.ipynb"
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 3', 1))
    assert [line.split(":")[0] for line in check_export.check(project)] == ["notebook, not clean"]


def test_badge_path_is_the_headers(settings: dict[str, str]) -> None:
    head = cell("# T\n\n" + chapter_header.badge("01_a.ipynb", settings), kind="markdown")
    assert badge_path(notebook(head)) == "nbs/01_a.ipynb"
