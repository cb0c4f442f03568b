"""Outputs as S3 gets them: with the options that are set, with their source's name, never over another's object."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, marking
from tests.standins.program import lose_checkpoint, script_with
from tests.standins.promises import PNG
from tests.standins.relay import Asked, Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
# Two parts: little to do, and as large as boto3 makes parts of.
IN_PARTS = script_with("program.MULTIPART_BYTES = 8_500_000")
LARGE = 9_000_000
OPTIONS = {
    "s3.storage_class": ("STANDARD_IA", "x-amz-storage-class"),
    "s3.sse": ("aws:kms", "x-amz-server-side-encryption"),
    "s3.sse_kms_key_id": ("a-key", "x-amz-server-side-encryption-aws-kms-key-id"),
    "s3.acl": ("bucket-owner-full-control", "x-amz-acl"),
    "s3.cache_control": ("max-age=60", "Cache-Control"),
}
WRITTEN = {header: value for value, header in OPTIONS.values()}
WITH_OPTIONS = [part for name, (value, _) in OPTIONS.items() for part in ("--set", f"{name}={value}")]


def written(relay: Relay) -> dict[str, Asked]:
    """Key -> the request that says how an object is to be written: a PUT, or the one that begins one in parts."""
    return {
        asked.key: asked
        for asked in relay.asked
        if (asked.method == "PUT" and "partNumber" not in asked.query)
        or (asked.method == "POST" and "uploads" in asked.query)
    }


def test_conversions_and_copies_are_written_with_the_options_that_are_set(
    run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.png", PNG)
    bucket.put("b.jpg", PNG)
    # Not every server has all of them, so none is asked.
    done = b"<CopyObjectResult><ETag>made up</ETag></CopyObjectResult>"
    relay.instead = lambda asked: done if asked.method == "PUT" or asked.key in written(relay) else None
    run = run_cli(*WITH_OPTIONS, "--set", "convert.same_format=copy", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"]) == (0, 2)
    puts = written(relay)
    assert sorted(puts) == ["converted/a.jpg", "converted/b.jpg"]
    for put in puts.values():
        assert {name: put.headers.get(name) for name in WRITTEN} == WRITTEN


def test_a_large_output_says_what_it_was_made_of_and_is_found_without_the_checkpoint(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, tmp_path: Path
) -> None:
    small, large = PNG, PNG + bytes(LARGE)
    bucket.put("small.png", small)
    bucket.put("large.png", large)
    changed = {"command": IN_PARTS, "AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli("--set", "s3.cache_control=max-age=60", **changed).exit_code == 0
    assert [asked.key for asked in written(relay).values() if asked.method == "POST"] == ["converted/large.jpg"]
    assert {asked.headers.get("Cache-Control") for asked in written(relay).values()} == {"max-age=60"}
    outputs = bucket.outputs()
    body, media_type, metadata = outputs["converted/large.jpg"]
    assert (body, media_type) == (marking(Conversion(large, "png", "jpg", None)).body, "image/jpeg")
    head = bucket.client.head_object(Bucket=bucket.name, Key="large.png")
    own = {"source-key": "large.png", "source-etag": head["ETag"].strip('"')}
    assert metadata == {**outputs["converted/small.jpg"][2], **own}
    lose_checkpoint(tmp_path / "work")
    again = run_cli(**changed)
    assert (again.exit_code, again.summary["already_done"], len(api.paid)) == (0, 2, 2)


AMONG_SOURCES = ("--set", "s3.output_key={dir}{stem}.{target}")


def test_among_the_sources_nothing_is_overwritten_that_nobody_has_looked_at(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", PNG)
    bucket.put("a.jpg", b"of somebody else")
    run = run_cli(*AMONG_SOURCES, "--set", "run.skip_existing=no")
    assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
    assert (bucket.read("a.jpg"), api.paid) == (b"of somebody else", [])


def test_among_the_sources_an_output_that_somebody_has_replaced_is_not_overwritten_when_its_source_changes(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", PNG)
    assert run_cli(*AMONG_SOURCES).summary["converted"] == 1
    bucket.put("a.jpg", b"of somebody else")
    bucket.put("a.png", PNG + b"another version")
    run = run_cli(*AMONG_SOURCES)
    assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
    assert (bucket.read("a.jpg"), len(api.paid)) == (b"of somebody else", 1)
