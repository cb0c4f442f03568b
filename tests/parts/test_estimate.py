"""--dry-run: what the quota means for what is to be converted, and how long it would take."""

from typing import Any

import pytest

from s3_bulk_convert import Decision, DecisionKind, Estimate, SourceObject, Usage
from tests.parts.test_looking import settings


def estimate(count: int, usage: Usage, options: list[str], latencies: list[float]) -> dict[str, Any]:
    """The estimate for so many objects to convert."""
    made = Estimate(settings(*options), latencies)
    made.usage = usage
    for number in range(count):
        made.add(Decision(DecisionKind.CONVERT, SourceObject(str(number), "e1", 10), "default"))
    return made.document()


@pytest.mark.parametrize(
    ("usage", "options", "warning"),
    [
        (Usage(), [], "what the month has left is not known (the API does not say)"),
        (Usage(remaining=5), [], "5 conversions more than the month has left are billed as overage"),
        (Usage(remaining=5, bills_overage=False), [], "5 conversions more than the month has left are refused"),
        (Usage(remaining=5), ["api.max_conversions=5"], ""),
        (Usage(remaining=12), ["api.keep_remaining=3"], "the run would stop when 3 conversions are left"),
        (Usage(remaining=10), [], ""),
    ],
)
def test_what_the_quota_means_is_said(usage: Usage, options: list[str], warning: str) -> None:
    found = estimate(10, usage, options, [])["warnings"]
    assert [said[: len(warning)] for said in found] == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("options", "measured", "seconds"),
    [
        pytest.param([], [], 100 * 0.8 / 2, id="by the workers, at the published latency"),
        pytest.param([], [3.0, 4.0, 90.0], 100 * 4.0 / 2, id="by the workers, at the measured median"),
        pytest.param(["api.requests_per_minute=30"], [], 100 * 2, id="by the rate"),
        pytest.param(["api.requests_per_minute=30", "api.max_conversions=10"], [], 10 * 2, id="of what the cap allows"),
    ],
)
def test_the_time_is_bound_by_the_rate_or_by_the_workers(
    options: list[str], measured: list[float], seconds: float
) -> None:
    found = estimate(100, Usage(), ["run.workers=2", *options], measured)
    assert (found["seconds"], found["latency_is_measured"]) == (pytest.approx(seconds), bool(measured))
