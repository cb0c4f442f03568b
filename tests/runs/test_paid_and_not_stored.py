"""Results that were paid for and cannot be stored: how often they are bought, and how that is told.

A day passes in these tests when what is in flight was sent more than a day ago, and the API has forgotten it.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from tests.runs.test_resume import killed_when_paid, until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import HASTY
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
ONE_WORKER = ("--workers", "1")


def let_a_day_pass(run: Any, api: ConversionApi) -> None:
    with contextlib.closing(sqlite3.connect(run.workdir / "s3_bulk_convert.sqlite3")) as db, db:
        db.execute("UPDATE in_flight SET sent_at = sent_at - ?", (24 * 3600 + 60,))
    api.behaviour.keep_memory = 0


def failures(run: Any) -> list[tuple[str, str, bool]]:
    """The failures of a run and all before it."""
    return [(line["key"], line["code"], line["permanent"]) for line in run.failures]


def refuse_one_output(relay: Relay) -> Callable[[str, str], bool]:
    relay.refusal_status = 400
    relay.refusal = b"<Error><Code>InvalidArgument</Code><Message>no such output</Message></Error>"
    return lambda method, path: method == "PUT" and path.endswith("/converted/000.jpg")


def spoil_one_answer(api: ConversionApi) -> None:
    """Let the length of one object's answers be told by nobody, and half of them be lost."""
    fault = Fault.without_length(cut=True, times=None)
    api.faults.add(fault.at(lambda request: "/000.png?" in request.fields.get("file_url", "")))


@pytest.mark.parametrize("cause", ["store_failed", pytest.param("no_length", marks=pytest.mark.slow)])
def test_what_cannot_be_stored_is_bought_once_more_and_has_then_failed(
    cause: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 2)
    relay.refuse = refuse_one_output(relay) if cause == "store_failed" else relay.refuse
    if cause == "no_length":
        spoil_one_answer(api)
    given: Any = {"command": HASTY, "AWS_ENDPOINT_URL_S3": relay.url}
    options = ("--set", "api.retries=0")
    for _ in range(2):  # on one day: the second time it is had for nothing
        until_next_second()
        run = run_cli(*options, **given)
        assert len(api.paid) == 2
    for day, paid in enumerate([3, 3]):
        let_a_day_pass(run, api)
        run = run_cli(*options, **given)
        assert (len(api.paid), run.summary["possible_double_charges"]) == (paid, day)
    assert failures(run) == [("000.png", cause, False)] * 3 + [("000.png", "not_stored", True)]
    assert "paid for 2 times" in run.failures[-1]["message"]
    assert (run.exit_code, run.rows("in_flight")) == (1, [])
    sent = len(api.requests)
    last = run_cli(*options, **given)
    assert (last.exit_code, last.summary["skipped"]["failed_before"], len(api.requests)) == (0, 1, sent)
    # Whoever has put an end to the cause may buy it once more.
    relay.refuse = lambda *_: False
    api.faults.clear()
    assert run_cli("--retry-failed", **given).exit_code == 0
    assert (len(api.paid), bucket.read("converted/000.jpg")[:3]) == (4, b"\xff\xd8\xff")


def test_what_only_a_portal_says_it_has_taken_is_not_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    expected = fill(bucket, 1)
    relay.refuse = lambda method, _: method == "PUT"
    relay.refusal_status, relay.refusal = 200, b"<html>Welcome to our network</html>"
    through = {"AWS_ENDPOINT_URL_S3": relay.url}
    run = run_cli(**through)
    assert (run.exit_code, run.summary["failed"]) == (1, {"store_failed": 1})
    relay.refuse = lambda *_: False
    assert_all_promises_are_kept(run_cli(**through), api, bucket, expected)


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda: Fault.html_page(times=None), id="a web page in a 200"),
        pytest.param(lambda: Fault.status_reply(503, "service_unavailable", times=None), id="503"),
    ],
)
def test_a_trouble_of_three_days_in_which_nothing_was_paid_condemns_nothing(
    trouble: Callable[[], Fault], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 1)
    api.faults.add(trouble())
    for _ in range(3):
        run = run_cli("--set", "api.retries=0", command=HASTY)
        assert [permanent for _, _, permanent in failures(run)][-1:] == [False]
        let_a_day_pass(run, api)
    api.faults.clear()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


def pay_without_an_answer(run_cli: Cli, bucket: Any, api: ConversionApi, count: int) -> dict[str, bytes]:
    """Let some conversions be paid whose answers are lost, and a day pass."""
    expected = fill(bucket, count)
    fault = api.faults.add(Fault.cut_after_work(times=count))
    run = run_cli(*ONE_WORKER, "--set", "api.retries=0")
    assert (len(api.paid), fault.struck, len(run.rows("in_flight"))) == (count, count, count)
    let_a_day_pass(run, api)
    return expected


def test_what_the_cap_or_the_month_leaves_unsent_is_no_double_charge_yet(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = pay_without_an_answer(run_cli, bucket, api, 2)
    api.faults.add(Fault.status_reply(429, "quota_exceeded"))
    stopped = run_cli(*ONE_WORKER)
    assert (stopped.exit_code, stopped.summary["stopped_code"], len(api.paid)) == (3, "quota", 2)
    capped = run_cli(*ONE_WORKER, "--limit", "1")
    assert (capped.exit_code, capped.summary["stopped_code"], len(api.paid)) == (3, "cap", 3)
    last = run_cli(*ONE_WORKER)
    assert (last.exit_code, len(api.paid), last.rows("in_flight")) == (0, 4, [])
    doubles = [run.summary["possible_double_charges"] for run in (stopped, capped, last)]
    assert doubles == [0, 1, 1]
    assert {key: bucket.read(key) for key in expected} == expected


def test_a_kill_does_not_forget_that_something_may_have_been_charged_twice(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    pay_without_an_answer(run_cli, bucket, api, 1)
    killed_when_paid(start, api)
    api.behaviour.keep_memory = 24 * 3600
    until_next_second()
    last = run_cli()
    assert (last.exit_code, last.summary["possible_double_charges"], len(api.paid)) == (0, 1, 2)
    assert last.summary["replays"] == 1
