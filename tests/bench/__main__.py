"""Measure the program and write what was found to RESULTS.md: `make bench`, or a part of it, `make bench ONLY=listing`.

    python -m tests.bench [--quick] [PART ...]

--quick (or QUICK=1) takes small numbers, for trying the bench; it prints its tables and leaves RESULTS.md as it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

from tests.bench.parts import FULL, PARTS, QUICK
from tests.bench.report import Part, as_markdown, draw, replace_section, target_table

HERE = Path(__file__).parent


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = [f"  {name:<12} {function.__doc__}" for name, function in PARTS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the program against stand-ins on this machine.",
        epilog="\n".join(["parts:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quick = os.environ.get("QUICK", "") not in {"", "0"}
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure; all of it if none is named")
    parser.add_argument("--quick", action="store_true", default=quick, help="small numbers, for trying the bench")
    return parser


def circumstances(name: str, seconds: float) -> str:
    """When, how and on what a part was measured."""
    day = datetime.now(timezone.utc).date().isoformat()
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"`make bench ONLY={name}`, {day}, Python {platform.python_version()}, {machine}, {seconds:.0f} s in all; load "
        f"at its end {load} (1, 5, 15 minutes)."
    )


def main() -> int:
    """Measure the parts that are asked for; 1 if one of them could not be measured."""
    arguments = build_parser().parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        sys.stderr.write(f"error: there is no part {', '.join(unknown)}\nhint: there are {', '.join(PARTS)}\n")
        return 2
    directory = Path(tempfile.mkdtemp(prefix="bench-results-")) if arguments.quick else HERE
    parts = [measured(name, directory, is_quick=arguments.quick) for name in arguments.parts or PARTS]
    targets = [target for part in parts if part for target in part.targets]
    if targets:
        print(target_table(targets), end="\n\n")
    print(f"written to {directory / 'RESULTS.md'}")
    return 0 if all(parts) else 1


def measured(name: str, directory: Path, *, is_quick: bool) -> Part | None:
    """Measure one part and write what was found; None if that could not be done, which does not end the others."""
    started = monotonic()
    try:
        part = PARTS[name](QUICK if is_quick else FULL)
    except (RuntimeError, subprocess.CalledProcessError) as problem:
        sys.stderr.write(f"error: {name}: {problem}\n")
        return None
    section = as_markdown(part, circumstances(name, monotonic() - started))
    print(section, end="\n\n", flush=True)
    replace_section(directory / "RESULTS.md", name, section)
    draw(part.plots, directory)
    return part


if __name__ == "__main__":
    raise SystemExit(main())
