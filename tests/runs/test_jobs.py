"""Jobs: whatever their questions, links and failures come to, each object is paid once, and none is blamed wrongly."""

import contextlib
import email.utils
import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.standins import promises
from tests.standins.conversion_api import Answer, ConversionApi, Fault, Request, Step
from tests.standins.converters import Converted, marking
from tests.standins.program import HASTY


@pytest.fixture(autouse=True)
def _marks(api: ConversionApi) -> None:
    api.behaviour.convert = marking


Cli = Callable[..., Any]
JOBS = ("--set", "api.jobs_above=1")
# A job that is accepted is waited for as long as an answer.
SOON_OVER = ("--set", "run.max_runtime=1s", "--set", "api.timeout=1s")
UPLOAD = ("--set", "api.transfer=upload")
fill = partial(promises.fill, count=1, name="{}", repeated=1)


def is_poll(request: Request) -> bool:
    """Whether it asks for a job."""
    return request.method == "GET" and request.path.startswith("/v1/jobs/") and not is_download(request)


def is_download(request: Request) -> bool:
    """Whether it asks for a result."""
    return request.path.startswith("/v1/jobs/download/")


def bodies(bucket: Any) -> dict[str, bytes]:
    """What lies below the output prefix."""
    return {key: body for key, (body, *_) in bucket.outputs().items()}


@pytest.fixture
def run_cli(run_cli: Cli) -> Cli:
    """Run a script that asks soon, and soon again."""
    return partial(run_cli, command=HASTY)


# ----------------------------------------------------------------------------------------------------------------------
# Questions for a job
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    # Which way the source went is nothing to the question; the long proofs ask for it all the same.
    [pytest.param(JOBS, id="url"), pytest.param((*JOBS, *UPLOAD), id="upload", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (504, None, 1),
        # What this one stands for.
        pytest.param(401, "invalid_api_key", 3, marks=pytest.mark.slow),
        pytest.param(403, "forbidden", 3, marks=pytest.mark.slow),
        pytest.param(302, None, 1, marks=pytest.mark.slow),
        pytest.param(400, "bad_request", 1, marks=pytest.mark.slow),
        pytest.param(405, None, 1, marks=pytest.mark.slow),
        pytest.param(422, "bad_request", 1, marks=pytest.mark.slow),
    ],
)
def test_an_error_reply_to_the_question_for_a_job_pays_for_no_second_one(
    *,
    status: int,
    code: str | None,
    exit_code: int,
    options: tuple[str, ...],
    run_cli: Cli,
    bucket: Any,
    api: ConversionApi,
) -> None:
    expected = fill(bucket)
    api.faults.add(Fault.status_reply(status, code, times=None, where=is_poll))
    first = run_cli(*options, "--set", "api.retries=0")
    assert (first.exit_code, len(api.paid), first.summary["left"]) == (exit_code, 1, int(exit_code == 3))
    assert [(line["code"], line["permanent"]) for line in first.failures] == (
        [("job_not_finished", False)] if exit_code == 1 else []
    )
    api.faults.clear()
    assert run_cli(*options).exit_code == 0
    assert len([request for request in api.requests if request.is_conversion]) == len(api.paid) == 1
    assert bodies(bucket) == expected


def test_an_odd_reply_to_the_question_for_a_job_is_survived(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket)
    api.faults.add(Fault.status_reply(405, times=1, where=is_poll))
    assert (run_cli(*JOBS).exit_code, len(api.paid), bodies(bucket)) == (0, 1, expected)


def is_poll_of_the_first_job() -> Callable[[Request], bool]:
    """Picks the polls of whichever job is asked for first."""
    first: list[str] = []

    def is_it(request: Request) -> bool:
        if is_poll(request) and not first:
            first.append(request.path)
        return is_poll(request) and request.path in first

    return is_it


