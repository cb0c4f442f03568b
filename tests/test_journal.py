"""The checkpoint on a real file: nothing is changed, nothing is lost, nothing of somebody else's is touched."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import Event, Journal, Outcome, Task

SCRIPT = Path(program.__file__).resolve()
NOW = 1_790_000_000.0
ODD_KEYS = ["line\nbreak.png", "nul\0in it.png", "😀.png", "quo'te\".png", "%s ? ;--.png", "", "k" * 1024]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a checkpoint may be made."""
    return tmp_path / "checkpoint.sqlite3"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """A new checkpoint."""
    with Journal(path, "bucket", "outputs") as opened:
        yield opened


def task(key: str = "a.png", output_key: str = "converted/a.jpg", fingerprint: str = "f", url: str = "") -> Task:
    """One conversion to jpg."""
    return Task("default", fingerprint, key, "etag-1", 10, "jpg", None, output_key, f"id-{key}", url)


def converted(done: Task, **changes: Any) -> Outcome:
    """The outcome of a conversion that went well, or what is left of it after these changes."""
    return replace(Outcome(done, Event.CONVERTED, output_key=done.output_key, bytes_out=5, requests=1), **changes)


def rows(path: Path, query: str) -> list[Any]:
    """What a second connection sees of a checkpoint."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def change(path: Path, *statements: str) -> None:
    """Change a file behind the program's back."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)


def holders(journal: Journal, *claims: str) -> dict[str, str]:
    """The sources that output keys belong to, by what they made or by what they may have made."""
    return journal.claimants(claims) | journal.owners(claims)


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every byte in a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


########################################################################
# Appended to, and nothing else
########################################################################


@pytest.mark.parametrize("statement", ["UPDATE log SET event = 'failed'", "DELETE FROM log", "UPDATE log SET id = 9"])
def test_the_log_refuses_to_be_changed(journal: Journal, path: Path, statement: str) -> None:
    journal.end([converted(task())], NOW)
    before = rows(path, "SELECT * FROM log")
    with pytest.raises(sqlite3.IntegrityError, match="log is append-only"):
        change(path, statement)
    assert rows(path, "SELECT * FROM log") == before != []


def test_a_log_row_says_all_that_is_known(journal: Journal, path: Path) -> None:
    done = converted(task(), seconds=1.23456, requests=3, code="c", message="m", permanent=True)
    journal.end([done], NOW)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        row = dict(db.execute("SELECT * FROM log").fetchone())
    expected = {"time": NOW, "bucket": "bucket", "key": "a.png", "etag": "etag-1", "size": 10, "job": "default"}
    expected |= {
        "target": "jpg",
        "fingerprint": "f",
        "event": "converted",
        "output_bucket": "outputs",
        "seconds": 1.235,
    }
    expected |= {"output_key": "converted/a.jpg", "idempotency_key": "id-a.png", "requests": 3, "bytes_out": 5}
    assert {**row, **expected, "code": "c", "message": "m", "permanent": 1} == row


def test_a_request_is_on_the_disk_before_begin_returns(journal: Journal, path: Path) -> None:
    journal.begin([task(url="https://signed")], NOW)
    query = "SELECT bucket, key, fingerprint, etag, idempotency_key, url, sent_at FROM in_flight"
    assert rows(path, query) == [("bucket", "a.png", "f", "etag-1", "id-a.png", "https://signed", NOW)]


def test_a_resumed_request_keeps_the_time_when_it_was_first_sent(journal: Journal, path: Path) -> None:
    journal.begin([task()], NOW)
    journal.begin([replace(task(), resumed=True)], NOW + 60)
    assert rows(path, "SELECT sent_at FROM in_flight") == [(NOW,)]


def test_an_outcome_settles_its_request(journal: Journal, path: Path) -> None:
    journal.begin([task("a"), task("b")], NOW)
    journal.end([converted(task("a"))], NOW)
    assert rows(path, "SELECT key FROM in_flight") == [("b",)]
    assert rows(path, "SELECT key, event FROM log") == [("a", "converted")]


