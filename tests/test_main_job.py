"""The main job, end to end: the real script, a real S3 server, a real HTTP API that counts what is paid."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SCRIPT
from tests.conversion_api import ConversionApi, Fault
from tests.samples import number_in, photo

Cli = Callable[..., Any]
# Notes when each object is begun and done. The journal's times would not do: a slow disk comes between.
WITH_SPANS = """
import json, pathlib, sys, time
import s3_bulk_convert as program

convert_object, spans = program.convert_object, []

def timed(*arguments):
    begin = time.monotonic()
    outcome = convert_object(*arguments)
    spans.append((begin, time.monotonic()))
    return outcome

program.convert_object = timed
code = program.main(sys.argv[1:])
pathlib.Path("spans.json").write_text(json.dumps(spans))
program.leave(code)
"""


def put_photos(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"in/photo {number}.png", photo(number, "png", size=(64, 48)))


def assert_each_output_shows_its_source(bucket: Any, count: int) -> None:
    outputs = bucket.outputs()
    assert len(outputs) == count
    for key, (body, media_type, _) in outputs.items():
        assert key == f"converted/in/photo {number_in(body)}.jpg"
        assert media_type == "image/jpeg"


def objects_in_hand(spans: list[list[float]], workers: int) -> list[int]:
    """How many objects workers had in hand each time one was begun, but for the first and the last round."""
    spans.sort()
    return [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans[workers:-workers]]


def test_120_objects_are_converted_once_each_by_10_workers(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.latency = 0.05
    put_photos(bucket, 120)
    first = run_cli(command=("-c", WITH_SPANS), PYTHONPATH=str(SCRIPT.parent))
    assert first.exit_code == 0, first.err
    assert first.summary["converted"] == len(api.paid) == len(api.requests) == 120
    assert_each_output_shows_its_source(bucket, 120)
    assert api.max_in_flight <= 10
    assert min(objects_in_hand(json.loads((first.workdir / "spans.json").read_text()), workers=10)) >= 7
    assert run_cli().summary["already_done"] == 120
    assert len(api.requests) == 120
    bucket.put("in/photo 7.png", photo(120, "png"))
    bucket.put("in/photo 120.png", photo(121, "png"))
    assert run_cli().summary["converted"] == 2
    assert len(api.requests) == len(api.paid) == 122


def test_the_environment_alone_is_enough(run_cli: Cli, bucket: Any) -> None:
    bucket.put("uploads/a.png", photo(1, "png"))
    bucket.put("other/b.png", photo(2, "png"))
    run = run_cli(SOURCE_PREFIX="uploads/", TARGET_FORMAT="webp", CONCURRENCY="2")
    assert run.exit_code == 0
    assert list(bucket.outputs()) == ["converted/uploads/a.webp"]


def test_a_copy_of_the_one_file_in_an_empty_directory_is_all_it_needs(
    run_cli: Cli, bucket: Any, tmp_path: Path
) -> None:
    put_photos(bucket, 3)
    shutil.copy(SCRIPT, tmp_path / "work" / "converter.py")
    run = run_cli("--processes", "2", command=("converter.py",))
    assert run.exit_code == 0, run.err
    assert_each_output_shows_its_source(bucket, 3)


def test_a_run_that_was_killed_in_the_middle_is_finished_by_the_next(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_photos(bucket, 30)
    is_in_the_middle = threading.Event()
    api.on("work_done", lambda _: is_in_the_middle.set() if len(api.paid) >= 12 else None)
    killed = start()
    assert is_in_the_middle.wait(30)
    killed.process.kill()
    killed.wait()
    assert run_cli().exit_code == 0
    assert_each_output_shows_its_source(bucket, 30)
    assert api.paid_twice() == []
    assert len(api.paid) == 30


@pytest.mark.parametrize("transfer", ["url", "upload", "auto"])
def test_each_way_of_transfer_brings_the_same_bytes(
    transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_photos(bucket, 3)
    assert run_cli("--set", f"api.transfer={transfer}").exit_code == 0
    assert_each_output_shows_its_source(bucket, 3)
    assert {"file_url" in request.fields for request in api.requests} == {transfer != "upload"}


def test_auto_uploads_what_the_api_does_not_fetch_and_soon_stops_asking(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.accept_file_url = False
    put_photos(bucket, 20)
    run = run_cli("--workers", "1")
    assert run.exit_code == 0
    assert run.summary["possible_double_charges"] == 0
    assert_each_output_shows_its_source(bucket, 20)
    assert len([request for request in api.requests if "file_url" in request.fields]) == 3


def test_every_request_names_the_source_format_and_repeats_its_key(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.faults.add(Fault.status_reply(503, "service_unavailable", times=1, retry_after="0"))
    bucket.put("a.png", photo(1, "png"))
    assert run_cli("--set", "api.transfer=upload").exit_code == 0
    first, second = api.requests
    assert first.fields["source"] == "png"
    assert first.filename == "a.png"
    assert (first.idempotency_key, first.raw_sha256) == (second.idempotency_key, second.raw_sha256)
