"""Every exercise has a solution that runs: the chapters of a part against its notebook of solutions."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from structure_rules import code_of, is_assertion

SOLUTIONS = {  # a notebook of solutions, and what it solves: beginnings of the titles of parts, or chapters
    "A5_1_solutions": ("Part I:",),
    "A5_2_solutions": (*("20_data", "21_blocks", "22_unet", "23_parameters", "24_lenet", "25_metrics", "26_inspect"),),
    "A5_2_1_solutions": ("27_mnist_run", "47_files", "48_folders", "52_checkpoint"),
    "A5_3_solutions": ("29_petals", "30_flowers", "31_ddim", "32_resunet"),
    "A5_3_1_solutions": ("33_image_distances", "34_flowers_run"),
    "A5_4_solutions": ("Part IV:",),
    "A5_5_solutions": (
        *(
            "46_moves",
            "49_player",
            "50_explore",
            "51_precision",
            "51_1_compile",
            "52_1_guards",
            "52_2_monitor",
            "52_3_run",
        ),
        *("53_fit", "53_1_processes", "54_export"),
    ),
    "A5_6_solutions": ("A1_viz", "A1_1_diagrams", "A2_presets", "A2_1_digits", "A3_1_cards", "A3_weights"),
    "A5_6_1_solutions": ("A2_2_flower_recipes", "A2_3_pictures"),
    "A5_7_solutions": (
        *("A4_1_words", "A4_2_opening", "A4_3_outputs", "A4_4_small_runs", "A4_5_plans", "A4_6_commands", "A4_cli"),
    ),
}

Cell = Mapping[str, object]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def cells_of(path: Path) -> list[Cell]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def title(cells: Iterable[Cell]) -> str:
    """The first heading of a notebook, without the mark of a run."""
    text = next(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    return text.splitlines()[0].removeprefix("# ").removeprefix("▶ ")


def exercises(cells: Iterable[Cell]) -> list[int]:
    """The numbers of the items under "## Exercises", as they stand there."""
    text = "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    section = re.search(r"^## Exercises\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return [int(number) for number in re.findall(r"^(\d+)\. ", section[1], flags=re.MULTILINE)] if section else []


def solutions(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The folded code cells under each heading "## [Title](chapter.ipynb)", by title and chapter."""
    found: dict[tuple[str, str], list[Cell]] = {}
    heading = None
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for line in source(cell).splitlines():
                if line.startswith("## "):
                    link = re.fullmatch(r"## \[(.+)\]\((\w+)\.ipynb\)", line)
                    heading = (link[1], link[2]) if link else None
                    if heading:
                        found[heading] = []
        elif heading and "#| code-fold: true" in source(cell):
            found[heading].append(cell)
    return found


def numbers(cell: Cell) -> list[int]:
    """The numbers in a solution's first comment, `# 3. what is asked` or `# 3, 4. what is asked`; [0] without one."""
    lines = [line for line in source(cell).splitlines() if not line.startswith("#|")]
    numbered = re.match(r"# (\d+(?:, \d+)*)\. \S", lines[0]) if lines else None
    return [int(number) for number in numbered[1].split(", ")] if numbered else [0]


def complaints(chapters: Mapping[str, list[Cell]], solved: list[Cell]) -> list[str]:
    """What is wrong between chapters (by file name, without ending) and the notebook with their solutions."""
    wrong = []
    given = {name: (heading, cells) for (heading, name), cells in solutions(solved).items()}
    for name, cells in chapters.items():
        asked = exercises(cells)
        if asked != list(range(1, len(asked) + 1)):
            wrong.append(f"{name}: exercises are numbered {asked}")
        heading, answers = given.pop(name, (title(cells), []))
        solved_here = [number for answer in answers for number in numbers(answer)]
        if solved_here != asked:
            wrong.append(f"{name}: exercises {asked}, solutions {solved_here}")
        if heading != title(cells):
            wrong.append(f"{name}: the solutions call it {heading!r}, its title is {title(cells)!r}")
        for answer in answers:
            if not any(is_assertion(node) for node in ast.walk(ast.parse(code_of(answer)))):
                wrong.append(f"{name}: solution {', '.join(map(str, numbers(answer)))} asserts nothing")
    return wrong + [f"{name}: has solutions, but is no chapter of this part" for name in given]


def chapters_of_parts() -> dict[str, list[Path]]:
    """The notebooks of each part by its title, those of the appendix under "Appendix", in reading order."""
    book = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["book"]
    parts = {e["part"]: e["chapters"] for e in book["chapters"] if isinstance(e, dict)}
    parts["Appendix"] = book["appendices"]
    return {part: [ROOT / path for path in paths] for part, paths in parts.items()}