@pytest.mark.parametrize("refused", ["DELETE ON in_flight", "INSERT ON log"])
def test_outcome_and_request_change_together_or_not_at_all(journal: Journal, path: Path, refused: str) -> None:
    journal.begin([task("a"), task("b")], NOW)
    # The second of two is refused, as a disk may refuse it.
    old = "old" if "DELETE" in refused else "new"
    change(path, f"CREATE TRIGGER t BEFORE {refused} WHEN {old}.key = 'b' BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(program.UserError, match="cannot be used: no"):
        journal.end([converted(task("a")), converted(task("b"))], NOW)
    assert rows(path, "SELECT count(*) FROM log") == [(0,)]
    assert rows(path, "SELECT key FROM in_flight ORDER BY key") == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("event", "unsettled", "logged", "in_flight"),
    [
        (Event.CONVERTED, False, 1, 0),
        (Event.FOUND, False, 1, 0),
        (Event.FAILED, False, 1, 0),
        (Event.FAILED, True, 1, 1),
        (Event.LEFT, True, 0, 1),
        (Event.LEFT, False, 0, 0),
    ],
)
def test_a_request_that_may_have_been_paid_for_is_kept(
    journal: Journal, path: Path, event: Event, logged: int, in_flight: int, *, unsettled: bool
) -> None:
    journal.begin([task()], NOW)
    journal.end([converted(task(), event=event, unsettled=unsettled)], NOW)
    assert rows(path, "SELECT count(*) FROM log") == [(logged,)]
    assert rows(path, "SELECT count(*) FROM in_flight") == [(in_flight,)]


def test_after_a_failed_transaction_the_next_one_works(journal: Journal, path: Path) -> None:
    bad = converted(task(), message=None)
    with pytest.raises(program.UserError, match="NOT NULL"):
        journal.end([bad], NOW)
    journal.end([converted(task())], NOW)
    assert rows(path, "SELECT count(*) FROM log") == [(1,)]


########################################################################
# Questions
########################################################################


def test_the_newest_row_is_the_state(journal: Journal) -> None:
    journal.end([converted(task(), event=Event.FAILED, permanent=True)], NOW + 99)
    assert journal.states("f", ["a.png"]) == {"a.png": ("a.png", "etag-1", "failed", 1)}
    journal.end([converted(replace(task(), etag="etag-2"))], NOW)
    assert journal.states("f", ["a.png", "never seen"]) == {"a.png": ("a.png", "etag-2", "converted", 0)}


def test_another_bucket_or_job_has_its_own_state(journal: Journal, path: Path) -> None:
    journal.begin([task()], NOW)
    journal.end([converted(task(), unsettled=True)], NOW)
    with Journal(path, "another bucket", "outputs") as other:
        assert not other.states("f", ["a.png"])
        assert not other.sent("f", ["a.png"])
    assert not journal.states("another job", ["a.png"])
    assert not journal.sent("another job", ["a.png"])
    assert journal.states("f", ["a.png"])


def test_an_unsettled_request_comes_back_as_it_was_sent(journal: Journal, path: Path) -> None:
    journal.begin([task(url="https://signed")], NOW)
    with Journal(path, "bucket", "outputs") as next_run:
        assert next_run.sent("f", ["a.png"]) == {"a.png": program.Sent("etag-1", "id-a.png", "https://signed", NOW)}


@pytest.mark.parametrize(
    ("outcome", "owner"),
    [
        pytest.param(converted(task()), "a.png", id="converted"),
        pytest.param(converted(task(), output_key="converted/a.jpg.zip"), "a.png", id="archive of pages"),
        pytest.param(converted(task(), event=Event.FOUND), "a.png", id="found"),
        pytest.param(converted(task(), event=Event.FAILED, unsettled=True), "a.png", id="perhaps made"),
        pytest.param(converted(task(), event=Event.FAILED), None, id="failed"),
        pytest.param(converted(task(), event=Event.LEFT), None, id="left"),
    ],
)
def test_an_output_key_belongs_to_whoever_made_or_may_have_made_it(
    journal: Journal, outcome: Outcome, owner: str | None
) -> None:
    journal.begin([outcome.task], NOW)
    journal.end([outcome], NOW)
    assert holders(journal, "converted/a.jpg", "converted/b.jpg").get("converted/a.jpg") == owner


def test_a_request_in_flight_claims_its_output_key(journal: Journal) -> None:
    journal.begin([task(output_key="converted/a.zip")], NOW)
    assert holders(journal, program.claim_of("converted/a.zip")) == {"converted/a": "a.png"}


def test_an_output_key_in_another_bucket_is_free(journal: Journal, path: Path) -> None:
    journal.end([converted(task())], NOW)
    with Journal(path, "bucket", "other outputs") as other:
        assert other.owners(["converted/a.jpg"]) == {}


