"""Tags: those of outputs, and the one that a source gets when its output is stored, and not before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_looking import starting
from tests.runs.test_outputs_as_stored import IN_PARTS, LARGE, written
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import lose_checkpoint
from tests.standins.promises import PNG
from tests.standins.relay import Asked, Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
TAGGING = ("--set", "s3.tag_source=converted=yes", "--set", "run.max_failure_rate=never")
DONE = {"converted": "yes"}
COPYING = ("--set", "convert.same_format=copy")


def tags_of(bucket: Any, key: str, **which: str) -> dict[str, str]:
    """The tags of an object."""
    reply = bucket.client.get_object_tagging(Bucket=bucket.name, Key=key, **which)
    return {tag["Key"]: tag["Value"] for tag in reply.get("TagSet", ())}


def put_tagged(bucket: Any, key: str, tags: str) -> None:
    """Put an object with some tags."""
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=PNG + key.encode(), Tagging=tags)


def is_tagging(method: str, path: str, wanted: str = "PUT") -> bool:
    """Whether a request is about the tags of an object."""
    return method == wanted and "?tagging" in path


def tagged(relay: Relay) -> list[str]:
    """The keys of the objects whose tags were written by requests of their own, in the order of the keys."""
    return sorted(asked.key for asked in relay.asked if is_tagging(asked.method, asked.path))


@pytest.mark.needs("tags of copies")
def test_outputs_have_the_tags_that_are_set_however_they_are_written(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    for name, body in {"a.png": PNG, "large.png": PNG + bytes(LARGE), "large.jpg": PNG + bytes(LARGE)}.items():
        bucket.put(f"in/{name}", body)
    put_tagged(bucket, "in/b.jpg", "of=its+source&converted=yes")
    place = "s3.output_key=converted/{name}.{target}"
    run = run_cli(
        *COPYING, "--set", "s3.tags=a=b%20c&d=", "--set", place, command=IN_PARTS, AWS_ENDPOINT_URL_S3=relay.url
    )
    assert (run.exit_code, run.summary["converted"]) == (0, 4)
    outputs = bucket.keys("converted/")
    assert len(outputs) == 4
    assert [tags_of(bucket, key) for key in outputs] == [{"a": "b c", "d": ""}] * 4
    # From the first request that says how it is to be written: no output is ever there without them.
    begun = [asked.headers.get("x-amz-tagging") for asked in relay.asked if "uploads" in asked.query]
    assert begun == ["a=b%20c&d="] * 2


def test_a_copy_does_not_say_what_its_source_says_of_pages(run_cli: Cli, bucket: Any) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="a.jpg", Body=PNG, Metadata={"pages": "12", "by": "me"})
    assert run_cli(*COPYING).exit_code == 0
    ((_, _, metadata),) = bucket.outputs().values()
    assert ("pages" in metadata, metadata["by"]) == (False, "me")


def test_a_copy_has_no_tags_of_its_source(run_cli: Cli, bucket: Any) -> None:
    put_tagged(bucket, "b.jpg", "converted=yes")
    assert run_cli(*COPYING).exit_code == 0
    assert tags_of(bucket, "converted/b.jpg") == {}


def test_a_source_gets_its_tag_whichever_way_it_becomes_done(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, tmp_path: Path
) -> None:
    bucket.put("found.png", PNG)
    assert run_cli().exit_code == 0
    assert tags_of(bucket, "found.png") == {}
    lose_checkpoint(tmp_path / "work")
    bucket.put("adopted.png", PNG)
    until_next_second()  # an output is newer than its source
    bucket.put("converted/adopted.jpg", b"\xff\xd8\xff of another program")
    put_tagged(bucket, "converted.png", "keep=1")
    put_tagged(bucket, "copied.jpg", "converted=no")
    put_tagged(bucket, "tagged.png", "converted=yes&keep=2")
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    run = run_cli(*TAGGING, *COPYING, **there)
    assert (run.exit_code, run.summary["failed"]) == (0, {})
    assert (run.summary["converted"], run.summary["already_done"], run.summary["adopted"]) == (3, 1, 1)
    keys = ["adopted.png", "converted.png", "copied.jpg", "found.png", "tagged.png"]
    kept = [{}, {"keep": "1"}, {}, {}, {"keep": "2"}]
    assert [tags_of(bucket, key) for key in keys] == [{**tags, **DONE} for tags in kept]
    assert tags_of(bucket, "converted/copied.jpg") == {}
    # What has the tag is not written to.
    assert tagged(relay) == keys[:4]
    relay.asked.clear()
    assert (run_cli(*TAGGING, *COPYING, **there).exit_code, len(api.paid)) == (0, 3)
    assert not [asked for asked in relay.asked if "tagging" in asked.query]


@pytest.mark.parametrize("skip_existing", [pytest.param("yes", marks=pytest.mark.slow), "no"])
def test_a_source_that_may_not_be_tagged_is_tagged_by_the_next_run_and_nothing_is_paid_again(
    skip_existing: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    put_tagged(bucket, "full.png", "&".join(f"{number}=" for number in range(10)))
    bucket.put("refused.png", PNG)
    relay.refuse = is_tagging
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    options = (*TAGGING, "--set", f"run.skip_existing={skip_existing}")
    run = run_cli(*options, **there)
    assert (run.exit_code, run.summary["failed"]) == (1, {"tag_failed": 1, "too_many_tags": 1})
    assert "remedy: the output is stored, and the next run tags its source at no charge: allow s3:GetObj" in run.out
    assert "full.png: it has 10 tags, and S3 allows no more than 10\n" in run.out
    assert (bucket.keys("converted/"), run.rows("in_flight")) == (["converted/full.jpg", "converted/refused.jpg"], [])
    # A failure of another kind in between changes nothing of it.
    relay.refuse = lambda method, path: method == "HEAD" and path.endswith("/refused.png")
    assert "tag_failed" not in run_cli(*options, **there).summary["failed"]
    relay.refuse = lambda *_: False
    run = run_cli(*options, **there)
    assert (run.exit_code, run.summary["failed"], run.summary["already_done"]) == (1, {"too_many_tags": 1}, 1)
    assert tags_of(bucket, "refused.png") == DONE
    bucket.client.put_object_tagging(
        Bucket=bucket.name, Key="full.png", Tagging={"TagSet": [{"Key": "0", "Value": ""}]}
    )
    assert (run_cli(*options, **there).exit_code, tags_of(bucket, "full.png")) == (0, {"0": "", **DONE})
    assert len(api.paid) == 2


@pytest.mark.parametrize("may_be_listed", ["outputs may be listed", "outputs may not be listed"])
def test_what_is_only_to_be_tagged_is_not_made_again_where_its_output_is_gone(
    may_be_listed: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.keep_memory = 0  # else it would repeat its answer for nothing
    bucket.put("a.png", PNG)
    relay.refuse = is_tagging
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(*TAGGING, **there).summary["failed"] == {"tag_failed": 1}
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    # Not while the tag is refused, and not when it is put.
    assert run_cli(*TAGGING, **there).summary["failed"] == {"tag_failed": 1}
    relay.refuse = lambda *_: False
    assert "0 to pay for" in run_cli(*TAGGING, "--dry-run", **there).out
    if may_be_listed == "outputs may not be listed":
        relay.refuse = lambda _, path: "prefix=converted" in path
    run = run_cli(*TAGGING, **there)
    assert (run.exit_code, run.summary["already_done"], run.summary["converted"]) == (0, 1, 0)
    assert (tags_of(bucket, "a.png"), len(api.paid)) == (DONE, 1)
    relay.asked.clear()
    run = run_cli(*TAGGING, **there)
    assert (run.exit_code, run.summary["already_done"], len(api.paid)) == (0, 1, 1)
    assert not [asked for asked in relay.asked if "tagging" in asked.query]


@pytest.mark.parametrize("how", ["another output lies there", "repaired"])
def test_what_is_only_to_be_tagged_is_made_again_where_that_is_asked_for(
    how: str, run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.png", PNG)
    relay.refuse = is_tagging
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    options: tuple[str, ...] = (*TAGGING, "--set", "convert.quality=80")
    assert run_cli(*options, **there).summary["failed"] == {"tag_failed": 1}
    relay.refuse = lambda *_: False
    if how == "repaired":
        bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
        options = (*options, "--repair")
    else:
        assert run_cli(*TAGGING, "--set", "convert.quality=90", **there).summary["converted"] == 1
    run = run_cli(*options, **there)
    ((_, _, made),) = bucket.outputs().values()
    assert (run.exit_code, run.summary["converted"], tags_of(bucket, "a.png")) == (0, 1, DONE)
    assert made["job-fingerprint"] == run.rows("jobs")[0]["fingerprint"]


def test_what_is_only_to_be_tagged_is_not_done_where_another_has_its_key_by_now(
    run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("b.png", PNG)
    relay.refuse = is_tagging
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(*TAGGING, **there).summary["failed"] == {"tag_failed": 1}
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/b.jpg")
    bucket.put("b.heic", PNG)
    relay.refuse = lambda *_: False
    run = run_cli(*TAGGING, **there)
    assert (run.summary["converted"], run.summary["failed"]) == (1, {"output_collision": 1})
    assert (tags_of(bucket, "b.png"), tags_of(bucket, "b.heic")) == ({}, DONE)


def test_a_source_that_could_not_be_tagged_in_the_last_of_five_failed_runs_is_only_tagged_then(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    bucket.put("a.png", PNG)
    api.faults.add(Fault.status_reply(500, "internal_error", times=4))
    relay.refuse = is_tagging
    options, there = (*TAGGING, "--set", "api.retries=0"), {"AWS_ENDPOINT_URL_S3": relay.url}
    codes = [next(iter(run_cli(*options, **there).summary["failed"])) for _ in range(5)]
    assert codes == ["internal_error"] * 4 + ["gave_up"]
    relay.refuse = lambda *_: False
    run = run_cli(*options, "--retry-failed", "--set", "run.skip_existing=no", **there)
    assert (run.exit_code, tags_of(bucket, "a.png"), len(api.paid)) == (0, DONE, 1)


def test_a_source_that_has_ten_other_tags_is_tried_again_in_every_run(run_cli: Cli, bucket: Any) -> None:
    for name in "abcdefghijkl":
        put_tagged(bucket, f"{name}.png", "&".join(f"{number}=" for number in range(10)))
    for _ in range(2):
        run = run_cli("--workers", "1", *TAGGING[:2])
        assert (run.exit_code, run.summary["failed"]) == (1, {"too_many_tags": 12})
    # Of what says the same in every run there is one row.
    assert len(run.rows()) == 12


def test_ten_sources_that_may_not_be_tagged_stop_the_run(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    for number in range(30):
        bucket.put(f"{number}.png", PNG)
    relay.refuse = lambda method, path: is_tagging(method, path, "GET")
    run = run_cli("--workers", "2", *TAGGING, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["stopped_code"]) == (3, "same_failure")
    assert "10 objects in a row failed for the same reason: tag_failed S3 refused the tags of " in run.out


@pytest.mark.parametrize("versioned", [False, True])
def test_what_was_overwritten_after_it_was_converted_is_not_tagged(
    *, versioned: bool, run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    if versioned:
        status: Any = {"Status": "Enabled"}
        bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration=status)
    first = bucket.client.put_object(Bucket=bucket.name, Key="a.png", Body=PNG)

    def overwrite(asked: Asked) -> None:
        if is_tagging(asked.method, asked.path, "GET"):
            relay.instead = lambda _: None
            bucket.put("a.png", PNG + b"another version")

    relay.instead = overwrite
    options = (*TAGGING, "--set", "api.transfer=upload")
    run = run_cli(*options, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"], tags_of(bucket, "a.png")) == (0, 1, {})
    if versioned:
        assert tags_of(bucket, "a.png", VersionId=first["VersionId"]) == DONE
    assert (run_cli(*options).summary["converted"], tags_of(bucket, "a.png")) == (1, DONE)


def test_what_was_deleted_after_it_was_converted_is_no_failure(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    def delete(asked: Asked) -> None:
        if is_tagging(asked.method, asked.path, "GET"):
            bucket.client.delete_object(Bucket=bucket.name, Key="a.png")

    bucket.put("a.png", PNG)
    relay.instead = delete
    run = run_cli(*TAGGING, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"]) == (0, 1)


@pytest.mark.parametrize(("refused", "verdict"), [("", "OK"), ("GET", "FAIL"), ("PUT", "WARN")])
def test_check_proves_that_sources_may_be_tagged_and_tags_none(
    *, refused: str, verdict: str, run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("in/a.png", PNG)
    relay.refuse = lambda method, path: bool(refused) and is_tagging(method, path, refused)
    run = run_cli("--check", *TAGGING, "--set", "s3.tags=a=b", AWS_ENDPOINT_URL_S3=relay.url)
    assert "tag sources" in starting(verdict, run), run.out
    assert run.exit_code == (2 if verdict == "FAIL" else 0)
    assert (tags_of(bucket, "in/a.png"), bucket.keys()) == ({}, ["in/a.png"])
    (probe,) = (put for put in written(relay).values() if "tagging" not in put.query)
    assert probe.headers.get("x-amz-tagging") == "a=b"
