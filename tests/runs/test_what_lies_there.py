"""What lies in S3 has the last word: whose an output is, of which version, and what a source is while it is converted.

And S3 takes its time: it asks for fewer requests, sends empty pages, and reads some objects only after a restore.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.pages import SmallPages
from tests.standins.program import TestBucket, lose_checkpoint, script_with
from tests.standins.promises import PNG, assert_all_promises_are_kept, fill
from tests.standins.relay import Asked, Relay
from tests.standins.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
SHARED_KEY = ("--set", "s3.output_key=converted/{stem}.{target}")


def marked(source: bytes, ext: str = "png") -> bytes:
    """What a source comes to."""
    return marking(Conversion(source, ext, "jpg", None)).body


########################################################################
# Whose an output is
########################################################################


def test_of_two_configurations_that_want_one_key_the_first_keeps_it_whatever_changes(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("x/invoice.png", PNG + b"of x")
    bucket.put("y/invoice.heic", b"of y")
    both = [(*SHARED_KEY, "--prefix", f"{name}/", "--set", f"run.checkpoint={name}") for name in "xy"]
    assert run_cli(*both[0]).summary["converted"] == 1
    for of_y in (b"of y", b"another version of y"):
        until_next_second()
        bucket.put("y/invoice.heic", of_y)
        run = run_cli(*both[1])
        assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
        assert "belongs to x/invoice.png; put {ext} or {job}" in run.failures[-1]["message"]
    assert bucket.read("converted/invoice.jpg") == marked(PNG + b"of x")
    assert len(api.paid) == 1
    # What x wants of it has changed: it replaces its own.
    bucket.put("x/invoice.png", PNG + b"another version of x")
    assert run_cli(*both[0]).summary["converted"] == 1
    assert bucket.read("converted/invoice.jpg") == marked(PNG + b"another version of x")


def test_an_output_without_a_mark_is_adopted_by_one_source_and_by_no_other(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    sources = ("a.heic", "a.png")
    for key in sources:
        bucket.put(key, PNG + key.encode())
    until_next_second()  # an output is newer than its source
    bucket.put("converted/a.jpg", b"\xff\xd8\xff of another program")
    options = ("--set", "s3.tag_source=converted=yes", "--set", "run.max_failure_rate=never")
    for number in range(2):
        run = run_cli(*options)
        assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
        assert (run.summary["adopted"], run.summary["already_done"]) == ((0, 1) if number else (1, 0))
    assert api.requests == []
    (other,) = {line["key"] for line in run.failures}
    tags = {key: bucket.client.get_object_tagging(Bucket=bucket.name, Key=key).get("TagSet", []) for key in sources}
    assert [key for key in sources if not tags[key]] == [other]


@pytest.mark.parametrize("skips", [pytest.param("yes", marks=pytest.mark.slow), "no"])
def test_an_output_that_somebody_has_replaced_is_theirs_until_it_is_gone(
    skips: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    options = ("--set", f"run.skip_existing={skips}")
    bucket.put("a.png", PNG)
    assert run_cli(*options).summary["converted"] == 1
    bucket.put("converted/a.jpg", b"somebody's own")
    until_next_second()  # or it would be newer than its source, as what the published recipe has made is
    bucket.put("a.png", PNG + b"another version")
    for _ in range(2):
        run = run_cli(*options)
        assert (run.exit_code, run.summary["failed"], run.summary["requests"]) == (1, {"output_collision": 1}, 0)
    assert (bucket.read("converted/a.jpg"), len(api.paid)) == (b"somebody's own", 1)
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    assert run_cli(*options).summary["converted"] == 1
    assert bucket.read("converted/a.jpg") == marked(PNG + b"another version")


def test_where_what_is_found_does_not_count_what_somebody_has_put_there_is_theirs_though_it_is_newer(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", PNG)
    until_next_second()
    bucket.put("converted/a.jpg", b"somebody's own")
    run = run_cli("--set", "run.skip_existing=no")
    assert (run.exit_code, run.summary["failed"], api.requests) == (1, {"output_collision": 1}, [])
    assert bucket.read("converted/a.jpg") == b"somebody's own"


def copy_bucket(source: Any, target: Any) -> None:
    """Copy all objects, with what they say of themselves."""
    keys = source.keys()
    for key in keys:
        target.client.copy_object(Bucket=target.name, Key=key, CopySource={"Bucket": source.name, "Key": key})


@pytest.mark.parametrize(
    "is_known",
    [
        pytest.param(True, id="with its checkpoint", marks=pytest.mark.slow),
        pytest.param(False, id="without a checkpoint"),
    ],
)
def test_a_bucket_that_was_copied_to_another_name_has_nothing_left_to_do(
    *, is_known: bool, run_cli: Cli, bucket: Any, other_bucket: Any, api: ConversionApi, work: Path
) -> None:
    expected = fill(bucket, 3)
    assert run_cli().summary["converted"] == 3
    copy_bucket(bucket, other_bucket)
    if not is_known:
        lose_checkpoint(work)
    moved = {"S3_BUCKET": other_bucket.name}
    predicted = run_cli("--dry-run", **moved)
    assert re.search(r"done +3\b", predicted.out), predicted.out
    run = run_cli(**moved)
    assert (run.exit_code, run.summary["already_done"], len(api.paid)) == (0, 3, 3)
    assert {key: other_bucket.read(key) for key in expected} == expected


@pytest.mark.slow
def test_a_bucket_of_the_same_name_at_another_endpoint_is_another_bucket(
    run_cli: Cli, bucket: Any, api: ConversionApi, new_server: Callable[..., S3Server]
) -> None:
    fill(bucket, 2)
    assert run_cli().summary["converted"] == 2
    with new_server() as elsewhere:
        there = TestBucket(bucket.name, elsewhere.client())
        there.client.create_bucket(Bucket=there.name)
        expected = fill(there, 2)
        run = run_cli(AWS_ENDPOINT_URL_S3=elsewhere.endpoint)
        assert (run.exit_code, run.summary["converted"], run.summary["already_done"]) == (0, 2, 0)
        assert {key: there.read(key) for key in expected} == expected
    assert len(api.paid) == 4
    assert run_cli().summary["already_done"] == 2


def test_sources_that_begin_as_outputs_do_are_named(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("outdoor/a.png", PNG + b"a source that begins as outputs do")
    bucket.put("in/b.png", PNG)
    options = ("--set", "s3.output_key=out{dir}{stem}.{target}")
    for arguments in (options, (*options, "-q")):
        run = run_cli(*arguments)
        assert (run.exit_code, run.summary["skipped"]["own_output"] >= 1) == (0, True)
        assert "outdoor/a.png lies where outputs go and is none of this program's" in run.err
    assert len(api.paid) == 1
    # Beside a prefix for outputs alone they are sources as others are; what was made before is an output all the same.
    run = run_cli("--set", "s3.output_key=made/{dir}{stem}.{target}", "--set", "convert.same_format=copy")
    assert (run.exit_code, run.summary["converted"], "outdoor" in run.err) == (0, 2, False)
    assert sorted(bucket.keys("made/")) == ["made/in/b.jpg", "made/outdoor/a.jpg"]


def test_sources_that_end_as_outputs_do_are_named_if_a_job_would_take_them(
    run_cli: Cli, bucket: Any, api: ConversionApi, work: Path
) -> None:
    jobs = "[job camera]\ninclude = *.heic\ntarget = png\noutput_key = thumbs/{stem}.{target}\n"
    (work / "config.ini").write_text(f"{jobs}[job web]\ninclude = *.png\n")
    # What lies there as well, and no job would take, is no reason to warn.
    bucket.put("converted/old.jpg", b"\xff\xd8\xff of another program")
    assert run_cli("-q").err == ""
    bucket.put("thumbs/b.png", PNG)
    assert "thumbs/b.png lies where outputs go and is none of this program's" in run_cli("-q").err
    assert api.paid == []


########################################################################
# Of which version an output is
########################################################################


def test_a_version_that_is_restored_is_found_though_another_one_came_between(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    options = ("--set", "api.max_size=1MB")
    bucket.put("a.png", PNG)
    assert run_cli(*options).summary["converted"] == 1
    bucket.put("a.png", PNG + bytes(1_000_001))
    assert run_cli(*options).summary["failed"] == {"too_large": 1}
    bucket.put("a.png", PNG)
    run = run_cli(*options)
    assert (run.exit_code, run.summary["already_done"], len(api.paid)) == (0, 1, 1)


def test_a_checkpoint_that_is_a_week_old_pays_for_nothing_that_lies_there(
    run_cli: Cli, bucket: Any, api: ConversionApi, work: Path
) -> None:
    fill(bucket, 2)
    assert run_cli("--set", "convert.include=000.png").summary["converted"] == 1
    shutil.copy(work / "s3_bulk_convert.sqlite3", work / "old")
    bucket.put("000.png", PNG + b"another version")
    assert run_cli().summary["converted"] == 2
    lose_checkpoint(work)
    (work / "old").rename(work / "s3_bulk_convert.sqlite3")
    run = run_cli()
    assert (run.exit_code, run.summary["already_done"], len(api.paid)) == (0, 2, 3)


########################################################################
# What a source is while it is converted
########################################################################


class Overwrites:
    """Puts `second` into the place of the source `a.png` when it is fetched, and `third` when it is converted."""

    def __init__(self, bucket: Any, second: bytes, third: bytes) -> None:
        self._bucket, self._second, self._third = bucket, second, third
        self.is_over = False

    def while_it_is_fetched(self, asked: Asked) -> None:
        """For a relay's `instead`."""
        if (asked.method, asked.key) == ("GET", "a.png") and not self.is_over:
            until_next_second()  # for S3 tells the time of a version in whole seconds
            self._bucket.put("a.png", self._second)

    def while_it_is_converted(self, conversion: Conversion) -> Converted:
        """For the API's `convert`."""
        if not self.is_over:
            self.is_over = True
            self._bucket.put("a.png", self._third)
        return marking(conversion)


