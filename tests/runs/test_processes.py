"""Worker processes: the same work in several of them, and none of it lost or paid twice when one dies."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault, Request
from tests.standins.program import SCRIPT, script_with
from tests.standins.promises import assert_all_promises_are_kept, fill

Cli = Callable[..., Any]
THREE = ("--workers", "6", "--set", "run.processes=3")
PATIENCE_SECONDS = 30


def read_proc(path: Path) -> bytes:
    """What the kernel says of a process or a thread; nothing of one that has ended in the meantime."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_processes_are_refused_where_the_program_is_no_file(start: Cli) -> None:
    with SCRIPT.open("rb") as script:
        run = start("--processes", "2", command=("-",), stdin=script.fileno()).wait()
    assert (run.exit_code, run.out) == (2, "")
    assert (
        run.err == "error: run.processes needs this program as a file\nhint: save it, and start that; or set it to 1\n"
    )


def worker_pids(run: Any) -> list[int]:
    """The worker processes of a run that is at work."""
    threads = Path(f"/proc/{run.process.pid}/task").iterdir()
    found = [int(pid) for thread in threads for pid in read_proc(thread / "children").split()]
    return [pid for pid in found if b"spawn_main" in read_proc(Path(f"/proc/{pid}/cmdline"))]


def is_alive(pid: int) -> bool:
    """Whether a process is there and is more than a record of its end."""
    status = read_proc(Path(f"/proc/{pid}/status"))
    return status != b"" and b"\nState:\tZ" not in status


