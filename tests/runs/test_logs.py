"""With `--log-format json`, stderr is one JSON object a line with stable keys, and stdout the summary as one."""

import json
import signal
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]


def put_some(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"{number:03}.png", b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode())


def records(err: str) -> dict[str, list[dict[str, Any]]]:
    """The lines by event; each is an object with the four keys that all have."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in err.splitlines():
        record = json.loads(line)
        assert list(record)[:4] == ["ts", "level", "event", "message"]
        assert datetime.fromisoformat(record["ts"]).utcoffset() is not None
        found.setdefault(record["event"], []).append(record)
    return found


def test_a_run_is_told_in_json_from_start_to_summary(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    # So far apart that each is committed, and said, by itself.
    api.behaviour.latency = 0.15
    put_some(bucket, 4)
    run = run_cli("--log-format", "json", "--workers", "1", "--set", "run.log_every=2")
    told = records(run.err)
    assert list(told) == ["start", "progress", "summary"]
    assert (told["start"][0]["jobs"], told["start"][0]["workers"]) == (["default"], 1)
    assert [line["done"] for line in told["progress"]] == [2, 4]
    assert set(told["progress"][0]) >= {"total", "failed", "per_second", "eta_seconds", "p95_seconds", "remaining"}
    assert told["summary"][0]["converted"] == 4


def test_the_summary_on_stdout_is_the_one_in_the_file(run_cli: Cli, bucket: Any) -> None:
    put_some(bucket, 2)
    run = run_cli("--log-format", "json", "-q")
    assert run.err == ""
    said = json.loads(run.out)
    assert run.out.count("\n") == 1
    assert {**said, "seconds": 0, "per_second": 0} == {**run.summary, "seconds": 0, "per_second": 0}
    assert list(said) == list(run.summary)


def test_failures_are_told_by_code_with_an_example_and_a_remedy(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 3)
    api.faults.add(Fault.status_reply(422, "conversion_failed", times=2))
    told = records(run_cli("--log-format", "json", "-q", "--workers", "1", "--set", "api.transfer=upload").err)
    (failure,) = told["failures"]
    assert (failure["level"], failure["code"], failure["count"]) == ("warning", "conversion_failed", 2)
    assert failure["key"] == "000.png"
    assert "it may be damaged" in failure["remedy"]


def test_an_error_has_a_hint_and_the_exit_code(run_cli: Cli) -> None:
    run = run_cli("--log-format", "json", S3_BUCKET=None)
    (error,) = records(run.err)["error"]
    assert (run.exit_code, error["exit_code"], error["level"], error["code"]) == (2, 2, "error", "usage")
    assert "[s3] bucket is missing" in error["message"]
    assert "config.example.ini" in error["hint"]
    assert run.out == ""


def test_a_stop_is_told_with_its_reason(start: Cli, bucket: Any, api: ConversionApi, release: threading.Event) -> None:
    put_some(bucket, 4)
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--log-format", "json", "--workers", "1")
    assert fault.reached.wait(30)
    run.process.send_signal(signal.SIGTERM)
    stop = next(record for record in map(json.loads, run.process.stderr) if record["event"] == "stop")
    assert (stop["because"], stop["exit_code"]) == ("interrupted by SIGTERM", 143)
    release.set()
    assert json.loads(run.wait().out)["stopped_because"] == "interrupted by SIGTERM"


def test_a_cap_that_is_reached_is_told_with_its_remedy(run_cli: Cli, bucket: Any) -> None:
    put_some(bucket, 3)
    (stop,) = records(run_cli("--log-format", "json", "--limit", "1").err)["stop"]
    assert (stop["exit_code"], stop["because"]) == (3, "the cap of 1 conversion is reached")
    assert "raise api.max_conversions" in stop["hint"]


def test_a_line_for_people_has_the_date_and_the_zone(run_cli: Cli, bucket: Any) -> None:
    put_some(bucket, 1)
    when, *words = run_cli(TZ="XYZ-5:30").err.splitlines()[0].split(" ")
    assert datetime.fromisoformat(when).isoformat().endswith("+05:30")
    assert words[0] == "converting"


def test_a_zone_of_a_day_and_more_is_left_for_utc(run_cli: Cli, bucket: Any) -> None:
    put_some(bucket, 1)
    run = run_cli(TZ="XYZ+25")
    assert (run.exit_code, run.err.splitlines()[0].split(" ")[0][-6:]) == (0, "+00:00")
