"""The shape of the one file, measured from its syntax tree; these numbers only ever tighten."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator

from conftest import PROGRAM

SOURCE = PROGRAM.read_text()
TREE = ast.parse(SOURCE)
LINES = 11_567  # in all
SECTION = 500  # lines from a banner to the next
FUNCTION = 40  # lines of a body without its docstring
MEDIAN = 7  # of these
UPWARD = 0.95  # of the names of the file that are used stand above where they are used

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[int, str]]:
    """The lines of each function's body, and its name."""
    for node in ast.walk(TREE):
        if isinstance(node, Function):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield (node.end_lineno or 0) - body[0].lineno + 1 if body else 0, node.name


def sections() -> dict[str, int]:
    """The lines of each section, by the name on its banner."""
    rows = SOURCE.splitlines()
    heads = [(n, row.strip("# ─")) for n, row in enumerate(rows) if row.startswith("# ──")]
    ends = [*(n for n, _ in heads[1:]), len(rows)]
    return {name: end - n for (n, name), end in zip(heads, ends, strict=True)}


def bound_in(node: ast.AST) -> set[str]:
    """The names that a definition binds itself."""
    inner = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    inner |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    return inner | {n.name for n in ast.walk(node) if isinstance(n, (Function, ast.ClassDef))}


def uses() -> Iterator[bool]:
    """For each name of the file that a definition uses at run time: whether it stands above."""
    defined: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (Function, ast.ClassDef)):
            defined[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            defined |= {t.id: node.lineno for t in node.targets if isinstance(t, ast.Name)}
    for node in TREE.body:
        if isinstance(node, (Function, ast.ClassDef)):
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
            for name in {*names} & defined.keys() - bound_in(node):
                yield defined[name] < node.lineno


def test_functions_are_short() -> None:
    """Half of them at most seven lines, none longer than a screen."""
    lengths = [length for length, _ in functions()]
    assert statistics.median(lengths) <= MEDIAN
    assert not [name for length, name in functions() if length > FUNCTION]


def test_sections_and_classes_are_of_a_size_to_be_read() -> None:
    """No section grows beyond its bound, no class beyond a tenth of the file."""
    assert not [(name, n) for name, n in sections().items() if n > SECTION]
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    tenth = len(SOURCE.splitlines()) / 10
    assert not [c.name for c in classes if (c.end_lineno or 0) - c.lineno + 1 > tenth]


def test_it_reads_from_top_to_bottom() -> None:
    """What a definition uses stands above it, but for some helpers right below."""
    upward = [*uses()]
    assert sum(upward) / len(upward) >= UPWARD


def test_the_file_does_not_grow() -> None:
    """Its lines are counted."""
    assert len(SOURCE.splitlines()) <= LINES
