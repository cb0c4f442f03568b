"""Draw what a terminal shows of `make demo` into tests/demo/demo.svg, which README shows.

    python -m tests.demo.recording

The demo runs for real in a pseudo-terminal; paths of this machine are replaced by what a reader has in their place.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

PROJECT = Path(__file__).resolve().parents[2]
PICTURE = PROJECT / "tests" / "demo" / "demo.svg"
COLUMNS, LINES = 118, 200
FIRST, LAST = "What would it come to?", "Was nothing sent again?"  # the part of the story that is drawn
MADE_BY_DEMO = re.compile(r"(/\S*)?/(tmp|var)/\S*demo-\w+")


def shown_by_terminal() -> list[str]:
    """The lines of a terminal after the demo. Raises RuntimeError if the demo says that something is not true."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm"}
    demo = subprocess.Popen(
        [sys.executable, "-m", "tests.demo"], cwd=PROJECT, env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    try:
        while piece := os.read(master, 65536):
            stream.feed(piece)
    except OSError:
        pass  # Linux says that nobody is left at the other end with an error
    if demo.wait():
        raise RuntimeError("\n".join(screen.display))
    return [line.rstrip() for line in screen.display]


def without_this_machine(text: str) -> str:
    """A text with the names that a reader's machine has."""
    text = text.replace(sys.executable, "python3").replace(f"{PROJECT}{os.sep}", "")
    return re.sub(r"ctf_sk_\w+", "ctf_sk_...", MADE_BY_DEMO.sub("/tmp/demo", text))


def draw(lines: list[str]) -> str:
    """The lines as SVG, in the reader's own fixed-width font."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in lines:
        console.print(Text(line), soft_wrap=False)
    svg = console.export_svg(title="make demo")
    # The fonts would be fetched from elsewhere each time that somebody looks.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    return "".join(f"{line.rstrip()}\n" for line in svg.splitlines())


def main() -> None:
    """Run the demo and draw it."""
    lines = without_this_machine("\n".join(shown_by_terminal())).split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith(FIRST))
    last = next(number for number, line in enumerate(lines) if line.startswith(LAST))
    PICTURE.write_text(draw(lines[first : last - 1]), encoding="utf-8")


if __name__ == "__main__":
    main()
