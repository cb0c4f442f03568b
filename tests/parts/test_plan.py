"""The plan and the feeder: what becomes of each object, and never more of a bucket in memory than the bound allows."""

from __future__ import annotations

import itertools
import queue
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import s3_bulk_convert as program
from s3_bulk_convert import (
    Decision,
    DecisionKind,
    FeederUpdate,
    Journal,
    JournalState,
    Outcome,
    OutcomeKind,
    PendingRequest,
    RunError,
    SourceObject,
    Task,
)

NOW = 1_790_000_000.0
LISTED_AT = "2026-09-21T14:13:20.000Z"  # the same moment, as S3 writes it
COMPLETE = ("s3.bucket=bucket", "convert.target=jpg", "api.key=ctf_sk_1", "run.workers=2")
REQUEST = PendingRequest("e1", "id", "/v1/convert", "https://signed", NOW - 60)
STOP = RunError("enough", "run it again")


class FakeBucket(program.Bucket):
    """A bucket that has these pages and outputs, and notes what is asked of it."""

    def __init__(self, pages: Iterable[Sequence[SourceObject]], outputs: Sequence[str] = ()) -> None:
        self.name = self.output_name = "bucket"
        self.pages, self.outputs = pages, list(outputs)
        self.listed: list[str] = []
        self.pages_read = 0
        self.outputs_read: Callable[[], None] = lambda: None  # called when outputs have been listed

    def check(self) -> None:
        """It exists."""

    def list_pages(
        self, prefix: str, max_parallel: Callable[[], int], bucket: str = ""
    ) -> Generator[list[SourceObject], None, None]:
        """The pages, those of the keys that begin with the prefix."""
        self.listed.append(prefix)
        for page in self.pages:
            self.pages_read += 1
            yield [source for source in page if source.key.startswith(prefix)]

    def read_page(self, bucket: str, prefix: str, after: str = "", *_: str, **__: str) -> program.Page:
        """All outputs behind a key."""
        keys = sorted(key for key in self.outputs if key > after and key.startswith(prefix))
        self.outputs_read()
        return program.Page([source(key) for key in keys], is_last=True)

    def is_no_source(self, key: str) -> bool:
        """Every source is still there, and all outputs are this program's."""
        return key in self.outputs


