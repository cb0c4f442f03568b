"""One object's conversation with the API: whatever it comes to, what was sent last is asked for, and paid once."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.runs.test_jobs import JOBS, bodies, is_poll
from tests.runs.test_resume import killed_when_paid, until_next_second
from tests.standins import promises
from tests.standins.conversion_api import Answer, ConversionApi, Fault, Request, Step
from tests.standins.converters import marking
from tests.standins.program import script_with
from tests.standins.relay import Relay

Cli = Callable[..., Any]
UPLOAD = ("--set", "api.transfer=upload")
HASTIER = script_with("program.JOB_POLL_SECONDS, program.BACKOFF_CAP_SECONDS = (0.02,), 0.1")
fill = partial(promises.fill, count=1, name="{}", repeated=1)


@pytest.fixture(autouse=True)
def _marks(api: ConversionApi) -> None:
    api.behaviour.convert = marking


@pytest.fixture
def run_cli(run_cli: Cli) -> Cli:
    """Run a script that asks soon, and soon again."""
    return partial(run_cli, command=HASTIER)


def conversions(api: ConversionApi) -> list[Request]:
    """The requests for a conversion."""
    return [request for request in api.requests if request.is_conversion]


def codes(run: Any) -> list[tuple[str, bool]]:
    """The failures of a run and all before it: their codes, and whether they are for good."""
    return [(line["code"], line["permanent"]) for line in run.failures]


# ----------------------------------------------------------------------------------------------------------------------
# Jobs that the API does not know
# ----------------------------------------------------------------------------------------------------------------------


def among_the_first_polls(count: int) -> Callable[[Request], bool]:
    """Picks the first polls of each job."""
    polls: Counter[str] = Counter()

    def is_it(request: Request) -> bool:
        if is_poll(request):
            polls[request.path] += 1
        return is_poll(request) and polls[request.path] <= count

    return is_it


def test_a_job_that_is_known_late_is_billed_once(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket, count=4)
    api.faults.add(Fault.status_reply(404, "not_found", times=None).at(among_the_first_polls(3)))
    run = run_cli(*JOBS)
    assert (run.exit_code, run.summary["possible_double_charges"], run.rows("in_flight")) == (0, 0, [])
    assert (len(api.paid), len(conversions(api)), bodies(bucket)) == (4, 4, expected)


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_web_page_in_place_of_a_job_s_state_orders_nothing_again(
    times: int | None, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.faults.add(Fault.html_page(404, times=times).at(is_poll))
    first = run_cli(*JOBS, "--set", "api.retries=1")
    assert codes(first) == ([] if times else [("job_not_finished", False)])
    assert len(first.rows("in_flight")) == len(first.failures)
    api.faults.clear()
    second = run_cli(*JOBS)
    assert (second.exit_code, len(conversions(api)), len(api.paid), bodies(bucket)) == (0, 1, 1, expected)
    assert first.summary["possible_double_charges"] == second.summary["possible_double_charges"] == 0


def test_a_job_that_stays_unknown_is_ordered_once_more_and_counted(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.faults.add(Fault.status_reply(404, "not_found", times=None, where=is_poll))
    runs = [run_cli(*JOBS) for _ in range(2)]
    assert codes(runs[-1]) == [("job_lost", False)] * 2
    assert (len(api.paid), len(runs[-1].rows("in_flight"))) == (2, 1)
    api.faults.clear()
    runs.append(run_cli(*JOBS))
    assert (runs[-1].exit_code, len(api.paid), bodies(bucket)) == (0, 2, expected)
    assert [run.summary["possible_double_charges"] for run in runs] == [0, 0, 1]
    # The answer to a question for a job is an answer: the second question does not wait for another one.
    assert max(run.summary["seconds"] for run in runs) < 5


# ----------------------------------------------------------------------------------------------------------------------
# What says nothing of a request
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_an_answer_of_two_lengths_is_asked_for_again_under_the_same_key(
    times: int | None, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.faults.add(Fault.changed_headers({"Content-Length": "7"}, times=times))
    first = run_cli("--set", "api.retries=1")
    assert codes(first) == ([] if times else [("network", False)])
    assert len(first.rows("in_flight")) == len(first.failures)
    api.faults.clear()
    until_next_second()  # in which a presigned URL is another one
    assert run_cli().exit_code == 0
    assert (len(api.paid), bodies(bucket)) == (1, expected)


# An exception of a library's that nobody has ever seen, when the answer is there.
BREAKS_WHEN_ANSWERED = """
import requests
send = requests.Session.send
def send_and_break(self, request, **options):
    answer = send(self, request, **options)
    if request.method == "POST":
        raise ZeroDivisionError("nobody expects this")
    return answer
