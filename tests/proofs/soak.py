"""Let the real script work for an hour under every kind of trouble: it keeps its promises and does not grow.

    python -m tests.proofs.soak [--minutes N] [--rate N] [--seed N]

On one bucket, at the same time:

- objects are added, overwritten and deleted, and the script runs again and again, with one process or two, by URL or
  by upload in turn; most runs are killed or told to end at a random moment, or lose a worker process (Assault);
- two runs are never ended, one by URL with one process, one by upload with two: they are fed keys through stdin, and
  are weighed every few seconds: memory, open files, threads, write-ahead log, rows of `in_flight` (LongRun);
- the API refuses, breaks, hangs and answers in odd ways, none of which may cost anything (Weather); S3 stands still.

Every minute all is brought to an end and compared: each version is paid at most once, and each object's newest one
exactly once; what is stored is, byte for byte, what it must come to; after a minute by upload, a killed run's
checkpoint is thrown away as well. A line a minute, and a table at the end. Exit code 1: a promise is broken, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from tests.runs.test_processes import worker_pids
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.converters import marking
from tests.standins.program import Run, TestBucket, launch
from tests.standins.promises import PNG, converted
from tests.standins.s3_server import S3Server

WORKERS = 6
MOST_LIVING = 400  # objects at a time: with more of them deleted than added, the comparison stays short
SHARE_OF_ASSAULT = 0.5  # of the rate; the two long runs share the rest
PHASE_SECONDS = 60
BEAT_SECONDS = 3.0  # between two batches of changes, of keys for a long run, and two weighings
LONGEST_RUN_SECONDS = 6.0
PATIENCE_SECONDS = 900  # for one object or one run; seconds are enough where the machine has any to spare
PAGE_KEYS = 1000  # a long run takes so many lines at once
CHECKPOINT = "s3_bulk_convert.sqlite3"
OPTIONS = (
    *("--workers", str(WORKERS), "-q"),
    *("--set", "api.timeout=4s", "--set", "api.retries=12"),  # less than a request may hang, again and again
    *("--set", "api.requests_per_minute=900"),  # a run must take long enough to be killed, and leave others the CPU
    *("--set", "run.max_failure_rate=never"),  # objects are deleted under its hands
)
# Where an object was deleted or overwritten after it was listed.
BLAMELESS = {"source_gone", "source_changed", "fetch_failed"}
MEGABYTE = 1 << 20


########################################################################
# The API's troubles
########################################################################

# Each may come after the work, and is answered by the same request again: none of them can cost a second conversion.
TROUBLES: dict[str, Callable[[], Fault]] = {
    "429, Retry-After": lambda: Fault.status_reply(429, "rate_limited", retry_after="1"),
    "429": lambda: Fault.status_reply(429, "rate_limited"),
    "502": lambda: Fault.status_reply(502),
    "503": lambda: Fault.status_reply(503, "service_unavailable", retry_after="0"),
    "504": Fault.work_lost,
    "HTML in 200": Fault.html_page,
    "HTML in 502": lambda: Fault.html_page(502),
    "JSON in 200": Fault.json_in_200,
    "cut before the work": Fault.cut_before_work,
    "cut after the work": Fault.cut_after_work,
    "half an answer": Fault.truncated_answer,
    "half an answer, chunked": lambda: Fault.truncated_answer(chunked=True),
    "empty answer": Fault.empty_answer,
    "job": Fault.accepted_as_job,
    "link to the file": Fault.json_envelope,
}
# They end with a pulse that comes every few seconds: some sooner than the client's patience, some later.
DELAYS: dict[str, Callable[[threading.Event], Fault]] = {"hang": Fault.hang_until, "stall": Fault.stalled_answer}
LIMITS = ("429, Retry-After", "429")
SHARE_OF_TROUBLED = 0.25
SECONDS_BETWEEN_LIMITS = 20  # each slows the pace by a tenth, which takes a minute to recover by half


class Weather:
    """What goes wrong with a request: up to three troubles for each idempotency key, each once, fixed when it is new.

    So no object meets more of them than it has retries, nor two 504s, after which it would become a job under another
    key and might be paid twice.
    """

    def __init__(self, api: ConversionApi, luck: random.Random) -> None:
        self._luck, self._lock = luck, threading.Lock()
        self._coming: dict[tuple[str, str | None], list[str]] = {}
        self._last_limit = 0.0
        self.pulse = threading.Event()
        self._faults = {
            **{name: make() for name, make in TROUBLES.items()},
            **{name: make(self.pulse) for name, make in DELAYS.items()},
        }
        for name, fault in self._faults.items():
            fault.times = None
            api.faults.add(fault.at(partial(self._strikes, name)))
        polls = itertools.count(1)
        hiccup = Fault.status_reply(502, times=None)
        self._faults["502 to a poll"] = api.faults.add(
            hiccup.at(lambda request: request.path.startswith("/v1/jobs/") and next(polls) % 8 == 0)
        )

    def _strikes(self, name: str, request: Request) -> bool:
        if not request.is_conversion:
            return False
        with self._lock:
            identity = (request.path, request.idempotency_key)
            coming = self._coming.get(identity)
            if coming is None:
                coming = self._coming[identity] = self._drawn()
            if coming[:1] != [name]:
                return False
            coming.pop(0)
            return True

    def _drawn(self) -> list[str]:
        if self._luck.random() > SHARE_OF_TROUBLED:
            return []
        drawn = self._luck.sample(sorted({*TROUBLES, *DELAYS}), self._luck.randint(1, 3))
        if not set(drawn).isdisjoint(LIMITS):
            if time.monotonic() - self._last_limit < SECONDS_BETWEEN_LIMITS:
                return [name for name in drawn if name not in LIMITS]
            self._last_limit = time.monotonic()
        return drawn

    def struck(self) -> dict[str, int]:
        """How often each trouble has come."""
        return {name: fault.struck for name, fault in self._faults.items()}


########################################################################
# The objects
########################################################################


def source_of(key: str, version: int) -> bytes:
    """The bytes of one version of an object; no two are the same."""
    return PNG + f"{key} version {version} ".encode() * 50


def digest_of(key: str, version: int) -> str:
    """By which the API knows what it was paid for."""
    return hashlib.sha256(source_of(key, version)).hexdigest()


def output_key(key: str) -> str:
    """Where the output of an object goes."""
    return f"converted/{key.removesuffix('.png')}.jpg"


class Objects:
    """What is put into the bucket, and what it must come to. Safe to use from several threads."""

    def __init__(self, bucket: TestBucket) -> None:
        self.bucket = bucket
        self.known: dict[str, tuple[str, int]] = {}  # digest -> key, version
        self._numbers = itertools.count(1)

    def put(self, key: str) -> int:
        """Put a new version of an object; its number."""
        version = next(self._numbers)
        # Before it can be paid for.
        self.known[digest_of(key, version)] = (key, version)
        self.bucket.put(key, source_of(key, version))
        return version

    def stored(self, key: str) -> bytes | None:
        """The output of an object; None if there is none."""
        try:
            reply = self.bucket.client.get_object(Bucket=self.bucket.name, Key=output_key(key))
        except self.bucket.client.exceptions.NoSuchKey:
            return None
        return reply["Body"].read()

    def is_converted(self, key: str, version: int) -> bool:
        """Whether the output is that of a version."""
        return self.stored(key) == converted(source_of(key, version))

    def is_right_for_some_version(self, key: str, body: bytes) -> bool:
        """Whether an output is that of any version there ever was."""
        said = re.search(rb"converted:jpg:([0-9a-f]{64})", body)
        named, version = self.known.get(said[1].decode(), ("", 0)) if said else ("", 0)
        return named == key and body == converted(source_of(key, version))

    def delete(self, *keys: str) -> None:
        """Delete objects of the bucket."""
        for key in keys:
            self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)


########################################################################
# What is weighed
########################################################################


@dataclass(frozen=True)
class Weight:
    """What a run and its worker processes take at a moment."""

    rss_mb: float
    peak_mb: float
    files: int
    threads: int
    wal_mb: float
    in_flight: int


def weigh(run: Run) -> Weight | None:
    """Weigh a run; None when it is ending."""
    wal = run.workdir / f"{CHECKPOINT}-wal"
    try:
        pids = [run.process.pid, *worker_pids(run)]
        told = [dict(re.findall(r"(\w+):\s+(\d+)", Path(f"/proc/{pid}/status").read_text())) for pid in pids]
        return Weight(
            rss_mb=sum(int(of["VmRSS"]) for of in told) / 1024,
            peak_mb=sum(int(of["VmHWM"]) for of in told) / 1024,
            files=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
            threads=sum(int(of["Threads"]) for of in told),
            wal_mb=wal.stat().st_size / MEGABYTE,
            in_flight=len(in_flight_keys(run.workdir)),
        )
    except (OSError, KeyError, sqlite3.OperationalError):
        return None


def in_flight_keys(workdir: Path) -> list[str]:
    """The keys of the requests that the checkpoint knows as unsettled."""
    with closing(sqlite3.connect(f"file:{workdir / CHECKPOINT}?mode=rw", uri=True, timeout=30)) as db:
        return [key for (key,) in db.execute("SELECT key FROM in_flight")]


# What may be more in the last quarter than in the first. A long run remembers 50,000 keys, because a file may name one
# twice: some 200 bytes each. Rows and files come and go. The log is written back to the database when it has 4 MB,
# which a short soak does not reach: of that, what is too much is said below.
ALLOWED = {"rss_mb": 3.0, "peak_mb": 3.0, "files": 4, "threads": 2, "in_flight": WORKERS}
MEGABYTES_A_KEY = 200 / MEGABYTE
WARM_UP = 30  # weighings, in which connections are made
LEAST_TO_COMPARE = 16  # weighings after that
ALLOWED_PEAK_MB = 8.0  # of a short run, which looks into a larger checkpoint each time
MOST_WAL_MB = 5.0
MOST_IN_FLIGHT = 5 * WORKERS  # one for each worker, and those whose outcomes wait for the disk


def first_and_last(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first and the last quarter of some figures."""
    part = max(1, len(values) // 4)
    return values[:part], values[-part:]


def quarters(weights: Sequence[Weight], name: str) -> tuple[float, float, float]:
    """The median of a figure in the first and in the last quarter after the warm-up, and the most it ever was."""
    warm = weights[WARM_UP:] if len(weights) >= WARM_UP + LEAST_TO_COMPARE else weights
    first, last = first_and_last([float(getattr(weight, name)) for weight in warm])
    return statistics.median(first), statistics.median(last), max(float(getattr(weight, name)) for weight in weights)


def growth(weights: Sequence[Weight], keys: int) -> Iterator[str]:
    """What has grown or was too much, a sentence each. `keys`: how many the run was given."""
    if not weights:
        return
    for name in ALLOWED if len(weights) >= WARM_UP + LEAST_TO_COMPARE else ():
        first, last, _ = quarters(weights, name)
        allowed = ALLOWED[name] + (keys * MEGABYTES_A_KEY if name in {"rss_mb", "peak_mb"} else 0)
        if last > first + allowed:
            yield f"{name} grew from {first:.1f} to {last:.1f}, by more than {allowed:.1f}"
    if (most := quarters(weights, "wal_mb")[2]) > MOST_WAL_MB:
        yield f"the write-ahead log had {most:.1f} MB"
    if (most := quarters(weights, "in_flight")[2]) > MOST_IN_FLIGHT:
        yield f"in_flight had {most:.0f} rows"


########################################################################
# Runs that last
########################################################################


class LongRun:
    """One run that is never ended: it gets keys through its stdin as long as the soak lasts."""

    def __init__(self, name: str, run: Run, objects: Objects, rate: float) -> None:
        self.name, self.run, self.objects, self.rate = name, run, objects, rate
        self.weights: list[Weight] = []
        self.fed = self.checked = 0
        self._waiting: deque[tuple[float, dict[str, int]]] = deque()

    def watch(self, over: threading.Event) -> None:
        """Weigh it every few seconds."""
        while not over.wait(BEAT_SECONDS):
            if weight := weigh(self.run):
                self.weights.append(weight)

    def live(self, over: threading.Event) -> None:
        """Feed it, and compare what comes out; at the end, compare what it says of itself."""
        while not over.wait(BEAT_SECONDS):
            assert self.run.process.poll() is None, f"{self.name} has ended: {self.run.wait().err}"
            self._feed()
            while self._waiting and self._is_checked(*self._waiting[0]):
                self._waiting.popleft()
        self._end()

    def _feed(self) -> None:
        names = [f"{self.name}/{self.fed + number:07}.png" for number in range(max(1, round(self.rate * BEAT_SECONDS)))]
        batch = {key: self.objects.put(key) for key in names}
        # It converts nothing before its page is full; a key that is named again is no other object.
        lines = [*names, *[names[-1]] * (PAGE_KEYS - len(names))]
        assert self.run.process.stdin
        self.run.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.run.process.stdin.flush()
        self.fed += len(names)
        self._waiting.append((time.monotonic(), batch))

    def _is_checked(self, since: float, batch: dict[str, int]) -> bool:
        """Compare what has come of a batch, and take it away; false while some of it is still to come."""
        for key, version in list(batch.items()):
            body = self.objects.stored(key)
            if body is None:
                assert time.monotonic() - since < PATIENCE_SECONDS, f"{self.name}: {key} is lost"
                return False
            assert body == converted(source_of(key, version)), f"{self.name}: the output of {key} is wrong"
            self.objects.delete(key, output_key(key))
            del batch[key]
            self.checked += 1
        return True

    def _end(self) -> None:
        ended = self.run.wait(PATIENCE_SECONDS)
        assert ended.exit_code == 0, f"{self.name}: exit {ended.exit_code}: {ended.err}{ended.out}"
        said = {name: ended.summary[name] for name in ("converted", "left", "failed", "possible_double_charges")}
        wanted = {"converted": self.fed, "left": 0, "failed": {}, "possible_double_charges": 0}
        assert said == wanted, f"{self.name}: {said}, not {wanted}"
        assert in_flight_keys(self.run.workdir) == [], f"{self.name}: requests are unsettled"
        assert all(self._is_checked(0, batch) for _, batch in self._waiting)
        grown = list(growth(self.weights, self.fed))
        assert not grown, f"{self.name}: {'; '.join(grown)}"


########################################################################
# Runs that are ended
########################################################################


@dataclass
class Assault:
    """Objects that come, change and go while one run after the other is at work on them and is killed."""

    objects: Objects
    start: Callable[..., Run]
    luck: random.Random
    rate: float
    living: dict[str, int] = field(default_factory=dict)  # key -> version
    gone: list[str] = field(default_factory=list)  # keys that may come again: no request for them is on its way
    just_gone: list[str] = field(default_factory=list)  # those that may do so a minute later
    figures: Counter[str] = field(default_factory=Counter)
    # Of memory, of each run that was weighed, by the number of its processes.
    peaks: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    transfer: str = "upload"
    lock: threading.Lock = field(default_factory=threading.Lock)  # whoever has it, changes the bucket or compares

    # -- changes ---------------------------------------------------------------------------------------------------

    def change_things(self, over: threading.Event) -> None:
        """Add, overwrite and delete, until it is over."""
        while not over.wait(BEAT_SECONDS / 3):
            with self.lock:
                for _ in range(max(1, round(self.rate * BEAT_SECONDS / 3))):
                    self._change()

    def _change(self) -> None:
        kind = self.luck.choices(("add", "overwrite", "delete"), (5, 3, 4 if len(self.living) < MOST_LIVING else 8))[0]
        if kind == "add" or not self.living:
            self._add()
            return
        key = self.luck.choice(sorted(self.living))
        if kind == "delete":
            self.objects.delete(key)
            del self.living[key]
        # A presigned URL that is on its way would fetch the new version and pay for it under the old one's key.
        elif self.transfer == "upload" or self.objects.is_converted(key, self.living[key]):
            self.living[key] = self.objects.put(key)
        self.figures[kind] += 1

    def _add(self) -> None:
        comes_again = self.gone and self.luck.random() < 0.2
        self.figures["come again" if comes_again else "add"] += 1
        key = self.gone.pop() if comes_again else f"short/{self.figures['add']:06}.png"
        self.living[key] = self.objects.put(key)

    # -- runs ------------------------------------------------------------------------------------------------------

    def run_until(self, moment: float) -> None:
        """Start run after run, and end each in some way."""
        while time.monotonic() < moment:
            kind = self.luck.choice(("SIGKILL", "SIGKILL", "SIGTERM", "a worker", "nothing"))
            processes = 2 if kind == "a worker" else self.luck.choice((1, 2))
            run = self._started(processes)
            if weight := self._end(run, kind):
                self.peaks[processes].append(weight.peak_mb)
            self._judge(run)

    def _started(self, processes: int) -> Run:
        self.figures["runs"] += 1
        transfer = ("--set", f"api.transfer={self.transfer}")
        return self.start("--prefix", "short/", "--set", f"run.processes={processes}", *transfer, *OPTIONS)

    def _end(self, run: Run, kind: str) -> Weight | None:
        """End a run at a random moment; what it weighed last."""
        weight = self._weighed(run, self.luck.uniform(0.3, LONGEST_RUN_SECONDS))
        if run.process.poll() is None and kind != "nothing":
            # It may be ending just now.
            with suppress(OSError, IndexError):
                victim = worker_pids(run)[0] if kind == "a worker" else run.process.pid
                os.kill(victim, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
                self.figures[kind] += 1
        run.wait(PATIENCE_SECONDS)
        return weight

    @staticmethod
    def _weighed(run: Run, seconds: float) -> Weight | None:
        """Wait for so long, or for the run's end; what it weighed last."""
        until, weight = time.monotonic() + seconds, None
        while (left := until - time.monotonic()) > 0:
            try:
                run.process.wait(min(left, 1))
                break
            except subprocess.TimeoutExpired:
                weight = weigh(run) or weight
        return weight

    @staticmethod
    def _judge(run: Run) -> None:
        """A run that could say how it ended has said nothing that is not so."""
        # SIGTERM itself ends a program that has not come far enough to hear it.
        if run.exit_code in {-signal.SIGKILL, -signal.SIGTERM}:
            return
        assert run.exit_code in {0, 1, 128 + signal.SIGTERM}, f"exit {run.exit_code}: {run.err}{run.out}"
        assert "Traceback" not in run.err, run.err
        failed = set(run.summary.get("failed", ()))  # there is no summary before the first run has come so far
        assert failed <= BLAMELESS, f"objects failed with {failed}: {run.failures[-3:]}"
        assert not run.summary.get("possible_double_charges"), run.summary

    def judge_peaks(self) -> None:
        """A run takes no more memory because there were many before it."""
        for processes, peaks in self.peaks.items():
            first, last = first_and_last(peaks)
            if len(peaks) >= LEAST_TO_COMPARE:
                said = f"short runs with {processes} processes took {max(first):.0f} MB, then {max(last):.0f}"
                assert max(last) <= max(first) + ALLOWED_PEAK_MB, said

    # -- comparisons -----------------------------------------------------------------------------------------------

    def settle(self) -> set[str]:
        """Bring all to an end, compare, and go on the other way. The digests of what was living then."""
        with self.lock:
            self._finish()
            if self.transfer == "upload":
                self._lose_checkpoint()
            self._compare()
            self.transfer = "url" if self.transfer == "upload" else "upload"
            return {digest_of(*item) for item in self.living.items()}

    def _finish(self) -> None:
        run = self._started(1).wait(PATIENCE_SECONDS)
        self._judge(run)
        assert (run.exit_code, run.summary["left"]) == (0, 0), run.err + run.out
        unsettled = self.living.keys() & set(in_flight_keys(run.workdir))
        assert not unsettled, f"unsettled after a whole run: {unsettled}"

    def _lose_checkpoint(self) -> None:
        """Kill a run that has something new to do, and throw its checkpoint away."""
        for _ in range(round(5 * self.rate)):
            self._add()
        run = self._started(self.luck.choice((1, 2)))
        self._end(run, "SIGKILL")
        for path in run.workdir.glob(f"{CHECKPOINT}*"):
            path.unlink()
        self.figures["checkpoints lost"] += 1
        self._finish()

    def _compare(self) -> None:
        outputs = self.objects.bucket.keys("converted/short/")
        sources = [f"{key.removeprefix('converted/').removesuffix('.jpg')}.png" for key in outputs]
        with ThreadPoolExecutor(4) as pool:
            bodies = dict(zip(sources, pool.map(self.objects.stored, sources), strict=True))
        for key, version in self.living.items():
            assert key in bodies, f"{key} is lost"
            assert bodies.pop(key) == converted(source_of(key, version)), f"the output of {key} is wrong"
            self.figures["compared"] += 1
        for key, body in bodies.items():
            assert self.objects.is_right_for_some_version(key, body or b""), f"the output of {key}, now gone, is wrong"
            self.objects.delete(output_key(key))
        self.gone, self.just_gone = self.gone + self.just_gone, list(bodies)


########################################################################
# The whole
########################################################################


@dataclass
class Soak:
    """Everything that is at work, and what is asked about it each minute."""

    api: ConversionApi
    objects: Objects
    weather: Weather
    assault: Assault
    long_runs: Sequence[LongRun]
    s3_pid: int | None
    over: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)

    def last(self, seconds: float) -> None:
        """Let it all go on for so long. Raises AssertionError for a broken promise."""
        lasting = (task for run in self.long_runs for task in (run.live, run.watch))
        tasks = [self.shake, self.assault.change_things, *lasting]
        with ThreadPoolExecutor(len(tasks)) as pool:
            at_work = [pool.submit(task, self.over) for task in tasks]
            try:
                until = self.started + seconds
                while time.monotonic() + PHASE_SECONDS < until:
                    self.assault.run_until(time.monotonic() + PHASE_SECONDS)
                    self._take_stock(at_work)
                self.assault.run_until(until)
            finally:
                self.over.set()
        self._take_stock(at_work)
        self.assault.judge_peaks()

    def shake(self, over: threading.Event) -> None:
        """Let those that hang go on every few seconds, and S3 stand still for a moment."""
        luck = self.assault.luck
        while not over.wait(luck.uniform(3, 6)):
            self.weather.pulse.set()
            over.wait(0.3)
            self.weather.pulse.clear()
            if self.s3_pid and luck.random() < 0.3:
                self.assault.figures["S3 stood still"] += 1
                os.kill(self.s3_pid, signal.SIGSTOP)
                over.wait(luck.uniform(0.2, 2))
                os.kill(self.s3_pid, signal.SIGCONT)
        self.weather.pulse.set()

    def _take_stock(self, at_work: Sequence[Future[None]]) -> None:
        for task in at_work:
            if task.done():
                task.result()
        living = self.assault.settle()
        paid = Counter(charge.source_sha256 for charge in self.api.paid)
        assert paid.keys() <= self.objects.known.keys(), "something was paid that was never there"
        twice = [self.objects.known[digest] for digest, count in paid.items() if count > 1]
        assert not twice, f"paid twice: {twice}"
        assert living <= paid.keys(), "something is stored that was not paid"
        print(self.line(len(paid)), flush=True)

    def line(self, paid: int) -> str:
        """The state in a line."""
        figures = self.assault.figures
        long = (f"{run.name} {run.checked} of {run.fed}, {describe(run.weights)}" for run in self.long_runs)
        return (
            f"{(time.monotonic() - self.started) / 60:5.1f} min: {paid} paid of {len(self.objects.known)} versions, "
            f"0 twice, {figures['runs']} runs, {sum(self.weather.struck().values())} troubles; {'; '.join(long)}"
        )

    def table(self) -> str:
        """What has been done, and what it took, in Markdown."""
        figures, paid = self.assault.figures, self.api.paid
        changes = "added", "come again", "overwritten", "deleted"
        counts = [figures[name] for name in ("add", "come again", "overwrite", "delete")]
        ends = ("SIGKILL", "SIGTERM", "a worker", "checkpoints lost")
        rows = {
            "minutes": f"{(time.monotonic() - self.started) / 60:.1f}",
            "versions put": f"{len(self.objects.known)}: for the long runs {sum(r.fed for r in self.long_runs)}; "
            + ", ".join(f"{name} {count}" for name, count in zip(changes, counts, strict=True)),
            "paid, paid twice": f"{len(paid)}, {len(self.api.paid_twice())}",
            "requests, replays": f"{len(self.api.requests)}, {self.api.replays}",
            "outputs compared": str(figures["compared"] + sum(run.checked for run in self.long_runs)),
            "runs; ended by": f"{figures['runs']}; " + ", ".join(f"{name} {figures[name]}" for name in ends),
            "S3 stood still": f"{figures['S3 stood still']} times",
            "troubles": ", ".join(f"{name} {count}" for name, count in self.weather.struck().items()),
        }
        for processes, peaks in self.assault.peaks.items():
            if peaks:
                first, last = first_and_last(peaks)
                told = f"{max(first):.0f} MB in the first quarter, {max(last):.0f} in the last"
                rows[f"most memory of short runs, {processes} processes"] = told
        lines = ["| what | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
        return "\n".join([*lines, "", *weight_table(self.long_runs)])


def describe(weights: Sequence[Weight]) -> str:
    """The last weight in words."""
    if not weights:
        return "not weighed yet"
    last = weights[-1]
    return f"{last.rss_mb:.0f} MB, {last.files} files, {last.threads} threads, log {last.wal_mb:.1f} MB"


def weight_table(long_runs: Sequence[LongRun]) -> Iterator[str]:
    """What the long runs took, in Markdown."""
    yield "| run, all its processes | weighed | " + " | ".join(one.name for one in fields(Weight)) + " |"
    yield "| --- |" + " --- |" * (1 + len(fields(Weight)))
    for run in filter(lambda run: run.weights, long_runs):
        cells = ("{:.4g} → {:.4g}, most {:.4g}".format(*quarters(run.weights, one.name)) for one in fields(Weight))
        yield f"| {run.name}, {run.fed} objects | {len(run.weights)} | {' | '.join(cells)} |"


@contextmanager
def prepared(rate: float, seed: int, s3: S3Server, directory: Path) -> Iterator[Soak]:
    """Start what is needed; end what is left of it."""
    luck = random.Random(seed)
    with ExitStack() as stack:
        api = ConversionApi(convert=marking, latency=0.05, compare_raw_body=True, remember_failed_bodies=True)
        stack.enter_context(api)
        api.behaviour.job_states = ("processing", "completed")
        bucket = TestBucket(f"soak-{uuid.uuid4().hex}", s3.client())
        bucket.client.create_bucket(Bucket=bucket.name)
        objects = Objects(bucket)

        def start(*arguments: str, name: str = "short", **named: Any) -> Run:
            workdir = directory / name
            workdir.mkdir(exist_ok=True)
            run = launch(*arguments, workdir=workdir, s3=s3, api=api, bucket=bucket, **named)
            stack.callback(run.process.wait)
            stack.callback(run.process.kill)
            return run

        each = rate * (1 - SHARE_OF_ASSAULT) / 2
        long_runs = []
        for processes, transfer in ((1, "url"), (2, "upload")):
            how = ("--set", f"run.processes={processes}", "--set", f"api.transfer={transfer}", "--keys-from", "-")
            run = start(*how, *OPTIONS, name=f"long-{transfer}", stdin=subprocess.PIPE)
            long_runs.append(LongRun(f"long-{transfer}", run, objects, each))
        weather = Weather(api, luck)
        yield Soak(api, objects, weather, Assault(objects, start, luck, rate * SHARE_OF_ASSAULT), long_runs, s3.pid)


def soak(minutes: float, rate: float, seed: int, s3: S3Server) -> int:
    """Do it all, and print the table. The exit code."""
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    with prepared(rate, seed, s3, directory) as work:
        try:
            work.last(60 * minutes)
        except AssertionError as broken:
            print(f"BROKEN: {broken}\nseed {seed}; the checkpoints are kept in {directory}", flush=True)
            return 1
        finally:
            print(f"\n{work.table()}", flush=True)
    shutil.rmtree(directory)
    print("\nnothing paid twice, lost or wrong; nothing has grown", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and soak."""
    parser = argparse.ArgumentParser(description="let the script work under every kind of trouble")
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--rate", type=float, default=10, metavar="N", help="changes a second; default: %(default)s, one CPU"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), metavar="N", help="default: a random one")
    given = parser.parse_args(arguments)
    with S3Server() as s3:
        return soak(given.minutes, given.rate, given.seed, s3)


if __name__ == "__main__":
    raise SystemExit(main())