@dataclass
class Fed:
    """What came of a feeder: tasks on the queue, outcomes and counts told, how it ended."""

    tasks: list[Task] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    ended: list[FeederUpdate] = field(default_factory=list)
    end_markers: int = 0

    def tell(self, message: program.Message) -> None:
        """Take a message as the recorder would."""
        if isinstance(message, FeederUpdate):
            for (_, name), count in message.counts.items():
                self.counts[name] += count
            # Whatever is planned of a page is counted: only the last word counts nothing.
            self.ended += [message] * (not message.counts)
        elif isinstance(message, Outcome):
            self.outcomes.append(message)

    def take(self, tasks: queue.Queue[Task | None]) -> None:
        """Take what is on the queue as the workers would."""
        while not tasks.empty():
            task = tasks.get_nowait()
            if task is None:
                self.end_markers += 1
            else:
                self.tasks.append(task)

    @property
    def fates(self) -> dict[str, str]:
        """Source key -> the code of its failure, or what a worker is to do first."""
        of_tasks = {task.source.key: "taken" if task.holder else "look" if task.look else "send" for task in self.tasks}
        return of_tasks | {done.task.source.key: done.code for done in self.outcomes}

    @property
    def keys(self) -> list[str]:
        """The source keys on the queue."""
        return [task.source.key for task in self.tasks]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a checkpoint may be made."""
    return tmp_path / "checkpoint.sqlite3"


def settings(*assignments: str, retry_failed: bool = False) -> program.Settings:
    """A complete configuration with these options."""
    flags = [part for assignment in (*COMPLETE, *assignments) for part in ("--set", assignment)]
    made = program.load_settings(None, {}, program.read_flags(program.build_parser().parse_args(flags)))
    return replace(made, retry_failed=retry_failed)


def source(key: str, size: int = 10, version: str = "e1", *, archived: bool = False) -> SourceObject:
    """An object in the bucket."""
    return SourceObject(key, version, size, LISTED_AT, archived)


def pages_of(*keys: str) -> list[list[SourceObject]]:
    """One page with these keys."""
    return [[source(key) for key in keys]]


def feeder(
    bucket: FakeBucket, journal: Journal, wanted: program.Settings, tasks: queue.Queue[Task | None], fed: Fed
) -> program.Feeder:
    """A feeder and what its workers would share."""
    ledger = program.Ledger(journal, wanted)
    return program.Feeder(program.WorkerContext(wanted, program.StopFlag(), bucket, ledger, tasks, fed.tell), journal)


def feed(bucket: FakeBucket, path: Path, wanted: program.Settings | None = None, kind: type[Journal] = Journal) -> Fed:
    """Run a feeder to its end on a queue without a bound, as a run of its own."""
    fed, tasks, chosen = Fed(), queue.Queue[Task | None](), wanted or settings()
    with kind(path, "aws", chosen) as journal:
        journal.begin_run(NOW)
        feeder(bucket, journal, chosen, tasks, fed).run()
    fed.take(tasks)
    return fed


def settle(path: Path, tasks: Iterable[Task], kind: OutcomeKind, **changes: Any) -> None:
    """Write down how tasks ended."""
    with Journal(path, "aws", settings()) as journal:
        journal.begin_run(NOW)
        journal.settle([replace(Outcome(task, kind), **changes) for task in tasks], NOW)


def mark_sent(path: Path, *tasks: Task, wanted: program.Settings | None = None) -> None:
    """Write down that these have been sent."""
    with Journal(path, "aws", wanted or settings()) as journal:
        for task in tasks:
            journal.mark_sent(task, REQUEST)


########################################################################
# Selection
########################################################################


@pytest.mark.parametrize(
    ("listed", "options", "expected"),
    [
        pytest.param(source("a.png"), [], "wanted", id="wanted"),
        pytest.param(source("a.gif"), ["convert.include=*.png"], "not_matched", id="not matched"),
        pytest.param(source("a.png", 10), ["convert.min_size=11"], "not_matched", id="too small"),
        pytest.param(source("folder/"), [], "folder", id="folder"),
        pytest.param(source("folder/", 0), [], "folder", id="empty folder"),
        pytest.param(source("a.png", 0), [], "empty", id="empty"),
        pytest.param(source("a.png", archived=True), [], "archived", id="archived"),
        pytest.param(source("a.jpg"), [], "same_format", id="same format"),
        pytest.param(source("a.JPEG"), [], "same_format", id="same format by another name"),
        pytest.param(source("a.jpg"), ["convert.same_format=copy"], "wanted", id="same format to copy"),
        pytest.param(source("a.jpg"), ["convert.same_format=convert"], "wanted", id="same format to convert"),
        pytest.param(source("converted/a.png"), [], "own_output", id="own output"),
        pytest.param(source("converted/a.png"), ["s3.output_bucket=other"], "wanted", id="outputs elsewhere"),
        pytest.param(source("convertedness.png"), [], "wanted", id="a name like the outputs'"),
    ],
)
def test_each_listed_object_has_one_fate(path: Path, listed: SourceObject, options: list[str], expected: str) -> None:
    fed = feed(FakeBucket([[listed]]), path, settings(*options))
    counts = {"wanted": len(fed.tasks)} | {name: count for name, count in fed.counts.items() if name != "listed"}
    assert {name: count for name, count in counts.items() if count} == {expected: 1}
    assert fed.counts["listed"] == 1


@pytest.mark.parametrize(
    ("seconds_old", "option", "is_wanted"),
    [
        (-5, "newer_than=1h", True),
        (-5, "older_than=1h", False),
        (3599, "newer_than=1h", True),
        (3601, "newer_than=1h", False),
        (3601, "older_than=1h", True),
    ],
)
def test_an_object_that_is_from_the_future_by_s3_s_clock_is_new(
    seconds_old: int, option: str, *, is_wanted: bool
) -> None:
    (job,) = settings(f"convert.{option}").jobs
    assert replace(job, now=NOW + seconds_old).wants(source("a.png")) is is_wanted


def test_an_object_that_two_jobs_want_is_decided_twice_and_listed_once(path: Path) -> None:
    jobs = settings("job a.target=jpg", "job b.target=pdf", "job b.include=*.png")
    bucket = FakeBucket(pages_of("x.png", "y.gif"))
    fed = feed(bucket, path, jobs)
    assert [(task.job, task.source.key) for task in fed.tasks] == [("a", "x.png"), ("b", "x.png"), ("a", "y.gif")]
    assert (fed.counts["listed"], bucket.listed) == (3, [""])


def test_jobs_with_prefixes_of_their_own_are_listed_apart_and_none_twice(path: Path) -> None:
    bucket = FakeBucket(pages_of("p/in/x.png", "q/y.png"))
    jobs = settings("job a.prefix=p/", "job b.prefix=q/", "job c.prefix=p/in/", "job c.target=pdf")
    fed = feed(bucket, path, jobs)
    assert bucket.listed == ["p/", "q/"]
    assert [(task.job, task.source.key) for task in fed.tasks] == [
        ("a", "p/in/x.png"),
        ("c", "p/in/x.png"),
        ("b", "q/y.png"),
    ]


########################################################################
# What is done already
########################################################################


@pytest.mark.parametrize(
    ("kind", "permanent", "version", "retry", "expected"),
    [
        pytest.param(OutcomeKind.CONVERTED, False, "e1", False, "already_done", id="converted"),
        pytest.param(OutcomeKind.FOUND, False, "e1", False, "already_done", id="found"),
        pytest.param(OutcomeKind.ADOPTED, False, "e1", False, "already_done", id="adopted"),
        pytest.param(OutcomeKind.FAILED, True, "e1", False, "failed_before", id="failed for good"),
        pytest.param(OutcomeKind.FAILED, True, "e1", True, "retried", id="failed for good, to be retried"),
        pytest.param(OutcomeKind.FAILED, False, "e1", False, "retried", id="failed for now"),
        pytest.param(OutcomeKind.CONVERTED, False, "e1", True, "already_done", id="converted, failures to be retried"),
        pytest.param(OutcomeKind.CONVERTED, False, "e2", False, "to do", id="overwritten since it was converted"),
        pytest.param(OutcomeKind.FAILED, True, "e2", False, "to do", id="overwritten since it failed"),
    ],
)
def test_the_journal_tells_what_is_unfinished(
    path: Path, kind: OutcomeKind, version: str, expected: str, *, permanent: bool, retry: bool
) -> None:
    settle(path, feed(FakeBucket(pages_of("a.png")), path).tasks, kind, permanent=permanent)
    fed = feed(FakeBucket([[source("a.png", version=version)]]), path, settings(retry_failed=retry))
    found = {name for name, count in fed.counts.items() if count and name != "listed"}
    assert (found or {"to do"}) == {expected}
    assert fed.keys == (["a.png"] if expected in {"to do", "retried"} else [])
    assert fed.counts["listed"] == 1


def test_what_failed_last_time_comes_after_all_that_was_never_tried(path: Path) -> None:
    settle(path, feed(FakeBucket(pages_of("a.png", "c.png")), path).tasks, OutcomeKind.FAILED, code="network")
    fed = feed(FakeBucket([*pages_of("a.png", "b.png"), *pages_of("c.png", "d.png")]), path)
    assert fed.keys == ["b.png", "d.png", "a.png", "c.png"]
    assert (fed.counts["listed"], fed.counts["retried"]) == (4, 2)
    assert fed.ended == [FeederUpdate(is_complete=True)]


def test_a_failure_that_says_nothing_of_the_api_is_not_postponed(path: Path) -> None:
    settle(path, feed(FakeBucket(pages_of("a.png")), path).tasks, OutcomeKind.FAILED, code="source_changed")
    assert feed(FakeBucket(pages_of("a.png", "b.png")), path).keys == ["a.png", "b.png"]


@pytest.mark.parametrize(("version", "pending"), [("e1", REQUEST), ("e2", None)])
def test_a_request_in_flight_is_asked_for_again_if_it_was_for_this_version(
    path: Path, version: str, pending: PendingRequest | None
) -> None:
    mark_sent(path, *feed(FakeBucket(pages_of("a.png")), path).tasks)
    (again,) = feed(FakeBucket([[source("a.png", version=version)]]), path).tasks
    assert (again.pending, again.source.version) == (pending, version)
    assert again.look is (pending is not None)


@pytest.mark.parametrize(
    ("output", "fate"), [("converted/a.jpg", "look"), ("converted/a.jpg.zip", "look"), ("converted/b.jpg", "send")]
)
def test_what_lies_under_an_output_key_is_looked_at_before_anything_is_sent(path: Path, output: str, fate: str) -> None:
    fed = feed(FakeBucket(pages_of("a.png"), [output]), path)
    assert fed.fates == {"a.png": fate}


def test_outputs_that_may_not_be_listed_are_all_looked_at(path: Path) -> None:
    class Closed(FakeBucket):
        """A bucket whose outputs may not be listed."""

        def read_page(self, bucket: str, prefix: str, after: str = "", *_: str, **__: str) -> program.Page:
            raise program.ObjectFailed("AccessDenied", "no")

    assert feed(Closed(pages_of("a.png", "b.png")), path).fates == {"a.png": "look", "b.png": "look"}


def test_a_plan_writes_nothing_down(path: Path) -> None:
    feed(FakeBucket(pages_of("a.png", "b.png")), path)
    with Journal(path, "aws", settings()) as journal:
        assert (journal.pending("default", ["a.png", "b.png"]), journal.states("default", ["a.png", "b.png"])) == (
            {},
            {},
        )


########################################################################
# Who has an output key
########################################################################


def test_of_sources_with_one_output_key_the_first_keeps_it(path: Path) -> None:
    fed = feed(FakeBucket([*pages_of("a.heic", "a.png", "b.png"), *pages_of("a.tiff")]), path)
    assert fed.fates == {"a.heic": "send", "a.png": "taken", "b.png": "send", "a.tiff": "taken"}
    assert {task.holder for task in fed.tasks if task.holder} == {"a.heic"}


def test_of_two_jobs_with_one_output_key_the_first_by_name_keeps_it(path: Path) -> None:
    options = ("s3.output_key=out/{key}.x", "job b.quality=50", "job a.quality=60")
    fed = feed(FakeBucket(pages_of("x.png")), path, settings(*options))
    assert [(task.job, task.holder) for task in fed.tasks] == [("a", ""), ("b", "[job a]")]


def test_of_two_jobs_with_one_output_key_the_one_whose_request_is_in_flight_keeps_it(path: Path) -> None:
    wanted = settings("s3.output_key=out/{key}.x", "job b.quality=50", "job a.quality=60")
    _, second = feed(FakeBucket(pages_of("x.png")), path, wanted).tasks
    mark_sent(path, second, wanted=wanted)
    fed = feed(FakeBucket(pages_of("x.png")), path, wanted)
    # And it is handed out first.
    assert [(task.job, task.holder) for task in fed.tasks] == [("b", ""), ("a", "[job b]")]


def test_a_request_in_flight_holds_its_output_key_against_what_is_listed_before(path: Path) -> None:
    mark_sent(path, *feed(FakeBucket(pages_of("a.png")), path).tasks)
    fed = feed(FakeBucket(pages_of("a.heic", "a.png")), path)
    assert fed.fates == {"a.heic": "taken", "a.png": "look"}


def test_an_adopted_output_stays_its_source_s_in_every_later_run(path: Path) -> None:
    tasks = feed(FakeBucket(pages_of("a.png")), path).tasks
    output = program.StoredOutput("converted/a.jpg.zip", "etag", 5)
    settle(path, tasks, OutcomeKind.ADOPTED, output=output)
    fed = feed(FakeBucket(pages_of("a.heic", "a.png"), [output.key]), path)
    # It may only find there what is its own.
    assert ([task.rival for task in fed.tasks], fed.counts["already_done"]) == (["a.png"], 1)


@pytest.mark.parametrize(
    ("key", "options", "expected"),
    [
        ("a.jpg", ["s3.output_key={key}", "convert.same_format=convert"], "output_collision"),
        ("k" * 1006, [], "send"),
        ("k" * 1007, [], "output_key_too_long"),
        ("ü" * 503, [], "send"),
        ("ü" * 504, [], "output_key_too_long"),
        # A page has the number 10,000 at the most.
        ("k" * 1004, ["convert.pages=unpack"], "send"),
        ("k" * 1005, ["convert.pages=unpack"], "output_key_too_long"),
        ("k" * 1005, ["convert.pages=unpack", "s3.output_key=converted/{key}"], "output_key_too_long"),
    ],
)
def test_an_output_key_that_cannot_be_written_is_never_paid_for(
    path: Path, key: str, options: list[str], expected: str
) -> None:
    fed = feed(FakeBucket(pages_of(key)), path, settings(*options))
    assert fed.fates == {key: expected}
    assert not any(done.permanent for done in fed.outcomes)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (5_000_000_001, [], "too_large"),
        (5_000_000_000, [], "send"),
        (1001, ["api.max_size=1KB"], "too_large"),
        (100_000_001, ["api.jobs_above=never"], "too_large"),
        (100_000_000, ["api.jobs_above=never"], "send"),
    ],
)
def test_an_object_that_is_too_large_is_never_sent(path: Path, size: int, options: list[str], expected: str) -> None:
    fed = feed(FakeBucket([[source("a.png", size)]]), path, settings(*options))
    assert fed.fates == {"a.png": expected}
    assert all(done.permanent for done in fed.outcomes)


class Settling(Journal):
    """A checkpoint in which what is in flight is converted, and its output stored, after one of its answers."""

    after = ""
    bucket: FakeBucket

    def begin_run(self, now: float) -> None:
        """Hear of what the bucket answers, too."""
        super().begin_run(now)
        self.bucket.outputs_read = lambda: self.settle_meanwhile("outputs")

    def settle_meanwhile(self, answer: str) -> None:
        """Have the recorder settle what a worker has come to."""
        if answer == self.after:
            task = Task("default", "f", source("a.png"), "jpg", None, "converted/a.jpg")
            self.bucket.outputs.append(task.output_key)
            self.settle([Outcome(task, OutcomeKind.CONVERTED)], NOW)

    def states(self, job: str, keys: Sequence[str]) -> dict[str, JournalState]:
        """What is done."""
        found = super().states(job, keys)
        self.settle_meanwhile("states")
        return found

    def pending(self, job: str, keys: Sequence[str]) -> dict[str, PendingRequest]:
        """What is in flight."""
        found = super().pending(job, keys)
        self.settle_meanwhile("pending")
        return found

    def holders(self, slots: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Whose a key is."""
        found = super().holders(slots)
        self.settle_meanwhile("holders")
        return found