def test_more_keys_than_sqlite_takes_variables_are_all_found(journal: Journal) -> None:
    tasks = [task(f"{number}.png", f"{number}.jpg") for number in range(2000)]
    journal.begin(tasks, NOW)
    journal.end([converted(done, unsettled=True) for done in tasks], NOW)
    keys = [done.key for done in tasks]
    assert set(journal.states("f", keys)) == set(journal.sent("f", keys)) == set(keys)
    assert journal.owners([done.output_key for done in tasks]) == {done.output_key: done.key for done in tasks}
    # The SQLite of this machine may take more than the oldest one does: 999, the bucket and the job among them.
    assert program.SQL_VARIABLES + 2 <= 999


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_an_odd_key_comes_back_as_it_is(journal: Journal, key: str) -> None:
    odd = task(key, f"out/{key}")
    journal.begin([odd, task()], NOW)
    assert list(journal.sent("f", [key])) == [key]
    journal.end([converted(odd)], NOW)
    assert list(journal.states("f", [key])) == [key]
    assert journal.owners([f"out/{key}"]) == {f"out/{key}": key}


def test_an_empty_question_has_an_empty_answer(journal: Journal) -> None:
    assert [*journal.states("f", []), *journal.sent("f", []), *journal.owners([])] == []


########################################################################
# The file
########################################################################


def test_nobody_else_can_read_a_checkpoint(path: Path) -> None:
    old = os.umask(0)
    try:
        with Journal(path, "bucket", "outputs") as journal:
            journal.begin([task()], NOW)
            assert {file.name: mode_of(file) for file in path.parent.iterdir()} == dict.fromkeys(
                (path.name, f"{path.name}-wal", f"{path.name}-shm"), 0o600
            )
    finally:
        os.umask(old)


def test_an_existing_checkpoint_is_made_private(path: Path) -> None:
    Journal(path, "bucket", "outputs").__exit__()
    path.chmod(0o644)
    with Journal(path, "bucket", "outputs") as journal:
        journal.begin([task()], NOW)
        assert {mode_of(file) for file in path.parent.iterdir()} == {0o600}


def test_what_a_killed_run_left_beside_a_checkpoint_is_made_private(path: Path, tmp_path: Path) -> None:
    restored = tmp_path / "restored"
    with Journal(path, "bucket", "outputs") as journal:
        journal.begin([task(url="https://signed")], NOW)
        restored.mkdir()
        for name in (path.name, f"{path.name}-wal"):
            shutil.copyfile(path.with_name(name), restored / name)
            (restored / name).chmod(0o644)
    with Journal(restored / path.name, "bucket", "outputs") as journal:
        assert list(journal.sent("f", ["a.png"])) == ["a.png"]
        assert {mode_of(file) for file in restored.iterdir()} == {0o600}


def make_newer(path: Path) -> None:
    """A checkpoint of a program that is not written yet."""
    Journal(path, "bucket", "outputs").__exit__()
    change(path, "PRAGMA user_version = 99")


def make_foreign(path: Path) -> None:
    """A database of somebody else's."""
    change(path, "CREATE TABLE customers (name TEXT)", "INSERT INTO customers VALUES ('Ada')")


def make_foreign_with_a_version(path: Path) -> None:
    """A database of somebody else's, whose version is ours by chance."""
    make_foreign(path)
    change(path, f"PRAGMA user_version = {program.JOURNAL_VERSION}")


def make_text(path: Path) -> None:
    """A file that is no database."""
    path.write_text("These are my notes, do not lose them.\n" * 100, encoding="utf-8")


def make_short_text(path: Path) -> None:
    """A file that is too short for a database."""
    path.write_text("hi\n", encoding="utf-8")


REFUSED = [
    pytest.param(
        make_newer,
        "the checkpoint {} has version 99, this program knows 3",
        "use the newer s3_bulk_convert.py that made it",
        id="newer version",
    ),
    pytest.param(
        make_foreign,
        "{} is not a checkpoint of this program",
        "set run.checkpoint to another path",
        id="foreign database",
    ),
    pytest.param(
        make_foreign_with_a_version,
        "{} is not a checkpoint of this program",
        "set run.checkpoint to another path",
        id="foreign database of our version",
    ),
    pytest.param(
        make_text,
        "the checkpoint {} is damaged: file is not a database",
        "move it away to start over: with run.skip_existing, finished objects are found in the output bucket",
        id="text",
    ),
    pytest.param(
        make_short_text,
        "the checkpoint {} is damaged: file is not a database",
        "move it away to start over: with run.skip_existing, finished objects are found in the output bucket",
        id="short text",
    ),
]


