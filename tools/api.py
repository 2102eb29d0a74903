"""The page "API", written from the modules: python tools/api.py writes nbs/A8_1_api.ipynb, --check compares.

Each name stands with its signature as it is in the source, comments included, and with its docstring.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from textwrap import dedent

from notebooks import read_notebook, source
from written import ROOT, titles, write_or_check, written_page

PAGE = ROOT / "nbs" / "A8_1_api.ipynb"
TITLE = "# API\n\n> Every public name of the library, with its signature and what it promises"
HEAD = """\
**You will be able to**

- look up a function or a class, the shapes it takes, what it returns and which errors it raises;
- go from a name to the chapter that builds and tests it.

**Builds on** all chapters · **Exports** nothing · **Takes** no time.

The modules stand in the order of the book. Signatures and texts are those of the source, comments included. A name in
`code` inside a text is defined here or in PyTorch; sizes such as `(n, C, H, W)` are shapes of tensors."""
END = """\
## Summary

A module is a chapter, a name has one home, and what a signature does not say its comment does. Symbols and terms are
explained in the [glossary](A8_glossary.ipynb)."""
Definition = ast.FunctionDef | ast.ClassDef


def signature(node: Definition, lines: list[str]) -> str:
    """The source of a definition up to its docstring or its first statement."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if node.body[0].lineno == node.lineno:  # `def f(self): ...` on one line
        return dedent(lines[first - 1])
    return dedent("\n".join(lines[first - 1 : node.body[0].lineno - 1])).rstrip()


def fields(node: ast.ClassDef, lines: list[str]) -> list[str]:
    """The annotated attributes of a class, a line each."""
    found = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return ["    " + lines[item.lineno - 1].strip() for item in found if not item.target.id.startswith("_")]


def describe_class(node: ast.ClassDef, lines: list[str]) -> list[str]:
    """A class: its fields and its constructor, then its public methods with their docstrings."""
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    start = [signature(item, lines) for item in methods if item.name == "__init__"]
    inside = fields(node, lines) + ["    " + line for text in start for line in text.splitlines()]
    parts = [code("\n".join([signature(node, lines), *inside])), ast.get_docstring(node) or ""]
    for item in methods:
        told = ast.get_docstring(item)
        if told and not item.name.startswith("_"):
            parts += [code(signature(item, lines)), told]
        elif told and item.name == "__init__":
            parts.insert(2, told)
    return parts


def describe(node: ast.stmt, lines: list[str]) -> list[str]:
    """Markdown for one name of a module."""
    if isinstance(node, ast.ClassDef):
        return describe_class(node, lines)
    if isinstance(node, ast.FunctionDef):
        return [code(signature(node, lines)), ast.get_docstring(node) or ""]
    return [code("\n".join(lines[node.lineno - 1 : node.end_lineno]))]


def code(text: str) -> str:
    """A block of Python."""
    return f"```python\n{text}\n```"


def named(node: ast.stmt) -> str:
    """The public name that a statement defines, or nothing."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        name = node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = target.id if isinstance(target, ast.Name) else ""
    else:
        return ""
    return "" if name.startswith("_") else name


def module_page(module: str, chapter: str, title: str) -> str:
    """Markdown for one module."""
    text = (ROOT / "diffusion_book" / f"{module}.py").read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    subtitle = inspect.cleandoc(ast.get_docstring(tree) or "")
    parts = [f"## diffusion_book.{module}", f"{subtitle}: [{title}]({chapter})."]
    for node in tree.body:
        if name := named(node):
            parts += [f"### {name}", *describe(node, lines)]
    return "\n\n".join(filter(None, parts))


def modules() -> list[tuple[str, str, str]]:
    """Module, notebook and title of each chapter that exports, in reading order."""
    found = []
    for path, title in titles().items():
        text = "\n".join(source(cell) for cell in read_notebook(ROOT / path)["cells"])
        if exported := re.search(r"^#\| default_exp: (\w+)$", text, re.MULTILINE):
            found.append((exported[1], Path(path).name, title))
    return found


def page() -> dict:
    """The notebook."""
    return written_page(PAGE.name, TITLE, [HEAD, *(module_page(*found) for found in modules()), END])


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(), "api.py"))
