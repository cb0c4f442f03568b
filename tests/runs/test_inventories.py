"""An S3 Inventory as the source of keys: what is in it and is not there, and files that are not whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.key_files import full_row, write, write_manifest
from tests.standins.promises import PNG

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
DATA_FILE = "inv/bucket/daily/data/1.csv.gz"


def inventory_of(bucket: Any, root: Path, rows: Sequence[Sequence[str]], **changes: Any) -> str:
    """The manifest of an inventory of a bucket."""
    return str(write_manifest(root, [[bucket.name, *row[1:]] for row in rows], sourceBucket=bucket.name, **changes))


def test_what_is_no_newest_version_is_left_out(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    bucket.put("a.png", PNG)
    rows = [full_row("a.png"), full_row("overwritten.png", latest="false"), full_row("deleted.png", deleted="true")]
    run = run_cli("--keys-from", inventory_of(bucket, tmp_path, rows))
    assert (run.exit_code, run.summary["listed"], run.summary["converted"], run.failures) == (0, 1, 1, [])


def test_of_a_damaged_inventory_nothing_is_converted(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    for key in ("a.png", "b.png"):
        bucket.put(key, PNG + key.encode())
    whole = inventory_of(bucket, tmp_path, [full_row("a.png"), full_row("b.png")])
    # It can be unpacked and read, and one row is missing.
    write(tmp_path / DATA_FILE, f'"{bucket.name}",' + ",".join(f'"{cell}"' for cell in full_row("a.png")[1:]) + "\n")
    run = run_cli("--keys-from", whole)
    assert run.exit_code in {2, 3}
    assert "is damaged: its MD5 is not the manifest's" in run.out + run.err
    assert api.requests == []


def test_a_file_that_was_cut_is_not_taken_for_whole(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    bucket.put("a.png", PNG)
    named = write(tmp_path / "keys.gz", "a.png\n" * 10_000)
    named.write_bytes(named.read_bytes()[:-9])  # the end of the data, and the length and the checksum behind it
    run = run_cli("--keys-from", str(named))
    assert run.exit_code in {2, 3}
    assert f"{named} cannot be read: " in run.out + run.err
