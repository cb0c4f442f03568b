"""The promise of the crash: killed before or after any effect, the next run finishes, nothing is paid twice or lost."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.runs.test_jobs import make_a_day_older
from tests.runs.test_outputs_as_stored import IN_PARTS, LARGE
from tests.runs.test_pages import PDF, UNPACK, bodies, paged, stored
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import Conversion, Converted, wrapped
from tests.standins.crashing import EFFECTS, HALF_READ, crashing
from tests.standins.program import HASTY
from tests.standins.promises import PNG, assert_all_promises_are_kept, converted, fill

Cli = Callable[..., Any]
OBJECTS = 6
KILLED = -9
TAGGED = [{"Key": "converted", "Value": "yes"}]

# Which effects a run of pictures comes to; of jobs, of large outputs, and so on.
OF_ANY_RUN = {"run-begun", "page-listed", "metrics-written", "outcomes-committed", "run-ended", "summary-written"}
OF_PICTURES = {"source-looked-at", "request-recorded", "request-sent", "answer-read", HALF_READ}
OF_PICTURES |= {"place-looked-at", "output-put", "tags-read", "source-tagged"}
OF_ONE_TRANSFER = {"url-signed": "url", "source-looked-at-again": "url", "source-read": "upload"}
OF_JOBS = {"job-recorded", "job-asked-for", "result-asked-for"}
OF_LARGE_OUTPUTS = {"parts-begun": 1, "part-put": 2, "parts-joined": 1, "stored-looked-at": 1}  # and which of them
OF_COPIES = {"source-copied", "stored-looked-at", "source-looked-at-again", "place-looked-at"}
OF_THEIR_OWN = {"failure-written", "output-looked-at", "loss-recorded", "request-renewed"}
WITHOUT_A_TRANSFER = {*OF_ANY_RUN, "source-looked-at", "request-recorded", "tags-read", "source-tagged"}
# In make test, a kill before each effect by URL and one after it by upload stand for the others.
QUICK = {("before", "url"), ("after", "upload")}

fill_bucket = partial(fill, count=OBJECTS, name="in/picture {}", repeated=400)


def moments() -> Iterator[Any]:
    """Each effect of a run of pictures, before and after, by URL and by upload."""
    effects = sorted({*OF_ANY_RUN, *OF_PICTURES, *OF_ONE_TRANSFER})
    for effect, when, transfer in itertools.product(effects, ("before", "after"), ("url", "upload")):
        only = OF_ONE_TRANSFER.get(effect, transfer)
        stands_for_all = {("after", OF_ONE_TRANSFER.get(effect, "url"))}
        is_alone = effect in WITHOUT_A_TRANSFER or effect in OF_ONE_TRANSFER
        is_quick = (when, transfer) in (stands_for_all if is_alone else QUICK)
        if transfer == only and (effect, when) != (HALF_READ, "before"):
            yield pytest.param(effect, when, transfer, marks=[] if is_quick else [pytest.mark.slow])


def two_of(effects: Any, quick: str) -> list[Any]:
    """Before and after each effect; in make test, after one of them."""
    return [
        pytest.param(effect, when, marks=[] if (effect, when) == (quick, "after") else [pytest.mark.slow])
        for effect in sorted(effects)
        for when in ("before", "after")
    ]


def die_at(start: Cli, effect: str, when: str, nth: int, *options: str) -> Any:
    """Run the program with three workers until an effect, and kill it there. The killed run."""
    killed = start(*options, command=crashing(effect, when, nth), CONCURRENCY="3").wait()
    assert killed.exit_code == KILLED, killed.err
    return killed


def test_each_effect_is_somewhere_the_last() -> None:
    tried = {*OF_ANY_RUN, *OF_PICTURES, *OF_ONE_TRANSFER, *OF_JOBS, *OF_LARGE_OUTPUTS, *OF_COPIES, *OF_THEIR_OWN}
    assert tried == {*EFFECTS, HALF_READ}


@pytest.mark.parametrize(("effect", "when", "transfer"), list(moments()))
def test_a_run_after_a_kill_finishes_and_pays_nothing_twice(
    *, effect: str, when: str, transfer: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill_bucket(bucket)
    mode = ["--set", f"api.transfer={transfer}", "--set", "s3.tag_source=converted=yes"]
    mode += ["--set", "run.metrics=metrics.prom"]
    die_at(start, effect, when, 1 if effect in OF_ANY_RUN else 3, *mode)
    run = start(*mode).wait()
    assert_all_promises_are_kept(run, strict_api, bucket, expected)
    assert run.summary["possible_double_charges"] == 0
    for key in bucket.keys("in/"):
        assert bucket.client.get_object_tagging(Bucket=bucket.name, Key=key)["TagSet"] == TAGGED


@pytest.mark.parametrize("transfer", ["url", pytest.param("upload", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("effect", "when"), two_of(OF_JOBS, quick="job-recorded"))
def test_a_job_is_asked_for_again_after_a_kill_and_paid_once(
    *, effect: str, when: str, transfer: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill_bucket(bucket)
    mode = ["--set", "api.jobs_above=1", "--set", f"api.transfer={transfer}"]
    killed = die_at(start, effect, when, 3, *mode)
    known = [row["idempotency_key"] for row in killed.rows("in_flight") if row["job_id"]]
    run = start(*mode, command=HASTY).wait()
    assert_all_promises_are_kept(run, strict_api, bucket, expected)
    assert run.summary["possible_double_charges"] == 0
    # What is known as a job is not sent again, however large it is.
    sent = Counter(request.idempotency_key for request in strict_api.requests if request.is_conversion)
    assert [sent[key] for key in known] == [1] * len(known)


@pytest.mark.parametrize(("effect", "when"), two_of(OF_LARGE_OUTPUTS, quick=""))
def test_a_large_output_is_stored_whole_after_a_kill_between_its_parts(
    effect: str, when: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    source = PNG + bytes(LARGE)
    bucket.put("in/large.png", source)
    die_at(start, effect, when, OF_LARGE_OUTPUTS[effect])
    run = start(command=IN_PARTS).wait()
    assert_all_promises_are_kept(run, strict_api, bucket, {"converted/in/large.jpg": converted(source)})


@pytest.mark.parametrize(("effect", "when"), two_of(OF_COPIES, quick="source-copied"))
def test_a_run_after_a_kill_copies_what_is_in_the_target_format(
    effect: str, when: str, start: Cli, api: ConversionApi, bucket: Any
) -> None:
    expected = {f"converted/{number}.jpg": b"\xff\xd8\xff picture %d" % number for number in range(OBJECTS)}
    for key, body in expected.items():
        bucket.put(key.removeprefix("converted/"), body)
    mode = ("--set", "convert.same_format=copy")
    die_at(start, effect, when, 3, *mode)
    run = start(*mode).wait()
    assert (run.exit_code, run.summary["converted"] + run.summary["already_done"]) == (0, OBJECTS), run.err
    assert (bodies(bucket), api.requests) == (expected, [])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_where_a_loss_is_noted_pays_for_each_lost_output_once_more(
    when: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill_bucket(bucket)
    assert start().wait().exit_code == 0
    lost = sorted(expected)[::2]
    for key in lost:
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    die_at(start, "loss-recorded", when, 1, "--repair")
    for _ in range(2):
        run = start("--repair").wait()
        assert (run.exit_code, run.rows("in_flight"), bodies(bucket)) == (0, [], expected), run.err
        assert Counter(Counter(charge.source_sha256 for charge in strict_api.paid).values()) == {
            1: OBJECTS - len(lost),
            2: len(lost),
        }


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_where_a_dead_url_is_signed_anew_pays_once(
    when: str, start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill(bucket, 1)
    killed = die_at(start, "request-recorded", "after", 1)
    make_a_day_older(killed)
    (dead,) = killed.rows("in_flight")
    until_next_second()  # in which a presigned URL is another one
    renewed = die_at(start, "request-renewed", when, 1).rows("in_flight")[0]
    assert (renewed["url"] == dead["url"]) == (when == "before")
    run = start().wait()
    assert_all_promises_are_kept(run, strict_api, bucket, expected)
    # Nobody knows whether the first request was ever sent.
    assert run.summary["possible_double_charges"] == 1


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
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
    die_at(start, "output-put", when, nth, *UNPACK)
    # The archive is the fourth, and says that all the others are there.
    there = [f"converted/in/x/00{number}.jpg" for number in range(1, nth + (when == "after"))]
    assert bucket.keys("converted/") == there
    run = start(*UNPACK).wait()
    assert (run.exit_code, run.summary["converted"], len(strict_api.paid)) == (0, 1, 1), run.err
    assert (run.summary["possible_double_charges"], run.rows("in_flight")) == (0, [])
    assert bodies(bucket) == stored("converted/in/x", source, 3)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_a_kill_between_a_failure_line_and_its_commit_leaves_the_line(
    when: str, start: Cli, api: ConversionApi, bucket: Any
) -> None:
    bucket.put("broken.png", b"not a picture at all")
    assert len(die_at(start, "failure-written", when, 1).failures) == (when == "after")
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


@pytest.mark.usefixtures("strict_api")
def test_a_version_that_comes_back_after_a_kill_has_its_own_output(start: Cli, bucket: Any) -> None:
    bucket.put("a.png", PNG + b"one")
    assert start().wait().exit_code == 0
    first = bodies(bucket)
    until_next_second()
    bucket.put("a.png", PNG + b"two")
    # What lies there is made of the second version, and only the request for it says so.
    die_at(start, "outcomes-committed", "before", 1)
    assert bodies(bucket) != first
    until_next_second()
    bucket.put("a.png", PNG + b"one")
    assert start().wait().exit_code == 0
    assert bodies(bucket) == first


def test_options_that_come_back_after_a_kill_have_their_own_output(
    start: Cli, bucket: Any, strict_api: ConversionApi
) -> None:
    def convert(asked: Conversion) -> Converted:
        return Converted(wrapped(asked.source + str(asked.quality).encode(), "jpg"), "image/jpeg", "jpg")

    strict_api.behaviour.convert = convert
    bucket.put("a.png", PNG)
    assert start().wait().exit_code == 0
    first = bodies(bucket)
    die_at(start, "outcomes-committed", "before", 1, "--set", "convert.quality=50")
    assert bodies(bucket) != first
    until_next_second()
    assert start().wait().exit_code == 0
    assert bodies(bucket) == first
    # From then on it is done, though what was paid with the other options stays to be asked for.
    paid = len(strict_api.paid)
    until_next_second()
    assert start("--set", "run.skip_existing=no").wait().summary["already_done"] == 1
    assert len(strict_api.paid) == paid
