"""The S3 server is killed in the middle of a run and started again: nothing is paid twice, lost or wrong."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.runs.test_hardship import WITH_SHORT_PAGES
from tests.standins.conversion_api import ConversionApi, Event
from tests.standins.program import script_with
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.s3_server import S3Server

Cli = Callable[..., Any]
OBJECTS = 24
# Pages so short that the listing goes on while objects are converted: each moment is one of the listing, too.
PATIENT = script_with("program.PAGE_KEYS = 4")
COMMANDS = {"at once": PATIENT, "after the run": WITH_SHORT_PAGES}

pytestmark = [pytest.mark.needs("restart", "disk"), pytest.mark.slow]


def kill_at(api: ConversionApi, moment: Event, s3: S3Server) -> threading.Event:
    """Kill the S3 server at a moment of the ninth conversion; the event is set when it is dead."""
    is_dead, lock, moments = threading.Event(), threading.Lock(), list[object]()

    def kill(request: object) -> None:
        with lock:
            moments.append(request)
            if len(moments) == 9:
                s3.kill()
                is_dead.set()

    api.on(moment, kill)
    return is_dead


@pytest.mark.parametrize(
    ("transfer", "back"),
    [
        ("auto", "at once"),
        ("auto", "after the run"),
        # What `auto` stands for where it is quick.
        ("url", "at once"),
        ("upload", "at once"),
    ],
)
@pytest.mark.parametrize(
    "at",
    [
        # With one worker, nothing is being put.
        pytest.param(("request_received", 1), id="before the API fetches"),
        pytest.param(("answered", 8), id="while outputs are put", marks=pytest.mark.needs("whole puts")),
    ],
)
def test_a_run_whose_server_is_killed_survives_or_stops_and_the_next_one_finishes(
    *, at: tuple[Event, int], transfer: str, back: str, start: Cli, strict_api: ConversionApi, bucket: Any, s3: S3Server
) -> None:
    moment, workers = at
    expected = fill(bucket, OBJECTS, repeated=20_000)
    is_dead = kill_at(strict_api, moment, s3)
    mode = ("--set", f"api.transfer={transfer}", "--workers", str(workers))
    run = start(*mode, command=COMMANDS[back])
    try:
        assert is_dead.wait(60)
        if back == "after the run":
            run.wait(100)
    finally:
        s3.start()
    if back == "at once":
        run.wait(100)
    assert run.exit_code == (0 if back == "at once" else 3), run.out + run.err
    assert run.failures == []
    assert_all_promises_are_kept(start(*mode).wait(100), strict_api, bucket, expected)