@pytest.mark.parametrize("status", [404, pytest.param(410, marks=pytest.mark.slow)])
def test_a_job_that_the_api_has_forgotten_is_sent_anew_and_counted(
    status: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.faults.add(Fault.status_reply(status, "not_found", times=None, where=is_poll_of_the_first_job()))
    run = run_cli(*JOBS)
    assert (run.exit_code, run.summary["possible_double_charges"], bodies(bucket)) == (0, 1, expected)


@pytest.mark.parametrize(
    "result", [{}, *(pytest.param(other, marks=pytest.mark.slow) for other in (None, {"file_url": ""}))]
)
def test_a_job_that_is_completed_without_a_link_is_left_after_a_few_questions(
    result: object, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    told = json.dumps({"status": "completed", "result": result}).encode()
    api.faults.add(Fault(status=200, body=told, times=None, where=is_poll))
    run = run_cli(*JOBS)
    assert [(line["code"], line["permanent"]) for line in run.failures] == [("no_link", False)]
    api.faults.clear()
    assert (run_cli(*JOBS).exit_code, len(api.paid), bodies(bucket)) == (0, 1, expected)


def make_a_day_older(run: Any) -> None:
    """Let what is in flight have been sent longer ago than the API remembers keys."""
    with contextlib.closing(sqlite3.connect(run.workdir / "s3_bulk_convert.sqlite3")) as db, db:
        db.execute("UPDATE in_flight SET sent_at = sent_at - ?", (24 * 3600 + 60,))


@pytest.mark.parametrize(
    ("is_lost", "doubles"),
    [pytest.param(False, 0, id="known", marks=pytest.mark.slow), pytest.param(True, 1, id="lost")],
)
def test_a_job_of_yesterday_is_asked_for_before_anything_is_sent(
    *, is_lost: bool, doubles: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.behaviour.keep_memory = 0
    api.faults.add(Fault(status=200, body=b'{"status": "queued"}', times=None, where=is_poll))
    for _ in range(2):
        run = run_cli(*JOBS, *SOON_OVER)
        assert (run.exit_code, len(run.rows("in_flight")), len(api.paid)) == (3, 1, 1)
        make_a_day_older(run)
    api.faults.clear()
    if is_lost:
        api.faults.add(Fault.status_reply(404, "not_found", times=None, where=is_poll_of_the_first_job()))
    last = run_cli(*JOBS)
    assert (last.exit_code, last.summary["possible_double_charges"], len(api.paid)) == (0, doubles, 1 + doubles)
    assert (bodies(bucket), last.rows("in_flight")) == (expected, [])


# ----------------------------------------------------------------------------------------------------------------------
# Links to a result
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elsewhere",
    [pytest.param(False, id="own host"), pytest.param(True, id="another host", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "status", [302, 403, *(pytest.param(other, marks=pytest.mark.slow) for other in (401, 404, 405, 422))]
)
def test_a_link_that_is_refused_is_asked_for_anew(
    *, status: int, elsewhere: bool, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, count=2)
    api.behaviour.separate_download_host = elsewhere
    api.faults.add(Fault.redirect("http://127.0.0.1:9/login", status).at(is_download))
    run = run_cli(*JOBS)
    assert (run.exit_code, run.summary["stopped_because"], len(api.paid)) == (0, None, 2)
    assert bodies(bucket) == expected


def test_a_link_that_never_works_says_so_and_the_next_run_asks_for_it(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.behaviour.separate_download_host = True
    api.faults.add(Fault.status_reply(401, "login_first", times=None, where=is_download))
    (line,) = run_cli(*JOBS).failures
    assert (line["code"], line["permanent"]) == ("stale_link", False)
    assert "login_first" in line["message"]
    api.faults.clear()
    assert (run_cli(*JOBS).exit_code, len(api.paid), bodies(bucket)) == (0, 1, expected)


def test_a_429_of_a_download_host_pauses_nobody(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket)
    api.behaviour.separate_download_host = True
    api.faults.add(Fault.status_reply(429, retry_after="0.1", where=is_download))
    run = run_cli(*JOBS)
    assert (run.exit_code, run.summary["throttled"], bodies(bucket)) == (0, 0, expected)


def without_size(answer: Answer) -> Answer:
    """What tells of a job, and not how large its result is."""
    told = json.loads(answer.body)
    told.get("result", {}).pop("size", None)
    return replace(answer, body=json.dumps(told).encode())


@pytest.mark.parametrize("target", ["csv", pytest.param("txt", marks=pytest.mark.slow)])
def test_a_download_that_is_only_accepted_is_not_the_file(
    target: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    # Of a text, the bytes do not tell that it is another one.
    made = Converted(b"a,b\n1,2\n", "text/plain", target)
    api.behaviour.convert = lambda _: made
    fill(bucket)
    api.faults.add(Fault(Step.DELIVERY, reshape=without_size, times=None, where=is_poll))
    accepted = Fault(status=202, body=b"Accepted", content_type="text/plain", where=is_download)
    api.faults.add(accepted)
    run = run_cli(*JOBS, TARGET_FORMAT=target)
    assert (accepted.struck, run.exit_code, run.summary["converted"], len(api.paid)) == (1, 0, 1, 1)
    assert bodies(bucket) == {f"converted/0.{target}": made.body}


# ----------------------------------------------------------------------------------------------------------------------
# Jobs that fail
# ----------------------------------------------------------------------------------------------------------------------


def tell_of_failed_jobs(code: str, *, times: int | None = None, made: str = "") -> Fault:
    """Answer polls with the failure of a job, made at some time."""
    told = {"status": "failed", "created_at": made, "error": {"code": code, "message": "the engine gave up"}}
    now = {"Date": email.utils.formatdate(usegmt=True)}
    return Fault(status=200, body=json.dumps(told).encode(), headers=now, times=times, where=is_poll)


def let_jobs_fail(api: ConversionApi, count: int, code: str) -> None:
    """Let the first jobs fail, unpaid, and tell that after one poll each."""
    api.behaviour.job_states = ("failed",)
    fault = api.faults.add(tell_of_failed_jobs(code, times=count))

    def change(_: Request) -> None:
        if fault.struck == count:
            api.behaviour.job_states = ("completed",)

    api.on("answered", change)


def conversions(api: ConversionApi) -> list[bool]:
    """Of each request for a conversion, whether it had the bytes with it."""
    return [request.filename is not None for request in api.requests if request.is_conversion]


def test_a_job_that_failed_is_tried_again_on_demand(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket)
    api.behaviour.job_states = ("queued", "failed")
    first = run_cli(*JOBS, *UPLOAD)
    assert [(line["code"], line["permanent"]) for line in first.failures] == [("conversion_failed", True)]
    api.shelf.make_older(3)  # by clocks that tell whole seconds, it is an old one then
    assert len(run_cli(*JOBS, *UPLOAD, "--retry-failed").failures) == 2
    api.behaviour.job_states = ("completed",)
    api.shelf.make_older(3)
    last = run_cli(*JOBS, *UPLOAD, "--retry-failed")
    assert (last.exit_code, len(api.paid), last.summary["possible_double_charges"]) == (0, 1, 0)
    assert bodies(bucket) == expected
    # Each of them has walked over the jobs that failed before, and made one of its own.
    assert len(conversions(api)) == 1 + 2 + 3


def test_a_word_of_the_api_s_is_not_taken_for_one_of_this_program_s(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    # A job that the API calls lost has failed: it is not one that the API does not know, and nothing is ordered again.
    fill(bucket)
    let_jobs_fail(api, 3, "job_lost")
    run = run_cli(*JOBS, *UPLOAD)
    assert [(line["code"], line["permanent"]) for line in run.failures] == [("api_job_lost", True)]
    assert (len(conversions(api)), run.rows("in_flight")) == (1, [])


def test_what_the_api_calls_a_tag_does_not_settle_what_it_may_have_done(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    body = b'{"error": {"code": "tag_failed", "message": "no"}}'
    spoilt = Fault(Step.DELIVERY, times=2, reshape=lambda _: Answer(503, {"Content-Type": "application/json"}, body))
    api.faults.add(spoilt)
    first = run_cli("--set", "api.retries=1")
    assert [(line["code"], line["permanent"]) for line in first.failures] == [("api_tag_failed", False)]
    second = run_cli()
    assert (second.exit_code, len(api.paid), second.summary["possible_double_charges"]) == (0, 1, 0)
    assert bodies(bucket) == expected


@pytest.mark.parametrize("options", [JOBS, (*JOBS, *UPLOAD)], ids=["url", "upload"])
def test_a_job_that_failed_for_now_gets_another_attempt(
    options: tuple[str, ...], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    let_jobs_fail(api, 2, "service_unavailable")
    run = run_cli(*options)
    assert (run.exit_code, len(api.paid), run.summary["possible_double_charges"]) == (0, 1, 0)
    assert (bodies(bucket), len(conversions(api))) == (expected, 3)


def test_jobs_that_go_on_failing_are_for_the_next_run(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket)
    let_jobs_fail(api, 2, "service_unavailable")
    first = run_cli(*JOBS, *UPLOAD, "--set", "api.retries=1")
    assert [(line["code"], line["permanent"]) for line in first.failures] == [("service_unavailable", False)]
    api.faults.add(tell_of_failed_jobs("service_unavailable", times=2, made="2026-04-25T10:00:00Z"))
    last = run_cli(*JOBS, *UPLOAD, "--set", "api.retries=1")
    assert (last.exit_code, len(api.paid), bodies(bucket)) == (0, 1, expected)


def test_a_job_by_url_that_failed_gets_one_with_the_bytes(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket)
    let_jobs_fail(api, 1, "fetch_failed")
    run = run_cli(*JOBS)
    assert (run.exit_code, len(api.paid), run.summary["possible_double_charges"]) == (0, 1, 0)
    assert (bodies(bucket), conversions(api)) == (expected, [False, True])


@pytest.mark.parametrize(
    ("code", "options", "sent"),
    [
        ("fetch_failed", (), [False, True]),
        ("fetch_failed", ("--set", "api.transfer=url"), [False]),
        ("unsupported_route", (), [False]),
        pytest.param("file_too_large", (), [False], marks=pytest.mark.slow),
    ],
)
def test_a_job_that_fails_with_the_bytes_too_or_for_another_reason_has_failed(
    *, code: str, options: tuple[str, ...], sent: list[bool], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket)
    api.behaviour.job_states = ("failed",)
    api.faults.add(tell_of_failed_jobs(code))
    run = run_cli(*JOBS, *options)
    assert [(line["code"], line["permanent"]) for line in run.failures] == [(code, True)]
    assert (conversions(api), api.paid, run.rows("in_flight")) == (sent, [], [])


@pytest.mark.parametrize(
    ("code", "sent"),
    [("fetch_failed", [False, True]), pytest.param("service_unavailable", [False] * 3, marks=pytest.mark.slow)],
)
def test_a_job_of_an_earlier_run_that_failed_is_treated_no_worse(
    *, code: str, sent: list[bool], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.behaviour.job_states = ("failed",)
    api.faults.add(Fault(status=200, body=b'{"status": "queued"}', times=None, where=is_poll))
    assert run_cli(*JOBS, *SOON_OVER).exit_code == 3
    api.faults.clear()
    # The known job, and what the API says of it when its request is sent again.
    let_jobs_fail(api, 1 if code == "fetch_failed" else 2, code)
    run = run_cli(*JOBS)
    assert (run.exit_code, len(api.paid), bodies(bucket)) == (0, 1, expected)
    assert conversions(api) == sent
