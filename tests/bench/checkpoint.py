"""Make a checkpoint that knows every object of the synthetic bucket as converted, in seconds for a million.

    python -m tests.bench.checkpoint PATH BUCKET KEYS FOLDERS SIZE

The program itself makes the file; the rows are then made by SQLite. The columns are read from the file: one that is not
known here gets 0 or an empty text, and whether the program takes the rows for what they are is seen by what it counts
as already done.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import s3_bulk_convert as program
from tests.bench.keys import SQL_OBJECTS, Keys

TARGET = "jpg"


def job_of(bucket: str) -> program.Job:
    """The job of a run that is told bucket and target, and nothing else."""
    environment = {"CTF_API_KEY": "ctf_sk_bench", "S3_BUCKET": bucket, "TARGET_FORMAT": TARGET}
    return program.load_settings(Path(os.devnull), environment, []).jobs[0]


def expressions(job: program.Job, keys: Keys, bucket: str) -> dict[str, object]:
    """Column of the log -> SQL for its value where it is of the object, the value itself where it is the same for all.

    Raises ValueError if the program would put an output elsewhere than the SQL says.
    """
    if program.output_key(job, keys.key(0)) != f"converted/{keys.key(0).removesuffix('.png')}.{TARGET}":
        raise ValueError("the program's output keys are others than those of tests/bench/checkpoint.py")
    return {
        "time": 1_770_000_000.0,
        "bucket": bucket,
        "size": keys.size,
        "job": job.name,
        "target": TARGET,
        "fingerprint": job.fingerprint,
        "event": program.Event.CONVERTED.value,
        "output_bucket": bucket,
        "requests": 1,
        "seconds": 0.9,
        "bytes_out": keys.size,
    }


SQL_VALUES = {
    "key": "stem || '.png'",
    "etag": "etag",
    "output_key": f"'converted/' || stem || '.{TARGET}'",
    "claim": f"'converted/' || stem || '.{TARGET}'",
    "idempotency_key": "printf('%032x', number)",
}


def insert_all(db: sqlite3.Connection, constants: dict[str, object], keys: Keys) -> None:
    """Append a row for each object."""
    columns, values = [], []
    for _, name, kind, is_required, default, is_key in db.execute("PRAGMA table_info(log)"):
        if is_key or not (name in constants or name in SQL_VALUES or (is_required and default is None)):
            continue
        columns.append(name)
        values.append(SQL_VALUES.get(name) or (f":{name}" if name in constants else "''" if kind == "TEXT" else "0"))
    query = f"INSERT INTO log ({', '.join(columns)}) SELECT {', '.join(values)} FROM ({SQL_OBJECTS})"
    numbers = {"count": keys.count, "folders": keys.folders, "per_folder": keys.per_folder}
    db.execute(query, {**constants, **numbers})


def fill(path: Path, constants: dict[str, object], keys: Keys) -> None:
    """Append the rows; the indexes are made afterwards, because sorting once is far cheaper than a million times."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")
        indexes = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'log'").fetchall()
        own = [(name, sql) for name, sql in indexes if sql]
        db.execute("BEGIN")
        for name, _ in own:
            db.execute(f"DROP INDEX {name}")
        insert_all(db, constants, keys)
        for _, sql in own:
            db.execute(sql)
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")


def main(arguments: list[str]) -> None:
    """Make the checkpoint that the command line names."""
    path, bucket = Path(arguments[0]), arguments[1]
    keys = Keys(*map(int, arguments[2:]))
    with program.Journal(path, bucket, bucket):
        pass
    fill(path, expressions(job_of(bucket), keys, bucket), keys)


if __name__ == "__main__":
    main(sys.argv[1:])
