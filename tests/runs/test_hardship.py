"""Full disks and servers that go away: the run stops once, says why, and the next one goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import marking
from tests.standins.program import SCRIPT, Run, script_with
from tests.standins.s3_server import S3Server

Cli = Callable[..., Any]
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
WITH_SMALL_FILES = ("-c", LIMITED)
# For the failures file alone: the checkpoint has room.
WITH_A_SMALL_FAILURES_FILE = script_with("""
import resource
append, most = program.OutputFile.append, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def limited(*given):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, most))
    try:
        append(*given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
program.OutputFile.append = limited""")
WITH_SHORT_PAGES = script_with("program.PAGE_KEYS, program.OUTAGE_SECONDS = 4, 1")


def put_some(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"{number:03}.png", b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode())


def assert_stopped_without_blame(run: Run) -> None:
    assert run.exit_code == 3, run.out + run.err
    assert "Traceback" not in run.err
    assert "hint: " in run.out
    assert run.failures == []
    assert run.summary["failed"] == {}


def test_a_disk_that_is_full_stops_the_run_and_loses_nothing(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    put_some(bucket, 60)
    run = run_cli("--workers", "2", command=WITH_SMALL_FILES)
    assert_stopped_without_blame(run)
    assert "the checkpoint s3_bulk_convert.sqlite3 cannot be written" in run.summary["stopped_because"]
    assert run.summary["left"] > 0
    assert run_cli().exit_code == 0
    assert len(bucket.outputs()) == len(api.paid) == 60
    assert api.paid_twice() == []


def test_a_failures_file_that_cannot_be_written_stops_the_run(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.faults.add(Fault.status_reply(422, "conversion_failed", times=None))
    put_some(bucket, 3)
    run = run_cli("--set", "run.failures=/dev/full")
    assert run.exit_code == 3
    assert "run.failures = /dev/full cannot be written" in run.summary["stopped_because"]
    assert run.rows() == []
    assert run_cli().summary["failed"] == {"conversion_failed": 3}


def test_a_failures_file_that_fills_the_disk_midway_is_whole_lines_after_the_next_run(
    run_cli: Cli, bucket: Any, work: Path
) -> None:
    put_some(bucket, 12)
    keys = {f"{number:03}.png" for number in range(12)}
    too_large = ("--set", "api.max_size=1", "--set", "run.max_failure_rate=never")
    (work / "conversion_failures.jsonl").write_text('{"key": "of an earlier run"}\n')
    run = run_cli(*too_large, command=WITH_A_SMALL_FAILURES_FILE)
    assert (run.exit_code, "run.failures = " in run.summary["stopped_because"]) == (3, True), run.out
    assert 0 < (work / "conversion_failures.jsonl").stat().st_size <= 1_000
    run = run_cli(*too_large)
    assert run.summary["failed"] == {"too_large": 12}
    assert {line["key"] for line in run.failures} == keys | {"of an earlier run"}


@pytest.mark.needs("restart", "disk")
def test_a_listing_that_breaks_off_is_no_end_of_the_work(
    start: Cli, api: ConversionApi, bucket: Any, s3: S3Server
) -> None:
    api.behaviour.convert = marking
    put_some(bucket, 30)
    api.on("request_received", lambda _: s3.kill() if len(api.requests) == 3 else None)
    try:
        run = start("--workers", "1", command=WITH_SHORT_PAGES).wait(110)
    finally:
        s3.start()
    assert_stopped_without_blame(run)
    assert "S3 could not be reached for " in run.summary["stopped_because"]
    assert start().wait().exit_code == 0
    assert len(bucket.outputs()) == 30
    assert api.paid_twice() == []
