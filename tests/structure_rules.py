"""The limits that the book sets itself, one function each: texts and numbers in, complaints out.

tests/test_structure.py runs every function here over the project, and over something that breaks it.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MODULE_LINES, PUBLIC_NAMES, BODY_LINES = 200, 10, 30
CELLS, CELL_LINES, CLASS_CELL_LINES, ASSERTIONS = 70, 30, 90, 2
IDEA_BYTES, RUN_BYTES, ALL_BYTES, PLAYER_BYTES = 300_000, 700_000, 10_000_000, 150_000
WEIGHT_BYTES, FILE_BYTES = 12_000_000, 1_000_000

LEVELS = (
    "core files folders player schedule embed ema guidance lenet tables precision compiled",
    "processes viz toy diffusion ideal mlp blocks resunet attunet data metrics petals words",
    "unet train moves flowers inspection image_distances cifarnet checkpoint widgets export diagrams",
    "sampling ddim guards monitor",
    "run cards",
    "fit weights",
    "presets digits flower_recipes pictures opening",
    "small_runs outputs",
    "plans",
    "commands",
    "cli",
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
APART = {  # these never import each other
    "samplers": {"sampling", "ddim"},
    "guidance": {"guidance"},
    "training": {"train", "guards", "monitor", "run", "fit"},
    "networks": {"mlp", "blocks", "unet", "resunet", "attunet"},
}
BY_NAME = {"data"}  # data.load finds a loader by name when it is called
GENERATED = {"__init__", "__main__", "_modidx"}
Notebook = Mapping[str, Any]


# Reading modules and notebooks


def code_of(cell: Mapping[str, Any]) -> str:
    """The text of a cell as Python: magics and shell lines become `pass`, so that it parses."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)


def code_cells(notebook: Notebook) -> list[Mapping[str, Any]]:
    """The code cells of a notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def directives(cell: Mapping[str, Any]) -> dict[str, str]:
    """The `#| key: value` lines of a cell."""
    found = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", "".join(cell["source"]), flags=re.MULTILINE)
    return {key: value.strip() for key, value in found}


def is_exported(cell: Mapping[str, Any]) -> bool:
    """Whether a cell goes into a module."""
    return bool({"export", "exports", "exporti"} & directives(cell).keys())


def module_of(notebook: Notebook) -> str | None:
    """The module that a notebook exports; None for a run notebook."""
    for cell in code_cells(notebook):
        if "default_exp" in directives(cell):
            return directives(cell)["default_exp"]
    return None


def defined_names(text: str) -> list[str]:
    """Public names that a module's text defines at its top level; `__all__` and imported names are none."""
    names: list[str] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def exported_names(notebook: Notebook) -> list[str]:
    """Public names that the export cells of a notebook define."""
    return [name for cell in code_cells(notebook) if is_exported(cell) for name in defined_names(code_of(cell))]


def imported_modules(tree: ast.AST) -> set[str]:
    """Modules of this package that a module's tree imports, at any depth and by any spelling."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "diffusion_book." * bool(node.level) + (node.module or "")
            paths = [base, *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)]
        else:
            continue
        parts = [path.split(".") for path in paths]
        found |= {p[1] for p in parts if p[0] == "diffusion_book" and len(p) > 1 and not p[1].startswith("_")} - {""}
    return found


# Modules


def module_length(name: str, text: str) -> list[str]:
    """An exported module has at most 200 lines."""
    lines = len(text.splitlines())
    return [f"{name}: {lines} lines, at most {MODULE_LINES}"] if lines > MODULE_LINES else []


def public_names(name: str, text: str) -> list[str]:
    """A module defines at most 10 public names."""
    names = defined_names(text)
    return [f"{name}: {len(names)} public names, at most {PUBLIC_NAMES}: {names}"] if len(names) > PUBLIC_NAMES else []


def function_bodies(name: str, text: str) -> list[str]:
    """The body of a function has at most 30 lines, its docstring and signature not counted."""
    complaints = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if not body:
                continue
            first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
            lines = (node.end_lineno or first) - first + 1
            if lines > BODY_LINES:
                complaints.append(f"{name}: the body of {node.name} has {lines} lines, at most {BODY_LINES}")
    return complaints


def star_imports(name: str, text: str) -> list[str]:
    """Nothing is imported with a star."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    return [f"{name}: from {n.module} import *" for n in nodes if any(alias.name == "*" for alias in n.names)]


