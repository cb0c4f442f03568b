"""How the bench runs things: the stand-ins, the real script and the baselines, each in a process of its own.

What a process took is what the kernel says at its end (`os.wait4`): CPU time with that of its children, and the peak
of its memory. Linux starts counting a child's peak at what its parent has at that moment, so this process has to stay
small: it imports neither the program nor boto3 nor matplotlib.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "s3_bulk_convert.py"
# What the program is compared with: its first edition as it was last.
FIRST_EDITION = "bc754cffb8a4a784a177275ae68dcc20e9817a1f"
BUCKET = "bench"
MOST_SECONDS = 3600
SAMPLE_SECONDS = 0.5  # looking at all processes of the machine takes some milliseconds
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
USAGE_ERROR = 2


@dataclass
class Cost:
    """What a process took, its children included. `family_mb`: the largest sum of their memory that was seen."""

    exit_code: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    family_mb: float
    out: str
    err: str
    summary: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)  # of the stand-ins, for this run


class Standins:
    """The running stand-ins."""

    def __init__(self, url: str) -> None:
        self.url = url

    def counts(self, *, reset: bool = False) -> dict[str, Any]:
        """What they have counted since the last reset."""
        request = urllib.request.Request(f"{self.url}/counts", method="POST" if reset else "GET")
        with urllib.request.urlopen(request) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def let_a_day_pass(self) -> None:
        """Have the API forget what it has done under which key."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/day", method="POST")).close()


@contextmanager
def standins(**options: float | str) -> Iterator[Standins]:
    """Start the stand-ins with some of their options, of which True stands for a flag; they end with the block."""
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    flags = [part for name, value in named.items() for part in (name, *[str(value)][: value is not True])]
    command = [sys.executable, "-m", "tests.bench.standins", *flags]
    process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("READY "):
            raise RuntimeError("the stand-ins did not start")
        yield Standins(line.split()[1])
    finally:
        process.terminate()
        process.communicate()


def environment(servers: Standins, home: Path) -> dict[str, str]:
    """What a child needs so that it finds the stand-ins, and nothing that the person who measures has set."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(PROJECT),
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL_S3": servers.url,
        "CTF_API_KEY": "ctf_sk_bench",
        "TMPDIR": str(home),
    }


########################################################################
# What a process takes
########################################################################


def resident_bytes(pid: int) -> int:
    """The memory of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def family_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of a process, in parentheses, may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


class Watch(threading.Thread):
    """Looks at a running process: how much memory its family has, and whether it has run for too long."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        with_children: bool,
        is_enough: Callable[[], bool],
        ends_by: signal.Signals,
    ) -> None:
        super().__init__(daemon=True)
        self._process, self._with_children = process, with_children
        self._is_enough, self._ends_by = is_enough, ends_by
        self.has_ended = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        """Look until it has ended."""
        started = monotonic()
        while not self.has_ended.wait(SAMPLE_SECONDS):
            if self._with_children:
                self.peak_bytes = max(self.peak_bytes, sum(map(resident_bytes, family_of(self._process.pid))))
            if self._is_enough():
                self._process.send_signal(self._ends_by)
                self._is_enough = lambda: False
            if monotonic() - started > MOST_SECONDS:
                self._process.kill()


def measure(
    command: Sequence[str],
    env: dict[str, str],
    workdir: Path,
    *,
    with_children: bool = False,
    is_enough: Callable[[], bool] = lambda: False,
    ends_by: signal.Signals = signal.SIGINT,
) -> Cost:
    """Run a command to its end, or until `is_enough` and the end that a signal brings about."""
    with (workdir / "out").open("wb") as out, (workdir / "err").open("wb") as err:
        started = monotonic()
        process = subprocess.Popen(command, cwd=workdir, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        watch = Watch(process, with_children=with_children, is_enough=is_enough, ends_by=ends_by)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watch.has_ended.set()
            watch.join()
            process.kill()  # only if the wait was interrupted: one that has ended is left alone
    peak = usage.ru_maxrss * PEAK_UNIT
    return Cost(
        process.returncode,
        seconds,
        usage.ru_utime + usage.ru_stime,
        peak / 1e6,
        max(peak, watch.peak_bytes) / 1e6,
        (workdir / "out").read_text(errors="replace"),
        (workdir / "err").read_text(errors="replace"),
    )


@contextmanager
def directory() -> Iterator[Path]:
    """A directory for one run, below TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="s3-bulk-convert-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@lru_cache(maxsize=1)
