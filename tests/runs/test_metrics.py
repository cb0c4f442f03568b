"""`run.metrics` is what Prometheus reads, and what `promtool check metrics` finds nothing wrong with."""

import os
import re
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.standins.conversion_api import ConversionApi, Fault

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
METRICS = ("--set", "run.metrics=convert.prom")
# What promtool calls abbreviated, and what it wants as seconds, bytes or ratios.
BAD_NAME = re.compile(
    r"(^|_)(m?s|us|ns|sec|[kmgtp]?b|m|h|d|counter|gauge|summary|histogram|(milli|micro|nano)seconds|minutes|hours|days"
    r"|(kilo|mega|giga)bytes|bits|percent)(_|$)"
)


def put_some(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"{number:03}.png", b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode())


def values(text: str) -> dict[str, float]:
    """Name, with its reason or code if it has one -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            about = sample.labels.get("reason") or sample.labels.get("code")
            found[sample.name.removeprefix("s3_bulk_convert_") + (f":{about}" if about else "")] = sample.value
    return found


def lint(text: str) -> list[str]:
    """What promtool's rules find: each family has HELP and TYPE once, before its samples, which stand together."""
    found, current, seen = [], "", set()
    for line in text.splitlines():
        name = line.split(" ")[2] if line.startswith("#") else re.split(r"[{ ]", line)[0]
        if name != current and (name in seen or not line.startswith("# HELP ")):
            found.append(f"{name} is interleaved, or has no HELP")
        if line.startswith("# TYPE ") and (line.endswith(" counter") is not name.endswith("_total")):
            found.append(f"{name}: only counters end in _total")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or BAD_NAME.search(name):
            found.append(f"{name} is no good name")
        current = name
        seen.add(name)
    types = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    return found + [name for name in seen if types.count(name) != 1]


def test_a_run_leaves_its_counts(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 5)
    bucket.put("empty.png", b"")
    api.behaviour.month_quota = 100
    run = run_cli(*METRICS)
    text = (run.workdir / "convert.prom").read_text()
    assert lint(text) == []
    found = values(text)
    expected = {"listed_objects_total": 6, "converted_objects_total": 5, "skipped_objects_total:empty": 1, "running": 0}
    expected |= {"left_objects": 0, "in_flight_objects": 0, "remaining_conversions": 95, "last_exit_code": 0}
    expected |= {"source_bytes_total": run.summary["bytes_in"], "requests_total": run.summary["requests"]}
    assert {name: found[name] for name in expected} == expected
    assert found["conversion_p50_seconds"] <= found["conversion_p95_seconds"] <= found["run_duration_seconds"]


def test_a_checkpoint_whose_path_is_no_text_has_a_label(run_cli: Cli, bucket: Any) -> None:
    put_some(bucket, 1)
    run = run_cli(*METRICS, "--set", os.fsdecode(b"run.checkpoint=x\xffy"))
    assert (run.exit_code, run.summary["converted"]) == (0, 1)
    text = (run.workdir / "convert.prom").read_text()
    assert lint(text) == []
    labels = next(iter(text_string_to_metric_families(text))).samples[0].labels
    assert labels["checkpoint"] == r"x\udcffy"


def test_a_failure_keeps_the_time_of_the_last_success(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 1)
    path = run_cli(*METRICS).workdir / "convert.prom"
    succeeded = values(path.read_text())["last_success_timestamp_seconds"]
    bucket.put("bad.png", b"\x89PNG\r\n\x1a\nbad")
    api.faults.add(Fault.status_reply(422, "unsupported_route"))
    assert run_cli(*METRICS).exit_code == 1
    found = values(path.read_text())
    assert (found["last_success_timestamp_seconds"], found["last_exit_code"]) == (succeeded, 1)
    assert found["failed_objects_total:unsupported_route"] == 1
    run_cli(*METRICS)
    assert values(path.read_text())["last_success_timestamp_seconds"] > succeeded


def test_what_failed_for_good_is_counted_until_it_is_converted(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 3)
    path = run_cli(*METRICS).workdir / "convert.prom"
    assert values(path.read_text())["failed_for_good_objects"] == 0
    bucket.put("bad.png", b"\x89PNG\r\n\x1a\nbad")
    api.faults.add(Fault.status_reply(422, "unsupported_route"))
    for _ in range(3):
        run_cli(*METRICS)
        assert values(path.read_text())["failed_for_good_objects"] == 1
    # A run that ends before it has listed anything knows of no fewer.
    assert run_cli(*METRICS, S3_BUCKET="no-such-bucket").exit_code == 2
    assert values(path.read_text())["failed_for_good_objects"] == 1
    assert run_cli(*METRICS, "--retry-failed").exit_code == 0
    assert values(path.read_text())["failed_for_good_objects"] == 0


def test_there_is_no_success_before_the_first(run_cli: Cli, bucket: Any) -> None:
    put_some(bucket, 1)
    run = run_cli(*METRICS, CTF_API_KEY="ctf_sk_wrong_1")
    text = (run.workdir / "convert.prom").read_text()
    found = values(text)
    assert (found["last_exit_code"], found["left_objects"]) == (2, 1)
    assert "last_success_timestamp_seconds" not in found
    assert lint(text) == []


def test_the_file_is_there_while_the_run_is_at_work(
    start: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_some(bucket, 3)
    fault = api.faults.add(Fault.hang_until(release))
    run = start(*METRICS, "--workers", "1")
    assert fault.reached.wait(30)
    found = values((run.workdir / "convert.prom").read_text())
    assert found["running"] == 1
    release.set()
    run.wait()
    assert values((run.workdir / "convert.prom").read_text())["running"] == 0
    assert not list(run.workdir.glob("*.tmp"))


def test_a_place_that_cannot_be_written_is_said_before_anything_is_sent(run_cli: Cli, api: ConversionApi) -> None:
    run = run_cli("--set", "run.metrics=/dev/null/x.prom")
    assert (run.exit_code, api.requests) == (2, [])
    assert "run.metrics = /dev/null/x.prom cannot be written" in run.err


@pytest.mark.real
def test_promtool_has_nothing_to_say(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_some(bucket, 3)
    api.faults.add(Fault.status_reply(422, "unsupported_route"))
    run = run_cli("--set", "run.metrics=metrics.prom", "--set", "run.max_failure_rate=never")
    text = (run.workdir / "metrics.prom").read_text()
    said = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")
