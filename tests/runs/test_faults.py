"""One row for each thing that the API can answer or fail to: what is recorded, stored and paid, and what comes next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.converters import Conversion, marking
from tests.standins.program import HASTY

Cli = Callable[..., Any]
SOURCE = b"\x89PNG\r\n\x1a\n" + b"a picture " * 50
OTHER_KINDS = b"\x89PNG\r\n\x1a\n" + b"a PNG where a JPEG is wanted"


@dataclass(frozen=True)
class Row:
    """A fault and what must come of it. `second_*`: of a run after it, when the fault is over."""

    name: str
    faults: tuple[Callable[[], Fault], ...] = ()
    behaviour: dict[str, object] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    exit_code: int = 0
    code: str = ""  # of the failures record; empty: there is none
    permanent: bool = False
    paid: int = 1  # after the first run
    double: int = 0  # possible double charges, both runs together
    first_requests: int | None = None  # of the first run, for a conversion; None: as many as it takes
    second_requests: int | None = 0

    @property
    def is_stored(self) -> bool:
        """Whether the first run brings the output."""
        return self.exit_code == 0


def reply(
    status: int, code: str | None = None, *, retry_after: str | None = None, times: int | None = 1
) -> Callable[[], Fault]:
    return lambda: Fault.status_reply(status, code, retry_after=retry_after, times=times)


def refused(name: str, status: int, code: str | None, recorded: str) -> Row:
    """A refusal of the object itself, in upload mode: permanent, nothing paid, not sent again."""
    return Row(
        name,
        (reply(status, code, times=None),),
        options=("api.transfer=upload",),
        exit_code=1,
        code=recorded,
        permanent=True,
        paid=0,
    )


def stopped(name: str, *faults: Callable[[], Fault], exit_code: int = 3, **behaviour: object) -> Row:
    """A refusal of everything: the run stops and blames nobody, the next one converts."""
    return Row(name, faults, behaviour, exit_code=exit_code, paid=0, second_requests=1)


def survived(name: str, *faults: Callable[[], Fault], **behaviour: object) -> Row:
    """A passing trouble: converted all the same, and paid once."""
    return Row(name, faults, behaviour)


def given_up(name: str, fault: Callable[[], Fault], code: str, paid: int = 0) -> Row:
    """A trouble that outlasts the attempts: transient, so the next run tries again, and pays no second time."""
    return Row(name, (fault,), options=("api.retries=1",), exit_code=1, code=code, paid=paid, second_requests=1)


def failed_job(shape: Any, code: str) -> Row:
    """A job that fails, which says so in one of the forms that it may have."""
    return Row(
        f"a job that failed, {shape}",
        (Fault.accepted_as_job,),
        {"job_states": ("failed",), "job_error": shape},
        ("api.transfer=upload",),
        exit_code=1,
        code=code,
        permanent=True,
        paid=0,
    )


ROWS = [
    refused("400 bad_request", 400, "bad_request", "bad_request"),
    refused("422 unsupported_route", 422, "unsupported_route", "unsupported_route"),
    refused("422 in words that no file takes", 422, "\ud83d", "?"),
    stopped("401 invalid_api_key", reply(401, "invalid_api_key"), exit_code=2),
    stopped("429 quota_exceeded", reply(429, "quota_exceeded")),
    survived("409 while an earlier attempt is at work", reply(409, "bad_request", retry_after="0")),
    survived("429 rate_limited, seconds", reply(429, "rate_limited", retry_after="1")),
    survived("503 with an HTML page", lambda: Fault.html_page(503)),
    Row("three 504s, and no jobs", (lambda: Fault.work_lost(504, times=3),), options=("api.jobs_above=never",)),
    survived("connection cut before the work", Fault.cut_before_work),
    survived("connection cut after the work", Fault.cut_after_work),
    survived("an HTML page in a 200, once", Fault.html_page),
    survived("half of the answer", Fault.truncated_answer),
    survived("a JSON envelope with result.file_url", Fault.json_envelope, envelope_link="result.file_url"),
    survived("202 and a job", Fault.accepted_as_job),
    Row("two 504s: a job instead", (lambda: Fault.work_lost(504, times=2),), {"job_states": ("completed",)}, double=1),
    given_up("404 for the endpoint itself", reply(404, "not_found", times=None), "not_found"),
    given_up("a redirect", lambda: Fault.redirect("http://127.0.0.1:9/elsewhere", times=None), "http_307"),
    given_up("an error text in a 200, always", lambda: Fault.json_in_200(times=None), "json_answer"),
    given_up("connection cut after the work, always", lambda: Fault.cut_after_work(times=None), "network", paid=1),
    Row(
        "another format",
        (lambda: Fault.other_file(OTHER_KINDS, "image/png", kept=True, times=None),),
        first_requests=1,
        exit_code=1,
        code="wrong_type",
        permanent=True,
    ),
    failed_job("object", "conversion_failed"),
    Row(
        "422: the key is taken by another body",
        (reply(422, "bad_request"),),
        options=("api.transfer=upload",),
        double=1,
    ),
]

# The reading of Retry-After has tests of its own in tests/rules; here for the whole way.
FORMS_OF_RETRY_AFTER = {
    "a fraction": "0.2",
    "a date that is past": "Sun, 06 Nov 1994 08:49:37 GMT",
    "malformed": "soon",
    "negative": "-5",
}
# What another row stands for.
LONG_ROWS = [
    Row("three 504s from the queue of jobs", (lambda: Fault.work_lost(504, times=3),), options=("api.jobs_above=1",)),
    Row("202 and a job with half a letter", (lambda: Fault(status=202, body=b'{"job_id": "\\ud83d"}'),), double=1),
    *(failed_job(shape, "job_failed") for shape in ("string", "absent")),
    *(
        survived(f"429 rate_limited, {name}", reply(429, "rate_limited", retry_after=header))
        for name, header in FORMS_OF_RETRY_AFTER.items()
    ),
    refused("422 with another code", 422, "password_protected", "password_protected"),
    survived("429 rate_limited, without Retry-After", reply(429, "rate_limited")),
    survived("429 without a code", reply(429)),
    survived("502 service_unavailable once", reply(502, "service_unavailable")),
    survived("504 once", lambda: Fault.work_lost(504)),
    survived("408", reply(408)),
    survived("a JSON envelope with file_url", Fault.json_envelope),
    survived("a JSON envelope with download_url", Fault.json_envelope, envelope_link="download_url"),
    survived("stale rate headers", stale_rate_headers=True),
    given_up("422 without JSON", reply(422, times=None), "http_422"),
    given_up("403 without a code", reply(403, times=None), "http_403"),
    given_up("an HTML page in a 200, always", lambda: Fault.html_page(times=None), "html_answer"),
    survived("an error text in a 200, once", Fault.json_in_200),
    given_up("connection cut before the work, always", lambda: Fault.cut_before_work(times=None), "network"),
    survived("202 and a job in an unknown state", Fault.accepted_as_job, job_states=("dreaming", "completed")),
    survived("202, another host", Fault.accepted_as_job, job_states=("completed",), separate_download_host=True),
    survived("500 once", reply(500)),
    refused("413 file_too_large", 413, "file_too_large", "file_too_large"),
    survived("half of a chunked answer", lambda: Fault.truncated_answer(chunked=True)),
    survived("an empty 200, once", Fault.empty_answer),
    survived("no rate headers", rate_headers=False),
    given_up("502 always", reply(502, "service_unavailable", times=None), "service_unavailable"),
    given_up("half of the answer, always", lambda: Fault.truncated_answer(times=None), "cut_answer", paid=1),
    survived("a JSON envelope, another host", Fault.json_envelope, separate_download_host=True),
    survived("202 and a stale link", Fault.accepted_as_job, job_states=("completed",), stale_links=1),
    given_up("400 of a gateway, without a body", reply(400, times=None), "http_400"),
]


def prepare(api: ConversionApi, row: Row) -> None:
    api.behaviour.convert = marking
    api.behaviour.compare_raw_body = True
    for name, value in row.behaviour.items():
        setattr(api.behaviour, name, value)
    for fault in row.faults:
        api.faults.add(fault())


def assert_recorded(run: Any, row: Row) -> None:
    expected = [(row.code, row.permanent)] if row.code else []
    assert [(line["code"], line["permanent"]) for line in run.failures] == expected, run.failures
    assert run.exit_code == row.exit_code, run.out + run.err
    assert (run.summary["stopped_because"] is not None) == (row.exit_code >= 2)
    assert "hint: " in run.out or row.exit_code < 2


def assert_stored(bucket: Any, *, is_stored: bool) -> None:
    good = marking(Conversion(SOURCE, "png", "jpg", None)).body
    outputs = {key: body for key, (body, *_) in bucket.outputs().items()}
    assert outputs == ({"converted/a.jpg": good} if is_stored else {})


def assert_the_key_went_to_the_api_alone(api: ConversionApi) -> None:
    elsewhere = [request for request in api.requests if request.listener == "download"]
    assert not any("Authorization" in request.headers for request in elsewhere)


@pytest.mark.parametrize(
    "row", [*ROWS, *(pytest.param(row, marks=pytest.mark.slow) for row in LONG_ROWS)], ids=lambda row: row.name
)
def test_each_fault_has_its_consequence(row: Row, run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", SOURCE)
    prepare(api, row)
    options = [part for option in row.options for part in ("--set", option)]
    first = run_cli(*options, command=HASTY)
    assert_recorded(first, row)
    assert_stored(bucket, is_stored=row.is_stored)
    assert len(api.paid) == row.paid
    sent = len([request for request in api.requests if request.is_conversion])
    assert row.first_requests in {None, sent}
    api.faults.clear()
    api.behaviour.job_states = ("completed",)
    second = run_cli(*options, command=HASTY)
    assert len([request for request in api.requests if request.is_conversion]) - sent == row.second_requests
    assert second.summary["skipped"].get("failed_before", 0) == int(row.permanent)
    assert_stored(bucket, is_stored=not row.permanent)
    assert api.paid_twice() == []
    doubles = first.summary["possible_double_charges"] + second.summary["possible_double_charges"]
    assert doubles == row.double
    assert_the_key_went_to_the_api_alone(api)


def test_a_slow_answer_is_asked_for_again_and_paid_once(
    run_cli: Cli, bucket: Any, api: ConversionApi, release: Any
) -> None:
    api.behaviour.convert = marking
    api.faults.add(Fault.stalled_answer(release))
    bucket.put("a.png", SOURCE)
    run = run_cli("--set", "api.timeout=1s")
    assert (run.exit_code, len(api.paid), run.summary["replays"]) == (0, 1, 1)
    assert_stored(bucket, is_stored=True)


def test_the_month_s_remainder_is_kept(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    api.behaviour.month_quota = 20
    for number in range(20):
        bucket.put(f"{number}.png", SOURCE + bytes([number]))
    run = run_cli("--set", "api.keep_remaining=12", "--workers", "1")
    assert (run.exit_code, len(api.paid), run.summary["remaining"]) == (3, 8, 12)
    assert "api.keep_remaining is 12" in run.summary["stopped_because"]
    assert run.failures == []


def test_the_last_conversion_of_the_month_for_the_last_object_is_no_early_stop(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    api.behaviour.month_quota = 3
    for number in range(3):
        bucket.put(f"{number}.png", SOURCE + bytes([number]))
    run = run_cli()
    assert (run.exit_code, run.summary["left"], run.summary["stopped_because"]) == (0, 0, None)


def test_a_secret_that_the_api_repeats_gets_no_further(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    echo = f"X-Amz-Signature=0123 {api.api_key}"
    api.faults.add(Fault.status_reply(422, echo, times=None))
    bucket.put("a.png", SOURCE)
    run = run_cli("--set", "api.transfer=upload")
    assert run.failures[0]["code"] == "X-Amz-Signature=... ..."


def is_conversion_number(wanted: int) -> Callable[[Request], bool]:
    """Picks one request for a conversion, by its number."""
    seen: list[Request] = []

    def is_it(request: Request) -> bool:
        if request.is_conversion and request not in seen:
            seen.append(request)
        return len(seen) == wanted and request is seen[-1]

    return is_it


NO_WORD_ON_THE_OBJECT = [
    pytest.param(reply(401, "invalid_api_key"), 3, id="the key", marks=pytest.mark.slow),
    pytest.param(reply(403), 1, id="the account", marks=pytest.mark.slow),
    pytest.param(
        lambda: Fault.redirect("http://127.0.0.1:9/elsewhere", 302), 1, id="the address", marks=pytest.mark.slow
    ),
    pytest.param(reply(400), 1, id="a gateway's 400"),
    pytest.param(lambda: Fault.html_page(413), 1, id="a gateway's 413", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("refusal", "exit_code"), NO_WORD_ON_THE_OBJECT)
def test_what_is_no_word_on_the_object_does_not_forget_what_is_paid(
    refusal: Callable[[], Fault], exit_code: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", SOURCE)
    api.behaviour.convert = marking
    api.faults.add(Fault.cut_after_work())
    api.faults.add(refusal().at(is_conversion_number(2)))
    first = run_cli()
    assert (first.exit_code, len(api.paid), len(first.rows("in_flight"))) == (exit_code, 1, 1)
    api.faults.add(refusal())
    until_next_second()  # in which a presigned URL is another one
    # A key that is refused before anything else has come of the run would be refused in the next one as well.
    assert run_cli().exit_code == (2 if exit_code == 3 else exit_code)
    until_next_second()
    last = run_cli()
    assert (last.exit_code, len(api.paid), last.summary["replays"]) == (0, 1, 1)


def test_the_api_s_word_on_the_object_settles_what_a_broken_attempt_left_open(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", SOURCE)
    api.faults.add(Fault.cut_before_work())
    api.faults.add(Fault.status_reply(422, "password_protected"))
    run = run_cli("--set", "api.transfer=upload")
    assert [(line["code"], line["permanent"]) for line in run.failures] == [("password_protected", True)]
    assert run.rows("in_flight") == []
