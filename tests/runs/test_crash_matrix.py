"""The promise of the crash: killed before or after any effect, the next run finishes, nothing is paid twice or lost."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.runs.test_pages import PDF, UNPACK, bodies, paged, stored
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.crashing import EFFECTS, HALF_READ
from tests.standins.fork_server import IMPORTING
from tests.standins.promises import assert_all_promises_are_kept, fill

Cli = Callable[..., Any]
OBJECTS = 6
KILLED = -9
TAGGED = [{"Key": "converted", "Value": "yes"}]
OF_THEIR_OWN = {"failure-written", "output-looked-at", "page-put"}  # what a first run of pictures never comes to
MOMENTS = [
    *((effect, when) for effect in EFFECTS if effect not in OF_THEIR_OWN for when in ("before", "after")),
    (HALF_READ, "after"),
]
WITHOUT_A_TRANSFER = {"source-looked-at", "source-looked-at-again", "request-recorded", "summary-written"}
WITHOUT_A_TRANSFER |= {"source-tagged"}
# In make test, a kill before each effect by URL and one after it by upload stand for the others.
QUICK = {("before", "url"), ("after", "upload")}
CASES = [
    pytest.param(effect, when, transfer, marks=[] if is_quick else [pytest.mark.slow])
    for effect, when in MOMENTS
    for transfer in (("url",) if effect == "source-looked-at-again" else ("url", "upload"))
    for is_quick in [
        (when, transfer) == ("after", "url") if effect in WITHOUT_A_TRANSFER else (when, transfer) in QUICK
    ]
]

fill_bucket = partial(fill, count=OBJECTS, name="in/picture {}", repeated=400)


def die_at(start: Cli, effect: str, when: str, nth: int, *options: str) -> Any:
    """Run the program with three workers until an effect, and kill it there. The killed run."""
    command = ("-c", f"{IMPORTING}from tests.standins.crashing import main\nmain()", effect, when, str(nth))
    killed = start(*options, command=command, CONCURRENCY="3").wait()
    assert killed.exit_code == KILLED, killed.err
    return killed


@pytest.mark.parametrize(("effect", "when", "transfer"), CASES)
def test_a_run_after_a_kill_finishes_and_pays_nothing_twice(
    *, effect: str, when: str, transfer: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill_bucket(bucket)
    mode = ["--set", f"api.transfer={transfer}", "--set", "s3.tag_source=converted=yes"]
    nth = 1 if effect in {"summary-written", "outcomes-committed"} else 3
    die_at(start, effect, when, nth, *mode)
    run = start(*mode).wait()
    assert_all_promises_are_kept(run, strict_api, bucket, expected)
    assert run.summary["possible_double_charges"] == 0
    for key in bucket.keys("in/"):
        assert bucket.client.get_object_tagging(Bucket=bucket.name, Key=key)["TagSet"] == TAGGED


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_kill_where_a_paid_answer_is_looked_for_pays_nothing_twice(
    *, when: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill_bucket(bucket)
    # Three outputs lie there, and their requests are in flight.
    die_at(start, "outcomes-committed", "before", 1, "--limit", "3")
    die_at(start, "output-looked-at", when, 2)
    assert_all_promises_are_kept(start().wait(), strict_api, bucket, expected)


def test_a_kill_after_a_refused_url_ends_at_the_same_upload(start: Cli, strict_api: ConversionApi, bucket: Any) -> None:
    strict_api.behaviour.accept_file_url = False
    expected = fill_bucket(bucket)
    die_at(start, "output-put", "before", 3)
    assert_all_promises_are_kept(start().wait(), strict_api, bucket, expected)


@pytest.mark.parametrize(("when", "nth"), [("after", 2), ("before", 4)])
def test_a_kill_between_the_pages_of_a_document_leaves_no_archive_and_pays_nothing_twice(
    *, when: str, nth: int, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    strict_api.behaviour.convert = paged
    source = PDF + b"3"
    bucket.put("in/x.pdf", source)
    die_at(start, "page-put", when, nth, *UNPACK)
    # The archive is the fourth, and says that all the others are there.
    there = [f"converted/in/x/00{number}.jpg" for number in range(1, nth + (when == "after"))]
    assert bucket.keys("converted/") == there
    run = start(*UNPACK).wait()
    assert (run.exit_code, run.summary["converted"], len(strict_api.paid)) == (0, 1, 1), run.err
    assert (run.summary["possible_double_charges"], run.rows("in_flight")) == (0, [])
    assert bodies(bucket) == stored("converted/in/x", source, 3)


def test_a_kill_between_a_failure_line_and_its_commit_leaves_the_line(
    start: Cli, api: ConversionApi, bucket: Any
) -> None:
    bucket.put("broken.png", b"not a picture at all")
    die_at(start, "failure-written", "after", 1)
    run = start().wait()
    assert run.exit_code == 1
    assert {line["key"] for line in run.failures} == {"broken.png"}
    assert api.paid == []


@pytest.mark.parametrize(
    ("transfer", "exit_code"),
    [("auto", 0), ("url", 1)],
    ids=["auto uploads", "url waits for the next run"],
)
def test_a_url_that_died_with_its_credentials_condemns_no_object(
    *, transfer: str, exit_code: int, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    strict_api.behaviour.remember_failed_bodies = False
    expected = fill_bucket(bucket)
    mode = ["--set", f"api.transfer={transfer}", "--set", "run.max_failure_rate=never"]
    killed = die_at(start, "request-sent", "before", 1, *mode)
    recorded = [row["url"] for row in killed.rows("in_flight")]
    dead = strict_api.faults.add(Fault.status_reply(422, "fetch_failed", times=None))
    dead.at(lambda request: request.fields.get("file_url") in recorded)
    until_next_second()  # in which a presigned URL is another one
    second = start(*mode).wait()
    assert second.exit_code == exit_code, second.out
    assert not any(line["permanent"] for line in second.failures)
    # That the API says so of the URL proves that it has nothing of it: it would have repeated its answer.
    assert second.summary["possible_double_charges"] == 0
    assert_all_promises_are_kept(start(*mode).wait(), strict_api, bucket, expected)
