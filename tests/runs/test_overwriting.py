"""Whose an output is: nothing that another source, bucket or person has put there is overwritten or taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.program import TestBucket, lose_checkpoint, script_with
from tests.standins.relay import Asked, Relay
from tests.standins.samples import photo

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
PNG, JPG = b"\x89PNG\r\n\x1a\n", photo(1, "jpg")
BESIDE = ("--prefix", "in/", "--set", "s3.output_key={stem}.{target}")
PRECIOUS = b"somebody's own"


def body_of(bucket: Any, key: str) -> bytes:
    return bytes(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())


def refused(run: Any) -> bool:
    """Whether the only object was refused, before anything was sent."""
    return (run.exit_code, run.summary["failed"], run.summary["requests"]) == (1, {"output_collision": 1}, 0)


########################################################################
# Objects that are no outputs
########################################################################


def test_a_copy_overwrites_no_object_among_the_sources(run_cli: Cli, bucket: Any) -> None:
    bucket.put("in/a.jpg", JPG)
    bucket.put("a.jpg", PRECIOUS)
    assert refused(run_cli(*BESIDE, "--set", "convert.same_format=copy"))
    assert body_of(bucket, "a.jpg") == PRECIOUS


def test_a_copy_overwrites_no_object_below_the_output_prefix(run_cli: Cli, bucket: Any) -> None:
    bucket.put("converted/a.jpg", PRECIOUS)
    until_next_second()
    bucket.put("a.jpg", JPG)
    assert "fail: output_collision" in run_cli("--set", "convert.same_format=copy", "--why", "a.jpg").out
    assert refused(run_cli("--set", "convert.same_format=copy"))
    assert body_of(bucket, "converted/a.jpg") == PRECIOUS


def test_an_archive_of_pages_overwrites_no_other_archive(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.faults.add(Fault.zip_of_pages(2, times=None))
    bucket.put("in/a.png", PNG)
    bucket.put("a.jpg.zip", PRECIOUS)
    assert refused(run_cli(*BESIDE))
    bucket.put("converted/b.jpg.zip", PRECIOUS)
    until_next_second()
    bucket.put("b.png", PNG)
    assert refused(run_cli("--set", "convert.include=b.png"))
    assert [body_of(bucket, key) for key in ("a.jpg.zip", "converted/b.jpg.zip")] == [PRECIOUS] * 2


MARKS = {
    "no mark": {},
    "another source's": {"source-key": "a.heic", "source-etag": "1", "job": "default", "job-fingerprint": "1"},
}


@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_what_is_put_there_while_a_source_is_converted_is_not_overwritten(
    mark: dict[str, str], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    def convert(conversion: Conversion) -> Converted:
        until_next_second()
        told = {"source-bucket": bucket.name, **mark} if mark else {}
        bucket.client.put_object(Bucket=bucket.name, Key="converted/a.jpg", Body=PRECIOUS, Metadata=told)
        return marking(conversion)

    bucket.put("a.png", PNG)
    api.behaviour.convert = convert
    run = run_cli()
    assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
    assert body_of(bucket, "converted/a.jpg") == PRECIOUS
    # What was paid for is had for nothing when the place is free again.
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    assert (run_cli().summary["converted"], len(api.paid)) == (1, 1)


def test_what_is_put_there_after_a_look_is_not_overwritten_by_a_copy(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    def put_it_first(asked: Asked) -> None:
        if (asked.method, asked.key) == ("HEAD", "a.jpg"):
            bucket.put("converted/a.jpg", PRECIOUS)

    bucket.put("a.jpg", JPG)
    relay.instead = put_it_first
    assert refused(run_cli("--set", "convert.same_format=copy", AWS_ENDPOINT_URL_S3=relay.url))
    assert body_of(bucket, "converted/a.jpg") == PRECIOUS


@pytest.mark.parametrize("source", ["a.png", "a.jpg"], ids=["upload", "copy"])
def test_what_is_put_there_while_parts_are_is_not_overwritten_and_no_part_is_left(
    source: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    def put_it_meanwhile(asked: Asked) -> None:
        if asked.method == "PUT" and asked.query.get("partNumber") == "2":
            bucket.put("converted/a.jpg", PRECIOUS)

    def run() -> Any:
        options = ("--set", "api.transfer=upload", "--set", "convert.same_format=copy")
        script = script_with("program.MULTIPART_BYTES = 8_500_000")
        return run_cli(*options, command=script, AWS_ENDPOINT_URL_S3=relay.url)

    bucket.put(source, (PNG if source == "a.png" else JPG) + bytes(9_000_000))
    relay.instead = put_it_meanwhile
    refused = run()
    assert (refused.exit_code, refused.summary["failed"]) == (1, {"output_collision": 1}), refused.err
    assert body_of(bucket, "converted/a.jpg") == PRECIOUS
    assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.name)
    # What was paid for is had for nothing when the place is free again.
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    relay.instead = lambda _: None
    assert (run().exit_code, len(api.paid), len(bucket.read("converted/a.jpg")) > 9_000_000) == (
        0,
        int(source == "a.png"),
        True,
    )


def test_a_free_place_that_may_be_listed_and_not_looked_at_is_written(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    # As S3 has it for who may list one prefix alone.
    bucket.put("a.png", PNG)
    relay.refuse = lambda method, path: method == "HEAD" and "/converted/" in path
    run = run_cli(AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (0, 1, 1)


def test_of_two_sources_with_one_output_one_is_paid_where_outputs_may_not_be_listed(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    for name in ("a.heic", "a.png"):
        bucket.put(name, PNG + name.encode())
    # So long that the other one would be looked at before anything lies there.
    api.behaviour.latency = 0.5
    relay.refuse = lambda method, path: method == "GET" and "prefix=converted" in path
    run = run_cli("--workers", "2", "--set", "api.requests_per_minute=1000", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"output_collision": 1}, 1)


@pytest.mark.slow
def test_that_outputs_cannot_be_listed_is_said_once(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    for number in range(40):
        bucket.put(f"{number:02}.png", PNG)
    # So slowly that the total is counted as well, by a pass of its own.
    api.behaviour.latency = 0.05
    relay.refuse = lambda method, path: method == "GET" and "prefix=converted" in path
    run = run_cli("--workers", "1", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"]) == (0, 40)
    assert run.err.count("outputs cannot be listed (S3 refused the listing") == 1


########################################################################
# Several source buckets with one output bucket
########################################################################


@pytest.fixture
def two(bucket: Any) -> tuple[Any, Any, Any]:
    """Two source buckets with one picture each under the same key, and a bucket for outputs."""
    made = [TestBucket(f"{bucket.name}-{name}", bucket.client) for name in ("one", "two", "outputs")]
    for created in made:
        created.client.create_bucket(Bucket=created.name)
    for sources in made[:2]:
        sources.put("a.png", PNG + sources.name.encode())
    return (made[0], made[1], made[2])


def test_of_two_buckets_with_one_output_bucket_none_overwrites_the_other_s(
    run_cli: Cli, two: tuple[Any, Any, Any], api: ConversionApi
) -> None:
    one, other, outputs = two
    shared = ("--set", f"s3.output_bucket={outputs.name}")
    assert run_cli(*shared, S3_BUCKET=one.name).summary["converted"] == 1
    before = outputs.outputs("")
    second = run_cli(*shared, S3_BUCKET=other.name)
    assert refused(second)
    assert f"belongs to s3://{one.name}/a.png; give each bucket's outputs a prefix" in second.failures[0]["message"]
    assert (outputs.outputs(""), len(api.paid)) == (before, 1)
    assert before["converted/a.jpg"][2]["source-bucket"] == one.name
    assert run_cli(*shared, S3_BUCKET=one.name).summary["already_done"] == 1


def test_an_output_of_another_bucket_is_not_found_without_a_checkpoint_that_knows_it(
    run_cli: Cli, two: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    one, other, outputs = two
    until_next_second()
    shared = ("--set", f"s3.output_bucket={outputs.name}")
    first = run_cli(*shared, S3_BUCKET=one.name)
    lose_checkpoint(tmp_path / "work")
    assert refused(run_cli(*shared, S3_BUCKET=other.name))
    lose_checkpoint(tmp_path / "work")
    assert (first.summary["converted"], run_cli(*shared, S3_BUCKET=one.name).summary["already_done"]) == (1, 1)


########################################################################
# Several configurations of one bucket
########################################################################


def test_two_configurations_of_one_bucket_do_not_convert_each_other_s_outputs(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for name in ("in/a.heic", "in/b.heic"):
        bucket.put(name, name.encode())
    both = [
        (
            "--target",
            target,
            "--set",
            f"s3.output_key={target}s/{{stem}}.{{target}}",
            "--set",
            f"run.checkpoint={target}",
        )
        for target in ("jpg", "png")
    ]
    for configuration in both * 2:
        assert run_cli(*configuration).exit_code == 0
    assert len(api.paid) == 4
    assert sorted(bucket.keys()) == ["in/a.heic", "in/b.heic", "jpgs/a.jpg", "jpgs/b.jpg", "pngs/a.png", "pngs/b.png"]
    looked = json.loads(run_cli(*both[0], "--dry-run", "--log-format", "json").out)
    assert (looked["jobs"]["default"]["skipped"], looked["conversions"]) == ({"own_output": 2}, 0)