@pytest.mark.parametrize("answer", ["states", "pending", "holders", "outputs"])
@pytest.mark.parametrize("key", ["a.png", "a.heic"])
def test_what_settles_while_it_is_planned_is_never_sent_unseen(path: Path, answer: str, key: str) -> None:
    mark_sent(path, *feed(FakeBucket(pages_of("a.png")), path).tasks)
    bucket = FakeBucket(pages_of(key))
    kind = type("Settling", (Settling,), {"after": answer, "bucket": bucket})
    (fate,) = feed(bucket, path, kind=kind).fates.values()
    assert fate in {"look", "taken"}
    assert bucket.outputs == ["converted/a.jpg"]


########################################################################
# Handing out
########################################################################


class WatchedQueue(queue.Queue["Task | None"]):
    """A queue that says each time somebody wants to put something on it while it is full."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.refused = threading.Semaphore(0)

    def put(self, item: Task | None, *how: Any, **named: Any) -> None:
        """Put as usual."""
        if self.full():
            self.refused.release()
        super().put(item, *how, **named)


def test_blocked_workers_keep_the_listing_from_being_read(path: Path) -> None:
    fed, tasks, wanted = Fed(), WatchedQueue(4), settings()
    # Without end, but for a feeder that runs away.
    bucket = FakeBucket([source(f"{page:03}/{number}.png") for number in range(3)] for page in range(1000))
    with Journal(path, "aws", wanted) as journal:
        feeding = feeder(bucket, journal, wanted, tasks, fed)
        thread = threading.Thread(target=feeding.run, daemon=True)
        thread.start()
        # Three times in a row nobody took anything: 4 on the queue are a page and a third.
        assert all(tasks.refused.acquire(timeout=20) for _ in range(3))
        assert (tasks.qsize(), bucket.pages_read, fed.tasks) == (4, 2, [])
        assert feeding.is_ahead.is_set()
        feeding.context.stop.request(STOP)
        thread.join(20)
    fed.take(tasks)
    # Nobody empties the queue any more: workers see the flag, and need no marker.
    assert (thread.is_alive(), bucket.pages_read, len(fed.tasks)) == (False, 2, 4)
    assert fed.ended == [FeederUpdate()]


@pytest.mark.slow
def test_nothing_grows_with_the_bucket(path: Path) -> None:
    wanted, held = settings(), list[int]()
    pages = ([source(f"{page:06}/{number:06}.png") for number in range(200)] for page in range(60))
    tracemalloc.start()
    try:
        with Journal(path, "aws", wanted) as journal:
            planner = program.Planner(wanted, FakeBucket(pages), journal, program.StopFlag())
            for decisions in planner.decisions(lambda: 1):
                assert len(decisions) == 200
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # The keys of 39 pages alone would take more than half a megabyte.
    assert held[59] - held[20] < 200_000


def test_pages_are_read_side_by_side_only_while_workers_wait(path: Path) -> None:
    class Asking(FakeBucket):
        """A bucket that asks before each page how many it may read at a time."""

        asked: list[int]

        def list_pages(
            self, prefix: str, max_parallel: Callable[[], int], bucket: str = ""
        ) -> Generator[list[SourceObject], None, None]:
            self.asked = []
            for page in super().list_pages(prefix, max_parallel, bucket):
                self.asked.append(max_parallel())
                yield page

    bucket = Asking([*pages_of("a.png"), *pages_of("b.png"), *pages_of("c.png")])
    feed(bucket, path)
    assert bucket.asked == [program.LIST_THREADS, program.LIST_THREADS, 1]


@pytest.mark.parametrize("keys", [["a.png", "b.png"], []])
def test_a_stopped_feeder_hands_out_no_further_page(path: Path, keys: list[str]) -> None:
    fed, tasks, wanted = Fed(), queue.Queue[Task | None](), settings()
    bucket = FakeBucket([[source(key)] for key in keys])
    with Journal(path, "aws", wanted) as journal:
        feeding = feeder(bucket, journal, wanted, tasks, fed)
        feeding.context.stop.request(STOP)
        feeding.run()
    fed.take(tasks)
    assert (bucket.pages_read, fed.keys, fed.end_markers) == (len(keys[:1]), keys[:1], 2)
    assert fed.ended == [FeederUpdate()]


def broken_after(page: list[list[SourceObject]], error: Exception) -> Iterator[list[SourceObject]]:
    """A listing that breaks off."""
    yield from page
    raise error


@pytest.mark.parametrize(
    ("pages", "error", "code", "exit_code"),
    [
        (pages_of("a.png"), RunError("the listing broke off", "", code="s3"), "s3", 3),
        (pages_of("a.png"), program.usage_error("no such key file", ""), "usage", 3),
        ([], program.usage_error("no such key file", ""), "usage", 2),
        (pages_of("a.png"), ZeroDivisionError("a bug"), "bug", 3),
        (pages_of("a.png"), OSError("no file handles"), "environment", 3),
    ],
)
def test_a_listing_that_breaks_off_keeps_what_was_handed_out_and_sends_all_workers_home(
    path: Path, pages: list[list[SourceObject]], error: Exception, code: str, exit_code: int
) -> None:
    fed = feed(FakeBucket(broken_after(pages, error)), path)
    assert (len(fed.keys), fed.counts["listed"], fed.end_markers) == (len(pages), len(pages), 2)
    (ended,) = fed.ended
    assert ended.reason is not None
    assert (ended.reason.code, int(ended.reason.exit_code), ended.is_complete) == (code, exit_code, False)


def test_a_page_whose_outputs_cannot_be_seen_is_as_if_it_had_not_been_listed(path: Path) -> None:
    class Broken(FakeBucket):
        """A bucket whose outputs can be listed once."""

        def read_page(self, bucket: str, prefix: str, after: str = "", *_: str, **__: str) -> program.Page:
            if self.pages_read > 1:
                raise RunError("S3 went away", "run it again")
            # Not the last page, so that the emptiness behind it is not known.
            return program.Page([source("converted/z")], is_last=False)

    pages = [*pages_of("a.png"), *pages_of("zz.heic", "b.png", "c.jpg", "d/")]
    fed = feed(Broken(pages), path)
    assert (fed.keys, fed.outcomes, fed.counts["listed"]) == (["a.png"], [], 1)
    assert fed.end_markers == 2


@pytest.mark.parametrize("is_exhausted", [False, True])
def test_the_cap_ends_the_listing_only_when_one_more_is_wanted(path: Path, *, is_exhausted: bool) -> None:
    fed, tasks, wanted = Fed(), queue.Queue[Task | None](), settings("api.max_conversions=2")
    bucket = FakeBucket([*pages_of("a.png"), *pages_of("b.png"), *pages_of("c.png")])
    with Journal(path, "aws", wanted) as journal:
        feeding = feeder(bucket, journal, wanted, tasks, fed)
        ledger = feeding.context.ledger
        task = Task("default", "f", source("a.png"), "jpg", None, "converted/a.jpg")
        ledger.reserve(task)
        ledger.reserve(task)
        if is_exhausted:
            with pytest.raises(program.StopRequested):
                ledger.reserve(task)
        feeding.run()
    fed.take(tasks)
    assert (bucket.pages_read, fed.end_markers) == (1 if is_exhausted else 3, 2)
    assert fed.ended == [FeederUpdate(is_complete=not is_exhausted)]
    assert isinstance(ledger, program.Ledger)
    said = ledger.reason.message if ledger.reason else ""
    assert said == ("the cap of 2 conversions is reached" if is_exhausted else "")


########################################################################
# The account
########################################################################

LISTED = st.builds(
    source,
    st.from_regex(r"(p/|converted/|)[ab](\.png|\.heic|\.jpg|/|)", fullmatch=True),
    st.sampled_from([0, 1, 6_000_000_000]),
    archived=st.booleans(),
)
JOBS = st.sampled_from(
    [(), ("job x.target=jpg", "job y.target=jpg", "job y.prefix=p/"), ("job x.include=*.png", "job y.target=pdf")]
)
numbers = itertools.count()


@given(
    pages=st.lists(st.lists(LISTED, max_size=5), max_size=4),
    jobs=JOBS,
    outputs=st.sets(st.sampled_from(["converted/a.jpg", "converted/p/b.jpg.zip", "converted/z"])),
    failed=st.sets(st.sampled_from(["a.png", "p/b.heic"])),
)
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_object_and_job_gets_exactly_one_decision(
    tmp_path: Path, pages: list[list[SourceObject]], jobs: tuple[str, ...], outputs: set[str], failed: set[str]
) -> None:
    unique = {listed.key: listed for page in pages for listed in page}
    chosen = [[listed for listed in page if unique.pop(listed.key, None)] for page in pages]
    wanted = settings(*jobs)
    with Journal(tmp_path / f"{next(numbers)}.sqlite3", "aws", wanted) as journal:
        journal.begin_run(NOW)
        name = wanted.jobs[0].name
        tasks = [Task(name, "f", source(key), "jpg", None, f"converted/{key}.jpg") for key in failed]
        journal.settle([Outcome(task, OutcomeKind.FAILED, "network") for task in tasks], NOW)
        planner = program.Planner(wanted, FakeBucket(chosen, sorted(outputs)), journal, program.StopFlag())
        decisions = [decision for page in planner.decisions(lambda: 1) for decision in page]
    first = [decision for decision in decisions if not decision.is_retry]
    places = Counter((decision.job, decision.source.key) for decision in first)
    assert set(places.values()) <= {1}
    assert {key for _, key in places} == {listed.key for page in chosen for listed in page}
    # What no job wants is in no job's account.
    assert all(decision.job or decision.kind is DecisionKind.SKIP for decision in first)
    late = [decision for decision in decisions if decision.is_retry]
    postponed = [decision for decision in first if decision.kind is DecisionKind.POSTPONE]
    assert sorted(map(place_of, late)) == sorted(map(place_of, postponed))
    assert not any(decision.kind is DecisionKind.POSTPONE for decision in late)
    free = [decision.task.output_key for decision in decisions if decision.task and is_to_be_written(decision.task)]
    assert len(set(free)) == len(free)


def place_of(decision: Decision) -> tuple[str, str]:
    """The job and the object that a decision is about."""
    return decision.job, decision.source.key


def is_to_be_written(task: Task) -> bool:
    """Whether nothing but the task itself stands between it and its output key."""
    return not (task.holder or task.look or task.source.size > 5_000_000_000)
