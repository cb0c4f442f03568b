"""What goes over the wire to the API, and what is made of the lengths and numbers in its answers."""

import gzip
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import CONVERT, DOWNLOAD, JOBS, Answer, ConversionApi, Fault, Request, Step, Wire
from tests.standins.program import HASTY
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.tcp_proxy import Does, TcpProxy
from tests.standins.tcp_proxy import Fault as NetworkFault

Cli = Callable[..., Any]
SECONDS_OF_REPLAYS = 24 * 3600  # for so long the API repeats an answer for free
DAY_BEFORE = {"Date": "Thu, 01 Jan 2026 00:00:00 GMT"}


@pytest.fixture(autouse=True)
def _strict(strict_api: ConversionApi) -> None:
    """The API remembers bodies, whatever came of them."""


def is_download(request: Request) -> bool:
    return request.path.startswith(DOWNLOAD)


def of(api: ConversionApi, path: str) -> list[Request]:
    """The requests that were sent to one path."""
    return [request for request in api.requests if request.path == path]


########################################################################
# What is sent
########################################################################


def test_a_url_lives_as_long_as_the_api_repeats_its_answer(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    # A request that is sent again a day later has the same URL in it, or it is another request and is paid again.
    fill(bucket, 1)
    assert run_cli().exit_code == 0
    (request,) = of(api, CONVERT)
    (seconds,) = parse_qs(urlsplit(request.fields["file_url"]).query)["X-Amz-Expires"]
    assert int(seconds) >= SECONDS_OF_REPLAYS


def test_a_job_in_place_of_a_call_has_a_key_of_its_own(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket, 1)
    api.behaviour.keys_shared_by_endpoints = True
    api.behaviour.job_states = ("completed",)
    api.faults.add(Fault.work_lost(504, times=2))
    run = run_cli(command=HASTY)
    assert_all_promises_are_kept(run, api, bucket, expected)
    called, queued = ({request.idempotency_key for request in of(api, path)} for path in (CONVERT, JOBS))
    assert (len(called), len(queued), called & queued) == (1, 1, set())
    assert [request.status for request in of(api, JOBS)] == [202]


########################################################################
# What the answers say
########################################################################


def test_what_a_gateway_could_not_hand_on_is_asked_for_by_the_next_run_and_not_paid_again(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 1)
    lost = Answer(502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>")
    api.faults.add(Fault(Step.DELIVERY, reshape=lambda _: lost, times=None))
    first = run_cli("--set", "api.retries=1", command=HASTY)
    assert (first.exit_code, len(api.paid), [line["permanent"] for line in first.failures]) == (1, 1, [False])
    api.faults.clear()
    until_next_second()  # in which a presigned URL is another one
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


def test_what_remains_of_the_month_is_not_taken_from_an_answer_of_another_day(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.month_quota = 1
    expected = fill(bucket, 1)
    api.faults.add(Fault(Step.RESULT, reshape=lambda answer: replace(answer, headers={**answer.headers, **DAY_BEFORE})))
    api.faults.add(Fault.cut_after_work(times=None))
    assert run_cli("--set", "api.retries=0", command=HASTY).exit_code == 1
    # The month is over. The answer that nobody got still says that nothing remains.
    api.faults.clear()
    api.behaviour.month_quota = 1000
    expected |= fill(bucket, 3, first=1)
    run = run_cli("--workers", "1", "--set", "api.keep_remaining=10")
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert (api.replays, run.summary["remaining"]) == (1, 1000 - len(expected))


class WithoutLength(TcpProxy):
    """Takes the length out of the first answer, so that only the end of the connection says where it ends."""

    is_done = False

    def retold(self, piece: bytes) -> bytes:
        """The answer without its length."""
        if self.is_done:
            return piece
        self.is_done = True
        return re.sub(rb"\r\nContent-Length: \d+", b"", piece, count=1)


def test_half_of_an_answer_that_does_not_say_where_it_ends_is_not_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 1, repeated=1000)
    with WithoutLength(api.url) as network:
        network.faults.append(NetworkFault(Does.CLOSE, on=b"^POST ", way="down", after=2000))
        run = run_cli("--set", f"api.url={network.url}", command=HASTY)
    assert network.faults[0].struck == 1
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert api.replays == 1


def test_of_a_large_answer_in_chunks_that_breaks_off_nothing_is_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    # A part of it has been read before it breaks off.
    expected = fill(bucket, 1, repeated=100_000)
    api.faults.add(Fault.truncated_answer(chunked=True))
    run = run_cli(command=HASTY)
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert api.replays == 1


def test_a_file_of_another_size_than_its_job_says_is_fetched_again(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 1)
    api.behaviour.job_states = ("completed",)
    shortened = api.faults.add(Fault.shortened_answer().at(is_download))
    run = run_cli("--set", "api.jobs_above=1", command=HASTY)
    assert shortened.struck == 1
    assert_all_promises_are_kept(run, api, bucket, expected)


def packed(answer: Answer) -> Answer:
    headers = {**answer.headers, "Content-Encoding": "gzip"}
    return replace(answer, body=gzip.compress(answer.body), headers=headers)


def test_an_answer_that_somebody_packed_on_the_way_is_stored_unpacked(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    # Its length is that of the bytes on the wire, which are fewer than come out of them.
    expected = fill(bucket, 1)
    api.faults.add(Fault(Step.DELIVERY, reshape=packed))
    run = run_cli()
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert (len(api.requests), run.summary["bytes_out"]) == (1, len(expected["converted/000.jpg"]))


def test_half_of_an_answer_that_somebody_packed_on_the_way_is_not_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, 1)
    api.faults.add(Fault(Step.DELIVERY, reshape=lambda answer: replace(packed(answer), wire=Wire.HALF)))
    run = run_cli(command=HASTY)
    assert_all_promises_are_kept(run, api, bucket, expected)
    assert api.replays == 1
