"""Promises seen from outside, where S3, the terminal or the user's own words are the trouble."""

import io
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from tests.documents import OPERATIONS, column
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.converters import Converted, marking, wrapped
from tests.standins.program import SCRIPT, lose_checkpoint
from tests.standins.relay import Relay
from tests.standins.samples import number_in, photo, picture

Cli = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def deaf_port() -> Iterator[socket.socket]:
    """A listening socket from which no answer ever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def address(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def put_pngs(bucket: Any, *keys: str) -> None:
    for key in keys:
        bucket.put(key, PNG + key.encode())


def source_of(bucket: Any, key: str) -> str:
    return str(bucket.client.head_object(Bucket=bucket.name, Key=key)["Metadata"]["source-key"])


########################################################################
# What is converted
########################################################################


def test_archived_objects_are_skipped_and_restored_ones_are_not(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "plain.png", "GLACIER.png", "DEEP_ARCHIVE.png", "restored-GLACIER.png")
    restored = (
        rb"\2\3\4<RestoreStatus><IsRestoreInProgress>false</IsRestoreInProgress>"
        rb"<RestoreExpiryDate>2099-12-31T00:00:00.000Z</RestoreExpiryDate></RestoreStatus>"
    )

    def archive(body: bytes) -> bytes:
        body = re.sub(rb"(<Key>(GLACIER|DEEP_ARCHIVE)\.png.*?<StorageClass>)STANDARD", rb"\1\2", body, flags=re.S)
        pattern = rb"((<Key>restored-(GLACIER)\.png.*?<StorageClass>)STANDARD(</StorageClass>))"
        return re.sub(pattern, restored, body, flags=re.S)

    relay.rewrite = archive
    run = run_cli(AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["skipped"]) == (0, {"archived": 2})
    assert sorted(bucket.outputs()) == ["converted/plain.jpg", "converted/restored-GLACIER.jpg"]


@pytest.mark.needs("newlines")
def test_keys_of_any_length_and_shape_are_converted_and_named_in_the_metadata(
    run_cli: Cli, bucket: Any, other_bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    other = other_bucket.name
    # An output key has room for the .zip of an archive; a source key needs none.
    keys = ["k" * 1020 + ".png", "..", "a/../../b.png", "x//y.png", "//z.png", "no extension", "tab\tand\nline.png"]
    put_pngs(bucket, *keys)
    run = run_cli("--set", f"s3.output_bucket={other}", "--set", "s3.output_key={dir}{stem}")
    assert (run.exit_code, run.summary["converted"]) == (0, len(keys)), run.err
    pages = bucket.client.list_objects_v2(Bucket=other)["Contents"]
    metadata = [bucket.client.head_object(Bucket=other, Key=output["Key"])["Metadata"] for output in pages]
    assert sorted(entry["source-key"] for entry in metadata) == sorted(quote(key) for key in keys)


@pytest.mark.parametrize("output_key", ["{key}", "{dir}{stem}.{target}"])
def test_in_another_bucket_an_output_may_have_the_key_of_a_source(
    output_key: str, run_cli: Cli, bucket: Any, other_bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    other = other_bucket.name
    put_pngs(bucket, "a.png")
    bucket.put("a.jpg", photo(1, "jpg"))
    run = run_cli("--set", f"s3.output_bucket={other}", "--set", f"s3.output_key={output_key}")
    assert (run.exit_code, run.summary["failed"], run.summary["skipped"]) == (0, {}, {"same_format": 1})


def test_the_first_to_be_converted_keeps_the_key_though_another_lists_before_it(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "b.png")
    assert run_cli().exit_code == 0
    put_pngs(bucket, "b.heic")
    assert run_cli().summary["failed"] == {"output_collision": 1}
    assert run_cli("--retry-failed").summary["failed"] == {"output_collision": 1}
    assert source_of(bucket, "converted/b.jpg") == "b.png"
    assert len(api.requests) == 1


def test_without_the_checkpoint_no_output_of_another_source_is_overwritten(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "b.png")
    assert run_cli().exit_code == 0
    put_pngs(bucket, "b.heic")
    lose_checkpoint(tmp_path / "work")
    assert [line["key"] for line in run_cli().failures] == ["b.heic"]
    assert source_of(bucket, "converted/b.jpg") == "b.png"
    assert len(api.paid) == 1


def test_what_failed_for_good_is_counted_and_not_sent_until_it_changes(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", b"not a picture")
    assert run_cli().summary["failed"] == {"conversion_failed": 1}
    sent = len(api.requests)
    again = run_cli()
    assert (again.summary["listed"], again.summary["skipped"]) == (1, {"failed_before": 1})
    assert len(api.requests) == sent
    bucket.put("a.png", photo(1, "png"))
    assert run_cli().summary["converted"] == 1


def test_a_scan_of_several_pages_becomes_an_archive(run_cli: Cli, bucket: Any) -> None:
    scan = io.BytesIO()
    first, *others = (picture(number, (64, 48)) for number in (1, 2, 3))
    first.save(scan, "TIFF", save_all=True, append_images=others)
    bucket.put("scan.tiff", scan.getvalue())
    assert run_cli().exit_code == 0
    ((key, (body, media_type, _)),) = bucket.outputs().items()
    assert (key[-4:], body[:2], media_type) == (".zip", b"PK", "application/zip")


def test_a_large_output_is_stored_whole(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    large = wrapped(bytes(range(256)) * 4096 * 20, "jpg")
    api.behaviour.convert = lambda _: Converted(large, "image/jpeg", "jpg")
    put_pngs(bucket, "a.png")
    run = run_cli()
    assert (run.exit_code, run.summary["bytes_out"]) == (0, len(large))
    assert bucket.outputs()["converted/a.jpg"][0] == large


def test_heic_becomes_a_jpeg_that_a_viewer_opens(run_cli: Cli, bucket: Any) -> None:
    bucket.put("IMG_1.HEIC", photo(7, "heic"))
    assert run_cli().exit_code == 0
    body, *_ = bucket.outputs()["converted/IMG_1.jpg"]
    with Image.open(io.BytesIO(body)) as image:
        assert (image.format, number_in(body)) == ("JPEG", 7)


########################################################################
# What stops a run
########################################################################


def test_a_key_that_is_revoked_midway_stops_the_run_and_blames_no_object(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, *(f"{number:02}.png" for number in range(20)))
    right_key, revoked = api.api_key, threading.Event()

    def revoke(_: Request) -> None:
        if len(api.paid) >= 5 and not revoked.is_set():
            revoked.set()
            api.api_key = "another"

    api.on("work_done", revoke)
    run = run_cli("--workers", "2")
    assert (run.exit_code, run.failures) == (3, [])
    assert run.summary["converted"] == len(api.paid) < 20
    assert run.summary["converted"] + run.summary["left"] == 20
    api.api_key = right_key
    assert run_cli().exit_code == 0
    assert len(api.paid) == len(bucket.outputs()) == 20


@pytest.mark.slow
def test_what_s3_does_not_let_us_store_is_stored_by_the_next_run_for_free(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, *(f"{number:02}.png" for number in range(30)))
    relay.refuse = lambda method, path: method == "PUT" and "/converted/" in path
    run = run_cli("--workers", "2", AWS_ENDPOINT_URL_S3=relay.url)
    # Each is one object's failure at first; ten of them are evidence against all.
    assert (run.exit_code, run.summary["stopped_code"], len(api.paid) < 15) == (3, "same_failure", True)
    assert run.summary["left"] == 30 - len(run.failures)
    assert {(line["code"], line["permanent"]) for line in run.failures} == {("store_failed", False)}
    assert "AccessDenied" in run.summary["stopped_because"]
    relay.refuse = lambda *_: False
    assert run_cli(AWS_ENDPOINT_URL_S3=relay.url).exit_code == 0
    assert len(bucket.outputs()) == len(api.paid) == 30
    assert api.paid_twice() == []


@pytest.mark.slow
def test_a_storage_class_that_s3_does_not_have_stops_the_run_before_more_is_paid(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert, api.behaviour.latency = marking, 0.05  # outcomes are counted as often
    put_pngs(bucket, *(f"{number:02}.png" for number in range(30)))
    run = run_cli("--workers", "2", "--set", "s3.storage_class=NONSENSE")
    assert (run.exit_code, run.summary["left"]) == (3, 30 - len(run.failures))
    assert "store_failed S3 refused writing" in run.summary["stopped_because"]
    assert len(api.paid) < 15
    assert run_cli().exit_code == 0
    assert len(bucket.outputs()) == len(api.paid) == 30
    assert api.paid_twice() == []


@pytest.mark.parametrize(
    ("status", "code"), [(429, "rate_limited"), pytest.param(503, "service_unavailable", marks=pytest.mark.slow)]
)
def test_a_signal_ends_every_wait_at_once(
    *, status: int, code: str, start: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_pngs(bucket, "a.png")
    fault = api.faults.add(Fault.status_reply(status, code, retry_after="60", times=None))
    run = start()
    assert fault.reached.wait(30)
    run.process.terminate()
    assert run.wait(10).exit_code == 143
    assert (run.summary["left"], run.failures) == (1, [])


def test_a_signal_ends_a_run_whose_s3_does_not_answer(start: Cli, deaf_port: socket.socket) -> None:
    run = start("--set", "run.shutdown_grace=1s", AWS_ENDPOINT_URL_S3=address(deaf_port))
    deaf_port.settimeout(30)
    connection, _ = deaf_port.accept()
    run.process.terminate()
    assert run.wait(15).exit_code == 143
    assert "Traceback" not in run.err
    connection.close()


def test_requests_that_were_given_up_are_counted_too(
    start: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "a.png")
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--set", "run.shutdown_grace=1s")
    assert fault.reached.wait(30)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(20).summary["requests"] == len(api.requests) == 1


########################################################################
# What a person says and sees
########################################################################


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--set", "run.summary=s3_bulk_convert.sqlite3"), id="summary over checkpoint"),
        pytest.param(("--set", "run.failures=s3_bulk_convert.sqlite3"), id="failures into checkpoint"),
        pytest.param(("--set", "run.failures=summary.json"), id="failures into summary"),
        pytest.param(("--set", "run.summary=/dev/null/s.json"), id="summary cannot be written"),
        pytest.param(("--set", "convert.min_size=5MB", "--set", "convert.max_size=1MB"), id="no size is left"),
        pytest.param(("--set", "api.url=nonsense"), id="url"),
        pytest.param(("--set", "api.transfer=urll"), id="choice"),
        pytest.param(("--workers", "ten"), id="workers"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    arguments: tuple[str, ...], run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_pngs(bucket, "a.png")
    run = run_cli(*arguments)
    assert run.exit_code == 2, run.out + run.err
    assert ("Traceback" in run.err, api.requests, bucket.outputs()) == (False, [], {})


def test_a_key_on_the_command_line_is_not_repeated(run_cli: Cli) -> None:
    run = run_cli("--api-key", "ctf_sk_live_on_the_command_line")
    assert run.exit_code == 2
    assert "on_the_command_line" not in run.out + run.err


@pytest.mark.parametrize(("flag", "said"), [("--version", "s3_bulk_convert.py "), ("--help", "usage: ")])
def test_version_and_help_need_nothing(flag: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), flag]
    run = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert (run.stdout.startswith(said), run.stderr, list(tmp_path.iterdir())) == (True, "", [])


WITHOUT_OUTPUT = """
import os, sys
{preparation}
os.execv(sys.executable, [sys.executable, {script!r}, *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "preparation",
    [
        pytest.param("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", id="disk full"),
        pytest.param(
            "there, here = os.pipe(); os.close(there); os.dup2(here, 1)", id="reader has left", marks=pytest.mark.slow
        ),
        pytest.param("os.close(1)", id="closed", marks=pytest.mark.slow),
        pytest.param("os.close(2)", id="closed stderr"),
    ],
)
def test_output_that_nobody_can_read_is_no_bug_of_the_program(
    preparation: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "a.png")
    run = run_cli(command=("-c", WITHOUT_OUTPUT.format(preparation=preparation, script=str(SCRIPT))))
    assert list(bucket.outputs()) == ["converted/a.jpg"]
    assert (run.summary["exit_code"], run.summary["converted"]) == (0, 1)
    assert ("Traceback" in run.err, "bug" in run.err, run.exit_code in {0, 3}) == (False, False, True), run.err


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_takes_any_character_in_any_locale(
    closed: int, run_cli: Cli, bucket: Any, api: ConversionApi, work: Path
) -> None:
    api.behaviour.convert = marking
    put_pngs(bucket, "ü/a.png")
    (work / "config.ini").write_text("[s3]\nprefix = ü/\n", encoding="utf-8")
    command = WITHOUT_OUTPUT.format(preparation=f"os.close({closed})", script=str(SCRIPT))
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    run = run_cli(command=("-c", command), **plain)
    assert (run.exit_code, list(bucket.outputs())) == (0, ["converted/ü/a.jpg"]), run.out + run.err


def test_the_summary_has_exactly_the_promised_keys(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", photo(1, "png"))
    summary = list(run_cli().summary)
    assert summary == column(OPERATIONS, "key")
    assert " ".join(summary) == (
        "version started bucket shard jobs listed converted already_done adopted skipped failed left bytes_in "
        "bytes_out seconds per_second p50_seconds p95_seconds requests throttled replays possible_double_charges cost "
        "remaining exit_code stopped_because stopped_code listing_complete"
    )
