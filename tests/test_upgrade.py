"""A checkpoint of an older version opens in this one: nothing is sent again, and what was in flight is resumed."""

import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import s3_bulk_convert as program
from tests.runs.test_looking import kill_with_one_in_flight, picture
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking

Cli = Callable[..., Any]
# As version 1 made it, to the letter.
VERSION_1 = """
CREATE TABLE log (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, bucket TEXT NOT NULL, key TEXT NOT NULL, etag TEXT NOT NULL,
    size INTEGER NOT NULL, job TEXT NOT NULL, target TEXT NOT NULL, fingerprint TEXT NOT NULL,
    event TEXT NOT NULL CHECK (event IN ('converted', 'failed', 'found')), output_bucket TEXT NOT NULL,
    output_key TEXT NOT NULL, claim TEXT NOT NULL, idempotency_key TEXT NOT NULL, requests INTEGER NOT NULL,
    seconds REAL NOT NULL, bytes_out INTEGER NOT NULL, code TEXT NOT NULL, message TEXT NOT NULL,
    permanent INTEGER NOT NULL
);
CREATE INDEX log_state ON log (bucket, fingerprint, key);
CREATE INDEX log_claim ON log (output_bucket, claim) WHERE event IN ('converted', 'found');
CREATE TRIGGER log_keeps_its_rows BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TRIGGER log_replaces_no_rows BEFORE INSERT ON log WHEN EXISTS (SELECT 1 FROM log WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TRIGGER log_keeps_its_values BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TABLE in_flight (
    bucket TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, etag TEXT NOT NULL, output_bucket TEXT NOT NULL,
    claim TEXT NOT NULL, idempotency_key TEXT NOT NULL, url TEXT NOT NULL, sent_at REAL NOT NULL,
    PRIMARY KEY (bucket, fingerprint, key)
) WITHOUT ROWID;
CREATE INDEX in_flight_claim ON in_flight (output_bucket, claim);
PRAGMA user_version = 1;
PRAGMA application_id = 1395868227;
"""


def as_version_1(path: Path) -> None:
    """Put the same rows into a checkpoint as version 1 would have made it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in ("log", "in_flight")}
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(VERSION_1)
        for name, columns in (("log", 20), ("in_flight", 9)):
            marks = ", ".join("?" * columns)
            db.executemany(f"INSERT INTO {name} VALUES ({marks})", [row[:columns] for row in tables[name]])


def schema(path: Path) -> set[str]:
    """What a checkpoint is made of, but for how it is written."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        made = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
    # A column that was added stands behind the key in the text.
    return {sql for sql in (re.sub(r"\s+", " ", text) for text in made) if not sql.startswith("CREATE TABLE in_flight")}


def test_a_checkpoint_of_version_1_is_brought_up_to_date_and_nothing_is_sent_again(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    api.behaviour.convert = marking
    for name in ("a.png", "b.png"):
        bucket.put(name, picture(name))
    assert run_cli().exit_code == 0
    bucket.put("c.png", picture("c"))
    path = kill_with_one_in_flight(start, api, release).workdir / "s3_bulk_convert.sqlite3"
    release.set()
    as_version_1(path)
    run = run_cli()
    assert (run.exit_code, run.summary["already_done"], run.summary["converted"]) == (0, 2, 1), run.err
    assert (len(api.paid), api.paid_twice(), run.rows("in_flight")) == (3, [], [])
    new = path.with_name("new.sqlite3")
    with program.Journal(new, "b", "b"):
        assert schema(path) == schema(new)


def test_who_only_looks_at_an_older_checkpoint_is_told_to_start_a_run(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    bucket.put("a.png", picture("a"))
    path = run_cli().workdir / "s3_bulk_convert.sqlite3"
    as_version_1(path)
    for look in ("--status", "--dry-run", "--why=a.png"):
        run = run_cli(look)
        assert (run.exit_code, "is of an older version of this program" in run.err) == (2, True)
    assert run_cli("--limit", "1").summary["already_done"] == 1
    assert run_cli("--status").exit_code == 0
