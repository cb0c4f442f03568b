"""--check, --status and --why: what they say is true, and they leave nothing behind, neither a file nor an object."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.documents import OPERATIONS, section
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import zip_of_pages
from tests.standins.program import PYTHON, SCRIPT, script_with, shard_of
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
IN_SHELL = "import os, sys; os.execv('/bin/sh', ['sh', '-c', sys.argv[1], 'sh', *sys.argv[2:]])"
PLACE = "converted/{dir}{stem}.{target}"
DOCUMENTED = set(re.findall(r"`(\w+)`", section(OPERATIONS, "Looking in JSON")))
JSON = ("--log-format", "json")
DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d \(\d s ago\)"


def picture(text: str = "") -> bytes:
    """What a PNG begins with."""
    return b"\x89PNG\r\n\x1a\n" + text.encode()


def left_in(run: Any) -> dict[str, bytes]:
    """The files of a working directory; the index of the write-ahead log is memory that readers share, and left out."""
    return {entry.name: entry.read_bytes() for entry in run.workdir.iterdir() if not entry.name.endswith("-shm")}


def starting(word: str, run: Any) -> list[str]:
    """What the lines that begin with a verdict are about."""
    return [line[5:].partition(":")[0] for line in run.out.splitlines() if line.startswith(word)]


def names_in(found: Any) -> Iterator[str]:
    """All keys of a document, and of what is in it; codes of failures are none."""
    if isinstance(found, dict):
        yield from found
        found = [part for name, part in found.items() if not name.startswith("failed_for_")]
    for part in found if isinstance(found, list) else ():
        yield from names_in(part)


def document(run: Any) -> Any:
    """The one document on stdout, of a command that has nothing else to say."""
    assert (run.err, run.out.count("\n")) == ("", 1), run.out
    found = json.loads(run.out)
    assert set(names_in(found)) - DOCUMENTED == set()
    return found


def iso(moment: str) -> float:
    """A time of a document, in Unix seconds; it has an offset."""
    read = datetime.fromisoformat(moment)
    assert read.utcoffset() is not None
    return read.timestamp()


def last_line(run: Any) -> str:
    """How an answer to --why ends."""
    assert run.exit_code == 0, run.err
    return str(run.out.splitlines()[-1])


def kill_with_one_in_flight(start: Cli, api: ConversionApi, release: threading.Event) -> Any:
    """A run that was killed while the API worked for it."""
    fault = api.faults.add(Fault.hang_until(release))
    run = start("--workers", "1")
    assert fault.reached.wait(30)
    run.process.kill()
    return run.wait()


# ----------------------------------------------------------------------------------------------------------------------
# --check
# ----------------------------------------------------------------------------------------------------------------------


def test_check_reads_nothing_that_an_archive_keeps(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    bucket.put("a.png", picture())
    # Intelligent-Tiering says so to who looks, and in no listing.
    relay.added = {"x-amz-archive-status": "ARCHIVE_ACCESS"}
    relay.refuse = lambda method, path: method == "GET" and urlsplit(path).path.endswith("/a.png")
    relay.refusal = b"<Error><Code>InvalidObjectState</Code><Message>archived</Message></Error>"
    run = run_cli("-q", "--check", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, starting("WARN", run)) == (0, ["read"])


def test_check_reads_what_some_job_wants(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    bucket.put("a.txt", b"nobody's")
    bucket.put("b.png", picture())
    relay.refuse = lambda _, path: urlsplit(path).path.endswith("/a.txt")
    run = run_cli("--check", "--set", "convert.include=*.png", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, "b.png" in run.out, "a.txt" in run.out) == (0, True, False)


def test_check_names_a_key_file_of_nobody_s(run_cli: Cli) -> None:
    run = run_cli("--check", "--set", "api.key_file=~nobody-here/key", CTF_API_KEY=None)
    assert (run.exit_code, "bug" in run.out + run.err) == (2, False)
    assert "key_file = ~nobody-here/key: No such file" in run.out


def test_check_proves_everything_and_leaves_nothing_behind(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", picture())
    run = run_cli("--check")
    assert (run.exit_code, run.err) == (0, "")
    assert (len(starting("OK", run)), run.out.splitlines()[22:]) == (22, ["ready: 22 OK"]), run.out
    assert (left_in(run), bucket.keys(), api.paid) == ({}, ["a.png"], [])
    assert [request.path for request in api.requests] == ["/", "/v1/usage"]


def test_check_leaves_no_version_of_its_probe_in_a_versioned_bucket(run_cli: Cli, bucket: Any) -> None:
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    bucket.put("a.png", picture())
    assert run_cli("--check").exit_code == 0
    versions = bucket.client.list_object_versions(Bucket=bucket.name)
    assert [entry["Key"] for entry in versions["Versions"]] == ["a.png"]
    assert "DeleteMarkers" not in versions


def test_check_of_an_empty_bucket_warns_and_does_not_fail(run_cli: Cli) -> None:
    run = run_cli("--check")
    assert run.exit_code == 0
    assert starting("WARN", run) == ["list s3", "read"]
    assert last_line(run) == "ready: 19 OK, 2 WARN"


def test_check_reads_an_output_of_another_configuration_too(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    assert run_cli("--set", "s3.output_key=0/{name}.{target}").exit_code == 0
    run = run_cli("--check")
    assert (run.exit_code, last_line(run)) == (0, "ready: 22 OK"), run.out


def test_a_quiet_check_says_what_is_not_well_and_how_many_are(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    assert run_cli("-q", "--check").out == "ready: 22 OK\n"
    warned = run_cli("-q", "--check", "--prefix", "no-such/", CTF_API_KEY="ctf_sk_wrong_1")
    assert (starting("WARN", warned), starting("FAIL", warned)) == (["list s3", "read"], ["API key"])
    assert warned.out.splitlines()[3:] == ["not ready: 1 FAIL, 2 WARN"]


def test_check_in_json_is_one_document_with_all_that_the_lines_say(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    told = run_cli("--check", CTF_API_KEY="ctf_sk_wrong_1")
    run = run_cli(*JSON, "-q", "--check", CTF_API_KEY="ctf_sk_wrong_1")
    found = document(run)
    assert (run.exit_code, list(found), found["ready"]) == (2, ["ready", "checks"], False)
    assert {tuple(check) for check in found["checks"]} == {("verdict", "what", "message", "hint")}
    lines = [f"{check['verdict']:<4} {check['what']}" for check in found["checks"]]
    assert lines == [line[: len(said)] for line, said in zip(told.out.splitlines()[:-1], lines, strict=True)]
    (refused,) = (check for check in found["checks"] if check["verdict"] == "FAIL")
    assert refused["message"].startswith("the API refused the key: 401")
    assert refused["hint"] == "check CTF_API_KEY, api.key or api.key_file"
    well = run_cli(*JSON, "--check", "--prefix", "no-such/")
    assert (well.exit_code, document(well)["ready"]) == (0, True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "[api] key is missing: set CTF_API_KEY, or api.key or api.key_file"),
        ("", "[api] key_file = key.txt: the file is empty"),
    ],
)
def test_check_without_an_api_key_proves_all_the_rest(
    *, content: str | None, said: str, run_cli: Cli, bucket: Any, tmp_path: Path
) -> None:
    bucket.put("a.png", picture())
    if content is not None:
        (tmp_path / "work" / "key.txt").write_text(content)
    flags = () if content is None else ("--set", "api.key_file=key.txt")
    run = run_cli("--check", *flags, CTF_API_KEY=None)
    assert (run.exit_code, run.err) == (2, "")
    assert run.out.splitlines()[-2:] == [f"FAIL API key: {said}", "not ready: 1 FAIL"]


@pytest.mark.parametrize(("mode", "verdict"), [(0o600, "OK"), (0o640, "WARN"), (0o604, "WARN")])
def test_check_warns_of_a_key_file_that_others_can_read(
    *, mode: int, verdict: str, run_cli: Cli, api: ConversionApi, tmp_path: Path
) -> None:
    path = tmp_path / "key.txt"
    path.write_text(api.api_key)
    path.chmod(mode)
    run = run_cli("--check", "--set", f"api.key_file={path}", CTF_API_KEY=None)
    assert (run.exit_code, "api.key_file" in starting(verdict, run)) == (0, True)
    assert (f"run: chmod 600 {path}" in run.out) == (verdict == "WARN")


@pytest.mark.parametrize(
    ("changes", "failing", "to_do"),
    [
        pytest.param({"CTF_API_KEY": "ctf_sk_wrong_1"}, ["API key"], "check CTF_API_KEY", id="wrong key"),
        pytest.param(
            {"S3_BUCKET": "no-such-bucket"},
            ["bucket"],
            "correct s3.bucket",
            id="bucket",
        ),
        pytest.param(
            {"AWS_SECRET_ACCESS_KEY": "not-the-secret"},
            ["list s3"],
            "AWS_SECRET_ACCESS_KEY is wrong",
            id="secret",
            marks=pytest.mark.needs("secrets"),
        ),
        pytest.param({"AWS_ACCESS_KEY_ID": None}, ["S3"], "set AWS_ACCESS_KEY_ID", id="no credentials"),
        pytest.param({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, ["S3"], "check its address", id="no S3"),
        pytest.param({"TMPDIR": "/no/such/directory"}, [], "", id="an unusable TMPDIR is not used"),
    ],
)
def test_check_names_what_is_wrong_and_goes_on(
    *, changes: dict[str, str | None], failing: list[str], to_do: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", picture())
    run = run_cli("--check", **changes)
    assert (starting("FAIL", run), run.exit_code) == (failing, 2 if failing else 0)
    assert to_do in run.out
    assert "clock of the API" in starting("OK", run)
    assert (left_in(run), bucket.keys(), api.paid) == ({}, ["a.png"], [])


@pytest.mark.parametrize("name", ["checkpoint", "failures", "summary"])
def test_check_fails_for_a_file_that_cannot_be_written(name: str, run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    run = run_cli("--check", "--set", f"run.{name}=no/such/directory/file")
    assert f"run.{name}" in starting("FAIL", run)
    assert f"set run.{name} to another path" in run.out
    assert (run.exit_code, left_in(run)) == (2, {})


def test_check_fails_for_a_damaged_checkpoint_and_leaves_it_alone(run_cli: Cli) -> None:
    run = run_cli("--check")
    (run.workdir / "s3_bulk_convert.sqlite3").write_bytes(b"not a database" * 100)
    before = left_in(run)
    run = run_cli("--check")
    assert starting("FAIL", run) == ["run.checkpoint"]
    assert left_in(run) == before


def test_check_fails_where_the_api_is_not_there(run_cli: Cli) -> None:
    run = run_cli("--check", "--set", "api.url=http://127.0.0.1:1")
    assert (starting("FAIL", run), run.exit_code) == (["API"], 2)


def test_check_fails_when_the_month_is_used_up(run_cli: Cli, api: ConversionApi) -> None:
    api.behaviour.month_quota = 3
    assert starting("FAIL", run_cli("--check", "--set", "api.keep_remaining=3")) == ["quota"]
    assert "3 conversions are left of 3" in run_cli("--check").out


@pytest.mark.parametrize(
    ("fault", "verdict", "line"),
    [
        (Fault.json_in_200({"plan": None}), "WARN", "quota: the API does not say what is left of the month"),
        (Fault.html_page(), "WARN", "quota: the API does not say what is left of the month"),
        pytest.param(
            Fault.status_reply(404, "not_found"),
            "WARN",
            "quota: the API does not say what is left of the month",
            marks=pytest.mark.slow,
        ),
        (Fault.status_reply(503, "service_unavailable"), "FAIL", "API key: the API answered 503 service_unavailable"),
        (Fault.status_reply(403), "FAIL", "API key: the API refused the account: 403"),
    ],
)
def test_check_takes_any_answer_about_the_usage(
    fault: Fault, verdict: str, line: str, run_cli: Cli, api: ConversionApi
) -> None:
    api.faults.add(replace(fault, where=lambda request: request.path == "/v1/usage"))
    assert f"{verdict} {line}" in run_cli("--check").out


@pytest.mark.parametrize(("seconds", "verdict"), [(30, "OK"), (-120, "WARN"), (900, "FAIL"), (-900, "FAIL")])
def test_check_compares_the_clocks(seconds: int, verdict: str, run_cli: Cli) -> None:
    with ConversionApi(clock=lambda: time.time() + seconds) as elsewhere:
        run = run_cli("--check", "--set", f"api.url={elsewhere.url}", AWS_ENDPOINT_URL_S3=elsewhere.url)
    assert {"clock of S3", "clock of the API"} <= set(starting(verdict, run))


class GuardedS3(BaseHTTPRequestHandler):
    """An S3 that lets anybody list one object, and refuses every method that its server does not allow.

    `HEAD a.png` is what it is for: a method for that object alone.
    """

    def answer(self) -> None:
        """Answer one request."""
        is_listing = "list-type" in self.path
        is_bucket = "/" not in self.path.strip("/")
        name = urlsplit(self.path).path.rpartition("/")[2]
        is_allowed = (
            is_listing or is_bucket or {self.command, f"{self.command} {name}"} & {*vars(self.server)["allowed"]}
        )
        wanted = "".join(parse_qs(urlsplit(self.path).query).get("prefix", []))
        entry = "<Contents><Key>a.png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        entry += '<ETag>"1"</ETag><Size>9</Size></Contents>'
        found = entry if "a.png".startswith(wanted) else ""
        listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        body = listing if is_listing else "" if is_allowed else "<Error><Code>AccessDenied</Code></Error>"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200 if is_allowed else 403)
        is_source = is_allowed and name == "a.png" and self.command == "HEAD"
        self.send_header("Content-Length", "9" if is_source else str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body.encode())

    def __getattr__(self, name: str) -> Any:
        """The same for each method, which the base class looks up by its name."""
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def guarded_s3(*allowed: str) -> Iterator[str]:
    """The address of a GuardedS3."""
    with ThreadingHTTPServer(("127.0.0.1", 0), GuardedS3) as server:
        vars(server)["allowed"] = allowed
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_check_names_the_permission_that_is_missing(run_cli: Cli) -> None:
    with guarded_s3() as address:
        run = run_cli("--check", AWS_ENDPOINT_URL_S3=address)
    assert starting("FAIL", run) == ["read", "presigned URL", "write s3"]
    assert re.search(r"FAIL read: .*AccessDenied.*; allow s3:GetObject", run.out)
    assert re.search(r"FAIL write .*AccessDenied.*; allow s3:PutObject", run.out)
    assert "S3 answers it with 403" in run.out


def test_check_warns_of_an_output_bucket_where_it_can_only_write(run_cli: Cli) -> None:
    with guarded_s3("GET", "PUT", "HEAD a.png") as address:
        run = run_cli("--check", AWS_ENDPOINT_URL_S3=address)
    assert (run.exit_code, starting("WARN", run)) == (0, ["look at s3", "delete s3"])
    assert re.search(r"; delete converted/\.s3_bulk_convert-check-\w{16}, and allow s3:DeleteObject", run.out)


# ----------------------------------------------------------------------------------------------------------------------
# --status
# ----------------------------------------------------------------------------------------------------------------------


def test_status_without_a_checkpoint_says_so_and_makes_none(run_cli: Cli) -> None:
    run = run_cli("--status", CTF_API_KEY=None)
    assert (run.exit_code, run.out, left_in(run)) == (2, "", {})
    assert run.err.startswith("error: there is no checkpoint s3_bulk_convert.sqlite3\nhint: ")


def test_status_where_only_shards_have_checkpoints_says_how_to_ask_for_them(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    run_cli("--shard", "0/2")
    run = run_cli("--status")
    assert (run.exit_code, run.out) == (2, "")
    assert run.err.endswith("hint: s3_bulk_convert.0-of-2.sqlite3 is here: give --shard 0/2\n")


@pytest.mark.parametrize("key", ["", "s3://{}/"])
def test_why_of_no_key_is_refused(key: str, run_cli: Cli, bucket: Any) -> None:
    run = run_cli("--why", key.format(bucket.name))
    assert (run.exit_code, run.out) == (2, "")
    assert run.err.startswith("error: --why: there is no key\nhint: ")


def test_an_error_leaves_stdout_without_a_document(run_cli: Cli) -> None:
    run = run_cli(*JSON, "--status")
    assert (run.exit_code, run.out) == (2, "")
    error = json.loads(run.err)
    assert (error["event"], error["exit_code"], error["code"]) == ("error", 2, "usage")
    assert error["message"] == "there is no checkpoint s3_bulk_convert.sqlite3"
    (run.workdir / "s3_bulk_convert.sqlite3").write_bytes(b"not a database" * 100)
    run = run_cli(*JSON, "--why", "a.png")
    assert (run.exit_code, run.out, json.loads(run.err)["code"]) == (2, "", "checkpoint")


@pytest.mark.parametrize(
    "flags",
    [
        ("--check",),
        pytest.param(("--status",), marks=pytest.mark.slow),
        ("--why", "a.png"),
        pytest.param(("--dry-run",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_an_answer_that_cannot_be_written_is_no_success(flags: tuple[str, ...], run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    run_cli()
    script = f'exec {shlex.quote(PYTHON)} {SCRIPT} "$@" > /dev/full'
    run = run_cli(*flags, command=("-c", IN_SHELL, script))
    assert run.exit_code == 3
    assert "error: stdout cannot be written: No space left on device\nhint: " in run.err


def press_ctrl_c(run: Any) -> None:
    """And again, as a person does: Python does not hear of a signal that comes just as it begins to wait."""
    for _ in range(3):
        run.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(10)
    run.wait(20)


@pytest.mark.parametrize("flags", [("--check",), ("--dry-run",)], ids=" ".join)
def test_a_command_that_is_interrupted_says_so(flags: tuple[str, ...], start: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        run = start(*flags, "--set", f"api.url=http://127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = silent.accept()
        with connection:
            press_ctrl_c(run)
    assert (run.exit_code, run.err) == (130, "\ninterrupted\n")


def test_status_tells_what_the_runs_came_to(run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        bucket.put(name, picture(name))
    api.faults.add(Fault.status_reply(422, "conversion_failed"))
    api.faults.add(Fault.status_reply(503, "service_unavailable"))
    before = left_in(run_cli("--workers", "1", "--set", "api.retries=0", "--set", "api.transfer=upload"))
    earlier = time.time() - 3
    os.utime(tmp_path / "work" / "s3_bulk_convert.sqlite3", (earlier, earlier))  # to ask is no activity
    run = run_cli("--status", CTF_API_KEY=None, AWS_ENDPOINT_URL_S3="http://127.0.0.1:1")
    assert run.exit_code == 0
    assert re.search(
        rf"run +none is at work\nlast run +began {DATE}, ended {DATE} with exit code 1\nlast activity +{DATE}\n",
        run.out,
    )
    assert re.search(r"last activity .* \([2-9] s ago\)", run.out)
    assert f"s3://{bucket.name} to jpg in s3://{bucket.name}/{PLACE}: job default\n  converted    2\n" in run.out
    assert "failed       1 for good: conversion_failed 1\n  failed       1 for now: service_unavailable 1\n" in run.out
    found = document(run_cli(*JSON, "--status", CTF_API_KEY=None, AWS_ENDPOINT_URL_S3="http://127.0.0.1:1"))
    assert list(found) == ["checkpoint", "checkpoint_bytes", "run", "last_run", "last_activity", "jobs"]
    assert (found["checkpoint"], found["run"]) == ("s3_bulk_convert.sqlite3", None)
    assert found["checkpoint_bytes"] == len(before["s3_bulk_convert.sqlite3"])
    began, ended, last = map(iso, (found["last_run"]["began"], found["last_run"]["ended"], found["last_activity"]))
    assert (began <= ended <= time.time(), last, found["last_run"]["exit_code"]) == (True, int(earlier), 1)
    counts = {
        "converted": 2,
        "found": 0,
        "adopted": 0,
        "skipped": 0,
        "lost": 0,
        "in_flight": 1,
        "not_asked_for": 0,
        "possible_double_charges": 0,
    }
    (job,) = found["jobs"]
    assert iso(job.pop("oldest_sent_at")) <= ended
    assert len(job.pop("fingerprint")) > 10
    assert job == counts | {
        "bucket": bucket.name,
        "job": "default",
        "configured_as": "default",
        "target": "jpg",
        "output_bucket": bucket.name,
        "output_key": PLACE,
        "failed_for_good": {"conversion_failed": 1},
        "failed_for_now": {"service_unavailable": 1},
    }
    assert left_in(run) == before


def test_status_and_check_see_a_run_at_work_and_do_not_disturb_it(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    bucket.put("a.png", picture())
    fault = api.faults.add(Fault.hang_until(release))
    run = start()
    assert fault.reached.wait(30)
    before = left_in(run)
    holder = f"process {run.process.pid}, for "
    assert f"at work: {holder}" in run_cli("--status").out
    at_work = document(run_cli(*JSON, "--status"))["run"]
    assert (at_work["pid"], 0 <= time.time() - iso(at_work["since"]) < 60) == (run.process.pid, True)
    assert f"WARN lock: a run is at work ({holder}" in run_cli("--check").out
    assert left_in(run) == before
    release.set()
    assert run.wait().exit_code == 0


def test_status_of_a_killed_run_shows_what_is_in_flight(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    bucket.put("a.png", picture())
    before = left_in(kill_with_one_in_flight(start, api, release))
    run = run_cli("--status")
    assert "run            none is at work" in run.out
    assert re.search(r"interrupted  1, asked for again by the next run, the oldest since \S+ \S+ \(\d s ago\)", run.out)
    assert left_in(run) == before
    assert "s3_bulk_convert.sqlite3-wal" in before


def test_status_tells_what_is_in_flight_of_objects_that_are_gone(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    bucket.put("a.png", picture())
    kill_with_one_in_flight(start, api, release)
    said = "  of these     1 the last run did not meet: deleted, or wanted by no job; forgotten after a week\n"
    assert said not in run_cli("--status").out
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    assert run_cli().exit_code == 0
    assert said in run_cli("--status").out
    (job,) = document(run_cli(*JSON, "--status"))["jobs"]
    assert (job["in_flight"], job["not_asked_for"]) == (1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# --why
# ----------------------------------------------------------------------------------------------------------------------


WHAT_THE_NEXT_RUN_DOES = {
    "new.png": "the next run would convert it to jpg, which is paid for",
    "done.png": "the next run would leave it: already_done",
    "bad.png": "the next run would leave it: it failed for good before; --retry-failed tries it again",
    "same.jpg": "the next run would leave it: same_format: it is in the target format already",
    "folder/": "the next run would leave it: folder",
    "empty.png": "the next run would leave it: empty",
    "notes.txt": "the next run would leave it: not_matched",
    "converted/done.jpg": "the next run would leave it: own_output",
    "done.heic": "the next run would fail: output_collision, converted/done.jpg: belongs to done.png; put {ext}",
    "twin.gif": "the next run would convert it to jpg, which is paid for",
    "twin.heic": "the next run would fail: output_collision, converted/twin.jpg: belongs to twin.gif; put {ext}",
    "gone.png": "the next run would do nothing: it is not in the bucket",
    "/new.png": "the next run would do nothing: it is not in the bucket; did you mean new.png?",
    "s3://BUCKET/new.png": "the next run would convert it to jpg, which is paid for",
}


def test_why_says_what_the_next_run_does(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for name in ("bad.png", "done.png"):
        bucket.put(name, picture(name))
    api.faults.add(Fault.status_reply(422, "conversion_failed"))
    before = left_in(run_cli("--workers", "1", "--set", "api.transfer=upload"))
    for name in ("new.png", "same.jpg", "folder/", "notes.txt", "done.heic", "twin.gif", "twin.heic"):
        bucket.put(name, picture(name))
    bucket.put("empty.png", b"")
    keys = bucket.keys()
    for key, said in WHAT_THE_NEXT_RUN_DOES.items():
        run = run_cli("--set", "convert.exclude=*.txt", "--why", key.replace("BUCKET", bucket.name), CTF_API_KEY=None)
        assert last_line(run).startswith(said), run.out
        assert (left_in(run), bucket.keys(), len(api.paid)) == (before, keys, 1)


@pytest.mark.needs("newlines")
def test_why_tells_all_that_is_known(run_cli: Cli, bucket: Any) -> None:
    bucket.put("x/ä\n.png", picture())
    run_cli()
    first = bucket.client.head_object(Bucket=bucket.name, Key="x/ä\n.png")["ETag"].strip('"')
    assert f"ETag {first}" in run_cli("--why", "x/ä\n.png").out
    bucket.put("x/ä\n.png", picture("changed"))
    run = run_cli("--why", "x/ä\n.png")
    assert run.out.startswith(f'object         s3://{bucket.name}/"x/\\u00e4\\n.png"\ncheckpoint     newest first:\n')
    assert re.search(rf' converted as "converted/x/\S+, to jpg, ETag {first}\n', run.out)
    assert re.search(r'output key +"converted/\S+" \(job default\), its own\n', run.out)
    assert f"is there, made of another version, {first}\n" in run.out
    assert last_line(run) == "the next run would convert it to jpg, which is paid for"


@pytest.mark.needs("newlines")
def test_why_in_json_is_all_that_is_known(run_cli: Cli, bucket: Any) -> None:
    key, output = "x/ä\n.png", "converted/x/ä\n.jpg"
    bucket.put(key, picture())
    run_cli()
    first = bucket.client.head_object(Bucket=bucket.name, Key=key)
    stored = bucket.client.head_object(Bucket=bucket.name, Key=output)
    bucket.put(key, picture("changed"))
    second = bucket.client.head_object(Bucket=bucket.name, Key=key)
    found = document(run_cli(*JSON, "--why", key))
    (row,) = found.pop("history")
    assert 0 <= time.time() - iso(row.pop("time")) < 60
    assert (row.pop("seconds") > 0, row.pop("requests")) == (True, 1)
    made = {"output_key": output, "output_etag": stored["ETag"].strip('"'), "bytes_out": stored["ContentLength"]}
    assert row == made | {
        "event": "converted",
        "job": "default",
        "target": "jpg",
        "etag": first["ETag"].strip('"'),
        "output_bucket": bucket.name,
        "code": None,
        "message": None,
        "permanent": False,
        "runs_failed": 0,
        "possible_double_charge": False,
    }
    (job,) = found.pop("jobs")
    (there,) = job.pop("outputs")
    assert "is there, made of another version" in there.pop("message")
    assert there == {
        "output_key": output,
        "state": "there",
        "bytes": stored["ContentLength"],
        "etag": stored["ETag"].strip('"'),
        "made_of": "another_version",
        "source": key,
    }
    step = "convert it to jpg, which is paid for"
    assert job == {
        "job": "default",
        "target": "jpg",
        "output_bucket": bucket.name,
        "output_key": output,
        "place": "own",
        "taken_by": None,
        "next": {"kind": "convert", "reason": None, "message": None, "step": step},
        "repair": None,
    }
    assert iso(found["in_bucket"].pop("modified")) == second["LastModified"].timestamp() // 1
    assert found == {
        "bucket": bucket.name,
        "key": key,
        "checkpoint": "s3_bulk_convert.sqlite3",
        "checkpoint_exists": True,
        "in_flight": [],
        "s3_problem": None,
        "in_bucket": {"bytes": second["ContentLength"], "etag": second["ETag"].strip('"'), "archived": False},
    }


def test_what_the_api_has_said_breaks_no_document(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", picture())
    said = 'it is "https://example.com/a?X-Amz-Signature=0123456789abcdef" that I cannot read'
    api.faults.add(replace(Fault.status_reply(422, "conversion_failed"), message=said))
    run_cli("--set", "api.transfer=upload")
    found = document(run_cli(*JSON, "--why", "a.png"))
    assert found["history"][0]["message"] == 'it is "https://example.com/a?..." that I cannot read'
    assert found["jobs"][0]["next"]["reason"] == "failed_before"


def test_where_a_key_s_neighbours_may_not_be_listed_why_calls_it_no_bug(
    run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.png", picture())
    relay.refuse = lambda _, path: parse_qs(urlsplit(path).query).get("prefix") == ["a"]
    run = run_cli("--why", "a.png", AWS_ENDPOINT_URL_S3=relay.url)
    said = run.out + run.err
    assert ("bug" in said, "Traceback" in said, run.exit_code in {0, 2, 3}) == (False, False, True), said
    assert last_line(run).startswith("the next run would convert it to jpg"), said


def test_why_of_what_is_in_flight_promises_the_same_request(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    bucket.put("a.png", picture())
    kill_with_one_in_flight(start, api, release)
    release.set()
    run = run_cli("--why", "a.png")
    assert re.search(r"in flight      since \S+ \S+ \(\d s ago\), for converted/a.jpg, ETag ", run.out)
    assert "send the request in flight again" in last_line(run)
    found = document(run_cli(*JSON, "--why", "a.png"))
    (sent,) = found["in_flight"]
    assert (sent["job"], sent["output_key"], 0 <= time.time() - iso(sent["sent_at"]) < 60) == (
        "default",
        "converted/a.jpg",
        True,
    )
    assert (sent["etag"], found["jobs"][0]["next"]["kind"]) == (found["in_bucket"]["etag"], "resume")
    assert "http" not in json.dumps(sent)
    assert run_cli().exit_code == 0
    assert len(api.paid) == 1


def test_why_without_a_checkpoint_finds_the_output_and_makes_no_file(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    bucket.put("converted/a.jpg", picture("made by somebody else, later"))
    run = run_cli("--why", "a.png")
    assert "checkpoint     there is none (s3_bulk_convert.sqlite3)\n" in run.out
    assert "output         converted/a.jpg is there, without this program's mark\n" in run.out
    assert left_in(run) == {}


def test_why_shows_the_checkpoint_s_part_when_the_bucket_cannot_be_reached(
    run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.png", picture())
    run_cli(AWS_ENDPOINT_URL_S3=relay.url)
    # Another address would be another bucket: it is this one that answers no more.
    relay.shutdown()
    relay.server_close()
    run = run_cli("--why", "a.png", AWS_ENDPOINT_URL_S3=relay.url)
    assert " converted as converted/a.jpg, to jpg" in run.out
    assert "in the bucket  not known (S3 did not answer)\n" in run.out
    assert "output key     converted/a.jpg (job default), its own\n" in run.out
    assert last_line(run).startswith("the next run would stop before it: S3 could not be reached")
    found = document(run_cli(*JSON, "--why", "a.png", AWS_ENDPOINT_URL_S3=relay.url))
    assert (found["s3_problem"][:27], found["in_bucket"]) == ("S3 could not be reached for", None)
    (job,) = found["jobs"]
    assert (job["place"], job["outputs"], job["next"]["kind"]) == ("own", [], "stopped")


def test_why_answers_for_each_job(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    bucket.put("in/a.png", picture())
    ini = tmp_path / "jobs.ini"
    ini.write_text("[job one]\nprefix = in/\n[job three]\ninclude = *.gif\n[job two]\nprefix = out/\ntarget = pdf\n")
    steps = "convert it to jpg, which is paid for (job one); leave it: "
    steps += "not_matched: globs, sizes or ages leave it out; see convert.include (job three); "
    steps += "not list it, for its key does not begin with out/ (job two)"
    assert last_line(run_cli("-c", str(ini), "--why", "in/a.png")) == f"the next run would {steps}"


def test_why_answers_for_each_of_two_jobs_that_make_the_same_output(run_cli: Cli, bucket: Any, tmp_path: Path) -> None:
    bucket.put("a.png", picture())
    ini = tmp_path / "jobs.ini"
    ini.write_text("[job one]\n[job two]\n")
    step = "convert it to jpg, which is paid for"
    assert last_line(run_cli("-c", str(ini), "--why", "a.png")) == (
        f"the next run would {step} (job one); {step} (job two)"
    )


def test_why_says_of_a_free_key_that_a_source_of_another_folder_may_take_it(run_cli: Cli, bucket: Any) -> None:
    for key in ("x/a.png", "y/a.png"):
        bucket.put(key, picture())
    free = [
        run_cli("--set", f"s3.output_key={template}", "--why", "y/a.png").out.splitlines()[-2].partition("), ")[2]
        for template in ("converted/{stem}.{target}", "converted/{key}.{target}", PLACE)
    ]
    assert free == ["free, unless a source of another folder has it and is listed before", "free", "free"]


REPAIR = "s3_bulk_convert.py --repair --keys-from -"


@pytest.mark.needs("newlines")
def test_why_says_that_an_output_is_missing_and_how_to_have_it_again(run_cli: Cli, bucket: Any) -> None:
    for key in ("it's.png", "two\nlines.png"):
        bucket.put(key, picture(key))
    run_cli()
    for output in bucket.keys("converted/"):
        bucket.client.delete_object(Bucket=bucket.name, Key=output)
    run = run_cli("--why", "it's.png")
    assert run.out.splitlines()[-4:] == [
        "output key     converted/it's.jpg (job default), its own",
        "output         it is missing: converted/it's.jpg was stored, and is not there",
        f"""to repair      run it with --repair; this object alone: printf '%s\\n' 'it'"'"'s.png' | {REPAIR}""",
        "the next run would leave it: already_done",
    ]
    # Such a key is no line of a file.
    (job,) = document(run_cli(*JSON, "--why", "two\nlines.png"))["jobs"]
    assert ([output["state"] for output in job["outputs"]], job["repair"]) == (["missing"], "run it with --repair")
    # What the next run converts anyway needs no repair, and what another version has left is missing all the same.
    bucket.put("it's.png", picture("changed"))
    run = run_cli("--why", "it's.png")
    assert "it is missing: converted/it's.jpg was stored, and is not there\nthe next run would convert it" in run.out


def test_what_why_says_of_a_missing_output_converts_that_object_again_and_no_other(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for key in ("it's.png", "b.png"):
        bucket.put(key, picture(key))
    api.behaviour.convert = lambda conversion: zip_of_pages([conversion.source] * 2, "jpg")
    run_cli()
    for output in bucket.keys("converted/"):
        bucket.client.delete_object(Bucket=bucket.name, Key=output)
    (job,) = document(run_cli(*JSON, "--why", "it's.png"))["jobs"]
    command = job["repair"].partition("this object alone: ")[2].replace("s3_bulk_convert.py", 'exec "$@"')
    repaired = run_cli(command=("-c", IN_SHELL, command, PYTHON, str(SCRIPT)))
    assert (repaired.exit_code, bucket.keys("converted/"), len(api.paid)) == (0, ["converted/it's.jpg.zip"], 3), (
        repaired.err
    )
    found = document(run_cli(*JSON, "--why", "it's.png"))
    assert [(row["event"], row["output_key"]) for row in found["history"]] == [
        (event, "converted/it's.jpg.zip") for event in ("converted", "lost", "converted")
    ]
    assert [output["state"] for output in found["jobs"][0]["outputs"]] == ["there"]


def test_why_says_that_an_output_is_altered_and_who_has_to_delete_it(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    run_cli()
    stored = bucket.client.head_object(Bucket=bucket.name, Key="converted/a.jpg")
    as_stored = f"{stored['ContentLength']} bytes with ETag {stored['ETag'][1:-1]} were stored"
    assert ("altered" in run_cli("--why", "a.png").out) is False
    # By a tool that keeps what an output says of itself, and by one that does not.
    for metadata, made_of in ((stored["Metadata"], "made of this version"), ({}, "without this program's mark")):
        bucket.client.put_object(Bucket=bucket.name, Key="converted/a.jpg", Body=b"smaller", Metadata=metadata)
        now = bucket.client.head_object(Bucket=bucket.name, Key="converted/a.jpg")["ETag"][1:-1]
        told = f"it is altered: converted/a.jpg is there, {made_of}, 7 bytes with ETag {now}; {as_stored}"
        step = (
            f"what is altered is never overwritten: delete s3://{bucket.name}/converted/a.jpg, and run it with --repair"
        )
        assert run_cli("--why", "a.png").out.splitlines()[-3:] == [
            f"output         {told}",
            f"to repair      {step}; this object alone: printf '%s\\n' a.png | {REPAIR}",
            "the next run would leave it: already_done",
        ]


def test_why_says_what_an_output_is_that_is_adopted(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    until_next_second()  # S3's times have no finer ones
    bucket.put("converted/a.jpg", b"another program's")
    assert run_cli("--why", "a.png").out.splitlines()[-3:] == [
        "output key     converted/a.jpg (job default), not known whose",
        "output         converted/a.jpg is there, without this program's mark",
        "the next run would adopt the output that is there, and pay nothing",
    ]
    assert run_cli().summary["adopted"] == 1
    assert run_cli("--why", "a.png").out.splitlines()[-3:] == [
        "output key     converted/a.jpg (job default), its own",
        "output         converted/a.jpg is there, without this program's mark, and was adopted",
        "the next run would leave it: already_done",
    ]
    bucket.put("converted/a.jpg", b"replaced")
    assert "it is altered: converted/a.jpg is there, without" in run_cli("--why", "a.png").out


def test_why_does_not_call_altered_what_was_stored_since_with_another_checkpoint(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    run_cli()
    bucket.put("a.png", picture("changed"))
    assert run_cli("--set", "run.checkpoint=other").exit_code == 0
    assert run_cli("--why", "a.png").out.splitlines()[-2:] == [
        "output         converted/a.jpg is there, made of this version",
        "the next run would find its output, which is there, and pay nothing",
    ]


def test_why_does_not_call_free_what_cannot_be_looked_at(run_cli: Cli) -> None:
    with guarded_s3("GET", "HEAD a.png") as address:
        text = run_cli("--why", "a.png", AWS_ENDPOINT_URL_S3=address)
        (job,) = document(run_cli(*JSON, "--why", "a.png", AWS_ENDPOINT_URL_S3=address))["jobs"]
    assert (
        "output key     converted/a.jpg (job default), not known whose\noutput         it cannot be told: " in text.out
    )
    assert (job["place"], {output["state"] for output in job["outputs"]}) == ("unknown", {"unknown"})


def test_why_knows_an_output_that_was_made_with_other_options(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", picture())
    run_cli()
    run = run_cli("--set", "convert.quality=80", "--why", "a.png")
    assert "output         converted/a.jpg is there, made of this version with other options\n" in run.out
    assert last_line(run) == "the next run would convert it to jpg, which is paid for"


def test_why_names_the_shard_that_an_object_belongs_to(run_cli: Cli, bucket: Any) -> None:
    bucket.put("b.png", picture())
    claim = "converted/b.jpg"
    own = shard_of(claim, 2)
    there = run_cli("--why", "b.png", "--shard", f"{own}/2")
    assert last_line(there) == "the next run would convert it to jpg, which is paid for"
    elsewhere = run_cli("--why", "b.png", "--shard", f"{1 - own}/2")
    assert last_line(elsewhere) == f"the next run would leave it: it belongs to shard {own}/2"


def test_why_foresees_that_nothing_is_overwritten_among_the_sources(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.jpg", picture("of somebody else"))
    bucket.put("a.png", picture())
    run = run_cli("--set", "s3.output_key={stem}.jpg", "--set", "run.skip_existing=no", "--why", "a.png")
    assert last_line(run).startswith("the next run would fail: output_collision, a.jpg exists and is no output of this")


def test_why_is_readable_where_the_terminal_has_few_characters_and_a_message_has_odd_ones(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("ä.png", picture())
    api.faults.add(replace(Fault.status_reply(422, "unsupported_route"), message="\x1b[2J gone"))
    run_cli()
    run = run_cli("--why", "ä.png", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert run.exit_code == 0
    assert r"/\xe4.png" in run.out
    assert r'"unsupported_route \u001b[2J gone"' in run.out


def test_a_code_of_the_api_s_gives_no_orders_to_the_terminal(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for number in range(10):
        bucket.put(f"{number}.png", picture())
    # Failures in a row, and a rate of them, are said in words of their own.
    api.faults.add(Fault.status_reply(403, "\x1b[2Jodd\nfailed  99", times=None))
    stopped = run_cli()
    api.faults.clear()
    api.faults.add(Fault.status_reply(422, "\x1b[2Jodd\nfailed  99", times=None))
    failed = run_cli(command=script_with("program.FAILURES_BEFORE_RATE_COUNTS = 5"))
    assert ("in a row failed for" in stopped.out, "max_failure_rate" in failed.out) == (True, True)
    runs = [stopped, failed, run_cli("--status"), run_cli("--why", "0.png")]
    for run in runs:
        assert r"\u001b[2Jodd\nfailed  99" in run.out
        assert not re.search(r"\x1b|^failed  99", run.out + run.err, re.MULTILINE)


@pytest.mark.parametrize("other", ["--status", "--retry-failed", "--why=a"])
def test_what_looks_is_asked_for_alone(other: str, run_cli: Cli) -> None:
    run = run_cli("--check", other)
    assert run.exit_code == 2
    assert "not allowed with argument" in run.err
