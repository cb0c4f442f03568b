"""The checkpoint under several names, beside other commands and buckets, and a day after: nothing is paid twice."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_stopping import wait_until_said
from tests.standins import promises
from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.program import script_with
from tests.standins.relay import Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
CHECKPOINT = "s3_bulk_convert.sqlite3"
ONE_WORKER = ("--workers", "1", "--set", "api.retries=0", "--set", "run.max_failure_rate=never")
# Its clock is a day and an hour ahead as soon as a file named "tomorrow" is there.
TOMORROW = script_with(
    "import os, time\nnow = time.time\nprogram.time.time = lambda: now() + 25 * 3600 * os.path.exists('tomorrow')"
)
fill = partial(promises.fill, name="{}", repeated=1)


def bodies(bucket: Any) -> dict[str, bytes]:
    """What lies below the output prefix."""
    return {key: body for key, (body, *_) in bucket.outputs().items()}


def change(run: Any, statement: str, *values: object) -> None:
    """Change the checkpoint behind the program's back."""
    with contextlib.closing(sqlite3.connect(run.workdir / CHECKPOINT)) as db, db:
        db.execute(statement, values)


# ----------------------------------------------------------------------------------------------------------------------
# One run at a time
# ----------------------------------------------------------------------------------------------------------------------


def link_to(workdir: Path) -> str:
    """Give the checkpoint another name by a symbolic link in another folder."""
    (workdir / "folder").mkdir()
    (workdir / "folder" / "link.sqlite3").symlink_to(workdir / CHECKPOINT)
    return "folder/link.sqlite3"


def hard_link_to(workdir: Path) -> str:
    """Give the file a second name of its own."""
    os.link(workdir / CHECKPOINT, workdir / "hard.sqlite3")
    return "hard.sqlite3"


def without_lock_file(workdir: Path) -> str:
    """Remove what somebody may take for a leftover, and name the checkpoint by another path."""
    for path in workdir.glob("*.lock"):
        path.unlink()
    return str(workdir / ".." / workdir.name / CHECKPOINT)


@pytest.mark.parametrize("rename", [link_to, hard_link_to, without_lock_file])
def test_a_checkpoint_is_one_run_s_whatever_it_is_called(
    *,
    rename: Callable[[Path], str],
    start: Cli,
    run_cli: Cli,
    bucket: Any,
    api: ConversionApi,
    release: threading.Event,
) -> None:
    expected = fill(bucket, count=2)
    fault = api.faults.add(Fault.hang_until(release, times=2))
    run = start()
    assert fault.reached.wait(30)
    named = ("--set", f"run.checkpoint={rename(run.workdir)}")
    second = run_cli(*named)
    holder = rf"process {run.process.pid}, for \d+ s"
    assert second.exit_code == 4, second.err
    assert re.match(rf"error: another run holds \S+ \({holder}\)\nhint: wait for it to end, ", second.err)
    release.set()
    assert run.wait().exit_code == 0
    assert (len(api.paid), api.paid_twice(), bodies(bucket)) == (2, [], expected)


