"""The checkpoint and a power cut: what is committed is on the disk before anything is sent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking
from tests.standins.program import script_with
from tests.standins.promises import fill

Cli = Callable[..., Any]
FULL = 2  # of SQLite's `synchronous`: a commit waits for the disk. What is larger waits longer.
# No test can cut the power. Each connection that has written something says before it ends how it has committed.
WATCHED = script_with(
    """
import sqlite3, sys

class Watched(sqlite3.Connection):
    def execute(self, *statement):
        if statement[0].lstrip().upper().startswith(("COMMIT", "END")) and self.total_changes:
            (level,) = super().execute("PRAGMA synchronous").fetchone()
            with open("levels", "a") as levels:
                print(level, file=levels)
        return super().execute(*statement)

    def commit(self):
        if self.in_transaction:
            self.execute("COMMIT")

connect = sqlite3.connect
sqlite3.connect = lambda *where, **options: connect(*where, **{**options, "factory": Watched})
"""
)


def test_every_commit_waits_for_the_disk(run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path) -> None:
    # A commit that a power cut can undo is a request that was paid and that nobody knows of.
    api.behaviour.convert = marking
    fill(bucket, 3)
    assert run_cli(command=WATCHED).summary["converted"] == 3
    levels = list(map(int, (tmp_path / "work" / "levels").read_text().split()))
    assert len(levels) >= 2  # one before anything is sent, and one for what it came to
    assert min(levels) >= FULL
