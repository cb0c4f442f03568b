"""Whose an output is: only what is known to be absent or this source's is written. What S3 cannot say is neither."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError

import s3_bulk_convert as program
from s3_bulk_convert import OutcomeKind, SourceObject, Task
from tests.parts.test_looking import settings

JOBS = ("job j.target=jpg", "job k.target=webp")
ADOPTED, FOUND = OutcomeKind.ADOPTED, OutcomeKind.FOUND
FREE, FOREIGN = "may be written", "output_collision"


class Heads(program.Bucket):
    """A bucket whose server answers each HEAD alike: with an error's code, or with metadata and a time."""

    pages_asked = 0
    listed: tuple[str, ...] | None = ()  # keys; None: the listing is refused

    def __init__(self, answer: str | dict[str, str], *, written: float = 0.0, adopts: bool = True) -> None:
        self.name, self.output_name, self._payer, self._answer = "in", "out", {}, answer
        self._settings = settings(f"run.skip_existing={adopts}", *JOBS)
        self._written = datetime.fromtimestamp(written, timezone.utc)
        self.client = cast(Any, self)

    def head_object(self, **_: str) -> dict[str, Any]:
        """Answer as boto3 does."""
        if isinstance(self._answer, dict):
            return {"Metadata": self._answer, "ETag": '"o"', "ContentLength": 3, "LastModified": self._written}
        status: Any = {"HTTPStatusCode": int(self._answer)}
        raise ClientError({"Error": {"Code": self._answer}, "ResponseMetadata": status}, "HeadObject")

    def list_objects_v2(self, **asked: Any) -> dict[str, Any]:
        """Answer a page as the program has boto3 do."""
        if self.listed is None:
            raise ClientError({"Error": {"Code": "AccessDenied"}}, "ListObjectsV2")
        objects = [SourceObject(key, "o", 3) for key in self.listed if key > asked["StartAfter"]]
        return {"Page": program.Page(objects[:1], len(objects) < 2)}


SOURCE = SourceObject("k.png", "e", 1, "1970-01-01T00:01:40Z")
MINE, OTHERS = (job.fingerprint for job in settings(*JOBS).jobs)
TASK = Task("j", MINE, SOURCE, "jpg", None, "k.jpg", look=True)
OURS = {"source-key": "k.png", "source-etag": "e", "source-bucket": "in", "job": "j", "job-fingerprint": MINE}


def look(bucket: Heads, task: Task) -> str:
    """What a look at the output key shows."""
    try:
        found = bucket.look_at_output(task)
    except program.ObjectFailed as failure:
        return failure.code
    return found[0] if found else FREE


@pytest.mark.parametrize(
    ("answer", "adopts", "state"),
    [
        pytest.param("404", True, FREE, id="nothing"),
        pytest.param(OURS, True, FOUND, id="of this version"),
        pytest.param(OURS, False, FREE, id="of this version, which is not to count"),
        pytest.param({**OURS, "source-bucket": "old"}, True, FOUND, id="of a copy of the bucket"),
        pytest.param({**OURS, "source-bucket": "old"}, False, FOREIGN, id="of another bucket"),
        pytest.param({**OURS, "source-etag": "d"}, True, FREE, id="of another version"),
        pytest.param({**OURS, "job-fingerprint": "h"}, True, FREE, id="with other options"),
        pytest.param({**OURS, "job-fingerprint": OTHERS}, True, FOREIGN, id="of another job"),
        pytest.param({**OURS, "source-key": "l.png"}, True, FOREIGN, id="of another source"),
        pytest.param({}, True, FOREIGN, id="somebody's, and older"),
    ],
)
def test_what_lies_under_an_output_key_is_what_it_says_of_itself(
    answer: str | dict[str, str], state: str, *, adopts: bool
) -> None:
    assert look(Heads(answer, adopts=adopts), TASK) == state


@pytest.mark.parametrize(
    ("written", "adopts", "holder", "state"),
    [
        (101.0, True, "", ADOPTED),
        (100.0, True, "", FOREIGN),
        (101.0, False, "", FOREIGN),
        (101.0, True, "somebody", FOREIGN),
    ],
)
def test_what_says_nothing_of_itself_is_adopted_only_where_it_can_be_this_source_s(
    written: float, holder: str, state: str, *, adopts: bool
) -> None:
    task = replace(TASK, holder=holder)
    assert look(Heads({}, written=written, adopts=adopts), task) == state


def test_a_key_that_somebody_else_holds_is_free_for_no_task_but_what_is_found_counts() -> None:
    held = replace(TASK, holder="somebody")
    assert [look(Heads(answer), held) for answer in ("404", OURS, {**OURS, "source-etag": "d"})] == [
        FOREIGN,
        FOUND,
        FOREIGN,
    ]
    unseen = replace(held, look=False)
    with pytest.raises(program.ObjectFailed, match=r"k\.jpg: belongs to somebody"):
        Heads(OURS).look_at_output(unseen)


@pytest.mark.parametrize(
    ("answer", "listed"),
    [
        ("400", ("a", "k.jpg", "z")),
        ("403", ("a", "k.jpf~", "k.jpg")),  # the page ends before it
        ("500", None),
        ("503", ("k.jpg",)),
    ],
)
def test_what_s3_does_not_say_is_never_taken_for_absent(answer: str, listed: tuple[str, ...] | None) -> None:
    bucket = Heads(answer)
    bucket.listed = listed
    with pytest.raises(program.ObjectFailed, match=answer) as failed:
        bucket.look_at_output(TASK)
    assert (failed.value.code, failed.value.permanent) == ("look_failed", False)
    with pytest.raises(program.ObjectFailed, match=answer):
        bucket.require_unchanged(SOURCE, {})
    # Neither is a key given free by it, nor is somebody warned of what may well be an output.
    assert bucket.is_no_source("k.png") is None


@pytest.mark.parametrize("listed", [(), ("a", "k.jpeg"), ("k.jph", "z"), ("k.jpg.zip~",)])
def test_what_a_listing_shows_to_be_absent_is_absent_though_s3_refuses_to_look(listed: tuple[str, ...]) -> None:
    bucket = Heads("403")
    bucket.listed = listed
    assert look(bucket, TASK) == FREE


@pytest.mark.parametrize(("answer", "is_no_source"), [("404", True), (OURS, True), ({}, False)])
def test_what_s3_says_is_believed(answer: Any, *, is_no_source: bool) -> None:
    bucket = Heads(cast(Any, answer))
    assert bucket.is_no_source("k.png") is is_no_source