def import_levels(name: str, text: str) -> list[str]:
    """A module imports only from levels below its own; imports inside functions count."""
    if name not in LEVEL_OF:
        return [f"{name}: has no level; the table of levels is in tests/structure_rules.py"]
    complaints = []
    tree = ast.parse(text)
    for other in sorted(imported_modules(tree)):
        if other not in LEVEL_OF:
            complaints.append(f"{name}: imports {other}, which has no level")
        elif LEVEL_OF[other] >= LEVEL_OF[name]:
            levels = f"level {LEVEL_OF[name]} from level {LEVEL_OF[other]}"
            complaints.append(f"{name}: imports {other}, {levels}; only lower levels are allowed")
    for node in ast.walk(tree):
        called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if called in {"import_module", "__import__"} and name not in BY_NAME:
            complaints.append(f"{name}: {called} hides what is imported")
    return complaints


def kept_apart(name: str, text: str) -> list[str]:
    """Samplers, guidance, training and networks never import each other."""
    group = {module: key for key, modules in APART.items() for module in modules}
    others = sorted(imported_modules(ast.parse(text)) & group.keys()) if name in group else []
    strange = [other for other in others if group[other] != group[name]]
    return [f"{name}: {group[name]} must not import {group[other]} ({other})" for other in strange]


# Notebooks


def repeated_names(exports: Mapping[str, Iterable[str]]) -> list[str]:
    """No public name is defined in two notebooks, or twice in one. `exports`: names by notebook."""
    homes: dict[str, list[str]] = {}
    for notebook, names in exports.items():
        for name in names:
            homes.setdefault(name, []).append(notebook)
    return [f"{name}: defined in {' and '.join(where)}" for name, where in homes.items() if len(where) > 1]


def repeated_default_exp(notebooks: Mapping[str, Notebook]) -> list[str]:
    """A notebook exports one module, and no other notebook exports it."""
    found = [(directives(c)["default_exp"], name) for name, nb in notebooks.items() for c in code_cells(nb)
             if "default_exp" in directives(c)]  # fmt: skip
    modules = Counter(module for module, _ in found)
    names = Counter(name for _, name in found)
    complaints = [f"default_exp {module}: used {count} times" for module, count in modules.items() if count > 1]
    return complaints + [f"{name}: {count} default_exp lines" for name, count in names.items() if count > 1]


def cell_count(name: str, notebook: Notebook) -> list[str]:
    """A notebook has at most 70 cells."""
    cells = len(notebook["cells"])
    return [f"{name}: {cells} cells, at most {CELLS}"] if cells > CELLS else []


def end_is_last(name: str, notebook: Notebook) -> list[str]:
    """No code comes after a chapter's exercises."""
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    end = next(
        (i for i, (kind, text) in enumerate(texts) if kind == "markdown" and "## Exercises\n" in text), len(texts)
    )
    return [f"{name}: code after the exercises: {text.splitlines()[0]}" for kind, text in texts[end:] if kind == "code"]


def cell_lengths(name: str, notebook: Notebook) -> list[str]:
    """A code cell has at most 30 lines, directives not counted; 90 where it exports one class."""
    complaints = []
    for number, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] != "code":
            continue
        lines = [line for line in "".join(cell["source"]).strip().splitlines() if not line.startswith("#|")]
        body = ast.parse(code_of(cell)).body
        one_class = is_exported(cell) and len(body) == 1 and isinstance(body[0], ast.ClassDef)
        limit = CLASS_CELL_LINES if one_class else CELL_LINES
        if len(lines) > limit:
            complaints.append(f"{name}: cell {number} has {len(lines)} lines, at most {limit}")
    return complaints


def is_assertion(node: ast.AST) -> bool:
    """`assert`, `assert_allclose(…)` and the like, `with raises(…)`, `raise AssertionError`."""
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "AssertionError"
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return called.startswith("assert_") or called == "raises"
    return False


def touched(node: ast.AST, about: Mapping[str, set[str]]) -> set[str]:
    """Exported names that a piece of code uses, directly or through variables computed from them."""
    used = [leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)]
    return set().union(*(about.get(name, set()) for name in used))


def stored(node: ast.AST) -> Iterator[str]:
    """Variables that a statement sets, functions and classes that it defines."""
    for leaf in ast.walk(node):
        if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store):
            yield leaf.id
        elif isinstance(leaf, ast.FunctionDef | ast.ClassDef):
            yield leaf.name


