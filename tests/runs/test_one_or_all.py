"""One object's trouble or everybody's: what a refusal or a number of the API's may be taken for, and what not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import USAGE, ConversionApi, Fault, Request
from tests.standins.program import HASTY, lose_checkpoint
from tests.standins.promises import PNG, assert_all_promises_are_kept, fill
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
PAGE = b"<!DOCTYPE html><html><body><h1>This site is blocked</h1></body></html>"
ONE_BY_ONE = ("--workers", "1", "--set", "api.requests_per_minute=100000")
# Slowly enough that what is counted is seen before the next ten are sent.
IN_ORDER = ("--workers", "2", "--set", "api.requests_per_minute=3000")


def is_about(key: str) -> Callable[[Request], bool]:
    """Picks the requests for one source, whichever way it goes."""

    def picks(request: Request) -> bool:
        # A resumed request carries the URL it had; an upload has the key's last part for its name.
        return request.is_conversion and (f"/{key}?" in request.fields.get("file_url", "") or request.filename == key)

    return picks


def page_of_a_proxy(status: int, key: str) -> Fault:
    """A web page in place of the API's answer, whenever this source is sent."""
    headers = {"Location": "http://127.0.0.1:9/login"} if 300 <= status < 400 else {}
    fault = Fault(status=status, body=PAGE, content_type="text/html", times=None, headers=headers)
    return fault.at(is_about(key))


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", [pytest.param("upload", marks=pytest.mark.slow), "auto"])
def test_what_a_proxy_refuses_is_the_failure_of_those_objects_alone(
    transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 24)
    # More than ten in all, none of them ten times in a row.
    statuses = (*[403] * 6, 401, 402, 404, 405, 302, 307)
    refused = {f"{2 * number:03}.png": status for number, status in enumerate(statuses)}
    faults = [api.faults.add(page_of_a_proxy(status, key)) for key, status in refused.items()]
    run = run_cli(*ONE_BY_ONE, "--set", f"api.transfer={transfer}")
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (1, 12, 12)
    assert {line["key"]: line["status"] for line in run.failures} == refused
    assert {(line["code"], line["permanent"]) for line in run.failures} == {
        (f"http_{status}", False) for status in refused.values()
    }
    # Another body for the same object would be asked for, and perhaps paid, a second time.
    assert [fault.struck for fault in faults] == [1] * 12
    api.faults.clear()
    assert_all_promises_are_kept(run_cli("--set", f"api.transfer={transfer}"), api, bucket, expected)


@pytest.mark.parametrize("transfer", [pytest.param("upload", marks=pytest.mark.slow), "auto"])
def test_without_the_api_s_own_code_nothing_has_failed_for_good(
    transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 8)
    refused = {f"{number:03}.png": status for number, status in enumerate((400, 413, 414, 418, 422, 431, 451))}
    for key, status in refused.items():
        api.faults.add(page_of_a_proxy(status, key))
    run = run_cli(*ONE_BY_ONE, "--set", f"api.transfer={transfer}")
    assert (run.exit_code, len(api.paid)) == (1, 1)
    assert {line["key"]: (line["status"], line["permanent"]) for line in run.failures} == {
        key: (status, False) for key, status in refused.items()
    }
    assert "failed for good" not in run.out
    api.faults.clear()
    assert_all_promises_are_kept(run_cli("--set", f"api.transfer={transfer}"), api, bucket, expected)


