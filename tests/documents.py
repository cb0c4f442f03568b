"""The documentation as the tests read it: its files, what stands under a heading, blocks of code and links."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By the path from the top of the project; a new file of docs/ is read as well.
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = DOCUMENTS["README.md"]
OPTIONS = DOCUMENTS["docs/options.md"]
OPERATIONS = DOCUMENTS["docs/operations.md"]
MESSAGES = DOCUMENTS["docs/messages.md"]
INTERNALS = DOCUMENTS["docs/internals.md"]
# A block of code, with the language that its fence names.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """All blocks of code in one language, of all files."""
    return [code for text in DOCUMENTS.values() for found, code in BLOCK.findall(text) if found == language]


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one. Raises ValueError if there is no such heading."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"no heading {heading}")
    return found[1]


def column(text: str, title: str) -> list[str]:
    """The first column of the table whose first title this is: what stands there in backticks."""
    rows = re.search(rf"^\| {re.escape(title)} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [row.split(" | ")[0] for row in rows[1].splitlines()] if rows else []
    return [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]


def anchors(text: str) -> set[str]:
    """The names by which links lead to the headings of a file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """The targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text))
