"""--dry-run: what the quota means for what is to be converted, and how long it would take."""

import pytest

from s3_bulk_convert import Decision, DecisionKind, Estimate, SourceObject, Task, Usage
from tests.parts.test_looking import settings


def estimate(count: int, usage: Usage, options: list[str], latencies: list[float]) -> Estimate:
    """The estimate for so many objects to convert."""
    made = Estimate(settings(*options), latencies)
    made.usage = usage
    for number in range(count):
        made.add(Decision(DecisionKind.CONVERT, SourceObject(str(number), "e1", 10), "default"))
    return made


def line(made: Estimate, name: str) -> str:
    """What the line of that name says; empty if there is none."""
    return next((said.removeprefix(name).strip() for said in made.lines() if said.startswith(name)), "")


@pytest.mark.parametrize(
    ("usage", "options", "warning"),
    [
        (Usage(), [], "what the month has left is not known (the API does not say)"),
        (Usage(remaining=5), [], "5 conversions more than the month has left are billed as overage"),
        (Usage(remaining=5, bills_overage=False), [], "5 conversions more than the month has left are refused"),
        (Usage(remaining=5), ["api.max_conversions=5"], ""),
        (Usage(remaining=12), ["api.keep_remaining=3"], "the run would stop when 3 conversions are left"),
        (Usage(remaining=5), ["api.keep_remaining=3"], "the run would stop when 3 conversions are left"),
        (Usage(remaining=10), [], ""),
    ],
)
def test_what_the_quota_means_is_said(usage: Usage, options: list[str], warning: str) -> None:
    found = estimate(10, usage, options, []).document()["warnings"]
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
    found = estimate(100, Usage(), ["run.workers=2", *options], measured).document()
    assert (found["seconds"], found["latency_is_measured"]) == (pytest.approx(seconds), bool(measured))


@pytest.mark.parametrize(
    ("rate", "workers", "said"),
    [
        pytest.param(None, 2, "the rate limit is not known", id="no rate"),
        pytest.param(300, 2, "(as the API publishes); 4 workers would fill that rate (run.workers)", id="more"),
        pytest.param(301, 9, "; 5 workers would fill that rate (run.workers)", id="fewer"),
        pytest.param(300, 4, "300 requests a minute, 4 workers at 0.8 s each (as the API publishes)", id="as many"),
    ],
)
def test_how_many_workers_fill_the_rate_is_said_where_it_is_another_number(
    rate: int | None, workers: int, said: str
) -> None:
    made = estimate(1, Usage(requests_per_minute=rate), [f"run.workers={workers}"], [])
    told = line(made, "time")
    assert said in told
    enough = made.document()["workers_that_fill_the_rate"]
    assert ("would fill" in told) is (enough not in {None, workers})


def test_with_a_price_the_forecast_is_in_money_too() -> None:
    priced = estimate(1000, Usage(), ["api.price=0.004", "api.max_conversions=100"], [])
    found = priced.document()
    assert (found["cost"], found["cost_in_one_run"]) == (4.0, 0.4)
    said = "about 4.00 at the most, about 0.4000 of it in the next run, at 0.004 each (api.price)"
    assert line(priced, "cost") == said
    unpriced = estimate(1000, Usage(), [], [])
    assert (unpriced.document()["cost"], line(unpriced, "cost")) == (None, "")


def test_requests_for_the_tags_of_sources_are_counted() -> None:
    made = estimate(10, Usage(), ["s3.tag_source=converted=yes"], [])
    source = SourceObject("found", "e1", 10)
    task = Task("default", "f", source, "jpg", None, "found.jpg")
    made.add(Decision(DecisionKind.DONE, source, "default", "found", task=task))
    made.add(Decision(DecisionKind.DONE, source, "default", "already_done"))
    assert made.document()["s3_requests"] == {"LIST": 0, "HEAD": 30 + 11, "COPY": 0, "GET": 10 + 11, "PUT": 10 + 11}
