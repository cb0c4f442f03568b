"""The pace: evenly spaced, learned from what the API says, slowed down by a 429, and back again after a while."""

from collections.abc import Callable
from typing import Any

from tests.standins.conversion_api import ConversionApi
from tests.standins.samples import photo

Cli = Callable[..., Any]


def test_the_limit_is_known_before_the_second_request_even_if_the_first_is_refused(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.per_minute, api.behaviour.window_seconds = 1200, 60
    bucket.put("00.txt", b"of a format that is refused")
    for number in range(1, 25):
        bucket.put(f"{number:02}.png", photo(number, "png", size=(64, 48)))
    run = run_cli("--set", "run.max_failure_rate=never")
    assert (run.exit_code, run.summary["throttled"]) == (1, 0)
    posts = [request.started for request in api.requests if request.is_conversion]
    assert posts[-1] - posts[1] > 22 * 0.05