def test_a_checkpoint_that_is_a_link_is_kept_where_it_points(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    fill(bucket, count=1)
    workdir = run_cli("--version").workdir
    (workdir / "volume").mkdir()
    (workdir / CHECKPOINT).symlink_to("volume/real.sqlite3")
    fault = api.faults.add(Fault.hang_until(release))
    run = start()
    assert fault.reached.wait(30)
    real = ("--set", "run.checkpoint=volume/real.sqlite3")
    for named in ((), real):
        assert f"run            at work: process {run.process.pid}, for " in run_cli("--status", *named).out
    assert run_cli(*real).exit_code == 4
    release.set()
    assert run.wait().exit_code == 0
    assert (workdir / CHECKPOINT).is_symlink()
    again = run_cli(*real)
    assert (again.exit_code, again.summary["already_done"], len(api.paid)) == (0, 1, 1)


def test_runs_with_checkpoints_of_their_own_work_side_by_side(
    *, start: Cli, run_cli: Cli, bucket: Any, other_bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    fill(bucket, count=1)
    fill(other_bucket, count=1, name="other-{}")
    fault = api.faults.add(Fault.hang_until(release))
    run = start()
    assert fault.reached.wait(30)
    assert run_cli("--set", "run.checkpoint=other.sqlite3", S3_BUCKET=other_bucket.name).exit_code == 0
    release.set()
    assert run.wait().exit_code == 0


# ----------------------------------------------------------------------------------------------------------------------
# Looking while a run is at work
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_comes_and_goes_beside_a_dry_run_damages_nothing(
    *, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, release: threading.Event
) -> None:
    fill(bucket, count=4, name="first-{}-" + "x" * 900)
    ini = run_cli("--version").workdir / "jobs.ini"
    ini.write_text("[job first]\nprefix = first\n[job second]\nprefix = second\n")
    given, there = ("-c", "jobs.ini"), {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(*given, **there).exit_code == 0
    listing = threading.Event()

    def hold(method: str, path: str) -> bool:
        if method == "GET" and "list-type" in path and "prefix=second" in path and not listing.is_set():
            listing.set()
            release.wait(60)
        return False

    relay.refuse = hold
    forecast = start(*given, "--dry-run", "--log-format", "json", **there)
    # What the first job has done was looked up by now, and is known to the dry run's own cache.
    assert listing.wait(30)
    fill(bucket, count=40, name="second-{}-" + "x" * 900)
    run = run_cli(*given, **there)
    assert (run.exit_code, run.summary["converted"]) == (0, 40)
    for key in bucket.keys("converted/"):
        bucket.client.delete_object(Bucket=bucket.name, Key=key)  # so that the checkpoint alone knows of them
    release.set()
    forecast.wait()
    assert (forecast.exit_code, forecast.err) == (0, ""), forecast.err
    # What the run has done by then is done: the dry run looks at the checkpoint as it is.
    done = {name: job["already_done"] for name, job in json.loads(forecast.out)["jobs"].items()}
    assert done == {"first": 4, "second": 40}
    left = {path.name for path in run.workdir.iterdir()} - {"jobs.ini"}
    assert left <= {CHECKPOINT, f"{CHECKPOINT}.lock", "summary.json"}
    assert (run_cli(*given, **there).summary["already_done"], len(api.paid)) == (44, 44)


# ----------------------------------------------------------------------------------------------------------------------
# A day after
# ----------------------------------------------------------------------------------------------------------------------


def pay_without_an_answer(run_cli: Cli, api: ConversionApi, count: int) -> Any:
    """Let some conversions be paid whose answers are lost."""
    fault = api.faults.add(Fault.cut_after_work(times=count))
    run = run_cli(*ONE_WORKER, command=TOMORROW)
    assert (len(api.paid), fault.struck, len(run.rows("in_flight"))) == (count, count, count)
    return run


def hold_the_first(api: ConversionApi, release: threading.Event) -> threading.Event:
    """Let the first request wait for the event, and the API forget all answers after it; set when it has arrived."""
    arrived, first = threading.Event(), list[Request]()

    def hold(request: Request) -> None:
        if request.is_conversion and not arrived.is_set():
            first.append(request)
            arrived.set()
            release.wait(60)

    def forget(request: Request) -> None:
        if request in first:
            api.behaviour.keep_memory = 0

    api.on("request_received", hold)
    api.on("answered", forget)
    return arrived


def let_a_day_pass(run: Any, arrived: threading.Event) -> None:
    """Turn the clock of a run whose only worker is busy, while its other requests are planned and wait."""
    assert arrived.wait(30)
    (run.workdir / "tomorrow").touch()


def test_what_the_api_has_forgotten_by_the_time_it_is_sent_is_counted_as_perhaps_paid_twice(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    expected = fill(bucket, count=4)
    pay_without_an_answer(run_cli, api, 4)
    arrived = hold_the_first(api, release)
    run = start(*ONE_WORKER, command=TOMORROW)
    let_a_day_pass(run, arrived)
    release.set()
    assert run.wait().exit_code == 0
    assert (run.summary["possible_double_charges"], run.summary["replays"]) == (3, 1)
    assert (len(api.paid), bodies(bucket)) == (4 + 3, expected)


def test_what_was_sent_again_a_day_later_is_resumed_as_it_was_sent_then(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    expected = fill(bucket, count=3)
    pay_without_an_answer(run_cli, api, 3)
    arrived = hold_the_first(api, release)
    run = start(*ONE_WORKER, command=TOMORROW)
    let_a_day_pass(run, arrived)
    api.faults.add(Fault.cut_after_work(times=2)).at(lambda request: "/0.png?" not in request.fields["file_url"])
    release.set()
    assert (run.wait().exit_code, len(api.paid)) == (1, 3 + 2)
    # From now on the API remembers: the requests of the other day, if they come as they were sent then.
    api.behaviour.keep_memory = 24 * 3600
    last = run_cli(*ONE_WORKER, command=TOMORROW)
    assert (last.exit_code, last.summary["replays"], len(api.paid)) == (0, 2, 3 + 2)
    assert bodies(bucket) == expected


@pytest.mark.parametrize("is_old_at_the_start", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_old_request_that_a_run_leaves_unsent_is_known_as_perhaps_paid_to_the_next(
    *,
    is_old_at_the_start: bool,
    start: Cli,
    run_cli: Cli,
    bucket: Any,
    api: ConversionApi,
    release: threading.Event,
) -> None:
    expected = fill(bucket, count=3)
    first = pay_without_an_answer(run_cli, api, 3)
    if is_old_at_the_start:
        (first.workdir / "tomorrow").touch()
        api.behaviour.keep_memory = 0
    arrived = hold_the_first(api, release)
    run = start(*ONE_WORKER, command=TOMORROW)
    let_a_day_pass(run, arrived)
    run.process.send_signal(signal.SIGTERM)
    wait_until_said(run, "interrupted")
    release.set()
    run.wait()
    assert (run.exit_code, run.summary["converted"], run.summary["left"]) == (143, 1, 2)
    last = run_cli(*ONE_WORKER, command=TOMORROW)
    assert (last.exit_code, last.summary["possible_double_charges"]) == (0, 2)
    assert (len(api.paid), bodies(bucket)) == (3 + is_old_at_the_start + 2, expected)


def test_a_run_forgets_no_other_bucket_s_requests(
    run_cli: Cli, bucket: Any, other_bucket: Any, api: ConversionApi
) -> None:
    expected = fill(bucket, count=1)
    first = pay_without_an_answer(run_cli, api, 1)
    change(first, "UPDATE in_flight SET sent_at = sent_at - ?", 8 * 86_400)
    fill(other_bucket, count=1, name="other-{}")
    assert run_cli(S3_BUCKET=other_bucket.name).exit_code == 0
    api.behaviour.keep_memory = 0
    last = run_cli()
    assert (last.exit_code, last.summary["possible_double_charges"], bodies(bucket)) == (0, 1, expected)
