"""The feeder: what of a listing is to be done, and never more of it in memory than the bound allows."""

from __future__ import annotations

import itertools
import queue
import threading
import time
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
from s3_bulk_convert import Counted, Event, FeedEnded, Journal, Outcome, S3Object, Task

NOW = 1_790_000_000.0
LISTED_AT = "2026-09-21T14:13:20.000Z"  # the same moment, as S3 writes it
DAY = 86_400
COMPLETE = ("s3.bucket=bucket", "convert.target=jpg", "api.key=ctf_sk_1", "run.workers=2")


class FakeBucket(program.Bucket):
    """A bucket that has these pages and outputs, and notes what is asked of it."""

    def __init__(self, pages: Iterable[Sequence[S3Object]], outputs: dict[str, float] | None = None) -> None:
        self.pages, self.outputs = pages, outputs or {}
        self.listed: list[str] = []
        self.pages_read = 0

    def check(self) -> None:
        """It exists."""

    def list_pages(self, prefix: str, hunger: Callable[[], int]) -> Generator[list[S3Object], None, None]:
        """The pages, those of the keys that begin with the prefix."""
        self.listed.append(prefix)
        for page in self.pages:
            self.pages_read += 1
            yield [source for source in page if source.key.startswith(prefix)]

    def presign(self, key: str) -> str:
        """A URL that shows how many there were before."""
        return f"https://signed/{key}?X-Amz-Signature=1"

    def is_our_output(self, key: str) -> bool:
        """No source is an output."""
        return False

    def has_nothing_of(self, key: str, planned_key: str) -> bool:
        """Every source is still there."""
        return False

    def output_is_of(self, task: Task) -> bool:
        """No output says what it was made of."""
        return False

    def existing_outputs(self, prefix: str, keys: Iterable[str]) -> dict[str, float]:
        """Those of the keys that are outputs."""
        return {key: self.outputs[key] for key in keys if key.startswith(prefix) and key in self.outputs}


