"""Multiply the one row of a checkpoint, so that it knows every object of the bucket, in seconds for a million.

    python -m tests.bench.checkpoint PATH KEYS FOLDERS SIZE

A program has converted one object of the bucket; SQLite then makes as many copies of what was written down, each with
the key and the ETag of another object. So the checkpoint of any edition will do that has a table `log` with the columns
`id` and `key`. Whether it takes the copies for what they are is seen by what it counts as already done.
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from tests.bench.keys import ONE_FOLDER, SQL_OBJECTS, Keys


def insert_all(db: sqlite3.Connection, keys: Keys) -> None:
    """Append a row for each object but the one that is there, in the order of the keys."""
    db.execute("CREATE TEMPORARY TABLE sample AS SELECT * FROM log")
    found = db.execute("SELECT * FROM sample")
    columns = [name for name, *_ in found.description]
    [row] = found.fetchall()
    key = row[columns.index("key")]
    own = keys.number_of(key)
    assert own is not None
    values = []
    for column, value in zip(columns, row, strict=True):
        sql = f"sample.{column}"
        for of_sample, of_object in ((key.removesuffix(".png"), "stem"), (keys.etag(own), "objects.etag")):
            if of_sample in str(value):
                sql = f"replace({sql}, '{of_sample}', {of_object})"
        values.append(f"{sql} + 1 + number" if column == "id" else sql)
    query = f"SELECT {', '.join(values)} FROM ({SQL_OBJECTS}) AS objects, sample WHERE number <> :own"
    numbers = {"count": keys.count, "folders": keys.folders, "per_folder": keys.per_folder, "own": own}
    db.execute(f"INSERT INTO log ({', '.join(columns)}) {query}", {**numbers, "one_folder": ONE_FOLDER})


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
    """Fill the checkpoint that the command line names."""
    path, *numbers = arguments
    count, folders, size = map(int, numbers)
    fill(Path(path), Keys(count, folders, size))


if __name__ == "__main__":
    main(sys.argv[1:])
