"""Each reason to stop: once, drained, no innocent object blamed, the rest left to do; the next run goes on."""

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.runs.test_processes import wait_until
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault, Step
from tests.standins.program import HASTY, script_with
from tests.standins.promises import assert_all_promises_are_kept, fill

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]


def put_some(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"{number:03}.png", b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode())


def assert_next_run_finishes(run_cli: Cli, bucket: Any, api: ConversionApi, count: int) -> None:
    run = run_cli()
    assert run.exit_code == 0, run.err + run.out
    assert len(bucket.outputs()) == len(api.paid) == count
    assert api.paid_twice() == []


def test_a_run_that_stops_before_it_has_listed_anything_says_only_why(run_cli: Cli) -> None:
    run = run_cli(S3_BUCKET="no-such-bucket")
    assert (run.exit_code, run.summary["stopped_code"]) == (2, "s3")
    _, _, said = run.out.partition(" ")
    assert said == "stopped: the bucket no-such-bucket does not exist\nhint: correct s3.bucket or s3.output_bucket\n"


def test_what_the_api_had_put_off_when_a_run_ended_is_sent_again_as_it_was(
    start: Cli, bucket: Any, strict_api: ConversionApi
) -> None:
    expected = fill(bucket, 3)
    limited = strict_api.faults.add(Fault.status_reply(429, "rate_limited", retry_after="30"))
    run = start("--set", "api.transfer=url")
    assert limited.reached.wait(30)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait().exit_code == 143
    until_next_second()  # in which a presigned URL is another one
    again = start("--set", "api.transfer=url").wait()
    assert_all_promises_are_kept(again, strict_api, bucket, expected)
    assert again.summary["possible_double_charges"] == 0


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_lets_finish_what_is_in_flight_and_sends_nothing_new(
    *, number: int, exit_code: int, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_some(bucket, 12)
    fault = api.faults.add(Fault.hang_until(release, times=2))
    run = start("--workers", "2")
    assert fault.reached.wait(30)
    run.process.send_signal(number)
    wait_until_said(run, "interrupted")
    release.set()
    run.wait()
    assert run.exit_code == exit_code
    assert len(api.requests) <= 3
    assert run.summary["converted"] == len(api.paid) == len(api.requests)
    assert run.summary["converted"] + run.summary["left"] == 12
    assert_next_run_finishes(run_cli, bucket, api, 12)


def wait_until_said(run: Any, words: str) -> None:
    """Read the run's messages up to one."""
    for line in run.process.stderr:
        if words in line:
            return


def test_a_second_signal_ends_it_at_once(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_some(bucket, 6)
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1")
    assert fault.reached.wait(30)
    run.process.send_signal(signal.SIGINT)
    wait_until_said(run, "interrupted")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(10).exit_code == 130
    assert run.err.endswith("\nended at once: 1 in flight are asked for again by the next run\n")
    release.set()
    assert_next_run_finishes(run_cli, bucket, api, 6)


def test_a_signal_that_comes_twice_at_once_is_one(
    start: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    # So does `timeout`: first to the process, then to its group.
    put_some(bucket, 6)
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1")
    assert fault.reached.wait(30)
    for _ in range(2):
        run.process.terminate()
        time.sleep(0.05)
    wait_until_said(run, "interrupted")
    release.set()
    assert run.wait(30).exit_code == 143
    assert (run.summary["converted"], run.summary["left"]) == (1, 5)
    assert run.summary["jobs"]["default"] == {"target": "jpg", "listed": 6, "converted": 1, "left": 5}


def test_after_the_grace_it_does_not_wait_for_a_request_that_hangs(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_some(bucket, 4)
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1", "--set", "run.shutdown_grace=1s")
    assert fault.reached.wait(30)
    run.process.terminate()
    assert run.wait(20).exit_code == 143
    assert run.summary["left"] == 4
    release.set()
    assert_next_run_finishes(run_cli, bucket, api, 4)


def test_a_used_up_quota_stops_the_run_and_blames_nobody(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 20)
    api.behaviour.month_quota = 8
    run = run_cli("--set", "api.keep_remaining=0")
    assert run.exit_code == 3
    assert len(api.paid) <= 8
    assert run.failures == []
    assert run.summary["converted"] + run.summary["left"] == 20
    assert "hint: run it again next month" in run.out
    api.behaviour.month_quota = None
    assert_next_run_finishes(run_cli, bucket, api, 20)


def test_quota_exceeded_without_any_headers_stops_the_run(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 20)
    api.behaviour.month_quota = 8
    api.behaviour.rate_headers = False
    run = run_cli()
    assert (run.exit_code, run.failures, len(api.paid)) == (3, [], 8)
    assert run.summary["stopped_because"].startswith("the quota is used up: 429 quota_exceeded")
    api.behaviour.month_quota = None
    assert_next_run_finishes(run_cli, bucket, api, 20)


def test_the_limit_pays_for_exactly_so_many(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 12)
    run = run_cli("--limit", "5")
    assert (run.exit_code, len(api.paid)) == (3, 5)
    assert run.summary["converted"] == 5
    assert run.summary["left"] == 7
    assert run_cli("--limit", "7").exit_code == 0
    assert len(api.paid) == 12


def late_504() -> Fault:
    """The conversion takes longer than the API's call may: it is charged, and the answer says 504."""
    late = Fault(Step.DELIVERY, times=None, reshape=lambda answer: replace(answer, status=504, headers={}, body=b""))
    return late.at(lambda request: request.path == "/v1/convert")


def failing_jobs() -> Fault:
    """Each job is charged, and fails."""
    told = {"status": "failed", "error": {"code": "service_unavailable", "message": "busy"}}
    return Fault(status=200, body=json.dumps(told).encode(), times=None).at(lambda request: request.method == "GET")


@pytest.mark.parametrize(("fault", "flags"), [(failing_jobs, ("--set", "api.jobs_above=1")), (late_504, ())])
def test_the_limit_counts_whatever_may_be_charged_for_one_object(
    fault: Callable[[], Fault], flags: tuple[str, ...], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_some(bucket, 4)
    api.faults.add(fault())
    run = run_cli(*flags, "--limit", "2", "--workers", "1", command=HASTY)
    assert (run.exit_code, run.summary["stopped_code"], len(api.paid)) == (3, "cap", 2)
    api.faults.clear()
    assert run_cli(*flags, command=HASTY).exit_code == 0
    assert len(bucket.outputs()) == 4


def test_under_a_cap_of_one_runs_get_on_with_what_takes_two(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 2)
    api.faults.add(late_504())
    # What an earlier run has sent was counted there.
    codes = [run_cli("--limit", "1", "--workers", "1", command=HASTY).exit_code for _ in range(4)]
    assert (codes, len(bucket.outputs()), len(api.paid)) == ([3, 3, 3, 0], 2, 4)


def test_a_url_that_the_api_refuses_does_not_count_beside_the_bytes(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.accept_file_url = False
    put_some(bucket, 4)
    assert run_cli("--limit", "2", "--workers", "1").exit_code == 3
    assert len(api.paid) == len(bucket.outputs()) == 2


def test_under_a_cap_what_was_interrupted_comes_before_what_is_new(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_some(bucket, 12)
    api.on("work_done", lambda _: release.wait(30))
    run = start("--workers", "10")
    wait_until(lambda: len(api.paid) == 10)
    run.process.kill()
    run.wait()
    release.set()
    # The workers are more than the cap: no new object may overtake those that have to look at their outputs, too.
    for settled in (3, 6, 9):
        assert run_cli("--limit", "3").exit_code == 3
        assert (len(bucket.outputs()), len(api.paid)) == (settled, 10)
    assert run_cli().exit_code == 0
    assert (len(api.paid), api.paid_twice()) == (12, [])


@pytest.mark.slow
def test_too_many_failures_stop_the_run_and_are_named(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 70)
    api.faults.add(Fault.status_reply(422, "conversion_failed", times=20))
    run = run_cli()
    assert (run.exit_code, run.summary["stopped_code"]) == (3, "failure_rate")
    assert run.summary["left"] > 0
    assert "conversion_failed" in run.summary["stopped_because"]
    assert "run.max_failure_rate" in run.summary["stopped_because"]


def test_max_runtime_ends_the_run_and_the_next_goes_on(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 30)
    api.behaviour.latency = 0.4
    run = run_cli("--workers", "2", "--set", "run.max_runtime=1s")
    assert run.exit_code == 3
    assert (run.summary["stopped_because"], run.summary["stopped_code"]) == ("run.max_runtime is over", "time")
    assert 0 < run.summary["converted"] < 30
    api.behaviour.latency = 0
    assert_next_run_finishes(run_cli, bucket, api, 30)


@pytest.mark.slow
def test_a_pause_that_one_worker_learns_of_holds_for_all(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 12)
    api.behaviour.per_minute = 5
    api.behaviour.window_seconds = 4
    api.behaviour.rate_headers = False
    # After a 429 it goes on at a pace that does not take a minute.
    run = run_cli("--workers", "3", command=script_with("program.RateLimiter.MIN_LIMIT = 60"))
    assert run.exit_code == 0
    assert_next_run_finishes(run_cli, bucket, api, 12)
    # Without the pause each of the three would ask again and again.
    assert run.summary["throttled"] <= 9
