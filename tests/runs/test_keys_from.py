"""Keys from a file: every form comes out as the same keys, and nothing that is cut or damaged looks finished."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import killed_when_paid, until_next_second
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.converters import marking
from tests.standins.key_files import DATE, write
from tests.standins.program import script_with
from tests.standins.promises import PNG, fill
from tests.standins.relay import Asked, Relay
from tests.standins.samples import photo

Cli = Callable[..., Any]


########################################################################
# The whole program
########################################################################


def test_only_the_named_keys_are_converted_and_missing_ones_are_failures(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    for key in ("a.png", "b c/ü+%.png", "c.png", "d.jpg"):
        bucket.put(key, b"\x89PNG\r\n\x1a\n" + key.encode())
    named = tmp_path / "keys.txt"
    named.write_text("a.png\nb c/ü+%.png\nd.jpg\ngone.png\na.png\n", encoding="utf-8")
    run = run_cli("--keys-from", str(named), "--set", "run.max_failure_rate=never")
    assert run.exit_code == 1, run.err
    assert {line["key"]: line["code"] for line in run.failures} == {"gone.png": "source_gone"}
    assert sorted(bucket.outputs()) == ["converted/a.jpg", "converted/b c/ü+%.jpg"]
    assert (run.summary["listed"], run.summary["converted"], run.summary["skipped"]) == (4, 2, {"same_format": 1})
    bucket.put("gone.png", b"\x89PNG\r\n\x1a\nback")
    again = run_cli("--keys-from", "conversion_failures.jsonl")
    assert (again.exit_code, again.summary["converted"], len(api.paid)) == (0, 1, 3)


def test_a_named_key_outside_a_job_s_prefix_is_not_its_business(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    bucket.put("in/a.png", b"\x89PNG\r\n\x1a\n1")
    bucket.put("b.png", b"\x89PNG\r\n\x1a\n2")
    (tmp_path / "keys").write_text("in/a.png\nb.png\n")
    run = run_cli("--keys-from", str(tmp_path / "keys"), "--prefix", "in/")
    assert (run.summary["converted"], run.summary["skipped"]) == (1, {"not_matched": 1})


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("form", ["keys", "inventory"])
@pytest.mark.parametrize("quality", ["50", "90"], ids=["one output", "two qualities"])
def test_a_named_object_goes_to_the_job_that_wants_its_size(
    quality: str, form: str, run_cli: Cli, bucket: Any, tmp_path: Path
) -> None:
    (run_cli("--version").workdir / "config.ini").write_text(
        "[job a]\nmax_size = 9\nquality = 50\n"
        f"[job b]\nmin_size = 10\nquality = {quality}\n[job c]\nmin_size = 10\nquality = 70\n"
    )
    for key in ("small.png", "large.png"):
        bucket.put(key, b"\x89PNG\r\n\x1a\n" + b"x" * (key == "large.png") * 9)
    write_inventory(tmp_path, bucket.name, [("small.png", "old"), ("large.png", "old")])
    named = str(write(tmp_path / "keys", "small.png\nlarge.png") if form == "keys" else tmp_path / "manifest.json")
    run = run_cli("--keys-from", named)
    assert (run.summary["converted"], run.summary["failed"]) == (2, {"output_collision": 1}), run.out
    # As a listing would have it: of two jobs that want one key, the first by name.
    assert [(line["job"], line["message"].partition(";")[0]) for line in run.failures] == [
        ("c", "converted/large.jpg: belongs to [job b]")
    ]


@pytest.mark.usefixtures("cheap")
def test_a_named_object_is_handled_as_the_job_that_wants_its_size_says(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    (run_cli("--version").workdir / "config.ini").write_text(
        "[job a]\nmax_size = 9\nsame_format = copy\n[job b]\nmin_size = 10\nsame_format = convert\n"
    )
    bucket.put("large.jpg", photo(1, "jpg"))
    run = run_cli("--keys-from", str(write(tmp_path / "keys", "large.jpg\n")))
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (0, 1, 1), run.out


@pytest.mark.usefixtures("cheap")
def test_a_named_object_that_is_too_large_without_jobs_is_not_sent(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, work: Path
) -> None:
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n")
    (work / "keys").write_text("a.png\n")
    relay.hidden, relay.added = {"content-length"}, {"Content-Length": "100000001"}
    options = ("--keys-from", "keys", "--set", "run.max_failure_rate=never", "--set", "api.jobs_above=never")
    run = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.summary["failed"], [each.path for each in api.requests if each.is_conversion]) == ({"too_large": 1}, [])


@pytest.mark.parametrize("first", ["\n", "\ufeff\r\n" + 9 * "\n"], ids=["blank", "BOM and blanks"])
def test_what_a_file_is_shows_in_its_first_line_that_is_not_blank(
    first: str, run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n")
    line = json.dumps({"bucket": bucket.name, "key": "a.png", "code": "timeout"})
    run = run_cli("--keys-from", str(write(tmp_path / "failed", f"{first}{line}\n")))
    assert (run.exit_code, run.summary["converted"]) == (0, 1), run.out
    run = run_cli("--keys-from", str(write(tmp_path / "rows", f'{first}"{bucket.name}","a.png"\n')))
    assert (run.exit_code, run.summary["skipped"] | {"done": run.summary["already_done"]}) == (0, {"done": 1}), run.out


def test_keys_come_from_stdin_too(start: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    for key in ("a.png", "b.png"):
        bucket.put(key, b"\x89PNG\r\n\x1a\n" + key.encode())
    reading, writing = os.pipe()
    os.write(writing, b"b.png\n")
    os.close(writing)
    run = start("--keys-from", "-", stdin=reading)
    os.close(reading)
    assert (run.wait().exit_code, list(bucket.outputs())) == (0, ["converted/b.jpg"])


def test_a_silent_stdin_does_not_keep_a_run_from_stopping(start: Cli) -> None:
    reading, writing = os.pipe()
    run = start("--keys-from", "-", "--set", "run.max_runtime=1s", stdin=reading)
    assert run.wait().exit_code == 3
    assert run.summary["stopped_because"] == "run.max_runtime is over"
    os.close(reading)
    os.close(writing)


def test_a_file_that_is_not_there_is_a_usage_error(run_cli: Cli) -> None:
    run = run_cli("--keys-from", "nowhere.txt")
    assert (run.exit_code, run.summary["stopped_code"]) == (2, "usage")
    assert "nowhere.txt cannot be read: No such file or directory" in run.out + run.err


def test_an_address_of_no_object_is_a_usage_error(run_cli: Cli, bucket: Any) -> None:
    run = run_cli("--keys-from", f"s3://{bucket.name}/")
    assert run.exit_code == 2
    assert f"s3://{bucket.name}/ names no object\nhint: give FILE as s3://BUCKET/KEY" in run.out + run.err


def test_an_inventory_s_finished_objects_are_not_even_looked_at(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n1")
    etag = bucket.client.head_object(Bucket=bucket.name, Key="a.png")["ETag"].strip('"')
    write_inventory(tmp_path, bucket.name, [("a.png", etag)])
    named = str(tmp_path / "manifest.json")
    assert run_cli("--keys-from", named).summary["converted"] == 1
    # What the journal knows in the version that the inventory names needs no request: S3 may even have lost it.
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    again = run_cli("--keys-from", named)
    assert (again.exit_code, again.summary["already_done"], again.failures) == (0, 1, [])


def write_inventory(directory: Path, bucket: str, rows: list[tuple[str, str]]) -> None:
    """An inventory of objects with their ETags: its manifest and one data file beside it."""
    lines = "".join(f'"{bucket}","{key}","10","{DATE}","{etag}"\n' for key, etag in rows)
    (directory / "part.csv.gz").write_bytes(gzip.compress(lines.encode()))
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": "arn:aws:s3:::inventories",
        "fileFormat": "CSV",
        "fileSchema": "Bucket, Key, Size, LastModifiedDate, ETag",
        "files": [{"key": "part.csv.gz"}],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("form", ["keys", "inventory"])
def test_a_key_that_is_gone_for_a_while_takes_nothing_from_what_is_known_of_its_object(
    form: str, run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n1")
    assert run_cli().summary["converted"] == 1
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    write_inventory(tmp_path, bucket.name, [("a.png", "another")])
    named = str(write(tmp_path / "keys", "a.png") if form == "keys" else tmp_path / "manifest.json")
    gone = run_cli("--keys-from", named)
    assert (gone.summary["failed"], [line["code"] for line in gone.failures]) == ({"source_gone": 1}, ["source_gone"])
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n1")
    assert run_cli().summary["already_done"] == 1
    assert len(api.paid) == 1


NAMED_AGAIN = script_with("program.KEYS_REMEMBERED = program.PAGE_KEYS = 1")
# Without a rate, the others would wait for the first answer.
AGAIN = ("--keys-from", "keys", "--set", "convert.exclude=*.txt", "--set", "api.requests_per_minute=100000")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_key_that_is_named_again_while_it_is_at_work_is_converted_once(
    *, processes: str, start: Cli, bucket: Any, strict_api: ConversionApi, work: Path, release: threading.Event
) -> None:
    expected = fill(bucket, 2, name="{}")
    # Three for two processes: one of them gets it twice. What no job wants makes the run forget what it has read.
    (work / "keys").write_text("0.png\na.txt\n0.png\na.txt\n0.png\n1.png\n")
    strict_api.behaviour.in_flight_retry_after = "0"
    held = strict_api.faults.add(Fault.hang_until(release))
    are_all_handed_out = threading.Event()

    def note(request: Request) -> None:
        if request.filename == "1.png":
            are_all_handed_out.set()

    strict_api.on("request_received", note)
    held.where = lambda request: request.filename == "0.png"
    options = (*AGAIN, "--set", "api.transfer=upload", "--workers", "8", "--processes", processes)
    run = start(*options, command=NAMED_AGAIN)
    assert held.reached.wait(10)
    are_all_handed_out.wait(1)  # or the second waits for the first, and all else behind it
    release.set()
    run.wait()
    assert "Error" not in run.out + run.err, run.err
    assert (run.exit_code, run.summary["failed"], run.summary["left"]) == (0, {}, 0), run.out
    assert (len(strict_api.paid), strict_api.paid_twice(), run.rows("in_flight")) == (2, [], [])
    assert {key: bucket.read(key) for key in bucket.keys("converted/")} == expected


def test_a_key_that_is_named_again_is_paid_once_though_its_url_is_another_by_then(
    *, start: Cli, bucket: Any, strict_api: ConversionApi, work: Path, release: threading.Event, relay: Relay
) -> None:
    expected = fill(bucket, 1, name="{}")
    (work / "keys").write_text("0.png\na.txt\n0.png\n")
    held = strict_api.faults.add(Fault.hang_until(release))
    looks: list[Asked] = []
    has_sent_again = threading.Event()

    def let_the_second_look_in_the_next_second(asked: Asked) -> None:
        if asked.method == "HEAD" and asked.key == "0.png":
            looks.append(asked)
            if len(looks) == 2 and held.reached.wait(10):
                until_next_second()

    def note(request: Request) -> None:
        if request.is_conversion and held.reached.is_set():
            has_sent_again.set()

    relay.instead = let_the_second_look_in_the_next_second
    strict_api.on("request_received", note)
    run = start(*AGAIN, "--workers", "2", command=NAMED_AGAIN, AWS_ENDPOINT_URL_S3=relay.url)
    assert held.reached.wait(10)
    has_sent_again.wait(1.2)  # in vain, if the second waits for the first
    release.set()
    run.wait()
    assert (run.exit_code, run.summary["possible_double_charges"]) == (0, 0), run.out
    assert (len(strict_api.paid), run.rows("in_flight")) == (1, [])
    assert {key: bucket.read(key) for key in bucket.keys("converted/")} == expected


def test_a_named_object_has_the_version_that_a_listing_shows_where_looks_show_none(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    bucket.put("a.png", PNG)
    relay.hidden = {"etag"}
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    for named in ((), ("--keys-from", str(write(tmp_path / "keys", "a.png"))), ()):
        assert run_cli(*named, **there).exit_code == 0
    assert len(api.paid) == 1


def test_what_is_too_large_by_now_forgets_no_request_that_was_paid(
    start: Cli, bucket: Any, strict_api: ConversionApi, tmp_path: Path
) -> None:
    strict_api.behaviour.convert = marking
    fill(bucket, 1)
    killed_when_paid(start, strict_api)
    named = str(write(tmp_path / "keys", "\n".join(bucket.keys(""))))
    run = start("--set", "api.max_size=1", "--keys-from", named).wait()
    assert run.summary["failed"] == {"too_large": 1}
    until_next_second()
    assert start("--retry-failed").wait().exit_code == 0
    assert len(strict_api.paid) == 1


def test_a_list_in_s3_for_which_the_disk_has_no_room_is_not_blamed(run_cli: Cli, bucket: Any) -> None:
    bucket.put("list.txt", b"a.png\n" * 40_000)
    small = script_with("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))")
    run = run_cli("--keys-from", f"s3://{bucket.name}/list.txt", command=small)
    assert run.exit_code == 3
    assert "hint: free some space, or set TMPDIR" in run.out + run.err
