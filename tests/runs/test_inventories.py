"""An S3 Inventory as the source of keys: what is in it and is not there, and files that are not whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
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


def test_what_a_row_says_of_size_age_and_storage_decides_nothing(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    rows = {key: full_row(f"{key}.png") for key in ("archived", "empty", "huge", "old", "shrunk")}
    rows["archived"][8] = "GLACIER"
    for key, size in (("empty", "0"), ("huge", "9999999999"), ("shrunk", "50")):
        rows[key][5] = size
    for key in rows:
        bucket.put(f"{key}.png", PNG if key == "shrunk" else PNG + key.encode() * 5)
    limits = ("convert.min_size=20", "convert.max_size=100", "convert.newer_than=1d")
    options = [word for limit in limits for word in ("--set", limit)]
    options += ["--keys-from", inventory_of(bucket, tmp_path, list(rows.values()))]
    foreseen = json.loads(run_cli(*options, "--dry-run", "--log-format", "json").out)
    assert (foreseen["conversions"], foreseen["jobs"]["default"]["skipped"]) == (4, {"not_matched": 1})
    assert json.loads(run_cli(*options, "--verify", "--log-format", "json").out)["not_converted"] == 4
    assert "would convert it to jpg" in run_cli(*options, "--why", "empty.png").out
    run = run_cli(*options)
    assert (run.exit_code, run.summary["converted"], run.summary["skipped"]) == (0, 4, {"not_matched": 1})
    assert json.loads(run_cli(*options, "--verify", "--log-format", "json").out)["verified"] == 4


def test_an_object_that_failed_for_good_is_asked_whether_it_is_still_that_one(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    bucket.put("a.png", PNG)
    api.faults.add(Fault.status_reply(422, "conversion_failed", times=2))
    assert [line["permanent"] for line in run_cli().failures] == [True]
    row = full_row("a.png")
    row[7] = bucket.client.head_object(Bucket=bucket.name, Key="a.png")["ETag"].strip('"')
    options = ("--keys-from", inventory_of(bucket, tmp_path, [row]))
    assert run_cli(*options).summary["skipped"] == {"failed_before": 1}
    bucket.put("a.png", PNG + b"mended")
    assert run_cli(*options).summary["converted"] == 1


def test_what_is_missing_is_left_out_if_a_look_says_so_whatever_the_row_says(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    rows = [full_row(f"{name}.png") for name in ("gone", "large", "small")]
    for row, size in zip(rows, (0, 9, 1), strict=True):
        bucket.put(row[1], PNG + b"x" * size)
        row[7] = bucket.client.head_object(Bucket=bucket.name, Key=row[1])["ETag"].strip('"')
    options = ("--keys-from", inventory_of(bucket, tmp_path, rows), "--log-format", "json")
    assert run_cli(*options).summary["converted"] == 3
    for key in ("gone.png", *bucket.keys("converted/")):
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    limit = ("--set", "convert.min_size=10")
    missing = json.loads(run_cli(*options, *limit, "--verify").out)["findings"]
    assert {each["key"]: each["left_out"] for each in missing} == {
        "gone.png": "source_gone",
        "large.png": "",
        "small.png": "not_matched",
    }
    repaired = run_cli(*options, *limit, "--repair")
    assert (repaired.exit_code, repaired.summary["converted"], len(api.paid)) == (0, 1, 4)


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