def solved_chapters(names: Iterable[str]) -> dict[str, list[Cell]]:
    """The chapters of the parts whose titles begin so, and the chapters of these names, in the order of the names."""
    parts = chapters_of_parts()
    every = {path.stem: path for paths in parts.values() for path in paths}
    found: dict[str, list[Cell]] = {}
    for name in names:
        paths = [every[name]] if name in every else next(p for title, p in parts.items() if title.startswith(name))
        found |= {path.stem: cells_of(path) for path in paths}
    return found


@pytest.mark.parametrize(("notebook", "names"), SOLUTIONS.items())
def test_every_exercise_is_solved(notebook: str, names: tuple[str, ...]) -> None:
    chapters = solved_chapters(names)
    assert sum(len(exercises(cells)) for cells in chapters.values()) > 0
    wrong = complaints(chapters, cells_of(ROOT / "nbs" / f"{notebook}.ipynb"))
    assert not wrong, "\n".join(wrong)


def test_no_chapter_is_left_out() -> None:
    solved = [name for names in SOLUTIONS.values() for name in solved_chapters(names)]
    asking = [path.stem for paths in chapters_of_parts().values() for path in paths if exercises(cells_of(path))]
    assert sorted(name for name in solved if name in asking) == sorted(asking)  # and none is solved twice


# What the comparison must notice


def markdown(text: str) -> Cell:
    return {"cell_type": "markdown", "source": text.splitlines(keepends=True)}


def code(text: str) -> Cell:
    return {"cell_type": "code", "source": text.splitlines(keepends=True)}


CHAPTER = [
    markdown("# ▶ One\n\n> 1. no exercise"),
    markdown("## Exercises\n\n1. Show\n   1. this\n2. Try"),
    markdown("## End\n\n3. x"),
]
FIRST = code("#| code-fold: true\n# 1. show\nassert f(1) == 2")
SECOND = code('#| code-fold: true\n#| fig-alt: "x"\n# 2. try\nassert f(2) == 3')
HEAD = markdown("## [One](01_one.ipynb)\n\n1. A word.")


def test_matching_notebooks_are_silent() -> None:
    assert exercises(CHAPTER) == [1, 2] and title(CHAPTER) == "One"
    solved = [
        markdown("# S"),
        code("import math"),
        HEAD,
        FIRST,
        markdown("more"),
        SECOND,
        markdown("## Summary"),
        code("x = 1"),
    ]
    assert complaints({"01_one": CHAPTER, "02_none": [markdown("# Without exercises")]}, solved) == []


def test_one_cell_may_solve_two_exercises() -> None:
    both = code("#| code-fold: true\n# 1, 2. show, then try\nassert f(1) == 2")
    assert numbers(both) == [1, 2] and complaints({"01_one": CHAPTER}, [HEAD, both]) == []


@pytest.mark.parametrize(
    ("solved", "message"),
    [
        ([HEAD, code("#| code-fold: true\n# 2, 1. both\nassert f(1) == 2")], r"solutions \[2, 1\]"),
        ([HEAD, code("#| code-fold: true\n# 1, 2. both\nprint(f(1))")], "solution 1, 2 asserts nothing"),
        ([HEAD, FIRST], r"exercises \[1, 2\], solutions \[1\]"),
        ([HEAD, SECOND, FIRST], r"solutions \[2, 1\]"),
        ([HEAD, FIRST, FIRST, SECOND], r"solutions \[1, 1, 2\]"),
        ([HEAD, FIRST, code("#| code-fold: true\n# try\nassert f(2) == 3")], r"solutions \[1, 0\]"),
        ([FIRST, SECOND], r"solutions \[\]"),
        ([HEAD, FIRST, code("#| code-fold: true\n# 2. try\nprint(f(2))")], "solution 2 asserts nothing"),
        ([markdown("## [Two](01_one.ipynb)"), FIRST, SECOND], "call it 'Two', its title is 'One'"),
        ([HEAD, FIRST, SECOND, markdown("## [Old](07_old.ipynb)")], "07_old: has solutions, but is no chapter"),
    ],
)
def test_what_is_missing_is_named(solved: list[Cell], message: str) -> None:
    wrong = complaints({"01_one": CHAPTER}, solved)
    assert len(wrong) == 1 and re.search(message, wrong[0]), wrong


def test_wrong_numbers_of_exercises_are_named() -> None:
    chapter = [markdown("# One\n\n## Exercises\n\n1. Show\n3. Try")]
    wrong = complaints({"01_one": chapter}, [HEAD, FIRST, SECOND])
    assert wrong[0] == "01_one: exercises are numbered [1, 3]"