def assertions_about(notebook: Notebook) -> tuple[int, Counter[str]]:
    """All assertions outside the export cells, and how many of them are about each exported name.

    An assertion is about a name if it uses it, or a variable that came, through any number of statements, from it.
    """
    names = set(exported_names(notebook))
    about: dict[str, set[str]] = {name: {name} for name in names}
    total, counts = 0, Counter[str]()
    for cell in code_cells(notebook):
        for statement in [] if is_exported(cell) else ast.parse(code_of(cell)).body:
            everything = touched(statement, about)
            compound = isinstance(statement, ast.For | ast.With | ast.Try | ast.FunctionDef | ast.If | ast.While)
            for name in set(stored(statement)) - names:
                about[name] = about.get(name, set()) | everything
            for node in filter(is_assertion, ast.walk(statement)):
                total += 1
                counts.update(everything if compound else touched(node, about))
    return total, counts


def is_type(node: ast.AST) -> bool:
    """Whether an expression spells a type: `Callable[[int], int]`, `str | Path`, `Tensor`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return is_type(node.left) and is_type(node.right)
    if isinstance(node, ast.Subscript):
        return is_type(node.value)
    builtin = r"str|int|float|bool|bytes|list|dict|set|tuple|type|[A-Z]\w*[a-z]\w*"
    return ast.unparse(node) == "None" or (isinstance(node, ast.Name) and bool(re.fullmatch(builtin, node.id)))


def type_aliases(notebook: Notebook) -> set[str]:
    """Exported names that stand for a type, such as `Loss = str | Callable[[Tensor], Tensor]`: nothing to compute."""
    body = [n for cell in code_cells(notebook) if is_exported(cell) for n in ast.parse(code_of(cell)).body]
    types = [n for n in body if isinstance(n, ast.Assign) and is_type(n.value)]
    return {target.id for n in types for target in n.targets if isinstance(target, ast.Name)}


def assertions_per_name(name: str, notebook: Notebook) -> list[str]:
    """For each name that a notebook exports there are at least two assertions in it, and at least two are about it.

    A name for a type counts in the first half of the rule and not in the second.
    """
    names = exported_names(notebook)
    total, counts = assertions_about(notebook)
    complaints = []
    if total < ASSERTIONS * len(names):
        complaints.append(f"{name}: {total} assertions for {len(names)} exported names, {ASSERTIONS} each wanted")
    few = [n for n in names if counts[n] < ASSERTIONS and n not in type_aliases(notebook)]
    return complaints + [f"{name}: {counts[n]} assertions about {n}, at least {ASSERTIONS}" for n in few]


# Committed outputs


def outputs(notebook: Notebook) -> list[Mapping[str, Any]]:
    """All outputs of a notebook."""
    return [output for cell in code_cells(notebook) for output in cell.get("outputs", [])]


def size(value: Any) -> int:
    """Bytes of a value as it stands in a file."""
    return len(json.dumps(value, ensure_ascii=False).encode())


def output_bytes(name: str, notebook: Notebook) -> list[str]:
    """Outputs take at most 300 KB in an idea notebook and 700 KB in a run notebook."""
    limit = RUN_BYTES if module_of(notebook) is None else IDEA_BYTES
    total = size(outputs(notebook))
    return [f"{name}: {total} bytes of outputs, at most {limit}"] if total > limit else []


def all_output_bytes(notebooks: Mapping[str, Notebook]) -> list[str]:
    """Outputs of all notebooks take at most 10 MB."""
    total = sum(size(outputs(notebook)) for notebook in notebooks.values())
    return [f"{total} bytes of outputs in all notebooks, at most {ALL_BYTES}"] if total > ALL_BYTES else []


def player_bytes(name: str, notebook: Notebook) -> list[str]:
    """An Explorer or an animation, the only large HTML there is, takes at most 150 KB."""
    pages = [size("".join(output.get("data", {}).get("text/html", ""))) for output in outputs(notebook)]
    return [f"{name}: an HTML output of {n} bytes, at most {PLAYER_BYTES}" for n in pages if n > PLAYER_BYTES]


def widget_free(name: str, notebook: Notebook) -> list[str]:
    """No widget state and no widget view is committed: a page without a kernel cannot use them."""
    complaints = [f"{name}: widget state in the metadata"] if "widgets" in notebook.get("metadata", {}) else []
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    return complaints + [f"{name}: an output of type {k}" for k in sorted(kinds) if "jupyter.widget" in k]


def error_free(name: str, notebook: Notebook) -> list[str]:
    """No committed output is an error."""
    errors = [output for output in outputs(notebook) if output.get("output_type") == "error"]
    return [f"{name}: {output.get('ename')} in the committed outputs" for output in errors]


def figures_described(name: str, notebook: Notebook) -> list[str]:
    """Every cell that shows a picture says in words what is to be seen."""
    complaints = []
    for number, cell in enumerate(notebook["cells"], start=1):
        pictures = [o for o in cell.get("outputs", []) if any(k.startswith("image/") for k in o.get("data", {}))]
        if pictures and not directives(cell).get("fig-alt", "").strip("\"'"):
            complaints.append(f"{name}: cell {number} shows a picture and has no fig-alt line")
    return complaints


# The project as a whole


def versions_agree(settings_version: str, installed_version: str) -> list[str]:
    """The version in settings.ini is the installed one."""
    if settings_version == installed_version:
        return []
    return [f"settings.ini has version {settings_version}, {installed_version} is installed; install again"]


def chapters_in(value: Any) -> list[str]:
    """All notebooks named anywhere in a part of _quarto.yml."""
    if isinstance(value, str):
        return [value] if value.endswith(".ipynb") else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [path for part in parts for path in chapters_in(part)]


def contents_agree(quarto: Mapping[str, Any], present: Iterable[str], badges: Mapping[str, str]) -> list[str]:
    """_quarto.yml lists exactly the notebooks present, once each, and their badges lead to them.

    `present`: paths such as nbs/03_schedules.ipynb. `badges`: the badge's path by notebook path.
    """
    listed, there = chapters_in(quarto.get("book", {})), set(present)
    complaints = [f"_quarto.yml: {path} is listed twice" for path, n in Counter(listed).items() if n > 1]
    complaints += [f"_quarto.yml: {path} does not exist" for path in listed if path not in there]
    complaints += [f"_quarto.yml: {path} is missing" for path in sorted(there - set(listed))]
    wrong = [path for path in sorted(there) if badges.get(path) != path]
    return complaints + [f"{path}: its badge leads to {badges.get(path)}" for path in wrong]


def modules_agree(modules: Iterable[str], exports: Iterable[str]) -> list[str]:
    """Every module is exported by a notebook, and every exported module is there."""
    modules, exports = set(modules) - GENERATED, set(exports)
    complaints = [f"diffusion_book/{name}.py: no notebook exports it" for name in sorted(modules - exports)]
    return complaints + [f"diffusion_book/{name}.py: missing, export it" for name in sorted(exports - modules)]


DATA_FILE = re.compile(
    r"\.(npz|npy|gz|tgz|tar|zip|7z|mat|pkl|pickle|pt|pth|ckpt|h5|hdf5|parquet|bin|csv)$|-ubyte$|(^|/)data/",
    re.IGNORECASE,
)


def data_free(sizes: Mapping[str, int]) -> list[str]:
    """No data set, pickle or large file is tracked; weights are safetensors, 12 MB in all. `sizes`: bytes by path."""
    complaints = [f"{path}: a data file is tracked" for path in sorted(sizes) if DATA_FILE.search(path)]
    weights = {path for path in sizes if path.startswith("diffusion_book/weights/")}
    total = sum(sizes[path] for path in weights)
    complaints += [f"weights take {total} bytes, at most {WEIGHT_BYTES}"] if total > WEIGHT_BYTES else []
    large = [path for path in sorted(sizes.keys() - weights) if sizes[path] > FILE_BYTES]
    return complaints + [f"{path}: {sizes[path]} bytes, at most {FILE_BYTES}" for path in large]


MACHINE = re.compile(  # written so that this file does not match itself
    r"(?<![\w.}/-])/(?:[h]ome|[r]oot|[U]sers|[o]pt|[w]ork|[m]nt|[s]rv)/[\w.-]+"
    r"|(?<![\w.}/-])/[t]mp/\w+"
    r"|[A-Z]:\\\\?[U]sers\\"
    r"|--(?:extra-)?[i]ndex-url|--[f]ind-links|pypi\.[o]rg/simple|files\.[p]ythonhosted|download\.[p]ytorch\.org"
)


def machine_free(path: str, text: str) -> list[str]:
    """No text names a folder of the machine it was written on, or a package index."""
    found = sorted({match.group(0) for match in MACHINE.finditer(text)})
    return [f"{path}: {what!r} belongs to one machine" for what in found]


RULES = (
    module_length, public_names, function_bodies, star_imports, import_levels, kept_apart, repeated_names,
    repeated_default_exp, cell_count, end_is_last, cell_lengths, assertions_per_name, output_bytes,
    all_output_bytes, player_bytes, widget_free, error_free, figures_described, versions_agree, contents_agree,
    modules_agree, data_free, machine_free,
)  # fmt: skip
