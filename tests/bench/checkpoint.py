"""Make a checkpoint that knows every object of the synthetic bucket as converted, in seconds for a million.

    python -m tests.bench.checkpoint PATH ENDPOINT BUCKET KEYS FOLDERS SIZE

The program itself makes the file; the rows are then made by SQLite. The columns are read from the file: one that is not
known here gets 0 or an empty text, and whether the program takes the rows for what they are is seen by what it counts
as already done.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import s3_bulk_convert as program
from tests.bench.keys import SQL_OBJECTS, Keys

TARGET = "jpg"
# Column of the log -> SQL for its value.
SQL_VALUES = {
    "job": "(SELECT max(id) FROM jobs)",
    "key": "stem || '.png'",
    "id": "((SELECT max(id) FROM runs) << 32) + number",
    "time": "1770000000",
    "etag": "etag",
    "event": "'converted'",
    "output_etag": "etag",
    "bytes_out": ":size",
    "seconds": "0.9",
    "requests": "1",
    "code": "''",
    "message": "''",
}


def insert_all(db: sqlite3.Connection, keys: Keys) -> None:
    """Append a row for each object, in the order of the keys."""
    values: dict[str, str] = {}
    for _, name, kind, is_required, default, _ in db.execute("PRAGMA table_info(log)"):
        if name in SQL_VALUES or (is_required and default is None):
            values[name] = SQL_VALUES.get(name, "''" if kind == "TEXT" else "0")
    query = f"INSERT INTO log ({', '.join(values)}) SELECT {', '.join(values.values())} FROM ({SQL_OBJECTS})"
    numbers = {"count": keys.count, "folders": keys.folders, "per_folder": keys.per_folder, "size": keys.size}
    db.execute(query, numbers)


def fill(path: Path, keys: Keys) -> None:
    """Append the rows; indexes and triggers are made afterwards, because once is far cheaper than a million times."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")
        about = "SELECT type, name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND tbl_name = 'log'"
        own = [made for made in db.execute(about).fetchall() if made[2]]
        db.execute("BEGIN")
        for kind, name, _ in own:
            db.execute(f"DROP {kind} {name}")
        insert_all(db, keys)
        for _, _, sql in own:
            db.execute(sql)
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")


def main(arguments: list[str]) -> None:
    """Make the checkpoint that the command line names, for a run that is told bucket and target, and nothing else."""
    path, endpoint, bucket = Path(arguments[0]), arguments[1], arguments[2]
    environment = {"CTF_API_KEY": "ctf_sk_bench", "S3_BUCKET": bucket, "TARGET_FORMAT": TARGET}
    settings = program.load_settings(Path(os.devnull), environment, [])
    with program.Journal(path, endpoint, settings) as journal:
        journal.begin_run(time.time())
    fill(path, Keys(*map(int, arguments[3:])))


if __name__ == "__main__":
    main(sys.argv[1:])