V1, V2, V3 = PNG + b"version 1", PNG + b"version 2", PNG + b"version 3"


@pytest.mark.parametrize(
    ("second", "third"),
    [
        pytest.param(V2, V2, id="overwritten"),
        pytest.param(V2, V1, id="overwritten and put back"),
        pytest.param(V2, V3, id="overwritten twice", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_stored_of_a_source_that_was_overwritten_while_it_was_fetched(
    *, second: bytes, third: bytes, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    bucket.put("a.png", V1)
    overwrites = Overwrites(bucket, second, third)
    relay.instead, api.behaviour.convert = overwrites.while_it_is_fetched, overwrites.while_it_is_converted
    by_url = {"AWS_ENDPOINT_URL_S3": relay.url}
    run = run_cli("--set", "api.transfer=url", **by_url)
    assert (run.exit_code, run.summary["failed"]) == (1, {"source_changed": 1})
    assert [line["permanent"] for line in run.failures] == [False]
    assert bucket.outputs() == {}
    again = run_cli("--set", "api.transfer=url", **by_url)
    assert (again.exit_code, again.summary["converted"], again.rows("in_flight")) == (0, 1, [])
    assert bucket.read("converted/a.jpg") == marked(third)
    assert run_cli("--set", "api.transfer=url", **by_url).summary["already_done"] == 1


@pytest.mark.needs("conditional copies")
@pytest.mark.parametrize("change", ["overwritten", "deleted"])
def test_nothing_is_copied_of_a_source_that_is_not_what_was_looked_at(
    change: str, run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.jpg", b"version 1")
    changed = threading.Event()

    def change_it(asked: Asked) -> None:
        if asked.method == "PUT" and "x-amz-copy-source" in asked.headers and not changed.is_set():
            changed.set()
            if change == "overwritten":
                bucket.put("a.jpg", b"version 2")
            else:
                bucket.client.delete_object(Bucket=bucket.name, Key="a.jpg")

    relay.instead = change_it
    options = ("--set", "convert.same_format=copy")
    run = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
    code = "source_changed" if change == "overwritten" else "source_gone"
    assert (changed.is_set(), run.exit_code, run.summary["failed"]) == (True, 1, {code: 1})
    assert bucket.outputs() == {}
    again = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
    assert again.exit_code == 0
    assert [body for body, *_ in bucket.outputs().values()] == [b"version 2"] * (change == "overwritten")


@pytest.mark.parametrize("last", [b"version 2", b"version 1"], ids=["overwritten", "overwritten and put back"])
def test_where_the_condition_of_a_copy_is_not_heeded_another_version_s_copy_counts_as_no_output(
    *, last: bytes, run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.jpg", b"version 1")
    copied = threading.Event()

    def copy_what_is_there_by_now(asked: Asked) -> bytes | None:
        if asked.method != "PUT" or "x-amz-copy-source" not in asked.headers or copied.is_set():
            return None
        copied.set()
        bucket.put("a.jpg", b"version 2")
        source = {"Bucket": bucket.name, "Key": "a.jpg"}
        named = "x-amz-meta-"
        metadata = {
            name[len(named) :]: value for name, value in asked.headers.items() if name.lower().startswith(named)
        }
        bucket.client.copy_object(
            Bucket=bucket.name, Key=asked.key, CopySource=source, Metadata=metadata, MetadataDirective="REPLACE"
        )
        return b"<CopyObjectResult><ETag>any</ETag></CopyObjectResult>"

    relay.instead = copy_what_is_there_by_now
    options = ("--set", "convert.same_format=copy")
    run = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
    assert (copied.is_set(), run.exit_code, run.summary["failed"]) == (True, 1, {"source_changed": 1})
    bucket.put("a.jpg", last)
    again = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
    assert (again.exit_code, again.summary["failed"]) == (0, {})
    assert [(body, of["source-etag"]) for body, _, of in bucket.outputs().values()] == [
        (last, hashlib.md5(last).hexdigest())
    ]


@pytest.mark.parametrize("way", ["listed", "named in a file"])
def test_what_intelligent_tiering_has_archived_is_skipped_until_it_is_restored(
    *, way: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, work: Path
) -> None:
    expected = fill(bucket, 2)
    (work / "keys").write_text("000.png\n001.png\n")
    relay.added = {"x-amz-storage-class": "INTELLIGENT_TIERING", "x-amz-archive-status": "ARCHIVE_ACCESS"}
    relay.refuse = lambda method, path: method == "GET" and urlsplit(path).path.endswith(".png")
    relay.refusal = b"<Error><Code>InvalidObjectState</Code><Message>archived</Message></Error>"
    options = ("--keys-from", "keys") if way == "named in a file" else ()
    for restore in ({}, {"x-amz-restore": 'ongoing-request="true"'}):
        relay.added |= restore
        run = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
        assert (run.exit_code, run.summary["skipped"]["archived"], run.failures) == (0, 2, [])
    assert api.requests == []
    relay.added = {"x-amz-restore": 'ongoing-request="false", expiry-date="Fri, 01 Jan 2100 00:00:00 GMT"'}
    relay.refuse = lambda *_: False
    assert_all_promises_are_kept(run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url), api, bucket, expected)


########################################################################
# An S3 that takes its time
########################################################################

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HASTY = script_with("program.BACKOFF_CAP_SECONDS, program.PAGE_KEYS = 0.3, 5")


class Throttle:
    """Takes so many requests of a kind in each tenth of a second, and refuses the others."""

    def __init__(self, is_meant: Callable[[str, str], bool], at_once: int) -> None:
        self._is_meant, self._at_once, self._lock = is_meant, at_once, threading.Lock()
        self._moment, self._taken = 0, 0
        self.refused = 0

    def __call__(self, method: str, path: str) -> bool:
        """Whether this request is one too many."""
        if not self._is_meant(method, path):
            return False
        with self._lock:
            moment = int(10 * time.monotonic())
            self._taken = 1 if moment != self._moment else self._taken + 1
            self._moment = moment
            self.refused += self._taken > self._at_once
            return self._taken > self._at_once


@pytest.mark.slow
@pytest.mark.needs("pages")
@pytest.mark.parametrize("status", [503, 429])
def test_outputs_that_s3_takes_only_slowly_are_all_stored(
    status: int, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    expected = fill(bucket, 40)
    relay.refuse = throttle = Throttle(lambda method, _: method == "PUT", 1)
    relay.refusal_status, relay.refusal = status, SLOW_DOWN
    run = run_cli("--workers", "30", command=HASTY, AWS_ENDPOINT_URL_S3=relay.url)
    assert throttle.refused > 0
    assert_all_promises_are_kept(run, api, bucket, expected)
    # All of them wait, so that few are refused: each of the thirty would be again and again.
    assert throttle.refused < 4 * 40


@pytest.mark.slow
@pytest.mark.needs("pages")
def test_a_listing_that_s3_refuses_for_a_while_is_read_to_its_end(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    expected = fill(bucket, 20)
    refused: list[str] = []

    def is_refused(_: str, path: str) -> bool:
        if "list-type" in path and len(refused) < 12:
            refused.append(path)
            return True
        return False

    relay.refuse, relay.refusal_status, relay.refusal = is_refused, 503, SLOW_DOWN
    run = run_cli(command=HASTY, AWS_ENDPOINT_URL_S3=relay.url)
    assert len(refused) == 12
    assert_all_promises_are_kept(run, api, bucket, expected)


def test_a_listing_that_s3_never_lets_through_blames_no_credentials(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 1)
    relay.refuse = lambda _, path: "list-type" in path
    relay.refusal_status, relay.refusal = 503, SLOW_DOWN
    hasty = script_with("program.BACKOFF_CAP_SECONDS, program.MAX_S3_ATTEMPTS = 0.1, 6")
    run = run_cli(command=hasty, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, api.requests, run.failures) == (3, [], [])
    assert "S3 refused the listing of" in run.summary["stopped_because"]
    assert "SlowDown" in run.summary["stopped_because"]
    assert "credentials" not in run.out + run.err
    assert "run it again later" in run.out


def test_a_portal_s_page_in_place_of_a_listing_ends_the_run_in_a_sentence(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 1)
    portal = b"<!doctype html><html><head><meta charset=utf-8><title>Log in</title><body><p>Please<br>log in</html>"
    relay.instead = lambda asked: portal if asked.is_listing else None
    run = run_cli(command=HASTY, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, api.requests, run.failures) == (3, [], [])
    assert "the listing of" in run.summary["stopped_because"]
    assert "Traceback" not in run.err


@pytest.mark.slow
@pytest.mark.needs("pages")
def test_an_empty_page_before_each_page_does_not_make_a_listing_slow(
    run_cli: Cli, bucket: Any, relay: Relay, s3: S3Server
) -> None:
    for number in range(29):
        bucket.put(f"{number:03}.jpg", b"a picture")
    relay.instead = SmallPages(s3, 3, seconds=0.03, empty=10**6)
    run = run_cli("-q", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["skipped"]) == (0, {"same_format": 29})
    # Ten pages, and an empty one before each; every range that is read at the side costs two more at the most.
    assert len([asked for asked in relay.asked if asked.is_listing]) <= 2 * (2 * 10 + 64)
    assert run.summary["seconds"] < 6
