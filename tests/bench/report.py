"""Tables and plots of the bench: Markdown for people, SVG beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.harness import PROJECT

Cell = str | float | int | None
HEADING = "## Measurements"


@dataclass(frozen=True)
class Line:
    """One line of a plot; a dashed one is what could be at best."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    is_ideal: bool = False


@dataclass(frozen=True)
class Plot:
    """One picture, `name`.svg."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = True
    log_y: bool = False


@dataclass(frozen=True)
class Target:
    """What a figure is to be, and what it is; `first`: what it is in the first edition, by the same run."""

    what: str
    measured: float
    most: float | None = None
    least: float | None = None
    first: float | None = None

    def row(self) -> list[Cell]:
        """Its row of TARGET_COLUMNS."""
        bound = f"≤ {shown(self.most)}" if self.most is not None else f"≥ {shown(self.least)}"
        is_met = (self.most is None or self.measured <= self.most) and (
            self.least is None or self.measured >= self.least
        )
        return [self.what, bound, self.measured, self.first, "yes" if is_met else "**no**"]


TARGET_COLUMNS = ("target", "is to be", "is", "first edition", "met")


@dataclass(frozen=True)
class Part:
    """What one part of the bench found."""

    title: str
    about: str  # what was measured, and how to read it
    tables: Sequence[str]
    plots: Sequence[Plot] = ()
    targets: Sequence[Target] = ()


def shown(cell: Cell) -> str:
    """A number with about three digits that count; a dash for what could not be measured."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *[[shown(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target_table(targets: Sequence[Target]) -> str:
    """A Markdown table of targets."""
    return table(TARGET_COLUMNS, [target.row() for target in targets])


def as_markdown(part: Part, when: str) -> str:
    """The section of a part; `when` says when and on what it was measured."""
    targets = [target_table(part.targets)] if part.targets else []
    pictures = [f"![{plot.title}]({plot.name}.svg)" for plot in part.plots]
    return "\n\n".join([f"### {part.title}", when, part.about, *targets, *part.tables, *pictures])


def replace_section(path: Path, name: str, section: str) -> None:
    """Put the section of a part into the file in place of its last one; all else in the file stays as it is."""
    begin, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if HEADING not in whole:
        whole = f"{whole.rstrip()}\n\n{HEADING}\n"
    block = f"{begin}\n{section}\n{end}"
    if begin in whole and end in whole:
        before, _, rest = whole.partition(begin)
        whole = before + block + rest.partition(end)[2]
    else:
        whole = f"{whole.rstrip()}\n\n{block}\n"
    path.write_text(whole, encoding="utf-8")


def draw(plots: Sequence[Plot], directory: Path) -> None:
    """Draw the pictures, in a process of their own: matplotlib would make every later measurement of memory larger."""
    if plots:
        wanted = json.dumps([asdict(plot) for plot in plots])
        command = [sys.executable, "-m", "tests.bench.plots", str(directory)]
        subprocess.run(command, input=wanted, text=True, cwd=PROJECT, check=True)
