"""Large objects: streamed both ways, in parts where one PUT is too small, by jobs, and with little memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.bench.harness import PROJECT
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, marking
from tests.standins.program import SCRIPT, script_with

Cli = Callable[..., Any]
MB = 10**6
# A process of its own, because Linux starts counting a child's peak memory at what its parent has at that moment.
MEASURE = """
import json, sys
from tests.bench.harness import run_program, standins

size, files, workers = map(int, sys.argv[1:])
with standins(keys=files, size=size, answer_bytes=size, latency=0.0, put_latency=0.0) as servers:
    cost = run_program(servers, "--workers", str(workers), "--set", "api.transfer=upload")
print(json.dumps([cost.exit_code, cost.summary, cost.peak_mb, cost.err]))
"""
# Five of the parts that S3 takes make 26 MB: enough for several, and little enough for every test run.
IN_PARTS = script_with("program.MULTIPART_BYTES = 6_000_000")
# As on Amazon's fastest machines, where boto3 takes another client for transfers, if it is installed.
WITH_CRT = script_with("""
import types
import boto3.s3.transfer as of_boto3
is_optimized = types.SimpleNamespace(is_optimized_for_system=lambda: True)
of_boto3.HAS_CRT, of_boto3.awscrt = True, types.SimpleNamespace(s3=is_optimized)
of_boto3.has_minimum_crt_version, of_boto3.create_crt_transfer_manager = bool, None
program.MULTIPART_BYTES = 6_000_000""")


def source(size: int) -> bytes:
    """A PNG by its first bytes, that differs in each of its megabytes."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(number.to_bytes(4, "big") * 250_000 for number in range(size // MB))


@pytest.mark.parametrize("script", [(str(SCRIPT),), IN_PARTS, WITH_CRT], ids=["one PUT", "in parts", "beside CRT"])
def test_a_large_object_comes_out_whole(script: tuple[str, ...], run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    large = source(21 * MB)
    bucket.put("large.png", large)
    run = run_cli("--set", "api.transfer=upload", command=script)
    assert run.exit_code == 0, run.err
    body, *_ = bucket.outputs()["converted/large.jpg"]
    assert body == marking(Conversion(large, "png", "jpg", None)).body
    etag = bucket.client.head_object(Bucket=bucket.name, Key="converted/large.jpg")["ETag"]
    assert ("-5" in etag) is (script[0] == "-c")


def test_a_large_object_in_the_target_format_is_copied_whole(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    large = source(21 * MB)
    bucket.put("large.jpg", large)
    run = run_cli("--set", "convert.same_format=copy")
    assert (run.exit_code, api.requests) == (0, []), run.err
    body, media_type, metadata = bucket.outputs()["converted/large.jpg"]
    assert (body, media_type, metadata["source-key"]) == (large, "image/jpeg", "large.jpg")
    etag = bucket.client.head_object(Bucket=bucket.name, Key="converted/large.jpg")["ETag"]
    assert "-3" in etag


def measured(size: int, files: int, workers: int) -> float:
    """The peak memory in MB of a run over some objects of a size, up and down."""
    command = [sys.executable, "-c", MEASURE, *map(str, (size, files, workers))]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    exit_code, summary, peak_mb, err = json.loads(said)
    assert (exit_code, summary["converted"], summary["bytes_out"]) == (0, files, files * size), err
    return float(peak_mb)


@pytest.mark.slow
def test_six_workers_move_objects_of_60_mb_with_less_than_150_mb_of_memory() -> None:
    peak_mb = measured(60 * MB, files=18, workers=6)
    print(f"\n6 workers, 60 MB each: {peak_mb:.0f} MB at the peak")
    assert peak_mb < 150


@pytest.mark.slow
def test_objects_of_500_mb_go_through_jobs_with_less_than_200_mb_of_memory() -> None:
    peak_mb = measured(500 * MB, files=10, workers=10)
    print(f"\n10 workers, 500 MB each: {peak_mb:.0f} MB at the peak")
    assert peak_mb < 200