def wait_until(holds: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for what another process does, which no event of this one can tell."""
    patience = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < patience
        threading.Event().wait(0.02)


def has_paid(api: ConversionApi, count: int) -> bool:
    """Whether so many conversions are paid."""
    return len(api.paid) >= count


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["url", "upload"])
def test_each_object_is_converted_once_by_three_processes(
    transfer: str, run_cli: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill(bucket, 30)
    run = run_cli(*THREE, "--set", f"api.transfer={transfer}")
    assert_all_promises_are_kept(run, strict_api, bucket, expected)
    assert run.summary["requests"] == len(strict_api.requests)
    assert run_cli(*THREE).summary["already_done"] == 30


def test_a_worker_process_that_is_killed_is_replaced_and_nothing_is_paid_twice(
    start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill(bucket, 40)
    strict_api.behaviour.latency = 0.1
    run = start(*THREE)
    for paid in (8, 16, 24):
        wait_until(functools.partial(has_paid, strict_api, paid))
        os.kill(min(worker_pids(run)), signal.SIGKILL)
    assert_all_promises_are_kept(run.wait(), strict_api, bucket, expected)
    assert "a worker process died with" in run.err
    assert run.summary["converted"] >= 36


@pytest.mark.slow
def test_a_worker_process_that_is_frozen_is_replaced_and_nothing_is_paid_twice(
    start: Cli, strict_api: ConversionApi, bucket: Any
) -> None:
    expected = fill(bucket, 24)
    strict_api.behaviour.latency = 0.1
    run = start(*THREE, command=script_with("program.HANG_SECONDS = 20"))
    wait_until(functools.partial(has_paid, strict_api, 6))
    frozen = min(worker_pids(run))
    os.kill(frozen, signal.SIGSTOP)
    assert_all_promises_are_kept(run.wait(), strict_api, bucket, expected)
    assert not is_alive(frozen)


def test_worker_processes_that_all_die_end_the_run_and_the_next_one_finishes(
    start: Cli, strict_api: ConversionApi, bucket: Any, release: threading.Event
) -> None:
    expected = fill(bucket, 10)
    strict_api.faults.add(Fault.hang_until(release, times=None))
    run = start("--workers", "2", "--set", "run.processes=2")
    while run.process.poll() is None:
        for pid in worker_pids(run):
            os.kill(pid, signal.SIGKILL)
        threading.Event().wait(0.05)
    assert run.wait().exit_code == 3
    assert "worker processes died 3 times in a row without converting anything" in run.out
    assert run.summary["left"] == 10
    release.set()
    strict_api.faults.clear()
    assert_all_promises_are_kept(start().wait(), strict_api, bucket, expected)


@pytest.mark.slow
def test_ctrl_c_lets_all_processes_finish_what_is_in_flight(
    start: Cli, strict_api: ConversionApi, bucket: Any, release: threading.Event
) -> None:
    expected = fill(bucket, 30)
    strict_api.faults.add(Fault.hang_until(release, times=None))
    run = start(*THREE)
    wait_until(lambda: strict_api.max_in_flight == 6)
    # A terminal sends it to the whole group; here each process gets its own.
    for pid in (*worker_pids(run), run.process.pid):
        os.kill(pid, signal.SIGINT)
    wait_until(lambda: b"interrupted by SIGINT" in os.read(run.process.stderr.fileno(), 65536))
    release.set()
    assert run.wait().exit_code == 130
    assert run.summary["converted"] == 6
    assert len(strict_api.paid) == 6
    strict_api.faults.clear()
    assert_all_promises_are_kept(start(*THREE).wait(), strict_api, bucket, expected)


@pytest.mark.slow
def test_worker_processes_end_with_a_parent_that_is_killed(
    start: Cli, strict_api: ConversionApi, bucket: Any, release: threading.Event
) -> None:
    expected = fill(bucket, 12)
    fault = strict_api.faults.add(Fault.hang_until(release, times=None))
    run = start(*THREE)
    assert fault.reached.wait(PATIENCE_SECONDS)
    workers = worker_pids(run)
    assert len(workers) == 3
    run.process.kill()
    wait_until(lambda: not any(map(is_alive, workers)))
    release.set()
    strict_api.faults.clear()
    assert_all_promises_are_kept(start(*THREE).wait(), strict_api, bucket, expected)


@pytest.mark.slow
def test_what_one_process_hears_stops_them_all(run_cli: Cli, strict_api: ConversionApi, bucket: Any) -> None:
    fill(bucket, 40)
    strict_api.behaviour.month_quota = 10
    run = run_cli(*THREE)
    assert (run.exit_code, len(strict_api.paid)) == (3, 10)
    assert re.search("the quota is used up|0 conversions remain this month", run.out)
    assert run.summary["left"] == 30
    assert run.failures == []


@pytest.mark.slow  # a 429 below is for all as well, by the same pace
def test_one_pace_holds_for_all_processes(run_cli: Cli, strict_api: ConversionApi, bucket: Any) -> None:
    fill(bucket, 90)
    strict_api.behaviour.per_minute, strict_api.behaviour.window_seconds = 1200, 60
    run = run_cli(*THREE)
    posts = [request for request in strict_api.requests if request.method == "POST"]
    assert (run.exit_code, run.summary["throttled"]) == (0, 0)
    # 1,200 a minute are one every 50 ms; the first may have been late by a few of them.
    assert posts[-1].started - posts[0].started > 85 * 0.05


@pytest.mark.slow
def test_a_429_that_one_process_gets_lets_nobody_send(run_cli: Cli, strict_api: ConversionApi, bucket: Any) -> None:
    fill(bucket, 40)
    strict_api.behaviour.latency = 0.05
    limited = strict_api.faults.add(Fault.status_reply(429, "rate_limited", retry_after="2", times=None))
    hits: list[float] = []

    def is_the_tenth(request: Request) -> bool:
        hits.append(request.started)
        return len(hits) == 10

    limited.at(lambda request: request.is_conversion and is_the_tenth(request))
    run = run_cli(*THREE)
    assert (run.exit_code, run.summary["throttled"]) == (0, 1)
    pauses = [later - earlier for earlier, later in itertools.pairwise(hits)]
    assert max(pauses) > 1.5
