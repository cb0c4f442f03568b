"""The figures of a run, and what it makes of them."""

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Request
from tests.standins.promises import PNG, fill
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]


def test_the_95th_percentile_is_that_of_the_slow_ones(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    fill(bucket, 10)
    others = threading.Semaphore(0)

    def hold(request: Request) -> None:
        # The second is as slow as all the others together; for an answer to the first the others may wait.
        if api.requests.index(request) == 1:
            for _ in range(9):
                others.acquire(timeout=30)

    api.on("request_received", hold)
    api.on("answered", lambda _: others.release())
    run = run_cli("--workers", "2", "--set", "api.transfer=upload")
    assert (run.exit_code, run.summary["converted"]) == (0, 10)
    assert 0 < run.summary["p50_seconds"] < run.summary["p95_seconds"]


def test_failures_that_cost_nothing_do_not_stop_a_run(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    expected = fill(bucket, 10)
    api.behaviour.latency = 0.05  # so that much is left to do when the failures are counted
    gone = [f"gone-{number}.png" for number in range(60)]
    (tmp_path / "keys").write_text("\n".join([*gone, *(f"{number:03}.png" for number in range(10))]))
    run = run_cli("--keys-from", str(tmp_path / "keys"), "--workers", "1")
    assert (run.exit_code, run.summary["stopped_because"]) == (1, None)
    assert (run.summary["failed"], run.summary["left"]) == ({"source_gone": len(gone)}, 0)
    assert set(bucket.outputs()) == set(expected)


def test_the_summary_says_which_run_it_is_of(run_cli: Cli, bucket: Any) -> None:
    expected = fill(bucket, 2)
    bucket.put("empty.png", b"")
    before = time.time()
    summary = run_cli("--shard", "0/1").summary
    assert (summary["bucket"], summary["shard"], summary["listing_complete"]) == (bucket.name, None, True)
    assert (summary["stopped_because"], summary["stopped_code"]) == (None, None)
    assert run_cli("--version").out == f"s3_bulk_convert.py {summary['version']}\n"
    started = datetime.fromisoformat(summary["started"])
    assert (started.utcoffset() is None, int(before) <= started.timestamp() <= time.time()) == (False, True)
    # What no job wants is none's.
    assert (summary["listed"], summary["skipped"]) == (3, {"empty": 1})
    assert summary["jobs"] == {"default": {"target": "jpg", "listed": 2, "converted": len(expected)}}
    assert json.loads(run_cli("--shard", "1/2", "--log-format", "json").out)["shard"] == "1/2"


def test_a_run_that_stops_in_the_middle_says_that_the_listing_was_not_finished(run_cli: Cli, bucket: Any) -> None:
    fill(bucket, 12)
    run = run_cli("--workers", "1", "--limit", "2", "--set", "api.requests_per_minute=100000")
    assert (run.exit_code, run.summary["stopped_code"], run.summary["listing_complete"]) == (3, "cap", False)
    assert (run.summary["converted"], run.summary["left"]) == (2, 10)
    assert "left to do    10; the listing was not finished\n" in run.out
    whole = run_cli()
    assert (whole.exit_code, whole.summary["listing_complete"]) == (0, True)
    assert "listing" not in whole.out


def test_outputs_that_this_program_has_not_made_are_counted_in_a_line_of_their_own(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 2)
    until_next_second()  # an output is newer than its source
    bucket.put("converted/000.jpg", b"\xff\xd8\xff of another program")
    run = run_cli("--set", "run.metrics=x.prom")
    assert (run.exit_code, run.summary["adopted"], run.summary["converted"], len(api.paid)) == (0, 1, 1, 1)
    assert "already done  0\nadopted       1\n" in run.out
    assert re.search(r"^s3_bulk_convert_adopted_objects_total\{.*\} 1$", (run.workdir / "x.prom").read_text(), re.M)


def test_with_a_price_each_result_is_counted_once_in_the_run_that_it_first_came_in(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 3)
    bucket.put("copied.jpg", PNG)
    options = ("--set", "api.price=0.004", "--set", "run.metrics=x.prom", "--set", "convert.same_format=copy")
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    relay.refuse = lambda method, path: method == "PUT" and "converted/001.jpg" in path
    first = run_cli(*options, "--set", "run.max_failure_rate=never", **there)
    assert (first.summary["converted"], first.summary["failed"]) == (3, {"store_failed": 1})
    assert (first.summary["cost"], len(api.paid)) == (0.012, 3)
    assert "cost          about 0.0120: the results of 3 conversions, at 0.004 each (api.price)\n" in first.out
    metrics = (first.workdir / "x.prom").read_text()
    assert re.search(r"^s3_bulk_convert_cost_total\{.*\} 0\.012$", metrics, re.MULTILINE)
    relay.refuse = lambda *_: False
    again = run_cli("-q", *options, **there)
    assert (again.summary["converted"], again.summary["cost"], len(api.paid)) == (1, 0, 3)
    assert again.out.endswith("left 0, cost about 0.00\n")