requests.Session.send = send_and_break
"""


def test_an_exception_that_nobody_expects_forgets_nothing_that_is_paid(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    first = run_cli(command=script_with(BREAKS_WHEN_ANSWERED))
    assert (first.exit_code, len(api.paid), len(first.rows("in_flight"))) == (1, 1, 1)
    assert "nobody expects this" in first.failures[0]["message"]
    until_next_second()
    second = run_cli()
    assert (second.exit_code, second.summary["possible_double_charges"], second.rows("in_flight")) == (0, 0, [])
    assert (len(api.paid), bodies(bucket)) == (1, expected)


ONCE = script_with("program.S3_ATTEMPTS = 1")  # so that boto3 tries nothing again


def test_an_s3_that_does_not_answer_a_look_forgets_nothing_that_is_paid(
    start: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    expected = fill(bucket)
    # At one address all the time: the same bucket at another one is another bucket.
    start = partial(start, AWS_ENDPOINT_URL_S3=relay.url)
    killed_when_paid(start, api, *UPLOAD)
    relay.refuse = lambda method, _: method == "HEAD"
    relay.refusal_status = 500
    second = start(*UPLOAD, command=ONCE).wait()
    assert (codes(second), len(second.rows("in_flight"))) == ([("look_failed", False)], 1)
    relay.refuse = lambda *_: False
    last = start(*UPLOAD).wait()
    assert (last.exit_code, last.summary["possible_double_charges"], last.rows("in_flight")) == (0, 0, [])
    assert (len(api.paid), bodies(bucket)) == (1, expected)


def test_a_limit_that_is_lowered_after_a_request_was_paid_forgets_nothing(
    start: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    killed_when_paid(start, api)
    second = start("--set", "api.max_size=10").wait()
    assert (codes(second), len(second.rows("in_flight"))) == ([("too_large", True)], 1)
    until_next_second()
    last = start("--retry-failed").wait()
    assert (last.exit_code, last.summary["possible_double_charges"], last.rows("in_flight")) == (0, 0, [])
    assert (len(api.paid), bodies(bucket)) == (1, expected)


# ----------------------------------------------------------------------------------------------------------------------
# What was sent last
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_kill_after_bytes_were_paid_in_place_of_a_url_sends_the_bytes_again(
    processes: str, start: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, count=3)
    api.behaviour.accept_file_url = False
    options = ("--set", f"run.processes={processes}", "--workers", "2")
    killed_when_paid(start, api, *options)
    api.behaviour.accept_file_url = True
    last = start(*options).wait()
    assert (last.exit_code, last.summary["possible_double_charges"], last.rows("in_flight")) == (0, 0, [])
    assert (len(api.paid), api.paid_twice(), bodies(bucket)) == (3, [], expected)


def test_bytes_that_were_paid_in_place_of_a_url_and_not_stored_are_asked_for_again(
    start: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    expected = fill(bucket, count=4)
    api.behaviour.accept_file_url = False
    relay.refuse = lambda method, path: method == "PUT" and "/converted/" in path
    start = partial(start, AWS_ENDPOINT_URL_S3=relay.url)
    first = start().wait()
    paid = len(api.paid)
    assert (first.exit_code, len(first.rows("in_flight")) >= paid > 0, bodies(bucket)) == (1, True, {})
    api.behaviour.accept_file_url = True
    relay.refuse = lambda *_: False
    last = start().wait()
    assert (last.exit_code, last.summary["replays"], last.summary["possible_double_charges"]) == (0, paid, 0)
    assert (len(api.paid), api.paid_twice(), bodies(bucket)) == (4, [], expected)


def test_a_kill_after_a_successor_key_was_paid_forgets_neither_the_key_nor_the_doubt(
    start: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    killed = api.faults.add(Fault.status_reply(422, "bad_request"))
    killed_when_paid(start, api, *UPLOAD)
    assert killed.struck == 1
    # Now the first key would be taken.
    last = start(*UPLOAD).wait()
    assert (last.exit_code, last.summary["possible_double_charges"], last.rows("in_flight")) == (0, 1, [])
    assert (len(api.paid), bodies(bucket)) == (1, expected)


# ----------------------------------------------------------------------------------------------------------------------
# A word on one request
# ----------------------------------------------------------------------------------------------------------------------


def too_late(answer: Answer) -> Answer:
    """What a gateway makes of an answer that took too long: the work is done, and paid."""
    return dataclasses.replace(answer, status=504, headers={}, body=b"")


@pytest.mark.parametrize(
    ("status", "code"),
    [(422, "unsupported_route"), pytest.param(400, "bad_request", marks=pytest.mark.slow), (404, "not_found")],
)
def test_a_refused_job_says_nothing_of_the_call_that_took_too_long(
    status: int, code: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket)
    api.faults.add(Fault(Step.DELIVERY, times=2, reshape=too_late))
    api.faults.add(Fault.status_reply(status, code, times=None).at(lambda request: request.path == "/v1/jobs"))
    first = run_cli()
    assert (first.exit_code, len(api.paid), len(first.rows("in_flight"))) == (1, 1, 1)
    assert codes(first) == [(code, False)]
    until_next_second()
    last = run_cli()
    assert (last.exit_code, last.summary["replays"], last.summary["possible_double_charges"]) == (0, 1, 0)
    assert (len(api.paid), last.rows("in_flight"), bodies(bucket)) == (1, [], expected)


@pytest.mark.parametrize(
    ("transfer", "most"), [("auto", 4), pytest.param("url", 4, marks=pytest.mark.slow), ("upload", 3)]
)
def test_a_damaged_file_that_is_refused_as_a_taken_key_has_failed_after_two_successors(
    transfer: str, most: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket)
    api.faults.add(Fault.status_reply(422, "bad_request", times=None))
    runs = [run_cli("--set", f"api.transfer={transfer}") for _ in range(2)]
    assert codes(runs[-1]) == [("bad_request", True)]
    assert (len(conversions(api)), api.paid, runs[-1].rows("in_flight")) == (most, [], [])
    assert [run.summary["possible_double_charges"] for run in runs] == [0, 0]
    assert runs[-1].summary["skipped"] == {"failed_before": 1}
    keys = [request.idempotency_key for request in conversions(api)]
    assert len(set(keys)) == len(list(itertools.groupby(keys))) >= 3
