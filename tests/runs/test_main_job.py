"""The main job, end to end: the real script, a real S3 server, a real HTTP API that counts what is paid."""

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import SCRIPT
from tests.standins.samples import number_in, photo

Cli = Callable[..., Any]


def put_photos(bucket: Any, count: int) -> None:
    for number in range(count):
        bucket.put(f"in/photo {number}.png", photo(number, "png", size=(64, 48)))


def assert_each_output_shows_its_source(bucket: Any, count: int) -> None:
    outputs = bucket.outputs()
    assert len(outputs) == count
    for key, (body, media_type, _) in outputs.items():
        assert key == f"converted/in/photo {number_in(body)}.jpg"
        assert media_type == "image/jpeg"


def let_ten_meet(api: ConversionApi) -> None:
    """The second to the eleventh request wait for each other, and fail where they are not there at the same time."""
    meeting, numbers = threading.Barrier(10), itertools.count(1)
    api.on("request_received", lambda _: 2 <= next(numbers) <= 11 and meeting.wait(60))


def hold_one_back(api: ConversionApi, count: int, release: threading.Event) -> None:
    """One of so many conversions waits until all the others are answered: none of them may wait for it."""
    answers = itertools.count(1)
    api.faults.add(Fault.hang_until(release).at(lambda _: len(api.requests) > 20))

    def let_go(_: object) -> None:
        if next(answers) == count - 1:
            release.set()

    api.on("answered", let_go)


def test_120_objects_are_converted_once_each_by_10_workers(
    run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_photos(bucket, 120)
    let_ten_meet(api)
    hold_one_back(api, 120, release)
    first = run_cli()
    assert first.exit_code == 0, first.err
    assert first.summary["converted"] == len(api.paid) == len(api.requests) == 120
    assert_each_output_shows_its_source(bucket, 120)
    assert api.max_in_flight == 10
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


@pytest.mark.needs("cut puts")
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