def test_a_success_that_is_none_says_nothing_of_the_file(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    fill(bucket, 1)
    api.faults.add(replace(Fault.html_page(203), times=None))
    run = run_cli("--set", "api.retries=0")
    assert [line["code"] for line in run.failures] == ["http_203"]
    assert "remedy: answered without a code of the API's: is there a proxy" in run.out


REFUSALS_OF_ALL = [
    pytest.param(Fault.status_reply(403, "forbidden"), "forbidden", "check the API key and the plan", id="API"),
    pytest.param(Fault.html_page(403), "http_403", "answered without a code", id="proxy", marks=pytest.mark.slow),
    pytest.param(
        *(Fault.redirect("http://127.0.0.1:9/", 302), "http_302", "answered without a code"),
        id="address",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("fault", "code", "hint"), REFUSALS_OF_ALL)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ten_refusals_in_a_row_are_about_all_objects_and_stop_the_run(
    *, fault: Fault, code: str, hint: str, processes: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 30)
    api.faults.add(replace(fault, times=None))
    run = run_cli(*IN_ORDER, "--set", f"run.processes={processes}")
    assert (run.exit_code, len(api.paid)) == (3, 0)
    assert f"10 objects in a row failed for the same reason: {code}" in run.summary["stopped_because"]
    assert (run.summary["stopped_code"], f"\nhint: {hint}" in run.out) == ("same_failure", True)
    assert 10 <= len(run.failures) < 25
    assert {line["permanent"] for line in run.failures} == {False}
    assert run.summary["left"] == 30 - len(run.failures)
    api.faults.clear()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


def test_ten_refusals_of_a_bucket_that_has_no_more_are_still_said_to_be_about_all(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 10)
    api.faults.add(Fault.status_reply(403, "forbidden", times=None))
    run = run_cli(*IN_ORDER)
    assert (run.exit_code, len(run.failures), run.summary["left"]) == (3, 10, 0)
    assert "in a row failed for the same reason: forbidden" in run.summary["stopped_because"]
    api.faults.clear()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


@pytest.mark.slow
def test_ten_that_are_refused_hold_up_no_others_in_the_next_run(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket, 16)
    wheres = [is_about(f"{number:03}.png") for number in range(10)]
    refused = [api.faults.add(Fault.status_reply(403, "forbidden", times=None, where=where)) for where in wheres]
    first = run_cli(*ONE_BY_ONE)
    assert (first.exit_code, first.summary["converted"] + first.summary["left"]) == (3, 6)
    # No run finds out more about the ten, and they have failed for good in none.
    for converted in (first.summary["left"], *[0] * 4):
        run = run_cli(*ONE_BY_ONE)
        assert (run.exit_code, run.summary["converted"], run.summary["left"]) == (3, converted, 0)
        assert {line["permanent"] for line in run.failures} == {False}
    assert min(fault.struck for fault in refused) >= 6
    api.faults.clear()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        pytest.param(Fault.status_reply(401, "invalid_api_key", times=None), 2, id="key"),
        pytest.param(Fault.status_reply(403, "quota_exceeded", times=None), 3, id="quota"),
    ],
)
def test_the_api_s_word_on_the_key_or_the_month_stops_the_run_at_once(
    fault: Fault, exit_code: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 12)
    api.faults.add(fault)
    run = run_cli(*ONE_BY_ONE)
    assert (run.exit_code, run.failures, run.summary["left"], fault.struck) == (exit_code, [], 12, 1)


def test_what_another_run_would_meet_as_well_is_exit_2_until_something_was_begun(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 8)
    revoked = Fault.status_reply(401, "invalid_api_key", times=None)
    api.faults.add(revoked).at(lambda _: len(api.paid) >= 3)
    told = run_cli(*ONE_BY_ONE, "--log-format", "json")
    assert (told.exit_code, told.summary["converted"], '"exit_code": 3' in told.err) == (3, 3, True)
    # Nor is what an earlier run has done a reason to try once more.
    for options in (("--processes", "2"), ("--set", "s3.output_bucket=no-such-bucket"), ("--bucket", "no-such-bucket")):
        run = run_cli("-q", *options)
        assert (run.exit_code, run.summary["exit_code"], run.summary["converted"], run.rows("in_flight")) == (
            2,
            2,
            0,
            [],
        )
    # What may pass is worth another run, though nothing was begun in this one.
    assert run_cli("-q", AWS_ENDPOINT_URL_S3="http://127.0.0.1:9").exit_code == 3
    api.faults.clear()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


def test_a_proxy_s_page_in_place_of_a_job_s_state_stops_nobody(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket, 4)
    for status in (401, 403):
        page = Fault(status=status, body=PAGE, content_type="text/html", times=1)
        api.faults.add(page.at(lambda request: request.method == "GET" and request.path.startswith("/v1/jobs/")))
    run = run_cli("--set", "api.jobs_above=1", command=HASTY)
    assert_all_promises_are_kept(run, api, bucket, expected)


# ----------------------------------------------------------------------------------------------------------------------
# What is left of the month
# ----------------------------------------------------------------------------------------------------------------------


