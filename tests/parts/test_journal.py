"""The checkpoint on a real file: nothing is changed, nothing is lost, nothing of another program's is touched."""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import (
    Journal,
    JournalState,
    Outcome,
    OutcomeKind,
    PendingRequest,
    SourceObject,
    StoredOutput,
    Task,
)

SCRIPT = Path(program.__file__).resolve()
NOW = 1_790_000_000.0
ODD_KEYS = ["line\nbreak.png", "nul\0in it.png", "😀.png", "quo'te\".png", "%s ? ;--.png", "{}", "", "k" * 1024]
REQUEST = PendingRequest("etag-1", "id", "/v1/convert", "https://signed", NOW - 60, "job-7", 2, 1)
OUTPUT = StoredOutput("converted/a.jpg", "etag-of-output", 5)
TWO_JOBS = ("job a.target=jpg", "job b.quality=50")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a checkpoint may be made."""
    return tmp_path / "checkpoint.sqlite3"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """A new checkpoint, in a run."""
    with opened(path) as made:
        made.begin_run(NOW)
        yield made


def opened(path: Path, *options: str, endpoint: str = "aws", read_only: bool = False) -> Journal:
    """A checkpoint as a configuration sees it. `options`: `SECTION.OPTION=VALUE` each, the last one counts."""
    parser = configparser.ConfigParser(interpolation=None)
    for option in ("s3.bucket=bucket", "convert.target=jpg", *options):
        name, _, value = option.partition("=")
        section, _, name = name.rpartition(".")
        parser.read_dict({section: {name: value}})
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
        parser.write(config)
        config.flush()
        settings = program.load_settings(Path(config.name), {"CTF_API_KEY": "k"}, [])
    return Journal(path, endpoint, settings, read_only=read_only)


def task(key: str = "a.png", output_key: str = "converted/a.jpg", job: str = "default", **changes: Any) -> Task:
    """One conversion to jpg."""
    return replace(Task(job, "f", SourceObject(key, "etag-1", 10), "jpg", None, output_key), **changes)


def converted(done: Task, **changes: Any) -> Outcome:
    """The outcome of a conversion that went well, or what is left of it after these changes."""
    output = OUTPUT._replace(key=done.output_key)
    return replace(Outcome(done, OutcomeKind.CONVERTED, output=output, requests=1), **changes)


def failed(done: Task, code: str = "network", **changes: Any) -> Outcome:
    """The outcome of a conversion that failed."""
    return replace(Outcome(done, OutcomeKind.FAILED, code, "it says why"), **changes)


def rows(path: Path, query: str) -> list[Any]:
    """What a second connection sees of a checkpoint."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def change(path: Path, *statements: str) -> None:
    """Change a file behind the program's back."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


########################################################################
# Rows
########################################################################


def test_a_log_row_says_all_that_is_known(journal: Journal) -> None:
    output = StoredOutput("converted/a.jpg.zip", "etag-of-output", 5)
    done = converted(task(), output=output, seconds=1.23456, requests=3, code="c", message="m", permanent=True)
    journal.settle([replace(done, runs_failed=4, possible_double_charge=True)], NOW)
    [row] = journal.history("a.png")
    assert (row.pop("id") > 0, row.pop("job")) == (True, 1)
    expected: dict[str, Any] = {"time": NOW, "key": "a.png", "etag": "etag-1", "event": "converted", "requests": 3}
    expected |= {
        "output_key": "bucket/converted/a.jpg.zip",
        "output_etag": "etag-of-output",
        "bytes_out": 5,
        "pages": None,
    }
    expected |= {"code": "c", "message": "m", "permanent": 1, "runs_failed": 4, "charged_twice": 1, "seconds": 1.235}
    expected |= {"purpose": None}
    expected |= {"name": "default", "target": "jpg", "output_bucket": "bucket"}
    assert row == {**expected, "place": "converted/{dir}{stem}.{target}"}


def test_a_finished_object_takes_250_bytes_at_most(path: Path) -> None:
    digest = "0123456789abcdef" * 2
    keys = [f"photos/2024/05/21/picture-{number:010}.png" for number in range(5_000)]
    assert {len(key) for key in keys} == {40}
    with opened(path) as journal:
        journal.begin_run(NOW)
        for start in range(0, len(keys), 100):
            # As workers finish them: not in the order of the listing.
            page = sorted(keys[start : start + 100], key=lambda key: key[::-1])
            done = [task(key, f"converted/{key}.jpg", source=SourceObject(key, digest, 123_456)) for key in page]
            output = StoredOutput("", digest, 54_321)
            outcomes = [converted(each, output=output._replace(key=each.output_key), seconds=0.912) for each in done]
            for first in range(0, 100, 10):
                journal.settle(outcomes[first : first + 10], NOW)
    assert path.stat().st_size / len(keys) <= 250


def test_a_request_is_on_the_disk_before_it_may_be_sent(journal: Journal, path: Path) -> None:
    journal.mark_sent(task(), REQUEST)
    columns = "key, etag, idempotency_key, path, url, sent_at, job_id, payments, is_doubtful, slot"
    assert rows(path, f"SELECT {columns} FROM in_flight") == [("a.png", *REQUEST, "bucket/converted/a.jpg")]


@pytest.mark.parametrize("refused", ["DELETE ON in_flight", "INSERT ON log"])
def test_outcome_and_request_change_together_or_not_at_all(journal: Journal, path: Path, refused: str) -> None:
    for key in "ab":
        journal.mark_sent(task(key), REQUEST)
    # The second of two is refused, as a disk may refuse it.
    old = "old" if "DELETE" in refused else "new"
    change(path, f"CREATE TRIGGER t BEFORE {refused} WHEN {old}.key = 'b' BEGIN SELECT RAISE(ABORT, 'no'); END")
    outcomes = [converted(task("a")), converted(task("b"))]
    with pytest.raises(program.RunError, match="cannot be used: no"):
        journal.settle(outcomes, NOW)
    assert rows(path, "SELECT count(*) FROM log") == [(0,)]
    assert rows(path, "SELECT key FROM in_flight ORDER BY key") == [("a",), ("b",)]
    change(path, "DROP TRIGGER t")
    journal.settle(outcomes, NOW)
    assert rows(path, "SELECT key FROM log") == [("a",), ("b",)]
    assert rows(path, "SELECT key FROM in_flight") == []


@pytest.mark.parametrize(
    ("kind", "pending", "logged"),
    [
        (OutcomeKind.CONVERTED, None, 1),
        (OutcomeKind.FOUND, None, 1),
        (OutcomeKind.ADOPTED, None, 1),
        (OutcomeKind.SKIPPED, None, 0),
        (OutcomeKind.FAILED, None, 1),
        (OutcomeKind.FAILED, REQUEST._replace(job_id="another"), 1),
        (OutcomeKind.LEFT, REQUEST._replace(url=""), 0),
        (OutcomeKind.LEFT, None, 0),
    ],
)
def test_a_request_that_may_have_been_paid_for_is_kept_as_it_was_sent_last(
    journal: Journal, path: Path, kind: OutcomeKind, pending: PendingRequest | None, logged: int
) -> None:
    journal.mark_sent(task(), REQUEST)
    journal.settle([converted(task(), kind=kind, pending=pending)], NOW)
    assert rows(path, "SELECT count(*) FROM log") == [(logged,)]
    assert journal.pending("default", ["a.png"]) == ({"a.png": pending} if pending else {})


KNOWN = JournalState("a.png", "etag-1", "failed", 0, 0, "output_collision")


@pytest.mark.parametrize(
    ("outcome", "logged"),
    [
        pytest.param(failed(task(known=KNOWN), "output_collision"), 0, id="the same failure"),
        pytest.param(failed(task(), "output_collision"), 1, id="its first time"),
        pytest.param(failed(task(known=KNOWN._replace(version="etag-0")), "output_collision"), 1, id="another version"),
        pytest.param(failed(task(known=KNOWN), "too_large"), 1, id="another failure"),
        pytest.param(failed(task(known=KNOWN), "output_collision", permanent=True), 1, id="permanent now"),
        pytest.param(failed(task(known=KNOWN), "output_collision", runs_failed=1), 1, id="in one run more"),
        pytest.param(
            failed(task(known=KNOWN), "output_collision", possible_double_charge=True), 1, id="perhaps paid twice"
        ),
        pytest.param(converted(task(known=KNOWN._replace(event="converted", code=""))), 1, id="converted once more"),
        pytest.param(failed(task(source=SourceObject("a.png"))), 0, id="a key that is not there"),
        pytest.param(Outcome(task(), OutcomeKind.SKIPPED, program.OWN_OUTPUT), 1, id="an own output"),
        pytest.param(Outcome(task(), OutcomeKind.SKIPPED, program.ARCHIVED), 0, id="what the next look shows again"),
    ],
)
def test_the_log_gets_a_row_where_there_is_news(journal: Journal, path: Path, outcome: Outcome, logged: int) -> None:
    journal.settle([outcome], NOW)
    assert rows(path, "SELECT count(*) FROM log") == [(logged,)]


########################################################################
# Questions
########################################################################


def test_the_newest_row_is_the_state(journal: Journal) -> None:
    journal.settle([failed(task(), permanent=True, runs_failed=5)], NOW + 99)
    assert journal.states("default", ["a.png"]) == {"a.png": ("a.png", "etag-1", "failed", 1, 5, "network", None)}
    newer = task(source=SourceObject("a.png", "etag-2", 10))
    journal.settle([converted(newer)], NOW)
    newest = ("a.png", "etag-2", "converted", 0, 0, "", None)
    assert journal.states("default", ["a.png", "never seen"]) == {"a.png": newest}


@pytest.mark.parametrize("purpose", ["run 1", program.TAG])
def test_a_failure_changes_nothing_of_what_is_left_to_do_of_its_version(journal: Journal, purpose: str) -> None:
    journal.settle([failed(task(known=KNOWN._replace(purpose=purpose)), "network")], NOW)
    assert journal.states("default", ["a.png"])["a.png"][6] == purpose
    known = JournalState(*journal.states("default", ["a.png"])["a.png"])
    journal.settle([failed(task(known=known, source=SourceObject("a.png", "etag-2", 10)), "network")], NOW)
    assert journal.states("default", ["a.png"])["a.png"][6] is None
    journal.settle([converted(task(known=known))], NOW)
    assert journal.states("default", ["a.png"])["a.png"][6] is None


def test_what_a_run_has_done_can_be_left_out(journal: Journal, path: Path) -> None:
    journal.settle([failed(task())], NOW)
    with opened(path) as next_run:
        next_run.begin_run(NOW)
        next_run.settle([converted(task())], NOW)
        next_run.horizon = next_run.run_id << 32
        assert next_run.states("default", ["a.png"])["a.png"][2] == "failed"


@pytest.mark.parametrize(
    ("option", "endpoint"),
    [
        ("", "http://elsewhere"),
        ("s3.bucket=another", "aws"),
        ("s3.output_bucket=outputs", "aws"),
        ("s3.output_key=out/{key}.{target}", "aws"),
        ("convert.target=webp", "aws"),
        ("convert.quality=50", "aws"),
    ],
)
def test_another_bucket_or_job_has_its_own_state(journal: Journal, path: Path, option: str, endpoint: str) -> None:
    journal.settle([failed(task(), pending=REQUEST)], NOW)
    with opened(path, *filter(None, [option]), endpoint=endpoint) as another:
        assert [*another.states("default", ["a.png"]), *another.pending("default", ["a.png"])] == []
    with opened(path) as same:
        assert list(same.states("default", ["a.png"])) == ["a.png"]
        assert same.pending("default", ["a.png"]) == {"a.png": REQUEST}


@pytest.mark.parametrize(("option", "endpoint"), [("s3.output_bucket=outputs", "aws"), ("", "http://elsewhere")])
def test_the_counts_of_a_job_with_other_buckets_are_not_those_of_this_configuration(
    journal: Journal, path: Path, option: str, endpoint: str
) -> None:
    journal.settle([failed(task(), "conversion_failed", permanent=True)], NOW)
    assert [counts["configured_as"] for counts in journal.counts()] == ["default"]
    with opened(path, *filter(None, [option]), endpoint=endpoint, read_only=True) as another:
        assert [counts["configured_as"] for counts in another.counts()] == [None]


@pytest.mark.parametrize(
    ("events", "is_known"),
    [
        (["a converted"], True),
        (["b converted", "a converted"], True),
        (["a converted", "b converted"], False),
        (["a converted", "b found"], False),
        (["a converted", "b failed"], True),
        (["a failed", "b converted"], True),
        (["a failed", "a converted", "b converted"], False),
        (["a converted", "b converted", "a found"], True),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else str(value),
)
def test_what_another_job_has_replaced_is_not_done_any_more(path: Path, events: list[str], *, is_known: bool) -> None:
    with opened(path, *TWO_JOBS) as journal:
        journal.begin_run(NOW)
        for event in events:
            job, _, kind = event.partition(" ")
            journal.settle([converted(task(job=job), kind=OutcomeKind(kind))], NOW)
        assert bool(journal.states("a", ["a.png"])) is is_known
    with opened(path.with_name("apart"), *TWO_JOBS, "job b.output_key=b/{stem}.{target}") as journal:
        journal.begin_run(NOW)
        journal.settle([converted(task(job=job)) for job in "ab"], NOW)
        assert journal.states("a", ["a.png"])


@pytest.mark.parametrize(
    ("outcome", "holder"),
    [
        pytest.param(failed(task(), pending=REQUEST), ("bucket", "a.png"), id="perhaps made"),
        pytest.param(converted(task(), kind=OutcomeKind.ADOPTED), ("bucket", "a.png"), id="adopted"),
        pytest.param(
            converted(task(), kind=OutcomeKind.ADOPTED, output=OUTPUT._replace(key="converted/a.jpg.zip")),
            ("bucket", "a.png"),
            id="adopted archive of pages",
        ),
        pytest.param(converted(task()), None, id="converted"),
        pytest.param(failed(task()), None, id="failed"),
        pytest.param(Outcome(task(), OutcomeKind.LEFT), None, id="left"),
    ],
)
def test_an_output_key_is_held_by_a_request_and_by_an_adopted_output(
    journal: Journal, path: Path, outcome: Outcome, holder: tuple[str, str] | None
) -> None:
    journal.mark_sent(outcome.task, REQUEST)
    journal.settle([outcome], NOW)
    slots = [journal.slot(key) for key in ("converted/a.jpg", "converted/b.jpg")]
    assert slots[0] == journal.slot("converted/a.jpg.zip")
    held = {slots[0]: holder} if holder else {}
    assert journal.holders(slots) == held
    with opened(path, "s3.bucket=another", "s3.output_bucket=bucket") as other:
        assert other.holders(slots) == held
    with opened(path, endpoint="http://elsewhere") as other:
        assert other.holders(slots) == {}


@pytest.mark.parametrize("name", ["outputs", "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"])
def test_an_output_s_key_is_known_again_in_a_bucket_of_any_name(path: Path, name: str) -> None:
    with opened(path, f"s3.output_bucket={name}") as journal:
        journal.begin_run(NOW)
        archive = OUTPUT._replace(key="converted/a.jpg.zip")
        journal.settle([converted(task(), output=archive), converted(task("b.png", "converted/b.jpg"))], NOW)
        found = {key: output.key for key, (_, output) in journal.stored("default", ["a.png", "b.png"]).items()}
    assert found == {"a.png": "converted/a.jpg.zip", "b.png": "converted/b.jpg"}


def test_what_a_job_does_not_want_is_no_word_on_a_request_for_it(journal: Journal) -> None:
    journal.mark_sent(task(), REQUEST)
    journal.settle([program.Outcome(task(), program.OutcomeKind.SKIPPED, program.NOT_MATCHED)], NOW)
    assert list(journal.pending("default", ["a.png"])) == ["a.png"]
    # And it brings no request back that has been settled since.
    journal.settle([converted(task())], NOW)
    journal.settle([program.Outcome(task(), program.OutcomeKind.SKIPPED, program.NOT_MATCHED, pending=REQUEST)], NOW)
    assert list(journal.pending("default", ["a.png"])) == []


def test_more_keys_than_sqlite_takes_variables_are_all_found(journal: Journal) -> None:
    tasks = [task(f"{number}.png", f"{number}.jpg") for number in range(2000)]
    journal.settle([failed(done, pending=REQUEST) for done in tasks], NOW)
    # So many between the first and the last that they are looked up one by one.
    journal.settle([converted(task(f"{number}.between")) for number in range(10_000)], NOW)
    keys = [done.source.key for done in tasks]
    assert set(keys) <= set(journal.states("default", keys))
    assert set(keys) == set(journal.pending("default", keys))
    slots = [journal.slot(done.output_key) for done in tasks]
    assert journal.holders(slots) == {slot: ("bucket", key) for slot, key in zip(slots, keys, strict=True)}
    # The SQLite of this machine may take more than the oldest one does: 999, the job and the horizon among them.
    assert program.Journal.SQL_VARIABLES + 2 <= 999


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_an_odd_key_comes_back_as_it_is(journal: Journal, key: str) -> None:
    odd = task(key, f"out/{key}")
    journal.settle([failed(odd, pending=REQUEST)], NOW)
    assert list(journal.states("default", [key])) == list(journal.pending("default", [key])) == [key]
    slot = journal.slot(odd.output_key)
    assert journal.holders([slot]) == {slot: ("bucket", key)}
    assert [row["key"] for row in journal.history(key)] == [key]


def test_an_output_key_goes_to_the_first_that_asks_in_a_run(journal: Journal, path: Path) -> None:
    a, b, c = ("j/k", "a"), ("j", "k/b"), ("j", "c")
    assert journal.claim([("1", *a), ("1", *b), ("2", *b)]) == {"1": a, "2": b}
    assert journal.claim([("2", *c), ("3", *c)]) == {"2": b, "3": c}
    assert journal.claim([("2", *c)], anew=True) == {"2": c}
    with opened(path) as next_run:
        assert next_run.claim([("2", *a)]) == {"2": a}


def test_what_was_postponed_comes_back_once_and_by_pages(journal: Journal) -> None:
    sources = [SourceObject(f"{number:04}", "etag", number, "2026-01-02T03:04:05.000Z") for number in range(1500)]
    for start in range(0, 1500, 500):
        journal.postpone([("default", source) for source in sources[start : start + 500]])
    pages = list(journal.postponed())
    assert [len(page) for page in pages] == [1000, 500]
    assert [each for page in pages for each in page] == [("default", source) for source in sources]


def test_a_reader_waits_for_a_run_that_fills_the_checkpoint_at_this_moment(path: Path) -> None:
    path.touch()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(opened, path, read_only=True)
        assert wait([reading], timeout=0.1).not_done
        with opened(path), reading.result(timeout=10) as reader:
            assert reader.last_run() is None


@pytest.mark.parametrize("read_only", [False, True])
def test_an_empty_question_has_an_empty_answer(path: Path, *, read_only: bool) -> None:
    with opened(path, read_only=read_only) as journal:
        assert [*journal.states("default", []), *journal.pending("default", []), *journal.holders([])] == []
        assert [*journal.history("a.png"), *journal.latencies(), *journal.postponed()] == []
    assert path.exists() is not read_only


########################################################################
# The file
########################################################################


def test_what_a_killed_run_left_beside_a_checkpoint_is_made_private(
    journal: Journal, path: Path, tmp_path: Path
) -> None:
    restored = tmp_path / "restored"
    journal.mark_sent(task(), REQUEST)
    restored.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        shutil.copyfile(path.with_name(name), restored / name)
        (restored / name).chmod(0o644)
    with opened(restored / path.name) as next_run:
        assert next_run.pending("default", ["a.png"]) == {"a.png": REQUEST}
        assert {mode_of(file) for file in restored.iterdir()} == {0o600}


def make_newer(path: Path) -> None:
    """A checkpoint of a program that is not written yet."""
    opened(path).__exit__()
    change(path, "PRAGMA user_version = 99")


def make_foreign(path: Path) -> None:
    """A database of another program's."""
    change(path, "CREATE TABLE customers (name TEXT)", "INSERT INTO customers VALUES ('Ada')")


