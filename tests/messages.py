"""What docs/messages.md says is made from the script: every error text with its hint, every code with its remedy.

    python -m tests.messages            print the tables
    python -m tests.messages --write    put them into docs/messages.md

The texts are read from the syntax tree, so that none can be forgotten; what only a run can fill in is an ellipsis.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import s3_bulk_convert as program

SCRIPT = Path(program.__file__).resolve()
DOCUMENT = SCRIPT.parent / "docs" / "messages.md"
BEGIN, END = "<!-- messages: made by `python -m tests.messages --write` -->", "<!-- end of messages -->"
FILLED_IN = "…"
WITH_HINT = {"RunError", "usage_error", "CheckWarning"}  # called with (message, hint, ...)


class Row(NamedTuple):
    """One message and what to do about it."""

    text: str
    hint: str


class Text(NamedTuple):
    """What an expression may say, where the script's conditions are as `when` has them."""

    text: str
    when: Mapping[str, bool] = {}

    def joined(self, other: Text) -> Text | None:
        """This text with another one behind it; None where they cannot both be said."""
        if any(self.when.get(test, holds) is not holds for test, holds in other.when.items()):
            return None
        return Text(re.sub(f"{FILLED_IN}+", FILLED_IN, self.text + other.text), {**self.when, **other.when})


Names = dict[str, list[Text]]  # what names stand for, at some place in the script
UNKNOWN = [Text(FILLED_IN)]


def texts_of(node: ast.expr | None, names: Names) -> list[Text]:
    """All that an expression may say; an ellipsis for what only a run can fill in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [Text(node.value)]
    if isinstance(node, ast.JoinedStr):
        return joined(texts_of(part, names) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return joined([texts_of(node.left, names), texts_of(node.right, names)])
    if isinstance(node, ast.IfExp):
        return either(ast.unparse(node.test), texts_of(node.body, names), texts_of(node.orelse, names))
    if isinstance(node, ast.Call):
        return texts_of_call(node, names)
    value = node.value if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) else node
    return texts_of_name(value.id, names) if isinstance(value, ast.Name) else UNKNOWN


def joined(parts: Iterable[list[Text]]) -> list[Text]:
    """One text behind the other, in each way that the conditions allow."""
    texts = [Text("")]
    for part in parts:
        texts = [both for first, second in itertools.product(texts, part) if (both := first.joined(second))]
    return texts


def either(test: str, yes: list[Text], no: list[Text]) -> list[Text]:
    """What is said if a condition holds, and what if it does not."""
    cases = ((True, yes), (False, no))
    return [both for holds, texts in cases for text in texts if (both := Text("", {test: holds}).joined(text))]


def texts_of_call(call: ast.Call, names: Names) -> list[Text]:
    """What a call hands on: a text that it takes something away from, or that it looks up."""
    called = ast.unparse(call.func)
    if called in {"redact", "hide"}:
        return texts_of(call.args[0], names)
    if called == "hint_for":
        return [Text("what to do about such a failure: see below")]
    if called == "S3_HINTS.get":
        return texts_of(call.args[1], names)
    if isinstance(call.func, ast.Attribute) and call.func.attr == "rstrip":
        return texts_of(call.func.value, names)
    return UNKNOWN


def texts_of_name(name: str, names: Names) -> list[Text]:
    """A number that has a name in the script, or a text that is put into another one."""
    value = getattr(program, name, None)
    if isinstance(value, int):
        return [Text(f"{value:,}")]
    return names.get(name, UNKNOWN)


class Reader(ast.NodeVisitor):
    """Collects the texts of the script, in its order."""

    def __init__(self) -> None:
        self.errors: list[Row] = []
        self.problems: list[str] = []  # of the configuration
        self._names: Names = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function's names are its own; what _bad_line is called with is taken where it is called."""
        if node.name == "_bad_line":
            return
        outer = self._names
        given = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
        self._names = {name: texts for name, texts in outer.items() if name not in given}
        self.generic_visit(node)
        self._names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember what names stand for from here on."""
        self.generic_visit(node)
        pairs: list[tuple[ast.expr, ast.expr | None]] = []
        for target in node.targets:
            if isinstance(target, ast.Tuple):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [None] * len(target.elts)
                pairs += zip(target.elts, values, strict=False)
            else:
                pairs.append((target, node.value))
        found = {target.id: texts_of(value, self._names) for target, value in pairs if isinstance(target, ast.Name)}
        self._names.update(found)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """A text goes on."""
        self.generic_visit(node)
        name = ast.unparse(node.target)
        if name in self._names:
            self._names[name] = joined([self._names[name], texts_of(node.value, self._names)])

    def visit_If(self, node: ast.If) -> None:
        """What a branch that goes on has changed holds under its condition; what one that leaves has, does not."""
        self.visit(node.test)
        before, ends = self._names, list[Names]()
        for branch in (node.body, node.orelse):
            self._names = dict(before)
            for statement in branch:
                self.visit(statement)
            leaves = branch and isinstance(branch[-1], ast.Raise | ast.Return | ast.Continue)
            ends.append({} if leaves else self._names)
        yes, no = ends[0] or ends[1] or before, ends[1] or ends[0] or before
        test = ast.unparse(node.test)
        self._names = {
            name: yes[name]
            if yes.get(name) is no.get(name)
            else either(test, yes.get(name, UNKNOWN), no.get(name, UNKNOWN))
            for name in {**yes, **no}
        }

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """What is wrong with a page of a listing is no problem of the configuration."""
        known = len(self.problems)
        self.generic_visit(node)
        if node.name == "Page":
            del self.problems[known:]

    def visit_Return(self, node: ast.Return) -> None:
        """The API key comes with the problem that it has."""
        self.generic_visit(node)
        last = node.value.elts[-1] if isinstance(node.value, ast.Tuple) else None
        self.problems += [problem.text for problem in texts_of(last, self._names) if problem.text.startswith("[api]")]

    def visit_Call(self, node: ast.Call) -> None:
        """Take the texts of what is raised, or added to the problems."""
        self.generic_visit(node)
        called = ast.unparse(node.func)
        texts = [texts_of(argument, self._names) for argument in node.args]
        if called in WITH_HINT and len(texts) > 1:
            pairs = itertools.product(texts[0], texts[1])
            self.errors += [Row(text.text, hint.text) for text, hint in pairs if text.joined(hint)]
        elif called == "self._bad_line":
            self.errors += [Row(f"{FILLED_IN}: line {FILLED_IN} {what.text}", program.KEYS_HINT) for what in texts[1]]
        elif called in {"ValueError", "self.problems.append", "problems.append", "problems.insert"}:
            self.problems += [problem.text for problem in texts[-1]]


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
    """The part of docs/messages.md between the two marks."""
    reader = read_script()
    errors = [row for row in reader.errors if says_something(row.text) and says_something(row.hint)]
    errors += [Row(f"S3 refused {FILLED_IN}: {code} {FILLED_IN}", hint) for code, hint in program.S3_HINTS.items()]
    lines = [
        BEGIN,
        *table("| message | what to do |", errors),
        "",
        "Problems of the configuration come all at once, each with its place, what was given, and what is accepted.",
        "",
        *table("| failures of objects | what to do |", (Row(code, hint) for code, hint in program.HINTS.items())),
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or put them in their place."""
    if sys.argv[1:] == ["--write"]:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        DOCUMENT.write_text(before + tables() + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
