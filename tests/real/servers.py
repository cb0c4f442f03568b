"""Run the end-to-end tests against each real S3 server that can be had, and all tests that need more than Python.

    python -m tests.real.servers [NAME ...]     swift, ceph, moto, ..., each of them `-tls`, external, `rest`

Without names: all but `external`, which is run too when S3_TEST_ENDPOINT is set. Over TLS, by a private CA, what moves
bytes or signs URLs is run; against s3rver, the main job alone. `rest` are the tests with the mark `real`. A server that
is not installed fails, and is said to be so. At the end there is a line for each. Exit code 1: something failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from time import monotonic
from typing import NamedTuple

from tests.standins.s3_server import PROJECT
from tests.standins.servers.kinds import KINDS

PYTEST = (sys.executable, "-m", "pytest", "-c", "tests/pytest.ini")
OVER_TLS = (
    *("parts/test_listing", "standins/test_s3_server", "runs/test_crash_matrix", "runs/test_from_outside"),
    *("runs/test_keys_from", "runs/test_large_objects", "runs/test_looking", "runs/test_main_job"),
    *("runs/test_outputs_as_stored", "runs/test_what_is_converted"),
)
MAIN_JOB = "tests/runs/test_main_job.py"
MAIN_JOB_ONLY = ("s3rver",)  # odd keys are refused, end it or become others: many of the other tests need them


class Plan(NamedTuple):
    """Tests, and what they are run against."""

    name: str
    kind: str
    arguments: tuple[str, ...]


def plans() -> list[Plan]:
    """What there is to run."""
    over_tls = ("--tls", *(f"tests/{name}.py" for name in OVER_TLS))
    whole = [name for name in KINDS if name not in {"external", *MAIN_JOB_ONLY}]
    return [
        *(Plan(name, name, ("--s3", name, "-n", "2", "tests")) for name in whole),
        *(Plan(name, name, ("--s3", name, MAIN_JOB)) for name in MAIN_JOB_ONLY),
        *(Plan(f"{name}-tls", name, ("--s3", name, "-n", "2", *over_tls)) for name in whole),
        Plan("external", "external", ("--s3", "external", "tests")),
        Plan("rest", "", ("-m", "real", "tests")),
    ]


def result_of(plan: Plan) -> tuple[bool, str]:
    """Run the tests of a plan; whether all passed, and the line that says so."""
    started = monotonic()
    if plan.kind and (missing := KINDS[plan.kind].missing()):
        return False, f"{plan.name:<14} FAILED: {missing}"
    said = []
    with subprocess.Popen([*PYTEST, *plan.arguments], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            said.append(line)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)\b", said[-1] if said else "")
    left_out = sum(line.startswith("left out: ") for line in said)
    told = [*counts, *([f"{left_out} left out, see above"] if left_out else [])]
    word = "passed" if run.returncode == 0 else "FAILED"
    version = KINDS[plan.kind].version() if plan.kind else ""
    return (
        run.returncode == 0,
        f"{plan.name:<14} {version:<24} {word}: {', '.join(told)} in {monotonic() - started:.0f} s",
    )


def main() -> int:
    """Run what is asked for; 1 if any of it failed."""
    possible = {plan.name: plan for plan in plans()}
    default = [name for name in possible if name != "external" or os.environ.get("S3_TEST_ENDPOINT")]
    results = [result_of(possible[name]) for name in sys.argv[1:] or default]
    print("", *(line for _, line in results), sep="\n")
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
