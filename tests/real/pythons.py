"""Run the tests on every supported Python that is on this machine, and once with the oldest packages that are admitted.

    python -m tests.real.pythons [NAME ...]      3.10, 3.11, ..., `oldest`, `bare`; all of them if none is named

`oldest` has the lowest versions that requirements.txt admits, on the oldest Python that is here. `bare` has these four
packages and nothing else: the tests of the main job run the script there. Each makes a virtual environment of its own
below the project, `.venv-NAME`. A Python is found on the PATH, or among pyenv's. Exit code 1: something failed, or none
was found.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
REQUIREMENTS, TOOLS = PROJECT / "requirements.txt", PROJECT / "tests" / "requirements.txt"
PYTEST = ("-m", "pytest", "-c", "tests/pytest.ini")


class Plan(NamedTuple):
    """One environment, and the tests that are run in it or with it."""

    name: str
    python: str
    packages: list[str]  # as pip takes them
    tests: list[str]


def python_of(version: str) -> str | None:
    """An interpreter of a version that does start; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    return next((path for path in found if path and starts(path)), None)


def starts(path: str) -> bool:
    """Whether an interpreter runs: one of pyenv's shims may be there for a version that is not."""
    return subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0


def oldest_packages() -> list[str]:
    """The lowest versions that requirements.txt admits."""
    return re.findall(r"^\S+>=\S+", REQUIREMENTS.read_text(), re.MULTILINE)


def plans() -> list[Plan]:
    """What there is to run."""
    pythons = {version: path for version in VERSIONS if (path := python_of(version))}
    if not pythons:
        return []
    oldest = [package.replace(">=", "==") for package in oldest_packages()]
    first = next(iter(pythons.values()))
    everything = ["-n", "2", "tests"]
    return [
        *(Plan(name, path, ["-r", str(REQUIREMENTS), "-r", str(TOOLS)], everything) for name, path in pythons.items()),
        Plan("oldest", first, [*oldest, "-r", str(TOOLS)], everything),
        Plan("bare", first, oldest, ["tests/runs/test_main_job.py"]),
    ]


def ready_environment(plan: Plan) -> Path:
    """The interpreter of a plan's virtual environment, made anew."""
    directory = PROJECT / f".venv-{plan.name}"
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([plan.python, "-m", "venv", str(directory)], check=True)
    interpreter = directory / "bin" / "python"
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *plan.packages], check=True, cwd=PROJECT)
    return interpreter


def passes(plan: Plan) -> bool:
    """Run the tests of a plan, and say what came of them."""
    started = monotonic()
    interpreter = ready_environment(plan)
    is_bare = plan.name == "bare"
    environment = {**os.environ, **({"S3_TEST_PYTHON": str(interpreter)} if is_bare else {})}
    runner = sys.executable if is_bare else str(interpreter)
    done = subprocess.run([runner, *PYTEST, *plan.tests], check=False, cwd=PROJECT, env=environment)
    version = subprocess.run([str(interpreter), "-V"], check=True, capture_output=True, text=True).stdout.strip()
    word = "passed" if done.returncode == 0 else "FAILED"
    print(f"{plan.name:<8} {version:<14} {word} in {monotonic() - started:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run what is asked for; 1 if any of it failed."""
    wanted = [plan for plan in plans() if plan.name in sys.argv[1:] or not sys.argv[1:]]
    missing = set(sys.argv[1:] or VERSIONS) - {plan.name for plan in wanted}
    for name in sorted(missing):
        print(f"{name:<8} is not on this machine", flush=True)
    results = [passes(plan) for plan in wanted]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
