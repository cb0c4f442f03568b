"""The checkpoint under several names, and beside other commands: nothing is paid twice."""

import errno
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.standins import promises
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import marking
from tests.standins.program import script_with
from tests.standins.relay import Relay

Cli = Callable[..., Any]
CHECKPOINT = "s3_bulk_convert.sqlite3"
fill = partial(promises.fill, name="{}", repeated=1)


@pytest.fixture(autouse=True)
def cheap(api: ConversionApi) -> None:
    """Conversions that cost nothing, and whose bytes are known."""
    api.behaviour.convert = marking


def bodies(bucket: Any) -> dict[str, bytes]:
    """What lies below the output prefix."""
    return {key: body for key, (body, *_) in bucket.outputs().items()}


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_said_to_have_none(number: int, run_cli: Cli, api: ConversionApi) -> None:
    # No file system without locks is at hand: the call fails as it would on one.
    command = script_with(
        "import os\n"
        "def without_locks(*_):\n"
        f"    raise OSError({number}, os.strerror({number}))\n"
        "program.fcntl.flock = without_locks"
    )
    run = run_cli(command=command)
    assert (run.exit_code, api.requests) == (2, [])
    assert run.err == (
        f"error: {CHECKPOINT}.lock cannot be locked: {os.strerror(number)}\n"
        "hint: set run.checkpoint to a path on a disk of this machine; the file system there has no locks\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Looking while a run is at work
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_comes_and_goes_beside_a_dry_run_damages_nothing(
    *, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, release: threading.Event
) -> None:
    fill(bucket, count=2, name="first-{}-" + "x" * 900)
    assert run_cli().exit_code == 0
    listing = threading.Event()

    def hold(method: str, path: str) -> bool:
        if method == "GET" and "list-type" in path:
            listing.set()
            release.wait(60)
        return False

    relay.refuse = hold
    forecast = start("--dry-run", AWS_ENDPOINT_URL_S3=relay.url)
    assert listing.wait(30)
    fill(bucket, count=40, name="second-{}-" + "x" * 900)
    run = run_cli()
    assert (run.exit_code, run.summary["converted"]) == (0, 40)
    release.set()
    forecast.wait()
    assert (forecast.exit_code, forecast.err) == (0, ""), forecast.err
    # What the run has done by then is done: the dry run looks at the checkpoint as it is.
    assert re.search(r"done +42 already\n", forecast.out)
    left = {path.name for path in run.workdir.iterdir()}
    assert left <= {CHECKPOINT, f"{CHECKPOINT}.lock", "summary.json"}
    assert (run_cli().summary["already_done"], len(api.paid)) == (42, 42)