def make_foreign_with_a_version(path: Path) -> None:
    """A database of another program's, whose version is ours by chance."""
    make_foreign(path)
    change(path, f"PRAGMA user_version = {program.JOURNAL_VERSION}")


def make_text(path: Path) -> None:
    """A file that is no database."""
    path.write_text("These are my notes, do not lose them.\n" * 100, encoding="utf-8")


def make_short_text(path: Path) -> None:
    """A file that is too short for a database."""
    path.write_text("hi\n", encoding="utf-8")


VERSIONS = f"the checkpoint {{}} has version 99, this program knows {program.JOURNAL_VERSION}"
NEWER = "use the s3_bulk_convert.py that made it, or move it away: finished objects are found in the bucket"
FOREIGN = ("{} is not a checkpoint of this program", "set run.checkpoint to another path")
DAMAGED = (
    "the checkpoint {} is damaged: file is not a database",
    "move it away to start over: with run.skip_existing, finished objects are found in the output bucket",
)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_newer, (VERSIONS, NEWER)),
        (make_foreign, FOREIGN),
        (make_foreign_with_a_version, FOREIGN),
        (make_text, DAMAGED),
        (make_short_text, DAMAGED),
    ],
)
def test_a_file_that_is_no_checkpoint_of_ours_is_refused_and_left_as_it_is(
    path: Path, make: Callable[[Path], None], said: tuple[str, str], *, read_only: bool
) -> None:
    make(path)
    path.chmod(0o644)
    before = path.read_bytes()
    with pytest.raises(program.RunError) as refused:
        opened(path, read_only=read_only)
    assert (refused.value.message, refused.value.hint) == (said[0].format(path), said[1])
    assert (path.read_bytes(), mode_of(path)) == (before, 0o644)


