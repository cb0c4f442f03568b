"""The figures of a run, and what it makes of them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Request
from tests.standins.converters import marking
from tests.standins.promises import fill

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _cheap(api: ConversionApi) -> None:
    """Conversions cost nothing, and say what they were made of."""
    api.behaviour.convert = marking


def test_the_95th_percentile_is_that_of_the_slow_ones(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    fill(bucket, 10)
    others = threading.Semaphore(0)

    def hold(request: Request) -> None:
        # The second is as slow as all the others together; for an answer to the first the others may wait.
        if api.requests.index(request) == 1:
            for _ in range(9):
                others.acquire(timeout=30)

    api.on("request_received", hold)
    api.on("answered", lambda _: others.release())
    run = run_cli("--workers", "2", "--set", "api.transfer=upload")
    assert (run.exit_code, run.summary["converted"]) == (0, 10)
    assert 0 < run.summary["p50_seconds"] < run.summary["p95_seconds"]


def test_failures_that_cost_nothing_do_not_stop_a_run(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    expected = fill(bucket, 10)
    api.behaviour.latency = 0.05  # so that much is left to do when the failures are counted
    gone = [f"gone-{number}.png" for number in range(60)]
    (tmp_path / "keys").write_text("\n".join([*gone, *(f"{number:03}.png" for number in range(10))]))
    run = run_cli("--keys-from", str(tmp_path / "keys"), "--workers", "1")
    assert (run.exit_code, run.summary["stopped_because"]) == (1, None)
    assert (run.summary["failed"], run.summary["left"]) == ({"source_gone": len(gone)}, 0)
    assert set(bucket.outputs()) == set(expected)
