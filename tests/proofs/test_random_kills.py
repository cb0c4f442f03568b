"""Killed again and again at random moments, it still pays for each object once, loses none and overwrites nothing.

S3_TEST_SEED=N draws other moments (each test says which it had); S3_TEST_KILLS=N is the number of kills of a variant.
"""

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.proofs.soak import Weather
from tests.runs.test_pages import PDF, UNPACK, page, paged, stored
from tests.runs.test_processes import worker_pids
from tests.runs.test_tags import tags_of
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.program import AS_A_MODULE, HASTY, Run
from tests.standins.promises import PNG, converted

SEED = os.environ.get("S3_TEST_SEED", "20261124")
KILLS = int(os.environ.get("S3_TEST_KILLS", "105"))
OPTIONS = ("--workers", "6", "--set", "run.log_every=100000")
UPLOAD = ("--set", "api.transfer=upload")
JOBS_ABOVE = 1000  # bytes, where large sources go to the API as jobs
LONGEST_SECONDS = 0.6  # that a run may work before it is killed
FOREIGN = 2  # objects of each generation under whose output keys something lies already
LOST = 3  # outputs at a time
DONE = {"converted": "yes"}
ENDED_BY = {"SIGKILL": {-signal.SIGKILL}, "SIGTERM": {-signal.SIGTERM, 128 + signal.SIGTERM}}


@dataclass(frozen=True)
class Variant:
    """One way to run the program, and what it meets with."""

    options: tuple[str, ...] = ()
    processes: int = 1
    targets: tuple[str, ...] = ("jpg",)
    has_documents: bool = False  # every other source has pages
    has_large_sources: bool = False  # every other one
    is_tagged: bool = False
    loses_outputs: bool = False  # which --repair makes again
    has_weather: bool = False  # the API refuses and breaks off


TWO_JOBS = [part for target in ("jpg", "webp") for part in ("--set", f"job {target}.target={target}")]
TAGS = ("--set", "s3.tag_source=converted=yes", "--set", "s3.tags=made=here")
VARIANTS = {
    "by URL": Variant(),
    "by upload": Variant(UPLOAD),
    "two processes by URL": Variant(processes=2),
    "two processes by upload": Variant(UPLOAD, processes=2),
    "two jobs": Variant(tuple(TWO_JOBS), targets=("jpg", "webp")),
    "pages": Variant(UNPACK, has_documents=True),
    "tags": Variant(TAGS, is_tagged=True),
    "jobs of the API": Variant(("--set", f"api.jobs_above={JOBS_ABOVE}"), has_large_sources=True),
    "repair": Variant(loses_outputs=True),
    "weather": Variant(has_weather=True),
}


def convert(conversion: Conversion) -> Converted:
    """Documents come to their pages, pictures to themselves with a mark."""
    return paged(conversion) if conversion.source.startswith(PDF) else marking(conversion)


