"""How a run ends when two things end it at once, when a part of it dies, and what its last lines say then."""

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_processes import wait_until
from tests.runs.test_stopping import wait_until_said
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import script_with
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
AT_FULL_PACE = ("--set", "api.requests_per_minute=100000")


# ----------------------------------------------------------------------------------------------------------------------
# A signal while something else is stopping the run
# ----------------------------------------------------------------------------------------------------------------------


def begin_to_drain(start: Cli, api: ConversionApi, release: threading.Event, *options: str) -> Any:
    """A run that a used up month is stopping, and that waits for one request which hangs."""
    api.behaviour.month_quota = 20
    hanging = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "2", "--set", "api.keep_remaining=19", *AT_FULL_PACE, *options)
    assert hanging.reached.wait(30)
    wait_until_said(run, "api.keep_remaining is 19; waiting for what is in flight")
    return run


def test_the_first_signal_to_a_run_that_is_over_its_time_lets_it_finish(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    expected = fill(bucket, 8)
    hanging = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1", "--set", "run.max_runtime=1s")
    assert hanging.reached.wait(30)
    wait_until_said(run, "run.max_runtime is over; waiting for what is in flight")
    run.process.send_signal(signal.SIGTERM)
    wait_until_said(run, "interrupted by SIGTERM; waiting for what is in flight for up to 30 s; once more ends it")
    release.set()
    assert run.wait().exit_code == run.summary["exit_code"] == 143
    assert (run.summary["converted"], run.summary["left"], len(api.paid)) == (1, 7, 1)
    assert (run.summary["stopped_because"], run.summary["stopped_code"]) == ("interrupted by SIGTERM", "signal")
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_first_signal_to_a_run_that_drains_gives_it_its_grace_and_no_more(
    *, processes: int, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    expected = fill(bucket, 8)
    run = begin_to_drain(start, api, release, "--set", "run.shutdown_grace=1s", "--set", f"run.processes={processes}")
    run.process.send_signal(signal.SIGINT)
    assert run.wait(20).exit_code == run.summary["exit_code"] == 130
    assert run.summary["stopped_because"] == "interrupted by SIGINT"
    assert run.summary["converted"] + run.summary["left"] == 8
    assert "next: " in run.out or "stopped: interrupted by SIGINT" in run.out
    release.set()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


def test_only_the_second_signal_to_a_run_that_drains_ends_it_at_once(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    expected = fill(bucket, 8)
    run = begin_to_drain(start, api, release)
    run.process.send_signal(signal.SIGTERM)
    wait_until_said(run, "interrupted by SIGTERM; waiting for what is in flight for up to 30 s")
    threading.Event().wait(0.3)  # at once, it would be the echo of the first: `timeout` sends each signal twice
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(10).exit_code == 143
    # The one that hangs, and perhaps one that a worker has just given back unsent.
    assert re.search(r"\nended at once: [12] in flight are asked for again by the next run\n$", run.err)
    assert run.summary == {}
    release.set()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Two jobs
# ----------------------------------------------------------------------------------------------------------------------

TWO_PLACES = """
[job web]
output_key = web/{stem}.jpg
[job archive]
output_key = archive/{stem}.jpg
"""


@pytest.mark.parametrize("transfer", ["url", pytest.param("upload", marks=pytest.mark.slow)])
def test_two_jobs_with_equal_options_put_their_outputs_into_two_places(
    transfer: str, run_cli: Cli, bucket: Any, strict_api: ConversionApi, tmp_path: Path
) -> None:
    expected = fill(bucket, 3)
    (tmp_path / "jobs.ini").write_text(TWO_PLACES)
    run = run_cli("-c", str(tmp_path / "jobs.ini"), "--set", f"api.transfer={transfer}")
    assert (run.exit_code, run.summary["converted"], run.failures) == (0, 6, [])
    stored = {**bucket.outputs("web/"), **bucket.outputs("archive/")}
    assert {key: body for key, (body, *_) in stored.items()} == {
        key.replace("converted", place): body for key, body in expected.items() for place in ("web", "archive")
    }
    # Under one key for both, the second is a conflict, or the first one's answer: nobody could say what was paid.
    sent = [request.idempotency_key for request in strict_api.requests if request.is_conversion]
    assert (len(sent), len(set(sent))) == (6, 6)
    assert (run.summary["replays"], run.summary["possible_double_charges"]) == (0, 0)


# ----------------------------------------------------------------------------------------------------------------------
# What is counted
# ----------------------------------------------------------------------------------------------------------------------


def test_requests_of_worker_processes_are_counted_though_they_were_given_up(
    start: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    fill(bucket, 8)
    api.faults.add(Fault.hang_until(release, times=None))
    run = start("--workers", "2", "--set", "run.processes=2", "--set", "run.shutdown_grace=1s", *AT_FULL_PACE)
    wait_until(lambda: api.max_in_flight == 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(20).exit_code == 143
    assert (run.summary["requests"], len(api.requests)) == (2, 2)


def test_a_total_that_cannot_be_counted_is_nobody_s_trouble(
    start: Cli, bucket: Any, api: ConversionApi, relay: Relay, release: threading.Event
) -> None:
    expected = fill(bucket, 10)
    hanging = api.faults.add(Fault.hang_until(release))
    pages, second = [], threading.Event()

    def without_a_date(body: bytes) -> bytes:
        """What lists the sources for the second time: the total is counted over a listing of its own."""
        if b"<Key>000.png</Key>" not in body:
            return body
        pages.append(body)
        if len(pages) == 1:
            return body
        second.set()
        return re.sub(rb"<LastModified>[^<]*", b"<LastModified>yesterday", body)

    relay.rewrite = without_a_date
    options = ("--workers", "1", "--set", "convert.newer_than=1d", *AT_FULL_PACE)
    run = start(*options, AWS_ENDPOINT_URL_S3=relay.url)
    assert hanging.reached.wait(30)
    assert second.wait(30)
    release.set()
    assert_all_promises_are_kept(run.wait(), api, bucket, expected)
    assert ("Traceback" in run.err, "Error" in run.err) == (False, False), run.err


# ----------------------------------------------------------------------------------------------------------------------
# Workers that die. Nothing that can be done to the program from outside kills one, so the program is made wrong.
# ----------------------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_when_all_is_done_is_no_success(run_cli: Cli, bucket: Any) -> None:
    fill(bucket, 3)
    run = run_cli("--workers", "1", command=script_with("program.HTTPAdapter.close = lambda _: 1 / 0"))
    assert (run.exit_code, run.summary["exit_code"], run.summary["stopped_code"]) == (3, 3, "bug")
    assert run.summary["stopped_because"] == "the program has a bug (a worker failed)"


def test_a_run_whose_workers_have_all_died_ends_and_leaves_the_rest_to_do(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 12)
    # It cannot say what has come of its first object.
    run = start("--workers", "1", *AT_FULL_PACE, command=script_with("program.MESSAGE_CHARACTERS = '1000'"))
    assert run.wait(30).exit_code == 3
    assert (run.summary["converted"], run.summary["left"], len(api.paid)) == (0, 12, 1)
    assert run.summary["stopped_because"] == "the program has a bug (a worker failed)"
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)
