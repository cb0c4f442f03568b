"""What is written down before a request is sent, and what a later run makes of it, as bills and the checkpoint say."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import Trap, killed_when_paid
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import script_with
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"
UPLOAD, BY_URL = ("--set", "api.transfer=upload"), ("--set", "api.transfer=url")


def hours_later(hours: int) -> tuple[str, str]:
    """The script on a machine whose clock has gone on."""
    return script_with(f"import time\nnow = time.time\ntime.time = lambda: now() + {hours} * 3600")


########################################################################
# Rows
########################################################################


def test_nothing_is_sent_while_the_checkpoint_cannot_be_written(
    *, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, tmp_path: Path
) -> None:
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(**there).exit_code == 0  # nothing is listed yet; it leaves a checkpoint
    expected = fill(bucket, 2)
    held, sent = threading.Event(), threading.Event()
    checkpoint = tmp_path / "work" / "s3_bulk_convert.sqlite3"
    with contextlib.closing(sqlite3.connect(checkpoint, isolation_level=None, check_same_thread=False)) as other:

        def hold(_method: str, path: str) -> bool:
            """Take the right to write, as a backup does, before the run knows of any object."""
            if "list-type=2" in path and not held.is_set():
                other.execute("BEGIN IMMEDIATE")
                held.set()
            return False

        relay.refuse = hold
        api.on("request_received", lambda _: sent.set())
        run = start(**there)
        assert held.wait(60)
        assert not sent.wait(1)
        other.execute("ROLLBACK")
    assert_all_promises_are_kept(run.wait(), api, bucket, expected)


def test_what_the_log_says_cannot_be_changed_or_taken_away(run_cli: Cli, bucket: Any) -> None:
    fill(bucket, 2)
    run = run_cli()
    before = run.rows()
    assert len(before) == 2
    column = next(iter(before[0]))
    with contextlib.closing(sqlite3.connect(run.workdir / "s3_bulk_convert.sqlite3")) as db:
        for statement in (
            f"UPDATE log SET {column} = {column}",
            "DELETE FROM log",
            "INSERT OR REPLACE INTO log SELECT * FROM log",
        ):
            with pytest.raises(sqlite3.DatabaseError):
                db.execute(statement)
    assert run.rows() == before


########################################################################
# Requests that are sent again
########################################################################


def test_a_request_that_was_first_sent_a_day_ago_is_no_replay_however_often_it_was_sent_again(
    start: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", PNG + b"a picture")
    killed_when_paid(start, api, *UPLOAD)
    # Sent again, and killed again, before the day is over.
    api.faults.add(Fault.cut_before_work())
    trap = Trap("request_received", 1)
    api.on("request_received", lambda _: trap.spring("request_received"))
    again = start(*UPLOAD, command=hours_later(23))
    trap.process = again.process
    assert again.wait().exit_code == -signal.SIGKILL
    api.behaviour.keep_memory = 0
    last = start(*UPLOAD, command=hours_later(25)).wait()
    assert last.exit_code == 0
    assert (len(api.paid), last.summary["possible_double_charges"], last.summary["replays"]) == (2, 1, 0)


def test_what_was_stored_before_a_kill_is_found_and_not_sent_again(
    start: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    expected = fill(bucket, 1)
    is_put, is_stored = threading.Event(), threading.Event()

    def kill_at_put(method: str, _path: str) -> bool:
        if method == "PUT":
            os.kill(run.process.pid, signal.SIGKILL)
            is_put.set()
        return False

    def note(body: bytes) -> bytes:
        if is_put.is_set():
            is_stored.set()
        return body

    relay.refuse, relay.rewrite = kill_at_put, note
    run = start(**there)
    assert run.wait().exit_code == -signal.SIGKILL
    assert is_stored.wait(30)
    relay.refuse = lambda *_: False
    api.behaviour.keep_memory = 0  # so that whatever is sent would be paid again
    assert_all_promises_are_kept(start(**there).wait(), api, bucket, expected)
    assert len(api.requests) == 1


def test_409_is_waited_for_and_uses_up_no_attempt(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    expected = fill(bucket, 1)
    api.faults.add(Fault.status_reply(409, "bad_request", retry_after="0", times=3))
    assert_all_promises_are_kept(run_cli("--set", "api.retries=1"), api, bucket, expected)
    assert len(api.requests) == 4


########################################################################
# The key of a request
########################################################################


def test_another_version_of_the_same_size_is_asked_for_under_another_key(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    relay.tell_one_time()  # which tells versions apart as well, unless they are of the same second
    for version in (b"version 1", b"version 2"):
        bucket.put("a.png", PNG + version)
        run = run_cli(*UPLOAD, AWS_ENDPOINT_URL_S3=relay.url)
        assert (run.exit_code, run.summary["possible_double_charges"]) == (0, 0)
        assert version in bucket.read("converted/a.jpg")
    assert len(api.requests) == len(api.paid) == 2


def test_the_same_object_in_another_bucket_is_asked_for_under_another_key(
    run_cli: Cli, bucket: Any, other_bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    # Both outputs go to one place, and both sources are of one second, so that nothing but the bucket of the source
    # tells one request from the other.
    relay.tell_one_time()
    there = ("--set", f"s3.output_bucket={bucket.name}")
    for each in (bucket, other_bucket):
        each.put("a.png", PNG + b"a picture")
        own = ("--set", f"run.checkpoint={each.name}.sqlite3")
        run = run_cli(*BY_URL, *there, *own, S3_BUCKET=each.name, AWS_ENDPOINT_URL_S3=relay.url)
        assert (run.exit_code, run.summary["possible_double_charges"]) == (0, 0)
        assert list(bucket.outputs()) == ["converted/a.jpg"]
        bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    assert [request.status for request in api.requests] == [200, 200]


########################################################################
# Where requests go
########################################################################


@pytest.mark.parametrize(("status", "is_own_host"), [(303, True), (307, False)], ids=["as a GET", "as it was"])
def test_a_request_follows_no_redirect(
    *, status: int, is_own_host: bool, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 1)
    host = api.url if is_own_host else api.download_url
    api.faults.add(Fault.redirect(f"{host}/elsewhere", status, times=None))
    run = run_cli()
    assert (run.exit_code, run.summary["failed"]) == (1, {f"http_{status}": 1})
    assert [(request.listener, request.path) for request in api.requests] == [("api", "/v1/convert")]