@dataclass
class Siege:
    """A bucket that grows by generations of objects, and a program that is killed while it converts them."""

    variant: Variant
    start: Callable[..., Run]
    bucket: Any
    api: ConversionApi
    luck: random.Random
    sources: dict[str, bytes] = field(default_factory=dict)
    foreign: dict[str, bytes] = field(default_factory=dict)  # what is another's, by the output key where it lies
    hindered: set[str] = field(default_factory=set)  # sources whose output keys those are
    lost: dict[str, int] = field(
        default_factory=dict
    )  # sources whose outputs were deleted: the row that knows of those
    bill: Counter[tuple[str, str]] = field(default_factory=Counter)  # what is to be paid: (digest, target) -> how often
    figures: Counter[str] = field(default_factory=Counter)
    is_asked: threading.Event = field(default_factory=threading.Event)  # the API, for the first time by this run

    # -- what lies in the bucket -----------------------------------------------------------------------------------

    def add_generation(self, count: int) -> None:
        """Put more objects, and overwrite some of those that are there; what is another's comes before its source."""
        generation = self.figures["generations"] = self.figures["generations"] + 1
        new = [f"g{generation}/{number:05}.{self._format(number)}" for number in range(count)]
        # Nobody pays for the output of a version that is not there any more.
        free = sorted(self.sources.keys() - self.hindered - self.lost.keys())
        made = {key: self._source(key, generation) for key in [*new, *self.luck.sample(free, len(free) // 20)]}
        self.sources |= made
        for key in self.luck.sample(new, FOREIGN):
            place = self.luck.choice(sorted(self.outputs_of(key)))
            self.foreign[place] = f"what somebody else has put at {place}".encode()
            self.hindered.add(key)
            # Without a mark of the program, or with that of another source.
            mark = {"source-key": "another.png", "source-etag": "0" * 32, "job": "default"}
            place_of = {"Bucket": self.bucket.name, "Key": place, "Body": self.foreign[place]}
            self.bucket.client.put_object(**place_of, Metadata=mark if self.luck.random() < 0.5 else {})
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._put, made))
        self.bill.update(paid for key in made for paid in self._paid_for(key))
        self.figures["versions"] += len(made)

    def _format(self, number: int) -> str:
        return "pdf" if self.variant.has_documents and number % 2 else "png"

    def _source(self, key: str, generation: int) -> bytes:
        number = int(key[-9:-4])
        if key.endswith(".pdf"):
            return PDF + f"{key} in generation {generation} with pages: {1 + number % 3}".encode()
        large = JOBS_ABOVE if self.variant.has_large_sources and number % 2 else 0
        return PNG + f"{key} in generation {generation}".encode() + bytes(large)

    def _put(self, key: str) -> None:
        tags = {"Tagging": "&".join(f"{name}={value}" for name, value in self._own_tags(key).items())}
        place = {"Bucket": self.bucket.name, "Key": key, **(tags if self._own_tags(key) else {})}
        self.bucket.client.put_object(**place, Body=self.sources[key])

    def _own_tags(self, key: str) -> dict[str, str]:
        return {"its": "own"} if self.variant.is_tagged and int(key[-9:-4]) % 2 else {}

    def _paid_for(self, key: str) -> list[tuple[str, str]]:
        return [(hashlib.sha256(self.sources[key]).hexdigest(), target) for target in self.variant.targets]

    def outputs_of(self, key: str) -> dict[str, bytes]:
        """What a source must come to."""
        source, stem = self.sources[key], f"converted/{key[:-4]}"
        if not key.endswith(".pdf"):
            return {f"{stem}.{target}": converted(source, target) for target in self.variant.targets}
        count = int(source.split()[-1])
        return stored(stem, source, count) if count > 1 else {f"{stem}.jpg": page(source, 1)}

    def lose_outputs(self, workdir: Path) -> None:
        """Delete some outputs that the checkpoint knows as stored: each will be paid for once more."""
        try:
            with closing(sqlite3.connect(f"file:{workdir / 's3_bulk_convert.sqlite3'}?mode=rw", uri=True)) as db:
                log = db.execute("SELECT key, id, event, etag FROM log ORDER BY id").fetchall()
                unsettled = {key for (key,) in db.execute("SELECT key FROM in_flight")}
        except sqlite3.OperationalError:
            return  # no run has come so far
        stored = set[str]()
        newest = {key: row for key, *row in log}
        for key in newest.keys() - unsettled:
            row, *known = newest[key]
            if known == ["converted", hashlib.md5(self.sources[key]).hexdigest()] and self.lost.get(key) != row:
                stored.add(key)
        for key in self.luck.sample(sorted(stored), min(LOST, len(stored))):
            self.lost[key] = newest[key][0]
            self.bill.update(self._paid_for(key))
            self.figures["outputs lost"] += 1
            for place in self.outputs_of(key):
                self.bucket.client.delete_object(Bucket=self.bucket.name, Key=place)

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, *options: str) -> Run:
        """Start the program."""
        self.is_asked.clear()
        processes = ("--set", f"run.processes={self.variant.processes}")
        # Other processes read the program as a file.
        command = HASTY if self.variant.processes == 1 else AS_A_MODULE
        return self.start(*OPTIONS, *processes, *self.variant.options, *options, command=command)

    def runs(self, kills: int) -> Iterator[Run]:
        """Start the program again and again, and kill it; a run that ends before its time is up is yielded."""
        while self.figures["kills"] < kills:
            run = self.run(*(["--repair"] if self.variant.loses_outputs and self.luck.random() < 0.5 else []))
            how = self._attack(run)
            run.wait(600)
            if run.exit_code not in ENDED_BY.get(how, set()):
                self._judge(run)
                yield run
            if self.variant.loses_outputs:
                self.lose_outputs(run.workdir)

    def _attack(self, run: Run) -> str:
        """End a run at a random moment, perhaps after one of its worker processes. How; nothing if it was not ended."""
        if self.variant.processes > 1 and self.luck.random() < 0.25:
            self._let_work(run)
            with suppress(OSError, IndexError):
                os.kill(self.luck.choice(worker_pids(run)), signal.SIGKILL)
                self.figures["workers killed"] += 1
            if self.luck.random() < 0.2:
                return ""  # another one takes its place, and the run comes to its end
        self._let_work(run)
        if run.process.poll() is not None:
            return ""
        if self.luck.random() < 0.1:
            run.process.terminate()
            return "SIGTERM"
        run.process.kill()
        self.figures["kills"] += 1
        return "SIGKILL"

    def _let_work(self, run: Run) -> None:
        # On a busy machine most would be killed before they have sent anything.
        if self.luck.random() < 0.8:
            while not self.is_asked.wait(0.02) and run.process.poll() is None:
                pass
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(self.luck.uniform(0, LONGEST_SECONDS))

    def _judge(self, run: Run) -> None:
        """A run that was let finish has left nothing to do but what is another's."""
        said = {name: run.summary[name] for name in ("left", "failed", "possible_double_charges", "exit_code")}
        failed = {"output_collision": len(self.foreign)} if self.foreign else {}
        wanted = {"left": 0, "failed": failed, "possible_double_charges": 0, "exit_code": int(bool(failed))}
        assert (said, run.exit_code) == (wanted, wanted["exit_code"]), run.err + run.out

    # -- promises --------------------------------------------------------------------------------------------------

    def assert_promises(self) -> None:
        """Finish, and compare what was paid and what is stored with what was put."""
        options = ["--repair"] if self.variant.loses_outputs else []
        self._judge(self.run(*options).wait(600))
        assert {place: self.bucket.read(place) for place in self.foreign} == self.foreign
        if self.variant.is_tagged:
            assert not [key for key in self.hindered if tags_of(self.bucket, key).items() >= DONE.items()]
        for place in self.foreign:
            self.bucket.client.delete_object(Bucket=self.bucket.name, Key=place)
        self.foreign.clear()
        last = self.run(*options).wait(600)
        self._judge(last)
        assert last.rows("in_flight") == []
        paid = Counter((charge.source_sha256, charge.target) for charge in self.api.paid)
        assert (paid - self.bill, self.bill - paid) == ({}, {})  # paid twice, and not paid
        expected = {place: body for key in self.sources for place, body in self.outputs_of(key).items()}
        # Each by its key as well: after a kill, Swift has in no listing what it had not yet acknowledged.
        assert set(self.bucket.keys("converted/")) <= expected.keys()
        with ThreadPoolExecutor(8) as pool:
            there = dict(zip(expected, pool.map(self._stored, expected), strict=True))
            assert [place for place in expected if there[place] != expected[place]] == []  # lost, or wrong
            if self.variant.is_tagged:
                tags = {key: self._own_tags(key) | DONE for key in self.sources}
                tags |= {place: {"made": "here"} for place in expected}
                assert dict(zip(tags, pool.map(lambda key: tags_of(self.bucket, key), tags), strict=True)) == tags

    def _stored(self, place: str) -> bytes | None:
        try:
            body: bytes = self.bucket.read(place)
        except self.bucket.client.exceptions.NoSuchKey:
            return None
        return body

    def survive(self, kills: int, objects: int) -> str:
        """Let it be killed so many times; when all is converted too early, there is more to do. The figures."""
        started = time.monotonic()
        self.api.on("request_received", lambda _: self.is_asked.set())
        self.add_generation(objects)
        for _ in self.runs(kills):
            self.add_generation(objects // 4)
        hindered = len(self.foreign)
        self.assert_promises()
        more = [f"{self.figures[name]} {name}" for name in ("workers killed", "outputs lost") if self.figures[name]]
        return ", ".join(
            [
                *(f"{self.figures['kills']} kills", *more),
                f"{self.figures['versions']} versions of {len(self.sources)} objects, {hindered} of another's",
                f"{len(self.api.requests)} requests, {self.api.replays} replays, {len(self.api.paid)} paid",
                f"0 twice, 0 lost, 0 wrong, {time.monotonic() - started:.0f} s",
            ]
        )


@pytest.fixture
def besiege(start: Callable[..., Run], bucket: Any, strict_api: ConversionApi) -> Callable[..., None]:
    """Make a siege of a variant, with a strict API that takes its time, and print the figures."""

    def besiege(name: str, kills: int, objects: int) -> None:
        strict_api.behaviour.latency, strict_api.behaviour.convert = 0.05, convert
        variant, luck = VARIANTS[name], random.Random(f"{SEED} {name}")
        print(f"\nrandom kills, {name}, S3_TEST_SEED={SEED}:", flush=True)
        weather = Weather(strict_api, random.Random(f"{SEED} {name} of the API")) if variant.has_weather else None
        if weather:
            weather.pulse.set()  # nothing hangs
        print(Siege(variant, start, bucket, strict_api, luck).survive(kills, objects))
        if weather:
            print(f"troubles of the API: {weather.struck()}")

    return besiege


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_kills_at_random_moments_cost_nothing(variant: str, besiege: Callable[..., None]) -> None:
    besiege(variant, KILLS, objects=200)