def test_a_damaged_checkpoint_is_named_and_left_as_it_is(path: Path) -> None:
    with opened(path) as journal:
        journal.settle([converted(task(f"{number}")) for number in range(500)], NOW)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(program.RunError) as refused, opened(path) as journal:
        journal.states("default", ["1"])
    assert refused.value.message.startswith(f"the checkpoint {path} is damaged: ")
    assert path.read_bytes()[4096:] == b"\xff" * (len(whole) - 4096)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/x.sqlite3", "Not a directory"),
        ("none/x.sqlite3", "No such file or directory"),
        ("folder", "Is a directory"),
    ],
)
def test_a_checkpoint_that_cannot_be_made_says_why(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(program.RunError) as refused:
        opened(tmp_path / place)
    assert refused.value.message == f"the checkpoint {tmp_path / place} cannot be used: {reason}"
    expected = "make it and its directory readable and writable, or set run.checkpoint to another path"
    assert (refused.value.hint, refused.value.exit_code) == (expected, program.ExitCode.USAGE)


########################################################################
# The lock
########################################################################

HOLDER = """
import sys
from pathlib import Path
import s3_bulk_convert
with s3_bulk_convert.RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=SCRIPT.parent) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_exits_4_and_changes_nothing(path: Path, holder: subprocess.Popen[str]) -> None:
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    environ = {"S3_BUCKET": "b", "TARGET_FORMAT": "jpg", "CTF_API_KEY": "ctf_sk_1", "PATH": os.environ["PATH"]}
    environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, str(SCRIPT), "--set", f"run.checkpoint={path}"]
    second = subprocess.run(command, env=environ, cwd=path.parent, capture_output=True, text=True, check=False)
    assert second.returncode == 4
    assert re.fullmatch(
        rf"error: another run holds {re.escape(str(path))}\.lock \(process {holder.pid}, for \d+ s\)\n"
        r"hint: wait for it to end, or give this run another run\.checkpoint\n",
        second.stderr,
    )
    assert second.stdout == ""
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("written", "said"),
    [("", "it has only just started"), ("4711 {}\n", r"process 4711, for 3[67]\d\d s")],
)
def test_where_a_file_has_no_locks_on_bytes_its_neighbour_says_who_holds_it(
    path: Path, written: str, said: str
) -> None:
    lock = path.with_name(f"{path.name}.lock")
    lock.write_text(written.format(int(time.time()) - 3600))
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(program.RunError) as refused, program.RunLock(path):
            pass
    assert re.fullmatch(rf"another run holds {re.escape(str(lock))} \({said}\)", refused.value.message)
    assert refused.value.exit_code == program.ExitCode.LOCKED
    # What is left in the file by a run that has ended names nobody.
    assert program.RunLock(path).holder() is None


def test_the_lock_is_asked_who_has_it_without_being_taken(path: Path, holder: subprocess.Popen[str]) -> None:
    path.with_name(f"{path.name}.lock").unlink()
    for _ in range(2):
        assert str(program.RunLock(path).holder()).startswith(f"process {holder.pid}, for ")
    holder.kill()
    holder.wait()
    assert program.RunLock(path).holder() is None
    with program.RunLock(path):
        assert str(program.RunLock(path).holder()).startswith(f"process {os.getpid()}, for ")


def test_a_lock_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(program.RunError) as refused, program.RunLock(tmp_path / "file" / "x.sqlite3"):
        pass
    assert refused.value.message == f"{tmp_path / 'file' / 'x.sqlite3'}.lock cannot be written: Not a directory"