@pytest.mark.parametrize(("make", "message", "hint"), REFUSED)
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(
    path: Path, make: Callable[[Path], None], message: str, hint: str
) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(program.UserError) as refused:
        Journal(path, "bucket", "outputs")
    assert (refused.value.message, refused.value.hint) == (message.format(path), hint)
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [make_foreign, make_text])
def test_a_file_of_somebody_else_s_keeps_its_mode(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    path.chmod(0o644)
    with pytest.raises(program.UserError):
        Journal(path, "bucket", "outputs")
    assert mode_of(path) == 0o644


def test_a_damaged_checkpoint_is_named_and_left_as_it_is(path: Path) -> None:
    with Journal(path, "bucket", "outputs") as journal:
        journal.end([converted(task(f"{number}")) for number in range(500)], NOW)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(program.UserError) as refused, Journal(path, "bucket", "outputs") as journal:
        journal.states("f", ["1"])
    assert refused.value.message.startswith(f"the checkpoint {path} is damaged: ")
    assert path.read_bytes()[4096:] == b"\xff" * (len(whole) - 4096)


@pytest.mark.parametrize(
    ("place", "reason"), [("file/x.sqlite3", "Not a directory"), ("none/x.sqlite3", "No such file or directory")]
)
def test_a_checkpoint_that_cannot_be_made_says_why(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(program.UserError) as refused:
        Journal(tmp_path / place, "bucket", "outputs")
    assert refused.value.message == f"the checkpoint {tmp_path / place} cannot be used: {reason}"
    expected = "make it and its directory readable and writable, or set run.checkpoint to another path"
    assert refused.value.hint == expected


def test_a_checkpoint_that_is_a_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(program.UserError, match="cannot be used: Is a directory"):
        Journal(tmp_path, "bucket", "outputs")


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


def test_a_second_run_is_told_who_holds_the_checkpoint(path: Path, holder: subprocess.Popen[str]) -> None:
    lock = path.with_name(f"{path.name}.lock")
    lock.write_text(f"{holder.pid} {int(time.time()) - 3600}\n", encoding="ascii")
    with pytest.raises(program.UserError) as refused, program.RunLock(path):
        pass
    found = re.fullmatch(r"another run holds (.*) \(process (\d+), for (\d+) s\)", refused.value.message)
    assert found
    assert (found[1], int(found[2])) == (str(lock), holder.pid)
    assert 3600 <= int(found[3]) < 3700
    assert refused.value.exit_code == program.ExitCode.LOCKED


def test_a_second_process_exits_4_and_changes_nothing(path: Path, holder: subprocess.Popen[str]) -> None:
    before = files_of(path.parent)
    environ = {"S3_BUCKET": "b", "TARGET_FORMAT": "jpg", "CTF_API_KEY": "ctf_sk_1", "PATH": os.environ["PATH"]}
    command = [sys.executable, str(SCRIPT), "--set", f"run.checkpoint={path}"]
    second = subprocess.run(command, env=environ, cwd=path.parent, capture_output=True, text=True, check=False)
    assert second.returncode == 4
    assert re.fullmatch(
        rf"error: another run holds {re.escape(str(path))}\.lock \(process {holder.pid}, for \d+ s\)\n"
        r"hint: wait for it to end, or give this run another run\.checkpoint\n",
        second.stderr,
    )
    assert (second.stdout, files_of(path.parent)) == ("", before)


def test_a_killed_run_lets_go_of_the_lock(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with program.RunLock(path):
        assert path.with_name(f"{path.name}.lock").read_text(encoding="ascii").split()[0] == str(os.getpid())


def test_the_lock_is_free_again_after_a_run(path: Path) -> None:
    for _ in range(2):
        with program.RunLock(path):
            pass


def test_an_empty_lock_file_does_not_confuse_a_second_run(path: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.poll() is None
    path.with_name(f"{path.name}.lock").write_bytes(b"")
    with pytest.raises(program.UserError, match="it has only just started"), program.RunLock(path):
        pass


def test_a_lock_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(program.UserError) as refused, program.RunLock(tmp_path / "file" / "x.sqlite3"):
        pass
    assert refused.value.message == f"{tmp_path / 'file' / 'x.sqlite3'}.lock cannot be written: Not a directory"
