"""What one reply of the API's, or of whoever answers in its place, means for the other objects and for the figures."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_jobs import JOBS, is_poll
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.program import HASTY, script_with
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.tcp_proxy import PrivateCa, TcpProxy

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
ONE_WORKER = ("--workers", "1")


def sent(api: ConversionApi) -> list[Request]:
    """The requests for a conversion."""
    return [request for request in api.requests if request.is_conversion]


########################################################################
# Formats that it does not convert
########################################################################


def refuse_route(api: ConversionApi, source: str | None) -> Fault:
    fault = Fault.status_reply(422, "unsupported_route", times=None)
    fault.message = "there is no such route"
    return api.faults.add(fault.at(lambda request: request.is_conversion and request.fields.get("source") == source))


@pytest.mark.parametrize("transfer", ["url", "upload"])
def test_a_format_that_the_api_does_not_convert_is_sent_once(
    transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 3)
    for number in range(12):
        bucket.put(f"{number:02}.{'XYZ' if number % 2 else 'xyz'}", b"of another format")
    refused = refuse_route(api, "xyz")
    run = run_cli(*ONE_WORKER, "--set", f"api.transfer={transfer}")
    assert (run.exit_code, run.summary["converted"], run.summary["failed"]) == (1, 3, {"unsupported_route": 12})
    assert (refused.struck, len(sent(api)), run.rows("in_flight")) == (1, 1 + 3, [])
    assert {(line["status"], line["permanent"], line["message"]) for line in run.failures} == {
        (422, True, "there is no such route")
    }
    assert sorted(line["attempts"] for line in run.failures) == [0] * 11 + [1]
    assert {key: bucket.read(key) for key in expected} == expected
    assert run_cli(*ONE_WORKER).summary["skipped"]["failed_before"] == 12


def test_files_without_an_extension_are_each_of_a_format_of_their_own(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for number in range(3):
        bucket.put(f"file{number}", b"it may be anything")
    refused = refuse_route(api, None)
    run = run_cli(*ONE_WORKER)
    assert (run.summary["failed"], refused.struck) == ({"unsupported_route": 3}, 3)


########################################################################
# URLs that are dead
########################################################################


def kill_with_all_in_flight(start: Cli, api: ConversionApi, count: int) -> None:
    """Run until so many objects are sent, none of which is converted, and kill it."""
    api.faults.add(Fault.cut_before_work(times=None))
    keys = set[str | None]()
    run = start("--workers", str(count))

    def kill(request: Request) -> None:
        keys.add(request.idempotency_key)
        if len(keys) == count and run.process.poll() is None:
            os.kill(run.process.pid, signal.SIGKILL)

    api.on("request_received", kill)
    assert run.wait().exit_code == -signal.SIGKILL
    assert len(run.rows("in_flight")) == count
    api.faults.clear()


def test_urls_of_an_earlier_run_that_are_dead_say_nothing_of_the_next_ones(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 5)
    kill_with_all_in_flight(start, api, 5)
    dead = {request.fields["file_url"] for request in sent(api)}
    until_next_second()  # in which a presigned URL is another one
    # As after the end of the role that has signed them.
    api.faults.add(
        Fault.status_reply(422, "fetch_failed", times=None).at(lambda request: request.fields.get("file_url") in dead)
    )
    expected |= fill(bucket, 8, first=5)
    run = run_cli(*ONE_WORKER)
    assert_all_promises_are_kept(run, api, bucket, expected)
    ways = {request.filename or request.fields["file_url"].partition("?")[0][-7:] for request in sent(api)[-3:]}
    assert ways == {"005.png", "006.png", "007.png"}
    assert all("file_url" in request.fields for request in sent(api)[-3:])


def test_a_download_host_whose_certificate_is_not_trusted_stops_no_run(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    expected = fill(bucket, 3)
    with TcpProxy(api.download_url, PrivateCa(tmp_path).server_context()) as elsewhere:
        link = {"file_url": f"{elsewhere.url}/v1/jobs/download/one"}
        fault = Fault.json_in_200(link, times=None).at(
            lambda request: "/000.png?" in request.fields.get("file_url", "")
        )
        api.faults.add(fault)
        run = run_cli(command=HASTY)
    assert (run.exit_code, run.summary["converted"], run.summary["stopped_because"]) == (1, 2, None)
    (line,) = run.failures
    assert (line["key"], line["code"], line["permanent"]) == ("000.png", "stale_link", False)
    assert "certificate" in line["message"]
    api.faults.clear()
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


########################################################################
# Lines that are slow
########################################################################


class Stalling(TcpProxy):
    """Passes nothing on for some seconds, once, in the middle of what a client sends."""

    passed = 0

    def seconds_for(self, way: Any, piece: bytes) -> float:
        """How long a piece is on its way."""
        before, self.passed = self.passed, self.passed + len(piece) * (way == "up")
        return 3.0 if before < 100_000 <= self.passed else 0.0


@pytest.mark.slow
def test_an_upload_may_stall_for_longer_than_a_connection_may_take(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    # More than the buffers on the way hold, so that the program has to wait with it.
    expected = fill(bucket, 1, repeated=3_000_000)
    with Stalling(api.url) as network:
        given = ("--set", f"api.url={network.url}", "--set", "api.transfer=upload", "--set", "api.retries=0")
        run = run_cli(*given, command=script_with("program.CONNECT_TIMEOUT_SECONDS = 1"))
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert len(api.requests) == 1


########################################################################
# What is counted
########################################################################


def test_a_question_for_a_job_that_must_be_asked_twice_is_no_replay(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 2)
    api.faults.add(Fault.status_reply(503, "service_unavailable", times=3, where=is_poll))
    run = run_cli(*JOBS, command=HASTY)
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert (run.summary["replays"], run.summary["possible_double_charges"]) == (0, 0)