def send_all_in_vain(run_cli: Cli, bucket: Any, api: ConversionApi, count: int) -> dict[str, bytes]:
    """Let a run send all objects, and the API do none of them: whether it has is not known to anybody."""
    expected = fill(bucket, count)
    # Ten times in a row the same would stop the run.
    api.faults.add(Fault.cut_before_work(times=count // 2))
    api.faults.add(Fault.status_reply(500, times=None))
    run = run_cli("--set", "api.retries=0")
    assert (len(run.rows("in_flight")), len(api.paid)) == (count, 0)
    api.faults.clear()
    return expected


def fail_each_at_first(_: Cli, bucket: Any, api: ConversionApi, count: int) -> dict[str, bytes]:
    """Let the first attempt for each object come to nothing, so that the second may be answered from memory."""
    sent: dict[str, Request] = {}

    def is_first(request: Request) -> bool:
        return request.is_conversion and sent.setdefault(str(request.idempotency_key), request) is request

    api.faults.add(Fault.status_reply(502, "service_unavailable", times=None, where=is_first))
    return fill(bucket, count)


@pytest.mark.parametrize("prepare", [send_all_in_vain, pytest.param(fail_each_at_first, marks=pytest.mark.slow)])
def test_the_remainder_is_kept_though_the_api_may_have_done_what_is_sent_again(
    prepare: Callable[..., dict[str, bytes]], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = prepare(run_cli, bucket, api, 14)
    api.behaviour.month_quota = 100
    run = run_cli("--workers", "4", "--set", "api.keep_remaining=95", command=HASTY)
    # Five may be used; what the other three workers have sent by then cannot be taken back.
    assert (run.exit_code, 5 <= len(api.paid) <= 8) == (3, True), len(api.paid)
    assert "api.keep_remaining is 95" in run.summary["stopped_because"]
    assert run.summary["converted"] + run.summary["left"] == 14
    assert_all_promises_are_kept(run_cli(command=HASTY), api, bucket, expected)


KEPT = ("--workers", "1", "--set", "api.keep_remaining=95")


def is_about_the_usage(request: Request) -> bool:
    """Whether it asks how much of the month is left."""
    return request.path == USAGE


def test_where_the_remainder_is_reached_the_next_runs_use_up_none_of_it(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 30)
    api.behaviour.month_quota = 100
    for number in range(3):
        run = run_cli(*KEPT)
        assert (run.exit_code, run.summary["stopped_code"]) == (3, "quota")
        assert (run.summary["converted"], len(api.paid)) == (0 if number else 5, 5)
    assert "95 conversions remain" in run.summary["stopped_because"]
    # Nobody else is asked for it.
    api.forget_counts()
    assert run_cli().summary["converted"] == 25
    assert not [request for request in api.requests if is_about_the_usage(request)]
    assert {key: bucket.read(key) for key in expected} == expected


def test_jobs_that_are_accepted_when_the_remainder_is_reached_are_waited_for(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 12)
    api.behaviour.month_quota = 100
    run = run_cli(*KEPT, "--set", "api.jobs_above=1", command=HASTY)
    assert (run.exit_code, run.summary["stopped_code"]) == (3, "quota")
    assert (run.summary["converted"], len(api.paid), run.rows("in_flight")) == (5, 5, [])


def test_an_answer_that_is_here_when_the_run_is_to_end_is_stored_though_s3_is_busy(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 1)
    api.behaviour.month_quota = 96
    busy = iter([True])
    relay.refuse = lambda method, _: method == "PUT" and next(busy, False)
    relay.refusal_status = 503
    run = run_cli(*KEPT, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.summary["converted"], run.rows("in_flight"), next(busy, None)) == (1, [], None)


def test_a_run_that_has_nothing_to_pay_for_does_not_mind_what_remains(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 5)
    api.behaviour.month_quota = 100
    first = run_cli(*KEPT)
    assert len(api.paid) == 5
    (first.workdir / "keys").write_text("".join(f"{number:03}.png\n" for number in range(5)))
    named = run_cli(*KEPT, "--keys-from", "keys")
    assert (named.exit_code, named.summary["already_done"]) == (0, 5)
    lose_checkpoint(first.workdir)
    found = run_cli(*KEPT)
    assert (found.exit_code, found.summary["already_done"], len(api.paid)) == (0, 5, 5)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(partial(Fault.status_reply, 500, "internal_error"), id="500"),
        pytest.param(partial(Fault.status_reply, 404, "not_found"), id="404"),
        pytest.param(Fault.html_page, id="a page", marks=pytest.mark.slow),
        pytest.param(Fault.cut_before_work, id="cut", marks=pytest.mark.slow),
    ],
)
def test_where_nobody_says_what_remains_the_answers_to_conversions_do(
    fault: Callable[..., Fault], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 12)
    api.behaviour.month_quota = 100
    silent = api.faults.add(fault(times=None)).at(is_about_the_usage)
    run = run_cli(*KEPT, command=HASTY)
    assert (run.exit_code, run.summary["stopped_code"], len(api.paid)) == (3, "quota", 5)
    # It is asked before anything is sent that costs something.
    assert (silent.struck > 0, api.requests[0].path) == (True, USAGE)


def remaining(*told: str) -> Fault:
    """Answers that say this of what remains of the month."""
    return Fault.changed_headers({"X-CTF-Remaining": ", ".join(told)}, times=None)


@pytest.mark.parametrize(
    ("told", "flags"),
    [
        pytest.param(None, ("--set", "api.jobs_above=1", "--set", "api.keep_remaining=95"), id="to what makes a job"),
        pytest.param(("95", "96"), ("--set", "api.keep_remaining=95"), id="said twice"),
    ],
)
def test_the_remainder_is_kept_wherever_it_is_said(
    told: tuple[str, ...] | None, flags: tuple[str, ...], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 12)
    api.behaviour.month_quota = 100
    if told:
        api.faults.add(remaining(*told))
    run = run_cli("--workers", "1", *flags, command=HASTY)
    assert (run.exit_code, run.summary["stopped_code"]) == (3, "quota")
    assert len(api.paid) == (1 if told else 5)


def test_what_remained_when_a_repeated_answer_was_made_stops_no_run(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 3)
    api.behaviour.month_quota = 3
    api.faults.add(Fault.cut_after_work(times=None))
    assert run_cli("--set", "api.retries=0", "--workers", "1").exit_code == 1
    assert len(api.paid) == 3
    api.faults.clear()
    api.behaviour.month_quota = None
    expected |= fill(bucket, 6, first=3)
    until_next_second()  # by whole seconds it is told that an answer is older than the question
    # The first repeated answer says 2, and what was converted before it said far more.
    run = run_cli("--workers", "1", "--set", "api.keep_remaining=2")
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert run.summary["replays"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# What fails again and again
# ----------------------------------------------------------------------------------------------------------------------


def test_what_has_failed_in_five_runs_has_failed_for_good_and_until_then_goes_last(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 3)
    damaged = is_about("001.png")
    fault = api.faults.add(Fault.status_reply(500, "internal_error", times=None)).at(damaged)
    once = (*ONE_BY_ONE, "--set", "api.retries=0")
    assert run_cli(*once).summary["failed"] == {"internal_error": 1}
    bucket.put("002-new.png", PNG + b"new")
    for number in range(2, 6):
        asked = len(api.requests)
        run = run_cli(*once)
        assert (run.exit_code, run.failures[-1]["key"], fault.struck) == (1, "001.png", number)
        assert damaged(api.requests[-1])
        assert len(api.requests) - asked == (2 if number == 2 else 1)
    last = run.failures[-1]
    assert (last["code"], last["permanent"], run.summary["failed"]) == ("gave_up", True, {"gave_up": 1})
    again = run_cli(*once)
    assert (again.exit_code, again.summary["skipped"], fault.struck) == (0, {"failed_before": 1, "own_output": 3}, 5)
    bucket.put("001.png", PNG + b"mended")
    api.faults.clear()
    assert run_cli(*once).summary["converted"] == 1


def test_what_was_paid_for_and_given_up_is_not_paid_for_again(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket, 1)
    api.faults.add(Fault.cut_after_work(times=None))
    for _ in range(5):
        run = run_cli("--set", "api.retries=0")
    assert (run.summary["failed"], len(api.paid)) == ({"gave_up": 1}, 1)
    api.faults.clear()
    assert_all_promises_are_kept(run_cli("--retry-failed"), api, bucket, expected)
