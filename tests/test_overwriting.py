"""Whose an output is: nothing that another source, bucket or person has put there is overwritten or taken."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError

import s3_bulk_convert as program
from s3_bulk_convert import ObjectFailed, Task
from tests.conftest import TestBucket
from tests.conversion_api import ConversionApi, Fault
from tests.converters import marking
from tests.samples import photo
from tests.test_feeder import FakeBucket, settings, source

Cli = Callable[..., Any]
PNG, JPG = b"\x89PNG\r\n\x1a\n", photo(1, "jpg")
BESIDE = ("--prefix", "in/", "--set", "s3.output_key={stem}.{target}")
PRECIOUS = b"somebody's own"


@pytest.fixture(autouse=True)
def _cheap(api: ConversionApi) -> None:
    """The stand-in does not really convert."""
    api.behaviour.convert = marking


def body_of(bucket: Any, key: str) -> bytes:
    return bytes(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())


def wait_for_another_second() -> None:
    """Let what is put next be newer than what was put last: listings have whole seconds."""
    time.sleep(1.1 - time.time() % 1)


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
    wait_for_another_second()
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
    wait_for_another_second()
    bucket.put("b.png", PNG)
    assert refused(run_cli("--set", "convert.include=b.png"))
    assert [body_of(bucket, key) for key in ("a.jpg.zip", "converted/b.jpg.zip")] == [PRECIOUS] * 2


class Heads(program.Bucket):
    """A bucket whose server answers each HEAD alike: with an error's code, or with metadata."""

    def __init__(self, answer: str | dict[str, str]) -> None:
        self.name, self.output_name, self._payer, self.client = "in", "out", {}, cast(Any, self)
        self._answer = answer

    def head_object(self, **_: str) -> dict[str, dict[str, str]]:
        """Answer as boto3 does."""
        if isinstance(self._answer, dict):
            return {"Metadata": self._answer}
        status: Any = {"HTTPStatusCode": int(self._answer)}
        raise ClientError({"Error": {"Code": self._answer}, "ResponseMetadata": status}, "HeadObject")


TASK = Task("j", "f", "k.png", "e", 1, "jpg", None, "k.jpg", "i", among_sources=True)
SHOWN = replace(TASK, look_first=True)  # by a listing
OURS = {"source-key": "k.png", "source-etag": "e", "job": "j", "job-fingerprint": "f"}


@pytest.mark.parametrize(
    ("answer", "task", "code", "permanent"),
    [
        ("404", SHOWN, "", False),
        ("500", TASK, "look_failed", False),
        ("503", SHOWN, "look_failed", False),
        ("403", TASK, "", False),
        ("403", replace(SHOWN, traced=True), "", False),
        ("403", SHOWN, "output_collision", False),
        ({}, TASK, "output_collision", True),
        (OURS, TASK, "", False),
        ({**OURS, "source-bucket": "in"}, TASK, "", False),
        ({**OURS, "source-bucket": "another"}, TASK, "output_collision", True),
        ({**OURS, "source-key": "l.png"}, TASK, "output_collision", True),
    ],
)
def test_only_what_is_known_to_be_absent_or_this_source_s_is_written(
    answer: str | dict[str, str], task: Task, code: str, *, permanent: bool
) -> None:
    found = ("", False)
    try:
        Heads(answer).refuse_to_overwrite(task)
    except ObjectFailed as failure:
        found = (failure.code, failure.permanent)
    assert found == (code, permanent)


def test_what_cannot_be_looked_at_is_no_output_and_what_s3_does_not_say_is_a_failure() -> None:
    assert [Heads(answer).is_our_output("k.jpg") for answer in ("404", "403", OURS)] == [False, False, True]
    for look in (Heads("500").is_our_output, Heads("500").output_of):
        with pytest.raises(ObjectFailed, match="500"):
            look(cast(Any, TASK))


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
    wait_for_another_second()
    shared = ("--set", f"s3.output_bucket={outputs.name}")
    first = run_cli(*shared, S3_BUCKET=one.name)
    for path in (tmp_path / "work").glob("s3_bulk_convert.sqlite3*"):
        path.unlink()
    assert refused(run_cli(*shared, S3_BUCKET=other.name))
    for path in (tmp_path / "work").glob("s3_bulk_convert.sqlite3*"):
        path.unlink()
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


def test_of_each_folder_one_object_is_looked_at_and_more_only_among_outputs(tmp_path: Path) -> None:
    looked: list[str] = []

    class Watched(FakeBucket):
        def is_our_output(self, key: str) -> bool:
            looked.append(key)
            return key.startswith("out/")

    names = ["a.png", "b.png", "in/a.png", "in/deep/b.png", "out/a.png", "out/b.png"]
    with program.Journal(tmp_path / "checkpoint", "bucket", "bucket") as journal:
        planner = program.Planner(settings(), Watched([]), journal, program.StopFlag())
        tasks = planner.tasks_of([source(name) for name in names], planner.routes)
        planner.tasks_of([source("in/c.png")], planner.routes)
    assert [task.key for task in tasks] == names[:4]
    assert looked == ["a.png", "in/a.png", "out/a.png", "out/b.png"]
    assert planner.counts["default", program.OWN_OUTPUT] == 2