def first_edition() -> Path:
    """The script of the first edition, from git's history: below TMPDIR, until the bench ends."""
    kept = tempfile.TemporaryDirectory(prefix="s3-bulk-convert-first-")
    atexit.register(kept.cleanup)
    told = subprocess.run(
        ["git", "show", f"{FIRST_EDITION}:{SCRIPT.name}"], cwd=PROJECT, capture_output=True, check=False
    )
    if told.returncode:
        raise RuntimeError(f"the first edition is in git's history, which is not here: {told.stderr.decode().strip()}")
    path = Path(kept.name) / SCRIPT.name
    path.write_bytes(told.stdout)
    return path


def run_program(
    servers: Standins,
    *arguments: str,
    script: Path = SCRIPT,
    checkpoint: Path | None = None,
    **watched: Any,
) -> Cost:
    """The real script, or another edition of it, over the whole synthetic bucket, in an empty directory."""
    with directory() as workdir:
        flags = ["--bucket", BUCKET, "--target", "jpg", "--quiet"]
        options = {"api.url": servers.url, "run.summary": "summary.json"}
        if checkpoint:
            options["run.checkpoint"] = str(checkpoint)
        for name, value in options.items():
            flags += ["--set", f"{name}={value}"]
        servers.counts(reset=True)
        command = [sys.executable, str(script), *flags, *arguments]
        env = environment(servers, workdir)
        cost = measure(command, env, workdir, **watched)
        summary = workdir / "summary.json"
        cost.summary = json.loads(summary.read_text()) if summary.exists() else {}
    cost.counts = servers.counts()
    return cost


def run_command(servers: Standins, *command: str, **watched: Any) -> Cost:
    """A peer, whatever comes of it."""
    with directory() as workdir:
        servers.counts(reset=True)
        cost = measure(command, environment(servers, workdir), workdir, **watched)
    cost.counts = servers.counts()
    cost.summary = json.loads(cost.out) if cost.out.startswith("{") else {}
    return cost


def run_recipe(servers: Standins, *arguments: str) -> Cost:
    """One of the baselines of recipe.py. Raises RuntimeError with its own words if it fails."""
    cost = run_command(servers, sys.executable, "-m", "tests.bench.recipe", *arguments)
    if cost.exit_code:
        raise RuntimeError(f"the recipe failed: {cost.err[-2000:]}")
    return cost


def installed(program: str) -> str | None:
    """Where a program of others is, beside this Python or anywhere; None if it is not installed."""
    return shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def version_of(program: str) -> str:
    """The program and its version, as it says it itself; empty if it is not installed."""
    path = installed(program)
    if not path:
        return ""
    told = subprocess.run([path, "version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return f"{program} {told.removeprefix(program).strip()}"


@contextmanager
def finished_checkpoint(
    servers: Standins, count: int, folders: int, size: int, script: Path = SCRIPT
) -> Iterator[Path]:
    """A checkpoint of an edition that knows every object of the stand-ins' bucket as converted."""
    with directory() as workdir:
        path = workdir / "checkpoint.sqlite3"
        cost = run_program(servers, "--limit", "1", script=script, checkpoint=path)
        if cost.summary.get("converted") != 1:
            raise RuntimeError(f"nothing was converted, exit {cost.exit_code}: {cost.err[-2000:]}")
        numbers = [str(number) for number in (count, folders, size)]
        command = [sys.executable, "-m", "tests.bench.checkpoint", str(path), *numbers]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "HOME": str(workdir), "TMPDIR": str(workdir)}
        subprocess.run(command, cwd=workdir, env=env, check=True)
        yield path