@dataclass
class Fed:
    """What came of a feeder: tasks on the queue, outcomes and counts told, how it ended."""

    tasks: list[Task] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    ended: list[FeedEnded] = field(default_factory=list)
    end_markers: int = 0
    notes: list[program.Note] = field(default_factory=list)  # of any other kind

    def tell(self, note: program.Note) -> None:
        """Take a note as the recorder would."""
        if isinstance(note, Counted):
            for (_, name), count in note.counts.items():
                self.counts[name] += count
        elif isinstance(note, FeedEnded):
            self.ended.append(note)
        elif isinstance(note, Outcome):
            self.outcomes.append(note)
        else:
            self.notes.append(note)

    def take(self, tasks: queue.Queue[Task | None]) -> None:
        """Take what is on the queue as the workers would."""
        while not tasks.empty():
            task = tasks.get_nowait()
            if task is None:
                self.end_markers += 1
            else:
                self.tasks.append(task)

    @property
    def codes(self) -> dict[str, str]:
        """Source key -> how it ended without a worker."""
        return {done.task.key: done.code or done.event.value for done in self.outcomes}

    @property
    def keys(self) -> list[str]:
        """The source keys on the queue."""
        return [task.key for task in self.tasks]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A new checkpoint."""
    with Journal(tmp_path / "checkpoint.sqlite3", "bucket", "bucket") as opened:
        yield opened


def settings(*assignments: str) -> program.Settings:
    """A complete configuration with these options."""
    flags = [part for assignment in (*COMPLETE, *assignments) for part in ("--set", assignment)]
    return program.load_settings(None, {}, program.read_flags(program.build_parser().parse_args(flags)))


def source(key: str, size: int = 10, etag: str = "e1", *, archived: bool = False) -> S3Object:
    """An object in the bucket."""
    return S3Object(key, etag, size, LISTED_AT, archived)


def pages_of(*keys: str) -> list[list[S3Object]]:
    """One page with these keys."""
    return [[source(key) for key in keys]]


def feeder(
    bucket: FakeBucket, journal: Journal, wanted: program.Settings, tasks: queue.Queue[Task | None], fed: Fed
) -> program.Feeder:
    """A feeder with no limit to its pace."""
    pacer, stop = program.Pacer(10**9), program.StopFlag()
    gate, trust = program.Gate(pacer.hear), program.UrlTrust()
    shared = program.Shared(wanted, stop, gate, bucket, trust, fed.tell, lambda _: None)
    return program.Feeder(shared, pacer, journal, tasks)


def feed(bucket: FakeBucket, journal: Journal, wanted: program.Settings | None = None) -> Fed:
    """Run a feeder to its end on a queue without a bound."""
    fed, tasks = Fed(), queue.Queue[Task | None]()
    feeder(bucket, journal, wanted or settings(), tasks, fed).run()
    fed.take(tasks)
    return fed


def settle(journal: Journal, tasks: Iterable[Task], event: Event, *, permanent: bool = False) -> None:
    """Write down how tasks ended."""
    journal.end([Outcome(task, event, permanent=permanent, output_key=task.output_key) for task in tasks], NOW)


########################################################################
# Selection
########################################################################


@pytest.mark.parametrize(
    ("listed", "options", "expected"),
    [
        pytest.param(source("a.png"), [], "wanted", id="wanted"),
        pytest.param(source("a.gif"), ["convert.include=*.png"], "not_matched", id="not matched"),
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
def test_each_listed_object_has_one_fate(journal: Journal, listed: S3Object, options: list[str], expected: str) -> None:
    fed = feed(FakeBucket([[listed]]), journal, settings(*options))
    counts = {"wanted": len(fed.tasks)} | {name: count for name, count in fed.counts.items() if name != "listed"}
    assert {name: count for name, count in counts.items() if count} == {expected: 1}
    assert fed.counts["listed"] == 1


def test_select_counts_a_page_by_hand() -> None:
    page = [source("a.png"), source("b.jpg"), source("c/"), source("d.png", 0), source("out/e.png"), source("f.gif")]
    wanted = settings("convert.include=*.png *.jpg")
    routes = [program.make_route(job, NOW) for job in wanted.jobs]
    counts: Counter[tuple[str, str]] = Counter()
    assert [found.source.key for found in program.select(page, routes, ("out/",), program.Shard(), counts)] == ["a.png"]
    of_no_job = {"listed": 4, "folder": 1, "empty": 1, "own_output": 1, "not_matched": 1}
    of_the_job = {"listed": 2, "same_format": 1}
    expected = [*((("", name), count) for name, count in of_no_job.items())]
    expected += [*((("default", name), count) for name, count in of_the_job.items())]
    assert counts == dict(expected)


def test_an_object_that_two_jobs_want_counts_twice_and_is_listed_once(journal: Journal) -> None:
    jobs = settings("job a.target=jpg", "job b.target=pdf", "job b.include=*.png")
    bucket = FakeBucket(pages_of("x.png", "y.gif"))
    fed = feed(bucket, journal, jobs)
    assert [(task.job, task.key) for task in fed.tasks] == [("a", "x.png"), ("b", "x.png"), ("a", "y.gif")]
    assert (fed.counts["listed"], bucket.listed) == (3, [""])


def test_jobs_with_prefixes_of_their_own_are_listed_apart(journal: Journal) -> None:
    bucket = FakeBucket(pages_of("p/x.png", "q/y.png"))
    fed = feed(bucket, journal, settings("job a.prefix=p/", "job b.prefix=q/"))
    assert (bucket.listed, fed.keys) == (["p/", "q/"], ["p/x.png", "q/y.png"])


########################################################################
# What is done already
########################################################################


@pytest.mark.parametrize(
    ("event", "permanent", "etag", "retry", "expected"),
    [
        pytest.param(Event.CONVERTED, False, "e1", False, "already_done", id="converted"),
        pytest.param(Event.FOUND, False, "e1", False, "already_done", id="found"),
        pytest.param(Event.FAILED, True, "e1", False, "failed_before", id="failed for good"),
        pytest.param(Event.FAILED, True, "e1", True, "to do", id="failed for good, to be retried"),
        pytest.param(Event.FAILED, False, "e1", False, "to do", id="failed for now"),
        pytest.param(Event.CONVERTED, False, "e1", True, "already_done", id="converted, failures to be retried"),
        pytest.param(Event.CONVERTED, False, "e2", False, "to do", id="overwritten since it was converted"),
        pytest.param(Event.FAILED, True, "e2", False, "to do", id="overwritten since it failed"),
    ],
)
def test_the_journal_tells_what_is_unfinished(
    journal: Journal, event: Event, etag: str, expected: str, *, permanent: bool, retry: bool
) -> None:
    settle(journal, feed(FakeBucket(pages_of("a.png")), journal).tasks, event, permanent=permanent)
    wanted = replace(settings(), retry_failed=retry)
    fed = feed(FakeBucket([[source("a.png", etag=etag)]]), journal, wanted)
    found = {name for name, count in fed.counts.items() if count and name not in {"listed", "retried"}}
    assert (found or {"to do"}) == {expected}
    assert fed.keys == (["a.png"] if expected == "to do" else [])


def test_unfinished_asks_for_each_job_apart(journal: Journal) -> None:
    first, second = settings("job a.target=jpg", "job b.target=pdf").jobs
    candidates = [program.Candidate(job, source("x.png")) for job in (first, second)]
    done = Task("a", first.fingerprint, "x.png", "e1", 10, "jpg", None, "converted/x.jpg", "id")
    settle(journal, [done], Event.CONVERTED)
    counts: Counter[tuple[str, str]] = Counter()
    left = list(program.unfinished(candidates, journal, counts, retry=False))
    assert ([found.job.name for found in left], counts) == (["b"], {("a", "already_done"): 1})


def test_a_crashed_request_is_sent_again_as_it_was(journal: Journal) -> None:
    (task,) = feed(FakeBucket(pages_of("a.png")), journal).tasks
    (again,) = feed(FakeBucket(pages_of("a.png")), journal).tasks
    assert (again.idempotency_key, again.url, again.resumed) == (task.idempotency_key, task.url, True)
    assert not task.resumed


def test_a_request_that_the_api_has_forgotten_is_looked_for_before_it_is_sent(journal: Journal) -> None:
    (task,) = feed(FakeBucket(pages_of("a.png")), journal).tasks
    journal.begin([replace(task, url="https://old")], time.time() - DAY - 60)
    (again,) = feed(FakeBucket(pages_of("a.png")), journal).tasks
    assert (again.overdue, again.resumed, again.look_first) == (True, False, True)
    assert again.url != "https://old"


def test_a_crashed_request_for_an_older_version_is_not_sent_again(journal: Journal) -> None:
    (task,) = feed(FakeBucket(pages_of("a.png")), journal).tasks
    (again,) = feed(FakeBucket([[source("a.png", etag="e2")]]), journal).tasks
    assert again.idempotency_key != task.idempotency_key
    assert (again.resumed, again.etag) == (False, "e2")


@pytest.mark.parametrize(
    ("output", "written", "options", "expected"),
    [
        pytest.param("converted/a.jpg", NOW + 60, [], {"a.png": "found"}, id="newer"),
        pytest.param("converted/a.jpg.zip", NOW + 60, [], {"a.png": "found"}, id="newer archive of pages"),
        pytest.param("converted/a.jpg", NOW - 60, [], {}, id="older"),
        pytest.param("converted/b.jpg", NOW + 60, [], {}, id="another's"),
        pytest.param("converted/a.jpg", NOW + 60, ["run.skip_existing=no"], {}, id="not asked for"),
    ],
)
def test_without_a_checkpoint_a_newer_output_counts_as_done(
    journal: Journal, output: str, written: float, options: list[str], expected: dict[str, str]
) -> None:
    fed = feed(FakeBucket(pages_of("a.png"), {output: written}), journal, settings(*options))
    assert fed.codes == expected
    assert fed.keys == ([] if expected else ["a.png"])


########################################################################
# What cannot be done
########################################################################


def test_the_first_source_keeps_an_output_key(journal: Journal) -> None:
    fed = feed(FakeBucket(pages_of("a.heic", "a.png", "a.tiff", "b.png")), journal)
    assert fed.keys == ["a.heic", "b.png"]
    assert fed.codes == {"a.png": "output_collision", "a.tiff": "output_collision"}
    assert all(done.permanent and "{ext}" in done.message for done in fed.outcomes)


def test_the_first_source_keeps_an_output_key_on_the_next_page(journal: Journal) -> None:
    fed = feed(FakeBucket([*pages_of("a.heic"), *pages_of("a.png")]), journal)
    assert (fed.keys, fed.codes) == (["a.heic"], {"a.png": "output_collision"})


@pytest.mark.parametrize("made", ["converted/a.jpg", "converted/a.jpg.zip"])
def test_an_output_key_stays_its_owner_s_in_every_later_run(journal: Journal, made: str) -> None:
    tasks = feed(FakeBucket(pages_of("a.png")), journal).tasks
    settle(journal, [replace(task, output_key=made) for task in tasks], Event.CONVERTED)
    fed = feed(FakeBucket(pages_of("a.heic", "a.png")), journal)
    assert (fed.keys, fed.codes) == ([], {"a.heic": "output_collision"})
    assert fed.counts["already_done"] == 1


def test_an_output_that_is_found_belongs_to_its_source_on_the_next_page_too(journal: Journal) -> None:
    # The recorder may be slow: what the feeder told of the first page need not be in the journal yet.
    pages = [*pages_of("a.heic"), *pages_of("a.png")]
    fed = feed(FakeBucket(pages, {"converted/a.jpg": NOW + 60}), journal)
    assert (fed.keys, fed.codes) == ([], {"a.heic": "found", "a.png": "output_collision"})


def test_an_object_that_its_own_output_would_replace_is_a_failure(journal: Journal) -> None:
    wanted = settings("s3.output_key={key}", "convert.same_format=convert")
    fed = feed(FakeBucket(pages_of("a.jpg")), journal, wanted)
    assert (fed.keys, fed.codes) == ([], {"a.jpg": "output_collision"})


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (5_000_000_001, [], "too_large"),
        (5_000_000_000, [], "sent"),
        (1001, ["api.max_size=1KB"], "too_large"),
        (100_000_001, ["api.jobs_above=never"], "too_large"),
        (100_000_000, ["api.jobs_above=never"], "sent"),
    ],
)
def test_an_object_that_is_too_large_is_never_sent(
    journal: Journal, size: int, options: list[str], expected: str
) -> None:
    fed = feed(FakeBucket([[source("a.png", size)]]), journal, settings(*options))
    assert [*fed.codes.values(), *("sent" for _ in fed.tasks)] == [expected]


@pytest.mark.parametrize(("length", "expected"), [(1006, "sent"), (1007, "output_key_too_long")])
def test_an_output_key_that_s3_would_refuse_is_never_paid_for(journal: Journal, length: int, expected: str) -> None:
    fed = feed(FakeBucket(pages_of("k" * length)), journal)
    assert [*fed.codes.values(), *("sent" for _ in fed.tasks)] == [expected]


class SettlesMeanwhile(Journal):
    """A checkpoint in which all that is in flight is converted as soon as it has answered a question."""

    in_flight: Sequence[Task] = ()

    def settle_meanwhile(self) -> None:
        """Have the recorder settle what the workers have come to."""
        tasks, self.in_flight = self.in_flight, ()
        settle(self, list(tasks), Event.CONVERTED)


class SettlesAfterKeys(SettlesMeanwhile):
    """The question whose a key is."""

    def owners(self, claims: Sequence[str]) -> dict[str, str]:
        """Whose outputs are there."""
        found = super().owners(claims)
        self.settle_meanwhile()
        return found

    def claimants(self, claims: Sequence[str]) -> dict[str, str]:
        """Whose outputs are on their way."""
        found = super().claimants(claims)
        self.settle_meanwhile()
        return found


class SettlesAfterStates(SettlesMeanwhile):
    """The question what is done."""

    def states(self, fingerprint: str, keys: Sequence[str]) -> dict[str, program.State]:
        """What is settled."""
        found = super().states(fingerprint, keys)
        self.settle_meanwhile()
        return found


@pytest.fixture
def feed_twice(tmp_path: Path) -> Callable[..., Fed]:
    """Feed one page, whose tasks are in flight, and then another, in the planning of which they are settled."""

    def feed_twice(kind: type[SettlesMeanwhile], first: str, second: str) -> Fed:
        opened = kind(tmp_path / "settles.sqlite3", "bucket", "bucket")
        with opened:
            opened.in_flight = feed(FakeBucket(pages_of(first)), opened).tasks
            return feed(FakeBucket(pages_of(second)), opened)

    return feed_twice


def test_a_key_whose_owner_settles_while_it_is_planned_goes_to_nobody_else(feed_twice: Callable[..., Fed]) -> None:
    fed = feed_twice(SettlesAfterKeys, "a.heic", "a.png")
    assert (fed.keys, fed.codes) == ([], {"a.png": "output_collision"})


def test_an_object_that_settles_while_it_is_planned_again_is_done(feed_twice: Callable[..., Fed]) -> None:
    fed = feed_twice(SettlesAfterStates, "a.png", "a.png")
    assert (fed.keys, fed.codes, fed.counts["already_done"]) == ([], {}, 1)


########################################################################
# Handing out
########################################################################


class WatchedQueue(queue.Queue["Task | None"]):
    """A queue that calls `before_put` each time somebody wants to put something on it."""

    def __init__(self, maxsize: int, before_put: Callable[[Task | None], None]) -> None:
        super().__init__(maxsize)
        self.before_put = before_put

    def put(self, item: Task | None, *how: Any, **named: Any) -> None:
        """Put as usual."""
        self.before_put(item)
        super().put(item, *how, **named)


def test_every_task_is_in_the_journal_before_a_worker_can_see_it(journal: Journal) -> None:
    seen: dict[str, bool] = {}

    def look(task: Task | None) -> None:
        with Journal(journal.path, "bucket", "bucket") as second:
            seen.update({task.key: task.key in second.sent(task.fingerprint, [task.key])} if task else {})

    fed = Fed()
    feeder(FakeBucket(pages_of(*map(str, range(9)))), journal, settings(), WatchedQueue(0, look), fed).run()
    assert seen == dict.fromkeys(map(str, range(9)), True)


def test_blocked_workers_keep_the_listing_from_being_read(journal: Journal) -> None:
    refused = threading.Semaphore(0)
    fed, tasks = Fed(), WatchedQueue(4, lambda _: refused.release() if tasks.full() else None)
    # Without end, but for a feeder that runs away.
    endless = ([source(f"{page:03}/{number}.png") for number in range(3)] for page in range(1000))
    bucket = FakeBucket(endless)
    feeding = feeder(bucket, journal, settings(), tasks, fed)
    thread = threading.Thread(target=feeding.run, daemon=True)
    thread.start()
    # Three times in a row nobody took anything: 4 on the queue are a page and a third.
    assert all(refused.acquire(timeout=20) for _ in range(3))
    assert (tasks.qsize(), bucket.pages_read, fed.tasks) == (4, 2, [])
    feeding.shared.stop.request(program.Stop("enough", ""))
    while thread.is_alive():
        fed.take(tasks)
        thread.join(0.01)
    fed.take(tasks)
    assert bucket.pages_read == 2
    assert fed.end_markers == 2
    assert fed.counts["listed"] == len(fed.tasks) + len(fed.outcomes) == 6


def test_what_a_stopped_feeder_does_not_hand_out_is_left_and_unclaimed(journal: Journal) -> None:
    fed, tasks = Fed(), queue.Queue[Task | None]()
    feeding = feeder(FakeBucket(pages_of("a.png", "b.png")), journal, settings(), tasks, fed)
    feeding.shared.stop.request(program.Stop("enough", ""))
    feeding.run()
    fed.take(tasks)
    assert (fed.keys, fed.codes, fed.end_markers) == ([], {"a.png": "left", "b.png": "left"}, 2)
    assert not journal.claimants(["converted/a.jpg", "converted/b.jpg"])


class FullDisk(Journal):
    """A checkpoint whose second batch meets a full disk."""

    batches = 0

    def begin(self, tasks: Sequence[Task], now: float) -> None:
        """Write down the first batch."""
        self.batches += 1
        if self.batches > 1:
            raise program.RunStopped("the checkpoint cannot be written: disk is full", "free some space")
        super().begin(tasks, now)


class Unsigned(FakeBucket):
    """A bucket whose credentials go while URLs are signed."""

    signed = 0

    def presign(self, key: str) -> str:
        """Sign the first four."""
        self.signed += 1
        if self.signed > 4:
            raise program.RunStopped("S3 could not be reached for signing a URL", "check the AWS credentials")
        return super().presign(key)


@pytest.mark.parametrize(
    ("checkpoint", "kind", "why"),
    [(FullDisk, FakeBucket, "disk is full"), (Journal, Unsigned, "could not be reached for signing")],
)
def test_what_a_feeder_cannot_hand_out_is_left_and_the_reason_is_kept(
    checkpoint: type[Journal], kind: type[FakeBucket], why: str, tmp_path: Path
) -> None:
    with checkpoint(tmp_path / "full.sqlite3", "bucket", "bucket") as opened:
        fed = feed(kind([[source(name) for name in "abcdefghi"]]), opened, settings())
    assert fed.keys == list("abcd")
    assert fed.codes == dict.fromkeys("efghi", "left")
    assert fed.ended[0].stop is not None
    assert why in fed.ended[0].stop.because


def test_an_overdue_request_that_is_not_begun_anew_is_not_forgotten(journal: Journal) -> None:
    (sent,) = feed(FakeBucket(pages_of("a.png")), journal, settings()).tasks
    journal.begin([sent], time.time() - 2 * DAY)
    fed, tasks = Fed(), queue.Queue[Task | None]()
    feeding = feeder(FakeBucket(pages_of("a.png")), journal, settings(), tasks, fed)
    feeding.shared.stop.request(program.Stop("enough", ""))
    feeding.run()
    journal.end(fed.outcomes, time.time())
    (again,) = feed(FakeBucket(pages_of("a.png")), journal, settings()).tasks
    assert again.overdue


def test_the_cap_on_conversions_is_kept_and_the_rest_is_left(journal: Journal) -> None:
    bucket = FakeBucket([*pages_of(*"abcdefghi"), *pages_of(*"jkl")])
    fed = feed(bucket, journal, settings("api.max_conversions=6"))
    assert fed.keys == list("abcdef")
    assert (fed.counts["listed"], fed.counts["left"]) == (9, 3)
    assert fed.ended[0].stop is not None
    assert fed.ended[0].stop.because == "the cap of 6 conversions is reached"


def test_a_cap_that_is_just_enough_stops_nothing(journal: Journal) -> None:
    fed = feed(FakeBucket(pages_of(*"abcd")), journal, settings("api.max_conversions=4"))
    assert (fed.keys, fed.ended) == (list("abcd"), [FeedEnded(None, is_complete=True)])


def test_copies_within_s3_do_not_use_up_the_cap_on_paid_conversions(journal: Journal) -> None:
    wanted = settings("api.max_conversions=1", "convert.same_format=copy")
    fed = feed(FakeBucket(pages_of("a.jpg", "b.jpg", "c.png")), journal, wanted)
    assert (fed.keys, fed.counts["left"]) == (["a.jpg", "b.jpg", "c.png"], 0)


def test_a_listing_that_breaks_off_ends_the_run_and_keeps_what_was_handed_out(journal: Journal) -> None:
    def broken() -> Iterator[list[S3Object]]:
        yield from pages_of("a.png")
        raise program.RunStopped("the listing broke off", "run it again")

    fed = feed(FakeBucket(broken()), journal)
    assert (fed.keys, fed.end_markers) == (["a.png"], 2)
    assert fed.ended == [FeedEnded(program.Stop("the listing broke off", "run it again"))]


def test_a_page_that_s3_breaks_off_in_the_middle_of_is_as_if_it_had_not_been_listed(journal: Journal) -> None:
    class Broken(FakeBucket):
        """A bucket whose outputs can be listed once."""

        def existing_outputs(self, prefix: str, keys: Iterable[str]) -> dict[str, float]:
            if self.pages_read > 1:
                raise program.RunStopped("S3 went away", "run it again")
            return super().existing_outputs(prefix, keys)

    fed = feed(Broken([*pages_of("a.png"), *pages_of("a.heic", "b.png", "c.jpg", "d/")]), journal)
    assert (fed.keys, fed.codes, fed.counts["listed"]) == (["a.png"], {}, 1)


@pytest.mark.parametrize(
    ("key", "options", "has_url"),
    [
        ("a.png", [], True),
        ("a.png", ["api.transfer=url"], True),
        ("a.png", ["api.transfer=upload"], False),
        ("up/../a.png", [], False),
        ("a.jpg", ["convert.same_format=copy"], False),
    ],
)
def test_a_url_is_signed_for_what_can_be_fetched_by_one(
    journal: Journal, key: str, options: list[str], *, has_url: bool
) -> None:
    (task,) = feed(FakeBucket(pages_of(key)), journal, settings(*options)).tasks
    assert bool(task.url) is has_url


########################################################################
# The account
########################################################################

LISTED = st.builds(
    source,
    st.from_regex(r"(p/|converted/|)[ab](\.png|\.heic|\.jpg|/|)", fullmatch=True),
    st.sampled_from([0, 1, 6_000_000_000]),
    archived=st.booleans(),
)
numbers = itertools.count()


@given(
    pages=st.lists(st.lists(LISTED, max_size=5), max_size=4),
    cap=st.none() | st.integers(1, 4),
    ends_are_known=st.booleans(),
)
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_listed_object_ends_in_exactly_one_count(
    tmp_path: Path, pages: list[list[S3Object]], cap: int | None, *, ends_are_known: bool
) -> None:
    unique = {listed.key: listed for page in pages for listed in page}
    chosen = [[listed for listed in page if unique.pop(listed.key, None)] for page in pages]
    outputs = {"converted/a.jpg": NOW + 60} if ends_are_known else {}
    with Journal(tmp_path / f"{next(numbers)}.sqlite3", "bucket", "bucket") as journal:
        fed = feed(FakeBucket(chosen, outputs), journal, settings(f"api.max_conversions={cap or 'none'}"))
    listed = fed.counts.pop("listed", 0)
    assert listed == fed.counts.total() + len(fed.tasks) + len(fed.outcomes)
    assert len(set(fed.keys) | set(fed.codes)) == len(fed.keys) + len(fed.codes)
    assert len({task.output_key for task in fed.tasks}) == len(fed.tasks)
