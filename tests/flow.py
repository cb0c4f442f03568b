"""Draw one object's way through the program into docs/flow.svg, which docs/internals.md shows.

python -m tests.flow
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "flow.svg"
STEP_WIDTH, STEP_HEIGHT, GAP, MARGIN, TITLE = 138, 58, 22, 16, 24
LANE_HEIGHT, LANE_GAP = TITLE + STEP_HEIGHT + MARGIN, 34


class Step(NamedTuple):
    """One thing that happens to an object."""

    name: str  # of the program's method that does it
    does: str
    touches: str  # what is asked or changed outside of this process


class Lane(NamedTuple):
    """Who does some of the steps, one after the other, and what it hands on."""

    who: str
    steps: Sequence[Step]
    hands_on: str = ""


LANES = (
    Lane(
        "feeder: one thread",
        (
            Step("list_pages", "sources, by pages", "S3: LIST"),
            Step("plan", "one Decision each", "checkpoint: read"),
        ),
        "Task, through a bounded queue",
    ),
    Lane(
        "workers: threads of one or more processes",
        (
            Step("look_at_source", "gone? ours?", "S3: HEAD"),
            Step("look_at_output", "whose is the place?", "S3: HEAD"),
            Step("mark_sent", "before it is sent", "checkpoint: in_flight"),
            Step("convert", "a slot, then paid", "API: POST"),
            Step("require_unchanged", "since the first look", "S3: HEAD"),
            Step("store", "looks, then puts", "S3: HEAD, PUT"),
            Step("tag_source", "if it is wanted", "S3: tags"),
        ),
        "Outcome",
    ),
    Lane(
        "main thread",
        (
            Step("record", "counts, or stops", "failures file"),
            Step("settle", "outcome is kept", "checkpoint: log"),
        ),
    ),
)
STYLE = (
    "text { font-family: sans-serif; font-size: 12px; fill: #222 } .who { font-weight: bold } "
    ".name { font-family: monospace; font-weight: bold } "
    ".touches { fill: #06c; font-size: 11px } .lane { fill: #f3f5f8 } .step { fill: #fff; stroke: #789 } "
    ".way { fill: none; stroke: #456; stroke-width: 1.5; marker-end: url(#tip) } svg { background: #fff }"
)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def left_of(number: int) -> float:
    """Where a step of a lane begins."""
    return 2 * MARGIN + number * (STEP_WIDTH + GAP)


def drawn_lane(lane: Lane, top: float) -> Iterator[str]:
    """A lane with its steps, and what goes to the next one."""
    y, begin = top + TITLE, left_of(0) + STEP_WIDTH / 2
    yield text(begin + 12, top + 17, lane.who, "who", "start")
    for number, step in enumerate(lane.steps):
        x = left_of(number)
        middle = x + STEP_WIDTH / 2
        yield f'<rect class="step" x="{x}" y="{y}" width="{STEP_WIDTH}" height="{STEP_HEIGHT}" rx="4"/>'
        yield text(middle, y + 17, step.name, "name")
        yield text(middle, y + 33, step.does)
        yield text(middle, y + 49, step.touches, "touches")
        if number:
            yield f'<path class="way" d="M{x - GAP},{y + STEP_HEIGHT / 2} H{x - 3}"/>'
    if lane.hands_on:
        start = left_of(len(lane.steps) - 1) + STEP_WIDTH / 2
        bend = top + LANE_HEIGHT + LANE_GAP / 2
        below = top + LANE_HEIGHT + LANE_GAP + TITLE - 3
        yield f'<path class="way" d="M{start},{y + STEP_HEIGHT} V{bend} H{begin} V{below}"/>'
        yield text(begin + 12, bend + 13, lane.hands_on, anchor="start")


def drawn() -> str:
    """The picture, as SVG."""
    width = left_of(max(len(lane.steps) for lane in LANES)) - GAP
    tops = [MARGIN + number * (LANE_HEIGHT + LANE_GAP) for number in range(len(LANES))]
    size = f'width="{width + 2 * MARGIN}" height="{tops[-1] + LANE_HEIGHT + MARGIN}"'
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>{STYLE}</style>",
        f'<defs>{tip}<path d="M0,0 L8,4 L0,8 z" fill="#456"/></marker></defs>',
        *(f'<rect class="lane" x="{MARGIN}" y="{top}" width="{width}" height="{LANE_HEIGHT}" rx="6"/>' for top in tops),
        *(line for lane, top in zip(LANES, tops, strict=True) for line in drawn_lane(lane, top)),
        "</svg>",
    ]
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Draw it."""
    PICTURE.write_text(drawn(), encoding="utf-8")


if __name__ == "__main__":
    main()
