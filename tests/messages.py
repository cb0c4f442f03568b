"""What README says of messages is made from the script: every error text with its hint, every code with its remedy.

    python -m tests.messages            print the tables
    python -m tests.messages --write    put them into README.md

The texts are read from the syntax tree, so that none can be forgotten; what only a run can fill in is an ellipsis.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import s3_bulk_convert as program

SCRIPT = Path(program.__file__).resolve()
README = SCRIPT.parent / "README.md"
BEGIN, END = "<!-- messages: made by `python -m tests.messages --write` -->", "<!-- end of messages -->"
FILLED_IN = "…"
WITH_HINT = {"UserError", "RunStopped", "Stop", "Doubt"}  # called with (message, hint, ...)


class Row(NamedTuple):
    """One message and what to do about it."""

    text: str
    hint: str


def text_of(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """An expression as text; `names`: what names stand for where it is."""
    while isinstance(node, ast.Call) and (inner := shortened(node)):
        node = inner
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{FILLED_IN}+", FILLED_IN, "".join(text_of(part, names) for part in node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names) + text_of(node.right, names)
    if isinstance(node, ast.Name) and node.id in names:
        return text_of(names[node.id], {name: value for name, value in names.items() if name != node.id})
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return named_number(node.value.id)
    return FILLED_IN


def shortened(call: ast.Call) -> ast.expr | None:
    """The text that a call takes something away from; None if it is a call of another kind."""
    if ast.unparse(call.func) == "redacted":
        return call.args[0]
    return call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr == "rstrip" else None


def named_number(name: str) -> str:
    """A number that has a name in the script; an ellipsis for any other name."""
    value = getattr(program, name, None)
    return f"{value:,}" if isinstance(value, int) else FILLED_IN


class Reader(ast.NodeVisitor):
    """Collects the texts of the script, in its order."""

    def __init__(self) -> None:
        self.errors: list[Row] = []
        self.problems: list[str] = []  # of the configuration
        self._names: dict[str, ast.expr] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function's names are its own; what bad_line is called with is taken where it is called."""
        if node.name == "bad_line":
            return
        outer, self._names = self._names, dict(self._names)
        self.generic_visit(node)
        self._names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember what a name stands for from here on."""
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._names[target.id] = node.value

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """A text goes on, or problems are added to their list."""
        self.generic_visit(node)
        name = ast.unparse(node.target)
        if name in self._names:
            self._names[name] = ast.BinOp(self._names[name], ast.Add(), node.value)
        if name == "problems" and isinstance(node.value, ast.ListComp):
            self.problems.append(text_of(node.value.elt, self._names))

    def visit_Return(self, node: ast.Return) -> None:
        """Some functions return the problems that they find."""
        self.generic_visit(node)
        found = node.value.elt if isinstance(node.value, ast.ListComp) else None
        texts = node.value.elts if isinstance(node.value, ast.List) else [found] if found else []
        self.problems += [text for text in (text_of(each, self._names) for each in texts) if text.startswith("[")]

    def visit_Call(self, node: ast.Call) -> None:
        """Take the texts of what is raised, or added to the problems."""
        self.generic_visit(node)
        called = ast.unparse(node.func)
        texts = [text_of(argument, self._names) for argument in node.args]
        if called in WITH_HINT and len(texts) > 1:
            self.errors.append(Row(texts[0], texts[1]))
        elif called == "bad_line":
            self.errors.append(Row(f"{FILLED_IN}: line {FILLED_IN} {texts[2]}", program.KEYS_HINT))
        elif called in {"ValueError", "problems.append", "problems.insert"}:
            self.problems += texts[-1:]


def says_something(text: str) -> bool:
    """Whether more is known of a text than that a run fills it in."""
    return re.search("[a-z]{2}", text) is not None


def read_script() -> Reader:
    """All texts of the script."""
    reader = Reader()
    reader.visit(ast.parse(SCRIPT.read_text(encoding="utf-8")))
    return reader


def table(head: str, rows: Iterable[Row]) -> Iterator[str]:
    """A table in Markdown: what has the same remedy stands in one row."""
    by_hint: dict[str, list[str]] = {}
    for row in dict.fromkeys(rows):
        by_hint.setdefault(row.hint, []).append(f"`{row.text}`")
    return iter([head, "| --- | --- |", *(f"| {'<br>'.join(texts)} | {hint} |" for hint, texts in by_hint.items())])


def tables() -> str:
    """The part of README between the two marks."""
    reader = read_script()
    errors = [row for row in reader.errors if says_something(row.text) and says_something(row.hint)]
    lines = [
        BEGIN,
        *table("| message | what to do |", errors),
        "",
        "Problems of the configuration come all at once, each with its place, what was given, and what is accepted.",
        "",
        *table("| failures of objects | what to do |", (Row(code, hint) for code, hint in program.REMEDIES.items())),
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or put them in their place."""
    if sys.argv[1:] == ["--write"]:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        README.write_text(before + tables() + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
